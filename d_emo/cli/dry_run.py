"""``--dry-run`` of training: what there is, a few images through the network, and a picture of them."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from PIL import Image

from d_emo.data.describing import describe_passes
from d_emo.errors import said
from d_emo.files import free_path, replacing
from d_emo.training.progress import warn_of_days
from d_emo.training.rehearsal import Rehearsal, rehearse
from d_emo.training.task import Task

Picture = Callable[[Rehearsal], tuple[Image.Image, int]]
"""Draws a micro-batch as the network sees it, or the first of many images; says how many."""


def dry_run(task: Task, lines: Sequence[tuple[str, str]], picture: Picture) -> None:
    """Print what is known of a run, then take a few images through its network, print time and memory, and draw them.

    Args:
        task: Of the run; its model is changed.
        lines: (topic, text) of the run and its data.
        picture: See there.
    """
    settings = task.settings
    print_lines(lines)
    tried = rehearse(task)
    whole = timedelta(seconds=round(tried.seconds * settings.max_steps))
    lines = [("time", f"{tried.seconds:.3g} s a step of {settings.batch_size:,} images by one process here; all "
                      f"{settings.max_steps:,} steps: {whole} (h:mm:ss)"), ("memory", f"{tried.gib:.2g} GiB")]
    output = free_path(f"samples/dry-run-{Path(settings.output_dir).name}.png")
    drawn, count = picture(tried)
    save(drawn, output)
    lines += [("LOOK", warning) for warning in warn_of_days(tried.seconds, settings.max_steps, task.smaller)]
    print_lines([*lines, ("batch", f"{output}  ({count} images as the network sees them)")])


def dry_run_of_scenes(task: Task, contents: Sequence[tuple[str, str]], picture: Picture) -> None:
    """`dry_run` of a task on images with boxes or masks, of which ``contents`` tells."""
    settings, run = task.settings, [("run", line) for line in task.introduction()]
    passes = describe_passes(len(task.dataset), settings.batch_size, settings.max_steps)
    dry_run(task, [*run, *contents, ("training", passes)], picture)


def save(picture: Image.Image, output: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(output) as temporary:
        picture.save(temporary, format="PNG")


def print_lines(lines: Sequence[tuple[str, str]]) -> None:
    """Print lines of (topic, text), the texts below each other."""
    width = max(len("duplicates"), *(len(topic) for topic, _ in lines))
    print(said("\n".join(f"{topic:<{width}}  {text}" for topic, text in lines)), flush=True)
