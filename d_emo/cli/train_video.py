"""``d-emo train-video``."""

from d_emo.config import VideoSettings
from d_emo.errors import said
from d_emo.io.hub import prepare_push, push_snapshot
from d_emo.io.snapshot import load_classifier
from d_emo.io.video import KIND
from d_emo.training import fit
from d_emo.training.accuracy import Accuracy
from d_emo.training.video import VideoTask


def run(settings: VideoSettings) -> None:
    """Do it."""
    prepare_push(settings.push_to_hub)
    snapshot = fit(VideoTask(settings), settings)
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
