"""The sampler: a snapshot opened once, to draw from again and again. Everything that draws stands on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d_emo.config import DEFAULT_GUIDANCE, check_guidance
from d_emo.data import to_uint8
from d_emo.device import best_device
from d_emo.io.snapshot import DenoiserSnapshot, load_denoiser, newest_denoiser
from d_emo.latents import Codec
from d_emo.models.contract import DenoiserFrame
from d_emo.models.layers import fold_batch_norms
from d_emo.sampling.classes import Labels, as_list
from d_emo.sampling.denoising import Step, decode, open_codec, sample
from d_emo.sampling.guidance import Guidance, check_guide
from d_emo.sampling.schedulers import make_scheduler, set_steps, steps_for
from d_emo.tables import objective_of

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
"""Types of the denoiser by ``mixed_precision`` of settings."""


class Sampler:
    """A denoiser with all that turns labels and seeds into images.

    `open` makes one of a snapshot; the constructor takes a model as it is, such as one in training.

    Args:
        model: In eval mode, on its device.
        codec: On the same device.
        scheduler_config: Noise schedule that the model was trained on.
        scheduler: Its name; None: the default of the model's objective.
        steps: Denoising steps; None: 30, or the only number that the objective has.
        guidance: A scale, or more; None: the default scale, or none where the snapshot cannot be guided.
        class_names: In the order of the labels.
        snapshot: Where the model comes from.
        objective: What the model was trained for. Default: the snapshot's, else what the noise schedule tells.
        guide: A weaker model for the same, for autoguidance; see `Guidance`.

    Attributes:
        model, codec, steps, class_names, snapshot, guide: As given.
        scheduler: A scheduler of diffusers, with its timesteps laid out.
        guidance: A `Guidance`.

    Raises:
        InputError: Scheduler, steps or guidance mean nothing to this model.
    """

    def __init__(
        self, model: DenoiserFrame, codec: Codec, scheduler_config: Mapping[str, Any], *, scheduler: str | None = None,
        steps: int | None = None, guidance: float | Guidance | None = None, class_names: Sequence[str] = (),
        snapshot: DenoiserSnapshot | None = None, objective: str | None = None, guide: DenoiserFrame | None = None,
    ):
        self.model, self.codec, self.scheduler_config = model, codec, scheduler_config
        self.class_names, self.snapshot, self.guide = class_names, snapshot, guide
        self._scheduler_name = scheduler
        self._objective = objective or (snapshot and snapshot.objective) or objective_of(scheduler_config)
        self.scheduler, self.steps, self.guidance = _settle(
            scheduler_config, self._objective, scheduler, steps, guidance, snapshot, guide is not None
        )

    @classmethod
    def open(
        cls, snapshot: str | Path | DenoiserSnapshot | None = None, *, scheduler: str | None = None,
        steps: int | None = None, guidance: float | Guidance | None = None,
        device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, compile: bool = False,
        guide: str | Path | DenoiserSnapshot | None = None, vae: str | None = None,
    ) -> Sampler:
        """Make a snapshot ready to draw from, as fast as it can be.

        Args:
            snapshot: Its folder or that of its run, or the snapshot itself, whose model is changed in place and can be
                saved no more; None: the newest one under ``results``, else the one that ships with the package.
            scheduler, steps, guidance: See `Sampler`.
            device: None: the best one that is there.
            dtype: Of the denoiser.
            compile: Compile the denoiser; pays for itself after some hundred images.
            guide: An earlier or smaller snapshot of the same data and objective, for autoguidance by the weight of
                ``guidance``; without a scale there is no classifier-free guidance then.
            vae: A codec to draw through instead of the snapshot's, see `open_codec`.

        Raises:
            InputError: There is no such snapshot, or it cannot be sampled, or guided, like this.
        """
        if not isinstance(snapshot, DenoiserSnapshot):
            snapshot = load_denoiser(snapshot or newest_denoiser())
        # What cannot be drawn is refused before a codec is fetched.
        _settle(snapshot.scheduler_config, snapshot.objective, scheduler, steps, guidance, snapshot, guide is not None)
        if guide is not None:
            guide = guide if isinstance(guide, DenoiserSnapshot) else load_denoiser(guide)
            check_guide(guide, snapshot)
        device = best_device(device)
        codec = open_codec(snapshot, vae).to(device)
        model, weaker = (each and prepare_denoiser(each.model.to(device), dtype=dtype, compile=compile)
                         for each in (snapshot, guide))
        return cls(
            model, codec, snapshot.scheduler_config, scheduler=scheduler, steps=steps, guidance=guidance,
            class_names=snapshot.class_names, snapshot=snapshot, guide=weaker,
        )

    def replace(self, **changes: Any) -> Sampler:
        """Another sampler over the same network; ``scheduler``, ``steps`` and ``guidance`` as in the constructor."""
        same = {"scheduler": self._scheduler_name, "steps": self.steps, "guidance": self.guidance}
        return Sampler(
            self.model, self.codec, self.scheduler_config, class_names=self.class_names, snapshot=self.snapshot,
            objective=self._objective, guide=self.guide, **{**same, **changes},
        )

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.model.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        _, height, width = self.model.latent_shape
        return height * self.codec.downsample, width * self.codec.downsample

    def images(
        self, labels: Labels, seeds: Labels, *, batch_size: int = 64, exact: bool = True,
        every_step: bool = False,
    ) -> Iterator[torch.Tensor] | Iterator[Step]:
        """Draw an image for each label and seed. It depends on these alone, see `sample`.

        Args:
            labels, seeds, batch_size, exact: See `sample`.
            every_step: Yield every `Step` of the denoising; the last ones have the images.

        Yields:
            Images, on the CPU. Shape: (batch, 3, H, W) uint8. Closing the iterator ends the drawing.

        Raises:
            InputError: Labels or seeds that cannot be used, or samples that are not finite.
        """
        steps = self._steps(labels, seeds, batch_size, exact)
        return steps if every_step else _batches(steps, batch_size, len(as_list(seeds)))

    def _steps(self, labels: Labels, seeds: Labels, batch_size: int, exact: bool) -> Iterator[Step]:
        scheduler = copy.deepcopy(self.scheduler)  # it has a state, and there may be several drawings at once
        for step in sample(
            self.model, scheduler, labels, seeds, steps=self.steps, guidance=self.guidance, batch_size=batch_size,
            exact=exact, objective=self._objective, guide=self.guide,
        ):
            if step.is_last:
                step.images = to_uint8(decode(self.codec, step.latents)).cpu()
            yield step


def prepare_denoiser(
    denoiser: DenoiserFrame, *, dtype: torch.dtype = torch.float32, compile: bool = False
) -> DenoiserFrame:
    """Make a denoiser fast for sampling, in place: batch norms folded, cast, compiled. It cannot be saved any more.

    On a GPU it is compiled into CUDA graphs: a step of a few images is launched at once, not kernel by kernel.
    """
    nn.Module.to(fold_batch_norms(denoiser.eval()), dtype)  # diffusers' own would warn of what the model sees to itself
    if compile:
        denoiser.compile(mode="reduce-overhead" if denoiser.device.type == "cuda" else None)
    return denoiser


def _settle(
    scheduler_config: Mapping[str, Any], objective: str | None, scheduler: str | None, steps: int | None,
    guidance: float | Guidance | None, snapshot: DenoiserSnapshot | None, autoguided: bool,
) -> tuple[Any, int, Guidance]:
    """Scheduler, steps and guidance as they are used, or an InputError."""
    made = make_scheduler(scheduler, scheduler_config, objective)
    steps = steps_for(objective or objective_of(scheduler_config), steps)
    set_steps(made, steps)
    dropout = None if snapshot is None else snapshot.label_dropout
    if guidance is None:
        guidance = 1.0 if dropout == 0 or autoguided else DEFAULT_GUIDANCE
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    check_guidance(guidance.scale, guidance.interval, label_dropout=dropout)
    return made, steps, guidance


def _batches(steps: Iterator[Step], batch_size: int, count: int) -> Iterator[torch.Tensor]:
    """The finished images among the steps, batch by batch."""
    drawn: list[torch.Tensor] = []
    for step in steps:
        if step.images is not None:
            drawn.append(step.images)
            done = step.first + len(step.images)
            if done == count or done % batch_size == 0:
                yield torch.cat(drawn)
                drawn = []
