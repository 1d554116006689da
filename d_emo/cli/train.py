"""``d-emo train``."""

from dataclasses import replace
from functools import partial

from d_emo.cli.doctor import dry_run_of_images
from d_emo.cli.trained import report
from d_emo.config import TrainSettings
from d_emo.io.hub import prepare_push
from d_emo.sampling import preview_grid
from d_emo.text import command
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask


def run(settings: TrainSettings) -> None:
    """Do it."""
    if settings.dry_run:
        return dry_run_of_images(DenoiserTask(replace(settings, cache_latents=False)))
    prepare_push(settings.push_to_hub)
    task = DenoiserTask(settings)
    preview = partial(
        preview_grid, scheduler_config=task.scheduler.config, codec=task.codec, class_names=task.images.class_names,
        guidance_scale=settings.preview_guidance, objective=settings.objective,
    )
    snapshot = fit(task, settings, preview=preview)
    sample, choice = command("sample", "sample.py"), " --class 0" * (len(task.images.class_names) > 1)
    report(snapshot, settings, lambda snapshot: [f"sample it  {sample} --checkpoint {snapshot}{choice}"])

