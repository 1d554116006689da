"""Settings of drawing pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from d_emo.config.base import setting
from d_emo.errors import InputError

DEFAULT_SCHEDULERS = {"eps": "dpm++", "flow": "euler"}
"""The sampler of each objective, where none is named."""
DEFAULT_GUIDANCE, DEFAULT_STEPS = 4.0, 30
"""Of pictures; tables say their own."""
LARGEST_SEED = 2**62


def check_seed(seed: int) -> None:
    """Refuse a seed that the generators do not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"`seed` must lie between 0 and 2^62, not {seed}")


def check_guidance(
    scale: float, interval: Sequence[float] = (0.0, 1.0), *, label_dropout: float | None = None
) -> None:
    """Refuse guidance that means nothing, or that a denoiser cannot give because it never saw the null class.

    Args:
        scale: Guidance scale.
        interval: Ranks of the noise path on which to guide.
        label_dropout: Of the denoiser's training, once that is known.
    """
    if not 0 <= scale < float("inf"):
        raise InputError(f"`guidance_scale` must be finite and not negative, not {scale}")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise InputError(f"`guidance_interval` must be two rising numbers in [0, 1], not {list(interval)}")
    if label_dropout == 0 and scale != 1:
        raise InputError(
            f"`guidance_scale` {scale:g} needs a null class, but this snapshot was trained without label dropout; "
            "use `guidance_scale` 1"
        )


@dataclass(kw_only=True)
class SampleSettings:
    """Settings of ``scripts/sample.py``."""

    classes: list[str] = setting(
        [], "class ids or names, e.g. --class 207 or --class cat dog; unconditional snapshots need none", flag="--class"
    )
    checkpoint: str | None = setting(
        None, "snapshot folder. Default: the newest under results/, else the one that ships with the package"
    )
    num_images: int = setting(8, "images per class")
    guidance_scale: list[float] = setting(
        [], "classifier-free guidance; 1 is none. Several draw a row each, of the same noise. Default: 4, or 1 for a "
        "snapshot trained without label dropout"
    )
    scheduler: Literal["ddpm", "ddim", "dpm++", "unipc", "deis", "euler", "heun"] | None = setting(
        None, "sampler; flow snapshots take euler or heun, the others the rest. Default: dpm++, or euler for flow"
    )
    guidance_channels: Literal["all", "3"] = setting("all", "latent channels to guide; DiT's tables guided the first 3")
    guidance_interval: list[float] = setting(
        [0.0, 1.0], "guide only on this part of the noise path, from 0 (data) to 1 (noise), e.g. 0.1 0.7"
    )
    steps: int = setting(DEFAULT_STEPS, "denoising steps (tables of DiT use --scheduler ddpm --steps 250)")
    seed: int = setting(0, "image i starts from the noise of seed + i")
    batch_size: int = setting(64, "images denoised at once")
    format: Literal["grid", "png"] = setting("grid", "one picture of all, or one PNG for each image in a folder")
    trajectory: Literal["strip", "gif"] | None = setting(
        None, "show the denoising instead: a strip of its steps for each image, or a GIF of the grid"
    )
    interpolate: list[str] | None = setting(
        None, "two classes: draw --num-images pictures on the way from one to the other, all from the same noise",
        nargs=2,
    )
    mixed_precision: Literal["no", "bf16"] = setting("no", "bf16: cast the denoiser, for speed; pictures change a bit")
    compile: bool = setting(False, "torch.compile the denoiser; pays for itself after some hundred images")
    output: str | None = setting(
        None, "PNG, GIF or folder to write. Default: samples/class-<classes>-seed<seed>, numbered if it exists"
    )

    def __post_init__(self):
        for name in ("num_images", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, not {getattr(self, name)}")
        if self.steps > 1000:
            raise InputError(f"`steps` must be at most 1000, not {self.steps}")
        check_seed(self.seed)
        for scale in self.guidance_scale or [1.0]:
            check_guidance(scale, self.guidance_interval)
        if self.interpolate is not None and (len(self.interpolate) != 2 or self.classes or self.num_images < 2):
            raise InputError("`interpolate` takes two classes, at least two `num_images`, and no `classes`")
        if self.format == "png" and (self.trajectory or self.interpolate):
            raise InputError("`format` png writes single images; leave it out with `trajectory` or `interpolate`")
        if len(self.guidance_scale) > 1 and (self.format == "png" or self.trajectory):
            raise InputError("several `guidance_scale` make a grid; give one with `format` png or `trajectory`")

    def fill_in(self, *, objective: str, label_dropout: float) -> None:
        """Settle what depends on how the snapshot was trained.

        Raises:
            InputError: Guidance from a denoiser that never saw the null class.
        """
        self.scheduler = self.scheduler or DEFAULT_SCHEDULERS[objective]
        self.guidance_scale = self.guidance_scale or [DEFAULT_GUIDANCE if label_dropout else 1.0]
        for scale in self.guidance_scale:
            check_guidance(scale, label_dropout=label_dropout)


@dataclass(kw_only=True)
class AppSettings:
    """Settings of ``scripts/app.py``."""

    checkpoint: str | None = setting(
        None, "snapshot folder. Default: the newest under results/, else the one that ships with the package"
    )
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines of the network in")
    port: int = setting(7860, "port to listen on")
    share: bool = setting(False, "also open a public address, through Gradio's servers: the only use of the internet")
    max_images: int = setting(64, "pictures that a visitor may draw at once")
    preview_share: float = setting(
        0.25, "share of the time that decoding unfinished pictures may take; 0 shows finished ones only"
    )
    mixed_precision: Literal["no", "bf16"] = setting("no", "bf16: cast the denoiser, for speed; pictures change a bit")

    def __post_init__(self):
        if not 1 <= self.port <= 65535:
            raise InputError(f"`port` must be from 1 to 65535, not {self.port}")
        if self.max_images < 1:
            raise InputError(f"`max_images` must be at least 1, not {self.max_images}")
        if not 0 <= self.preview_share < 1:
            raise InputError(f"`preview_share` must be at least 0 and below 1, not {self.preview_share}")
