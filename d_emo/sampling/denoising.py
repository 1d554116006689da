"""From noise to latents, step by step: pure functions of denoiser, scheduler, labels and seeds."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from d_emo.errors import InputError
from d_emo.io.snapshot import DenoiserSnapshot
from d_emo.latents import Codec, load_codec
from d_emo.models.contract import DenoiserFrame
from d_emo.sampling.classes import Labels, as_list
from d_emo.sampling.guidance import Guidance, guided
from d_emo.sampling.schedulers import set_steps
from d_emo.tables import OBJECTIVES, load, objective_of


@dataclass
class Step:
    """Where the denoising of some images stands after a step.

    Attributes:
        index: Of the step, from 0.
        steps: How many there are.
        timestep: At which the denoiser was asked.
        latents: Changed in place, they are what the denoising goes on with. Shape: (B, C, h, w) float32.
        first: Number of the first of these images.
        images: On the CPU, after the last step of a `Sampler`. Shape: (B, 3, H, W) uint8.
    """

    index: int
    steps: int
    timestep: torch.Tensor
    latents: torch.Tensor
    first: int = 0
    images: torch.Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether these images are done."""
        return self.index + 1 == self.steps


def sample(
    denoiser: DenoiserFrame, scheduler: Any, class_labels: Labels, seeds: Labels, *, steps: int,
    guidance: Guidance, batch_size: int = 64, exact: bool = True, objective: str | None = None,
    guide: DenoiserFrame | None = None,
) -> Iterator[Step]:
    """Denoise, in batches. All noise of an image comes from a generator of its own, seeded by its seed.

    An image depends on its label, its seed and the settings, not on its neighbours, the size of the batch or the
    number of processes that share the seeds: bitwise on a CPU with one number of threads, and but for rounding
    elsewhere, where libraries choose kernels by the shape of the batch.

    Args:
        denoiser: In eval mode.
        scheduler: From `make_scheduler`.
        class_labels, seeds: One of each per image: whole numbers, also as tensors or arrays.
        steps: Denoising steps.
        guidance: How to guide.
        batch_size: Images denoised at once.
        exact: Off, a CPU denoises whole batches, which is faster for small networks; the last bits of an image may
            then depend on its batch.
        objective: What the denoiser was trained for. Default: the first that predicts what the scheduler's config says.
        guide: A weaker denoiser for the same, see `Guidance`.

    Yields:
        All steps of the first images, then those of the next ones: a batch, on a CPU (unless ``exact`` is off) a part
        of one.

    Raises:
        InputError: Labels or seeds out of range, labels and seeds of different number, settings that mean nothing.
    """
    class_labels, seeds = as_list(class_labels), as_list(seeds)
    if len(class_labels) != len(seeds):
        raise InputError(f"{len(class_labels)} class labels and {len(seeds)} seeds were given; one of each per image")
    rows = len(denoiser.label_rows())
    for label in class_labels:
        if not isinstance(label, int) or not 0 <= label < rows:
            raise InputError(f"class label {label!r} is out of range; the denoiser has 0 to {denoiser.null_class - 1}")
    if odd := [seed for seed in seeds if not isinstance(seed, int) or not -(2**63) <= seed < 2**64]:
        raise InputError(f"a seed must be a whole number of 64 bits, not {odd[0]!r}")
    for start in range(0, len(seeds), batch_size):
        batch = range(start, min(start + batch_size, len(seeds)))
        size = (exact and _part_size(denoiser)) or len(batch)
        for first in range(0, len(batch), size):
            part = batch[first : first + size]
            filled = [*part] + [part[-1]] * (size - len(part))
            generators = [torch.Generator().manual_seed(seeds[index]) for index in filled]
            noise = torch.stack([torch.randn(denoiser.latent_shape, generator=generator) for generator in generators])
            labels = torch.tensor([class_labels[index] for index in filled], device=denoiser.device)
            set_steps(scheduler, steps, denoiser.device)
            for step in denoise(
                denoiser, scheduler, noise.to(denoiser.device), labels, guidance=guidance, generator=generators,
                objective=objective, guide=guide,
            ):
                step.latents, step.first = step.latents[: len(part)], part[0]
                yield step


