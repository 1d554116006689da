"""The sampler: a pure function of denoiser, scheduler, labels and seeds, used by everything that draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import nn

from d_emo.data import to_uint8
from d_emo.errors import InputError
from d_emo.latents import Codec
from d_emo.models import Denoiser
from d_emo.models.layers import fold_batch_norms
from d_emo.sampling.schedulers import set_steps


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: null + scale * (given - null).

    Attributes:
        scale: 1 is none and costs one forward pass instead of two.
        channels: ``all`` latent channels, or ``3``: the first three, as in the published numbers of DiT.
        interval: Ranks of the noise path, 0 (data) to 1 (noise), on which to guide; outside it, as with scale 1.

    Raises:
        InputError: Values that mean nothing.
    """

    scale: float = 1.0
    channels: Literal["all", "3"] = "all"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"the guidance scale must be finite and not negative, not {self.scale}")
        if str(self.channels) not in ("all", "3"):
            raise InputError(f"the guidance channels must be all or 3, not {self.channels!r}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise InputError(f"the guidance interval must be two rising numbers in [0, 1], not {self.interval}")

    def acts_at(self, share: float) -> bool:
        """Whether the scale holds at this share of the noise path."""
        return self.interval[0] <= share <= self.interval[1]


def prepare_denoiser(denoiser: Denoiser, *, dtype: torch.dtype = torch.float32, compile: bool = False) -> Denoiser:
    """Make a denoiser fast for sampling, in place: batch norms folded, cast, compiled. It cannot be saved any more.

    On a GPU it is compiled into CUDA graphs: a step of a few images is launched at once, not kernel by kernel.
    """
    nn.Module.to(fold_batch_norms(denoiser.eval()), dtype)  # diffusers' own would warn of what the model sees to itself
    if compile:
        denoiser.compile(mode="reduce-overhead" if denoiser.device.type == "cuda" else None)
    return denoiser


def sample(
    denoiser: Denoiser, scheduler: Any, class_labels: Sequence[int], seeds: Sequence[int], *,
    num_inference_steps: int, guidance_scale: float = 1.0, guidance_channels: Literal["all", "3"] = "all",
    guidance_interval: tuple[float, float] = (0.0, 1.0), batch_size: int = 64, exact: bool = True,
    on_step: Callable[[], Any] = lambda: None,
    on_latents: Callable[[int, torch.Tensor], Any] = lambda index, latents: None,
) -> Iterator[torch.Tensor]:
    """Denoise, in batches. All noise of an image comes from a generator of its own, seeded by its seed.

    An image depends on its label, its seed and the settings, not on its neighbours, the size of the batch or the
    number of processes that share the seeds: bitwise on a CPU with one number of threads, and but for rounding
    elsewhere, where libraries choose kernels by the shape of the batch.

    Args:
        denoiser: In eval mode.
        scheduler: From :func:`make_scheduler`.
        class_labels: One class id per image.
        seeds: One seed per image.
        num_inference_steps: Denoising steps.
        guidance_scale, guidance_channels, guidance_interval: See :class:`Guidance`.
        batch_size: Images denoised at once.
        exact: Off, a CPU denoises whole batches, which is faster for small networks; the last bits of an image may
            then depend on its batch.
        on_step: Called after every denoising step of a batch.
        on_latents: Called with (index of the step, latents) after every denoising step of a part of a batch; all of
            it on a GPU, a few images on a CPU.

    Yields:
        Latents. Shape: (batch, C, h, w), float32 on the denoiser's device.

    Raises:
        InputError: Labels out of range, labels and seeds of different number, settings that mean nothing.
    """
    guidance = Guidance(guidance_scale, guidance_channels, tuple(guidance_interval))
    rows = denoiser.y_embedder.embedding_table.num_embeddings
    if len(class_labels) != len(seeds):
        raise InputError(f"{len(class_labels)} class labels and {len(seeds)} seeds were given; one of each per image")
    for label in class_labels:
        if not 0 <= label < rows:
            raise InputError(f"class label {label} is out of range; the denoiser has 0 to {denoiser.null_class - 1}")

    def draw(part: range, last: bool) -> torch.Tensor:
        filled = [*part] + [part[-1]] * (size - len(part))
        generators = [torch.Generator().manual_seed(seeds[index]) for index in filled]
        noise = torch.stack([torch.randn(latent_shape(denoiser), generator=generator) for generator in generators])
        labels = torch.tensor([class_labels[index] for index in filled], device=denoiser.device)

        def step_done(index: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            if last:
                on_step()
            on_latents(index, latents[: len(part)])
            return latents

        set_steps(scheduler, num_inference_steps, denoiser.device)
        return denoise(
            denoiser, scheduler, noise.to(denoiser.device), labels, guidance=guidance, generator=generators,
            on_step=step_done,
        )[: len(part)]

    for start in range(0, len(seeds), batch_size):
        batch = range(start, min(start + batch_size, len(seeds)))
        size = (exact and _part_size(denoiser)) or len(batch)
        parts = [batch[first : first + size] for first in range(0, len(batch), size)]
        yield torch.cat([draw(part, part is parts[-1]) for part in parts])


def _part_size(denoiser: Denoiser) -> int | None:
    """Images that go through the network at once on a CPU; None elsewhere.

    Matrix products and vectorised functions round a row differently when the shape around it changes. Parts of one
    fixed size, the last one filled up, keep an image's bits. They are small, because a filled-up part costs as much as
    a full one; beyond 128 tokens only narrow networks gain from larger ones.
    """
    if denoiser.device.type != "cpu":
        return None
    _, height, width = latent_shape(denoiser)
    return max(1, 128 * denoiser.config.patch_size**2 // (height * width))


def sample_images(
    denoiser: Denoiser, scheduler: Any, codec: Codec, *args: Any, **kwargs: Any
) -> Iterator[torch.Tensor]:
    """:func:`sample`, decoded. Yields uint8 images of shape (batch, 3, H, W) on the CPU."""
    for latents in sample(denoiser, scheduler, *args, **kwargs):
        yield to_uint8(decode(codec, latents)).cpu()


def decode(codec: Codec, latents: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1]; on a CPU one by one, so that they do not depend on their batch. Shape: -> (B, 3, H, W).

    Raises:
        InputError: The codec gave NaN, which a picture cannot show.
    """
    parts = latents.split(1) if latents.device.type == "cpu" else [latents]
    images = torch.cat([codec.decode(part) for part in parts])
    if images.isnan().any():
        raise InputError(f"the codec {codec.name} decodes latents to NaN or infinite values; its weights are damaged")
    return images


def latent_shape(denoiser: Denoiser) -> tuple[int, int, int]:
    """(channels, height, width) of the latents that a denoiser takes."""
    size = denoiser.config.sample_size
    return (denoiser.config.in_channels, *((size, size) if isinstance(size, int) else size))


@torch.no_grad()
def denoise(
    denoiser: Denoiser, scheduler: Any, latents: torch.Tensor, labels: torch.Tensor, *, guidance: Guidance,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] = lambda index, t, latents: latents,
) -> torch.Tensor:
    """Carry one batch from unit noise to latents, along the timesteps that the scheduler has been set to.

    Args:
        latents: Unit noise.
        labels: Class ids.
        guidance: How to guide.
        generator: For the noise that a scheduler adds; one for each image, or one for all.
        on_step: Called with (index, timestep, latents) after every step; its value takes the latents' place.

    Shape: latents (B, C, h, w), labels (B,) -> (B, C, h, w) float32.

    Raises:
        InputError: The latents end in NaN or infinite values.
    """
    channels, longest = denoiser.config.in_channels, scheduler.config.num_train_timesteps
    learned_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers lack it, and the next
    scale_input = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    for index, t in enumerate(scheduler.timesteps):
        scale = guidance.scale if guidance.acts_at(float(t) / longest) else 1.0
        output = _guided(denoiser, scale_input(latents, t), t, labels, scale, guidance.channels)
        if not learned_variance:
            output = output[:, :channels]
        latents = on_step(index, t, scheduler.step(output, t, latents, **extra).prev_sample)
    if not latents.isfinite().all():
        raise InputError(
            f"the denoising (guidance {guidance.scale:g}, {len(scheduler.timesteps)} steps) ended in NaN or infinite "
            "values; the denoiser's weights are damaged, or guidance or precision are more than they bear"
        )
    return latents


def _guided(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float,
    guidance_channels: str = "all",
) -> torch.Tensor:
    """The denoiser's output with its prediction pushed away from that of the null class. Shape: as the output's."""
    if scale == 1:
        return denoiser(x.to(denoiser.dtype), timestep=t, class_labels=labels).sample.float()
    both = torch.cat([labels, torch.full_like(labels, denoiser.null_class)])
    output = denoiser(torch.cat([x, x]).to(denoiser.dtype), timestep=t, class_labels=both).sample.float()
    given, null = output.chunk(2)
    channels = denoiser.config.in_channels if guidance_channels == "all" else 3
    prediction = null[:, :channels] + scale * (given[:, :channels] - null[:, :channels])
    return torch.cat([prediction, given[:, channels:]], dim=1)
