"""``d-emo sample``."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from d_emo import sampling
from d_emo.config import SampleSettings
from d_emo.io.snapshot import load_denoiser, newest_denoiser
from d_emo.latents import load_codec


def run(settings: SampleSettings) -> None:
    """Do it."""
    snapshot = load_denoiser(settings.checkpoint or newest_denoiser())
    settings.fill_in(objective=snapshot.objective, label_dropout=snapshot.label_dropout)
    scheduler = sampling.make_scheduler(settings.scheduler, snapshot.scheduler_config)
    sampling.set_steps(scheduler, settings.steps)
    classes = sampling.find_classes(settings.interpolate or settings.classes, snapshot.class_names)
    output = sampling.free_path(settings.output, sampling.default_path(settings, classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = load_codec(snapshot.codec).to(device)
    captions, model = [f"{label}: {snapshot.class_names[label]}" for label in classes], snapshot.model.to(device)
    labels = [label for label in classes for _ in range(settings.num_images)]
    seeds = [settings.seed + index for index in range(len(labels))]
    if settings.interpolate:
        captions, seeds = [" to ".join(captions)], [settings.seed] * settings.num_images
        labels = sampling.mix_classes(model, *classes, settings.num_images)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    model = sampling.prepare_denoiser(model, dtype=dtype, compile=settings.compile)
    steps, started = len(scheduler.timesteps), time.perf_counter()
    trajectory = sampling.Trajectory(steps) if settings.trajectory else None
    scales = settings.guidance_scale
    with tqdm(total=len(scales) * len(labels) * steps, desc="sampling", unit="step") as bar:  # of one image

        def step_done(index: int, latents: torch.Tensor) -> None:
            bar.update(len(latents))
            if trajectory is not None:
                trajectory(index, latents)

        drawn = [torch.cat(list(sampling.sample_images(
            model, scheduler, codec, labels, seeds, num_inference_steps=settings.steps, guidance_scale=scale,
            guidance_channels=settings.guidance_channels, guidance_interval=settings.guidance_interval,
            batch_size=settings.batch_size, on_latents=step_done,
        ))) for scale in scales]
    speed = len(scales) * len(labels) / (time.perf_counter() - started)
    images, rows = sampling.sweep_rows(drawn, captions, scales)
    made_by = {
        **asdict(settings), "guidance_scale": scales if len(scales) > 1 else scales[0], "classes": classes,
        "checkpoint": str(snapshot.path), "step": snapshot.meta["step"], "weights": snapshot.meta["weights"],
    }
    frames = None if trajectory is None else trajectory.images(codec, device)
    sampling.save_samples(output, images, frames, rows, labels, seeds, settings, made_by)
    print(f"picture   {output}\nsnapshot  {snapshot.path} (step {made_by['step']:,}, {made_by['weights']} weights)")
    print(f"classes   {', '.join(captions)}\nseed      {settings.seed} to {seeds[-1]}, one per image")
    print(f"settings  {settings.scheduler}, {settings.steps} steps, guidance {', '.join(map('{:g}'.format, scales))}")
    print(f"speed     {speed:.1f} images/s on {device.type}")

