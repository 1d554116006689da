"""``d-emo train-classifier``."""

from d_emo.cli.trained import accuracies, report
from d_emo.config import ClassifierSettings
from d_emo.io.hub import prepare_push
from d_emo.training import fit
from d_emo.training.latent_classifier import classifier_task


def run(settings: ClassifierSettings) -> None:
    """Do it."""
    if settings.dry_run:
        from d_emo.cli.doctor import dry_run_of_images  # brings diffusers along

        return dry_run_of_images(classifier_task(settings))
    prepare_push(settings.push_to_hub)
    report(fit(classifier_task(settings), settings), settings, accuracies)

