"""Images of a snapshot, drawn on the spot and measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from torch import nn
from tqdm import tqdm

import d_emo
from d_emo.evaluation.classifier_metrics import BATCH
from d_emo.evaluation.feature_shards import ALONE, Ranks, draw_labels
from d_emo.evaluation.features import fingerprint
from d_emo.evaluation.measurement import Measurement
from d_emo.evaluation.result import Result
from d_emo.io.snapshot import DenoiserSnapshot
from d_emo.sampling import Guidance, Sampler
from d_emo.tables import OBJECTIVES


def measure_snapshot(
    measurement: Measurement, snapshot: DenoiserSnapshot, num_images: int, *, scheduler: str | None = None,
    steps: int = 250, guidance: Guidance | None = None, labels: str = "random", seed: int = 0, batch_size: int = 64,
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32, compile: bool = False,
    ranks: Ranks = ALONE, work_dir: str | Path | None = None, save_npz: str | Path | None = None,
    save_png: str | Path | None = None,
) -> Result | None:  # fmt: skip
    """Draw from a snapshot and measure; an image depends on its index and these arguments only.

    Args:
        measurement: What to measure, against what.
        snapshot: Its model is changed in place.
        num_images: How many to draw.
        scheduler: Its name; None: that of tables for the snapshot's objective.
        steps: Denoising steps.
        guidance: How to guide; None: not at all, as most tables.
        labels: See ``draw_labels``.
        seed: Image i starts from the noise of seed + i.
        batch_size: Images denoised at once.
        device: None: the best one that is there.
        dtype, compile: Of the denoiser, see ``Sampler.open``.
        ranks, work_dir, save_npz, save_png: See ``Measurement.of_generated``.

    Returns:
        The result in process 0, None in others.

    Raises:
        InputError: The snapshot cannot be sampled like this; or see ``Measurement.of_generated``.
    """
    scheduler = scheduler or OBJECTIVES[snapshot.objective].table_scheduler
    guidance = guidance or Guidance()
    weights = fingerprint(snapshot.model, 64)  # before it is folded and cast
    sampler = Sampler.open(
        snapshot, scheduler=scheduler, steps=steps, guidance=guidance, device=device, dtype=dtype, compile=compile
    )
    classes = len(sampler.class_names)

    def generate(first: int, end: int) -> Iterator[torch.Tensor]:
        chosen = draw_labels(labels, range(first, end), seed=seed, num_classes=classes)
        return sampler.images(chosen, range(seed + first, seed + end), batch_size=batch_size)

    sampling = {
        "scheduler": scheduler, "steps": steps, "guidance_scale": guidance.scale,
        "guidance_channels": guidance.channels, "guidance_interval": list(guidance.interval), "seed": seed,
        "labels": labels, "mixed_precision": "bf16" if dtype == torch.bfloat16 else "no", "compile": compile,
        "weights": snapshot.meta["weights"], "step": snapshot.meta["step"],
    }  # fmt: skip
    networks = [fingerprint(part, 64) for part in vars(sampler.codec).values() if isinstance(part, nn.Module)]
    identity = {
        "denoiser": weights, "codec": [snapshot.codec, *networks], "noise_schedule": snapshot.scheduler_config,
        "classes": classes,
        "versions": {"d_emo": d_emo.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip
    height, width = sampler.image_size
    return measurement.of_generated(
        generate, num_images, image_size=(width, height), name=str(snapshot.path), sampling=sampling,
        identity=identity, work_dir=work_dir, save_npz=save_npz, save_png=save_png, ranks=ranks,
    )  # fmt: skip


def draw_classes(sampler: Sampler, labels: Sequence[int], *, exact: bool = True) -> Iterator[torch.Tensor]:
    """Images of these classes from the noise of seeds 0, 1, 2, ..., with a progress bar on a terminal.

    Shape: of a batch (B, 3, H, W) uint8.
    """
    title = f"{type(sampler.scheduler).__name__}, {sampler.steps} steps"
    with tqdm(total=len(labels), desc=title, unit="image", disable=None, leave=False) as bar:
        for images in sampler.images(labels, range(len(labels)), batch_size=BATCH, exact=exact):
            bar.update(len(images))
            yield images
