"""From class labels and seeds to latents and pictures: schedulers, guidance, grids.

The diffusers pipeline is ``d_emo.DEMOPipeline``, in ``d_emo.sampling.pipeline``.
"""

from d_emo.sampling.classes import find_classes, mix_classes
from d_emo.sampling.grids import (
    Trajectory,
    default_path,
    draw_grid,
    free_path,
    preview_grid,
    save_gif,
    save_png,
    save_pngs,
    save_samples,
    sweep_rows,
)
from d_emo.sampling.sampler import Guidance, denoise, prepare_denoiser, sample, sample_images
from d_emo.sampling.schedulers import make_scheduler, scheduler_names, set_steps

__all__ = [
    "Guidance", "Trajectory", "default_path", "denoise", "draw_grid", "find_classes", "free_path",
    "make_scheduler", "mix_classes", "prepare_denoiser", "preview_grid", "sample", "sample_images", "save_gif",
    "save_png", "save_pngs", "save_samples", "scheduler_names", "set_steps", "sweep_rows",
]
