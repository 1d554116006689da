"""``d-emo train-classifier``."""

from d_emo.config import ClassifierSettings
from d_emo.errors import said
from d_emo.io.hub import prepare_push, push_snapshot
from d_emo.io.snapshot import load_classifier
from d_emo.training import fit
from d_emo.training.accuracy import Accuracy
from d_emo.training.classifier import ClassifierTask


def run(settings: ClassifierSettings) -> None:
    """Do it."""
    if settings.dry_run:
        from d_emo.cli.doctor import dry_run_of_images  # brings diffusers along

        return dry_run_of_images(ClassifierTask(settings))
    prepare_push(settings.push_to_hub)
    snapshot = fit(ClassifierTask(settings), settings)
    if snapshot is not None:
        print(f"snapshot  {snapshot}")
        accuracies = load_classifier(snapshot).meta.get("accuracy", {})
        if not accuracies:
            print(said("accuracy  not measured: there are no held-out images; name some with `validate_dir`"))
        for weights, measured in accuracies.items():
            print(f"accuracy  {Accuracy(**measured)} held out ({weights} weights)")
        if settings.push_to_hub:
            print(f"pushed    {push_snapshot(snapshot, settings.push_to_hub)}")

