"""``d-emo train-video``."""

from collections import Counter
from functools import partial

from PIL import Image

from d_emo.cli.dry_run import dry_run_of_scenes
from d_emo.cli.trained import accuracies, report
from d_emo.config import DoctorSettings, VideoSettings
from d_emo.data import ClassImages, to_uint8
from d_emo.data.describing import largest, look_over, some
from d_emo.io.hub import prepare_push
from d_emo.io.video import KIND
from d_emo.training import fit
from d_emo.training.rehearsal import Rehearsal
from d_emo.training.video import VideoTask

CLIPS = 8
"""Of a batch, how many are drawn before a run."""


def run(settings: VideoSettings) -> None:
    """Do it."""
    task = VideoTask(settings)
    if settings.dry_run:
        return dry_run_of_scenes(task, describe_videos(task.dataset, DoctorSettings.sample), partial(picture, task))
    prepare_push(settings.push_to_hub)
    report(fit(task, settings), settings, lambda snapshot: accuracies(snapshot, KIND, unit="videos"))


def describe_videos(videos: ClassImages, count: int) -> list[tuple[str, str]]:
    """Lines of (topic, text) about the classes, and ``count`` videos from all over; what looks wrong says LOOK."""
    counts, names = Counter(map(videos.label, range(len(videos)))), videos.class_names
    _, lines = look_over(videos, count, lambda index: videos[index][0].shape, unit="videos")
    if missing := [name for label, name in enumerate(names) if label not in counts]:
        lines.append(("LOOK", f"{len(missing):,} class{'es' * (len(missing) > 1)} without a video: {some(missing)}"))
    return [*lines, ("by class", largest(counts, names))]


def picture(task: VideoTask, tried: Rehearsal) -> tuple[Image.Image, int]:
    """The first clips of a batch, each a row of its frames under the name of its class, and how many these are."""
    from d_emo.sampling.grids import draw_grid  # brings diffusers along

    clips, labels = (part[:CLIPS].cpu() for part in tried.batch)  # (B, 3, T, H, W), (B,)
    names = [task.dataset.class_names[label] for label in labels.tolist()]
    return draw_grid(to_uint8(clips.transpose(1, 2).flatten(0, 1)), names, clips.shape[2]), len(clips)
