"""Images of a snapshot, drawn on the spot and measured."""

from collections.abc import Iterator, Sequence

import diffusers
import torch
from torch import nn
from tqdm import tqdm

import d_emo
from d_emo.config import TABLE_STEPS, FidSettings
from d_emo.evaluation.classifier_metrics import BATCH
from d_emo.evaluation.feature_shards import ALONE, Ranks, draw_labels
from d_emo.evaluation.features import fingerprint
from d_emo.evaluation.measurement import Measurement
from d_emo.evaluation.result import Result
from d_emo.io.snapshot import DenoiserSnapshot, load_denoiser
from d_emo.sampling import PRECISIONS, Guidance, Sampler
from d_emo.sampling.schedulers import steps_for
from d_emo.tables import OBJECTIVES


def measure_snapshot(
    measurement: Measurement, snapshot: DenoiserSnapshot, settings: FidSettings, *,
    device: torch.device | str | None = None, ranks: Ranks = ALONE,
) -> Result | None:
    """Draw from a snapshot and measure; an image depends on its index, the snapshot and the settings only.

    Args:
        measurement: What to measure, against what.
        snapshot: Its model is changed in place.
        settings: How to draw, and where images and features go.
        device: None: the best one that is there.
        ranks: See ``Measurement.of_generated``.

    Returns:
        The result in process 0, None in others.

    Raises:
        InputError: The snapshot cannot be sampled like this; or see ``Measurement.of_generated``.
    """
    scheduler, seed = settings.scheduler or OBJECTIVES[snapshot.objective].table_scheduler, settings.seed
    steps = steps_for(snapshot.objective, settings.steps, TABLE_STEPS)
    weights = fingerprint(snapshot.model, 64)  # before it is folded and cast
    guide = settings.guide and load_denoiser(settings.guide)
    weaker = guide and fingerprint(guide.model, 64)
    sampler = Sampler.open(
        snapshot, scheduler=scheduler, steps=steps, guidance=Guidance.of(settings), device=device,
        dtype=PRECISIONS[settings.mixed_precision], compile=settings.compile, guide=guide,
        vae=settings.vae,
    )
    classes = len(sampler.class_names)

    def generate(first: int, end: int) -> Iterator[torch.Tensor]:
        labels = draw_labels(settings.labels, range(first, end), seed=seed, num_classes=classes)
        return sampler.images(labels, range(seed + first, seed + end), batch_size=settings.batch_size)

    sampling = {
        "scheduler": scheduler, "steps": steps, "guidance_scale": settings.guidance_scale,
        "guidance_channels": settings.guidance_channels, "guidance_interval": list(settings.guidance_interval),
        "seed": seed, "labels": settings.labels, "mixed_precision": settings.mixed_precision,
        "compile": settings.compile, "weights": snapshot.meta["weights"], "step": snapshot.meta["step"],
    }  # fmt: skip
    networks = [fingerprint(part, 64) for part in vars(sampler.codec).values() if isinstance(part, nn.Module)]
    identity = {
        "denoiser": weights, "codec": [sampler.codec.name, *networks], "noise_schedule": snapshot.scheduler_config,
        "classes": classes,
        "versions": {"d_emo": d_emo.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip
    if guide:
        sampling |= {"guide": str(guide.path), "guide_step": guide.meta["step"],
                     "guide_weight": sampler.guidance.weight}
        identity["guide"] = weaker
    if settings.vae:
        sampling["vae"] = sampler.codec.name
    height, width = sampler.image_size
    return measurement.of_generated(
        generate, settings.num_images, image_size=(width, height), name=str(snapshot.path), sampling=sampling,
        identity=identity, work_dir=settings.work_dir, save_npz=settings.save_npz, save_png=settings.save_png,
        ranks=ranks,
    )


def draw_classes(sampler: Sampler, labels: Sequence[int], *, exact: bool = True) -> Iterator[torch.Tensor]:
    """Images of these classes from the noise of seeds 0, 1, 2, ..., with a progress bar on a terminal.

    ``exact`` is that of `Sampler.images`.

    Shape: of a batch (B, 3, H, W) uint8.
    """
    title = f"{type(sampler.scheduler).__name__}, {sampler.steps} steps"
    with tqdm(total=len(labels), desc=title, unit="image", disable=None, leave=False) as bar:
        for images in sampler.images(labels, range(len(labels)), batch_size=BATCH, exact=exact):
            bar.update(len(images))
            yield images
