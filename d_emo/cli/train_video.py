"""``d-emo train-video``."""

from collections import Counter
from functools import partial

from PIL import Image

from d_emo.cli.dry_run import dry_run_of_scenes
from d_emo.config import DoctorSettings, VideoSettings
from d_emo.data import ClassImages, to_uint8
from d_emo.data.describing import largest, look_at, some
from d_emo.errors import said
from d_emo.io.hub import prepare_push, push_snapshot
from d_emo.io.snapshot import load_classifier
from d_emo.io.video import KIND
from d_emo.sampling.grids import draw_grid
from d_emo.training import fit
from d_emo.training.accuracy import Accuracy
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
    snapshot = fit(task, settings)
    if snapshot is None:
        return
    print(f"snapshot  {snapshot}")
    accuracies = load_classifier(snapshot, KIND).meta.get("accuracy", {})
    if not accuracies:
        print(said("accuracy  not measured: there are no held-out videos; name some with `validate_dir`"))
    for weights, measured in accuracies.items():
        print(f"accuracy  {Accuracy(**measured).in_words('videos')} held out ({weights} weights)")
    if settings.push_to_hub:
        print(f"pushed    {push_snapshot(snapshot, settings.push_to_hub)}")


def describe_videos(videos: ClassImages, count: int) -> list[tuple[str, str]]:
    """Lines of (topic, text) about the classes, and ``count`` videos from all over; what looks wrong says LOOK."""
    counts, names = Counter(map(videos.label, range(len(videos)))), videos.class_names
    seen, failed = look_at(len(videos), count, lambda index: videos[index][0].shape)
    lines = [("data", f"{videos.name}: {len(videos):,} videos of {len(names):,} classes; {len(seen):,} looked at")]
    if failed:
        lines.append(("LOOK", f"{len(failed):,} unreadable, training stops at them: {some(failed, '; ')}"))
    if missing := [name for label, name in enumerate(names) if label not in counts]:
        lines.append(("LOOK", f"{len(missing):,} class{'es' * (len(missing) > 1)} without a video: {some(missing)}"))
    return [*lines, ("by class", largest(counts, names))]


def picture(task: VideoTask, tried: Rehearsal) -> tuple[Image.Image, int]:
    """The first clips of a batch, each a row of its frames under the name of its class, and how many these are."""
    clips, labels = (part[:CLIPS].cpu() for part in tried.batch)  # (B, 3, T, H, W), (B,)
    names = [task.dataset.class_names[label] for label in labels.tolist()]
    return draw_grid(to_uint8(clips.transpose(1, 2).flatten(0, 1)), names, clips.shape[2]), len(clips)