def _part_size(denoiser: DenoiserFrame) -> int | None:
    """Images that go through the network at once on a CPU; None elsewhere.

    Matrix products and vectorised functions round a row differently when the shape around it changes. Parts of one
    fixed size, the last one filled up, keep an image's bits. They are small, because a filled-up part costs as much as
    a full one; beyond 128 tokens only narrow networks gain from larger ones.
    """
    if denoiser.device.type != "cpu":
        return None
    return max(1, 128 // denoiser.tokens)


@torch.no_grad()
def denoise(
    denoiser: DenoiserFrame, scheduler: Any, latents: torch.Tensor, labels: torch.Tensor, *, guidance: Guidance,
    generator: torch.Generator | list[torch.Generator] | None = None, objective: str | None = None,
    guide: DenoiserFrame | None = None,
) -> Iterator[Step]:
    """Carry one batch from unit noise to latents, along the timesteps that the scheduler has been set to.

    The generator, one for each image or one for all, is for the noise that a scheduler adds. The objective
    tells what the denoiser predicts; see `sample`, for the guide too.

    Shape: latents (B, C, h, w), labels (B,).

    Raises:
        InputError: The latents end in NaN or infinite values.
    """
    channels, longest, steps = latents.shape[1], scheduler.config.num_train_timesteps, len(scheduler.timesteps)
    scheduled = load(OBJECTIVES[objective or objective_of(scheduler.config)].loss).scheduled
    learned_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers lack it, and the next
    scale_input = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    for index, t in enumerate(scheduler.timesteps):
        scale, weight = guidance.at(float(t) / longest)
        output = guided(denoiser, scale_input(latents, t), t, labels, scale, guidance.channels, guide, weight)
        if not learned_variance:
            output = scheduled(output[:, :channels], latents, float(t) / longest)
        latents = scheduler.step(output, t, latents, **extra).prev_sample
        if index + 1 == steps and not latents.isfinite().all():
            raise InputError(
                f"the denoising (guidance {guidance.scale:g}, {steps} steps) ended in NaN or infinite "
                "values; the denoiser's weights are damaged, or guidance or precision are more than they bear"
            )
        yield Step(index, steps, t, latents)


def check_codec(codec: Codec, denoiser: DenoiserFrame) -> None:
    """Raise InputError for a codec of other latents than the denoiser's."""
    if codec.channels != denoiser.latent_shape[0]:
        raise InputError(
            f"the codec {codec.name} has latents of {codec.channels} channels, the denoiser takes "
            f"{denoiser.latent_shape[0]}; the one that it was trained with is needed"
        )


def open_codec(snapshot: DenoiserSnapshot, vae: str | None = None) -> Codec:
    """The codec of a snapshot, or another decoder of the same latents.

    Args:
        snapshot: What it has to decode.
        vae: A name that `load_codec` takes, instead of the snapshot's.

    Raises:
        InputError: There is no such codec, or it is of other latents; names what differs.
    """
    codec = load_codec(vae or snapshot.codec)
    check_codec(codec, snapshot.model)
    if vae is None:
        return codec
    names = {"encoder": "fingerprint", "scaling": "scaling", "shift": "shift"}
    theirs = snapshot.meta
    if not names.keys() <= theirs.keys():  # older ones do not say
        own = load_codec(snapshot.codec)
        theirs = {name: getattr(own, attribute) for name, attribute in names.items()}
    differ = [f"{name} {value} here, {theirs[name]} there" for name, attribute in names.items()
              if (value := getattr(codec, attribute)) != theirs[name]]  # fmt: skip
    if differ:
        raise InputError(
            f"`vae` {codec.name} has other latents than {snapshot.codec}, which {snapshot.path} was trained with "
            f"({'; '.join(differ)}); give one whose decoder alone is another, as `d-emo train-vae` makes them with "
            "`train` decoder"
        )
    return codec


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
