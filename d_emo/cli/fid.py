"""``d-emo fid``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from accelerate import PartialState  # after parsing, so that --help and typing errors need no torch

from d_emo.config import FidSettings, check_guidance
from d_emo.evaluation import Measurement
from d_emo.tables import OBJECTIVES
from d_emo.threads import use_threads


def run(settings: FidSettings) -> None:
    """Do it."""
    state = PartialState()
    use_threads(state.device, state.num_processes)
    options = ("metrics", "features", "inception_weights", "batch_size", "output")
    measurement = Measurement(
        settings.reference, device=state.device, **{name: getattr(settings, name) for name in options}
    )
    if settings.samples is None:
        result = draw_and_measure(settings, measurement, state)
    elif state.is_main_process:
        result = measurement.of_images(settings.samples, num_images=settings.num_images)
    if state.is_main_process:
        for warning in result.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{result}\n\n{result.to_markdown()}")


def draw_and_measure(settings: FidSettings, measurement, state):
    """Draw from the snapshot; an image depends on its index and the settings only."""
    import diffusers
    import torch

    import d_emo
    from d_emo.evaluation import Ranks, draw_labels, fingerprint
    from d_emo.io.snapshot import load_denoiser
    from d_emo.latents import load_codec
    from d_emo.sampling import make_scheduler, prepare_denoiser, sample_images, set_steps

    snapshot = load_denoiser(settings.checkpoint)
    check_guidance(settings.guidance_scale, label_dropout=snapshot.label_dropout)
    settings = replace(settings, scheduler=settings.scheduler or OBJECTIVES[snapshot.objective].table_scheduler)
    model, codec = snapshot.model.to(state.device), load_codec(snapshot.codec).to(state.device)
    scheduler, classes = make_scheduler(settings.scheduler, snapshot.scheduler_config), len(snapshot.class_names)
    set_steps(scheduler, settings.steps)  # refuses before a network is loaded

    def generate(first: int, end: int) -> Iterator[torch.Tensor]:
        labels = draw_labels(settings.labels, range(first, end), seed=settings.seed, num_classes=classes)
        return sample_images(
            model, scheduler, codec, labels, [settings.seed + index for index in range(first, end)],
            num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
            guidance_channels=settings.guidance_channels, guidance_interval=settings.guidance_interval,
            batch_size=settings.batch_size,
        )  # fmt: skip

    chosen = ("scheduler", "steps", "guidance_scale", "guidance_channels", "guidance_interval", "seed", "labels",
              "mixed_precision", "compile")  # fmt: skip
    sampling = {name: getattr(settings, name) for name in chosen}
    sampling |= {"weights": snapshot.meta["weights"], "step": snapshot.meta["step"]}
    identity = {  # before the denoiser is folded and cast
        "denoiser": fingerprint(model, 64),
        "codec": [snapshot.codec, fingerprint(codec.vae, 64) if hasattr(codec, "vae") else None],
        "noise_schedule": snapshot.scheduler_config,
        "classes": classes,
        "versions": {"d_emo": d_emo.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    prepare_denoiser(model, dtype=dtype, compile=settings.compile)
    return measurement.of_generated(
        generate, settings.num_images, image_size=(snapshot.image_size, snapshot.image_size), name=str(snapshot.path),
        sampling=sampling, identity=identity, work_dir=settings.work_dir, save_npz=settings.save_npz,
        save_png=settings.save_png,
        share=Ranks(state.process_index, state.num_processes, state.wait_for_everyone),
    )  # fmt: skip

