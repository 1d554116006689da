"""Settings of drawing pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from d_emo.config.base import Settings, overwrite_setting, setting
from d_emo.config.ranges import BelowOne, Count, Fraction, NotNegative, Port, Seed, Steps
from d_emo.errors import InputError
from d_emo.tables import OBJECTIVES, SCHEDULERS

DEFAULT_GUIDANCE, DEFAULT_STEPS, TABLE_STEPS = 4.0, 30, 250
"""Of images; tables say their own."""
SNAPSHOT = "snapshot or run folder. Default: the newest under results/, else the one that ships with the package"


def vae_setting() -> Any:
    """The field ``vae`` of what draws."""
    return setting(
        None, "codec to draw through instead of the snapshot's, of the same encoder: a run of d-emo train-vae with "
        "--train decoder, a folder or a hub name", source="or a name"
    )


DEFAULT_GUIDE_WEIGHT = 2.0
"""Of a weaker denoiser, where one is named."""


def guide_setting() -> Any:
    """The field ``guide``."""
    return setting(
        None, "autoguidance: an earlier or smaller snapshot of the same data and objective, whose prediction for the "
        "same class is what images are pushed away from", source=True
    )


def guide_weight_setting() -> Any:
    """The field ``guide_weight``."""
    return setting(
        None, "with --guide: w of guide + w (given - guide); 1 is none. It adds to the classifier-free guidance of "
        f"--guidance-scale and has its interval and channels. Default: {DEFAULT_GUIDE_WEIGHT:g}"
    )


def check_guide(guide: str | None, weight: float | None) -> None:
    """Refuse a weight of nothing.

    Raises:
        InputError: There is a weight and no guide.
    """
    if weight is not None and guide is None:
        raise InputError(f"`guide_weight` {weight:g} needs a snapshot to guide by; name one with `guide`")


def read_sampler(text: str) -> tuple[str, int]:
    """Name and steps of a sampler, given as NAME:STEPS.

    Raises:
        InputError: It is not.
    """
    name, _, steps = text.rpartition(":")
    if not name or not steps.isdecimal():
        raise InputError(f"`samplers` takes NAME:STEPS, e.g. dpm++:20, not {text}")
    return name, int(steps)


def check_guidance(
    scale: float, interval: Sequence[float] = (0.0, 1.0), *, label_dropout: float | None = None
) -> None:
    """Refuse guidance that means nothing, or that a denoiser cannot give because it never saw the null class.

    Raises:
        InputError: It means nothing, or the denoiser cannot give it.
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


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Settings):
    """Settings of ``scripts/sample.py``."""

    classes: list[str] = setting(
        [], "class ids or names, e.g. --class 207 or --class cat dog; where a number is both, id:207 or name:207. "
        "Default: four from all over their order",
        flag="--class", group="Images",
    )
    checkpoint: str | None = setting(None, SNAPSHOT, source=True)
    vae: str | None = vae_setting()
    num_images: Count = setting(8, "images per class")
    guidance_scale: list[NotNegative] = setting(
        [], "classifier-free guidance scale; 1 is no guidance. Several give a row each, from the same noise. Default: "
        "4, or 1 for a snapshot trained without label dropout, or with --guide", group="Sampling",
    )
    scheduler: str | None = setting(
        None, "sampler, of those that serve the snapshot's objective. Default: dpm++, euler for flow, or lcm for "
        "four-step", choices=SCHEDULERS,
    )
    guidance_channels: Literal["all", "3"] = setting("all", "latent channels to guide; DiT's tables guided the first 3")
    guidance_interval: list[Fraction] = setting(
        [0.0, 1.0], "guide only in this interval of noise levels, from 0 (data) to 1 (noise), e.g. 0.1 0.7"
    )
    guide: str | None = guide_setting()
    guide_weight: NotNegative | None = guide_weight_setting()
    steps: Steps | None = setting(
        None, "denoising steps (tables of DiT use --scheduler ddpm --steps 250). Default: "
        f"{DEFAULT_STEPS}, or 1 of a one-step snapshot, 4 of a four-step one"
    )
    seed: Seed = setting(0, "image i starts from the noise of seed + i")
    batch_size: Count = setting(64, "images denoised at once")
    format: Literal["grid", "png"] = setting(
        "grid", "one grid of all images, or a folder with one PNG per image", group="Output"
    )
    trajectory: Literal["strip", "gif"] | None = setting(
        None, "show the denoising instead: its steps in a row for each image, or a GIF of the grid"
    )
    interpolate: list[str] | None = setting(
        None, "two classes: --num-images images that lead from one to the other, all from the same noise", nargs=2,
        group="Images",
    )
    output: str | None = setting(
        None, "PNG, GIF or folder to write. Default: samples/class-<classes>-seed<seed>, numbered if it exists",
        group="Output", output="pictures",
    )
    overwrite: bool = overwrite_setting()
    mixed_precision: Literal["no", "bf16"] = setting(
        "no", "bf16: cast the denoiser, for speed; images change slightly", group="Machine"
    )
    compile: bool = setting(False, "torch.compile the denoiser; pays off after some hundred images")

    def check(self) -> None:
        for scale in self.guidance_scale or [1.0]:
            check_guidance(scale, self.guidance_interval)
        check_guide(self.guide, self.guide_weight)
        if self.interpolate is not None and self.guide is not None:
            raise InputError("`interpolate` mixes classes that `guide` does not know; leave one of them out")
        if self.interpolate is not None and (len(self.interpolate) != 2 or self.classes or self.num_images < 2):
            raise InputError("`interpolate` takes two classes, at least two `num_images`, and no `classes`")
        if self.format == "png" and (self.trajectory or self.interpolate):
            raise InputError("`format` png writes single images; leave it out with `trajectory` or `interpolate`")
        if len(self.guidance_scale) > 1 and (self.format == "png" or self.trajectory):
            raise InputError("several `guidance_scale` make a grid; give one with `format` png or `trajectory`")

    def resolve(self, **facts: Any) -> SampleSettings:
        """Settle what depends on "objective" and "label_dropout" of the snapshot, once these facts are known.

        Raises:
            InputError: Guidance from a denoiser that never saw the null class.
        """
        if not facts:
            return self
        objective, label_dropout = facts["objective"], facts["label_dropout"]
        scales = self.guidance_scale or [DEFAULT_GUIDANCE if label_dropout and self.guide is None else 1.0]
        for scale in scales:
            check_guidance(scale, label_dropout=label_dropout)
        row = OBJECTIVES[objective]
        return replace(
            self, scheduler=self.scheduler or row.scheduler, guidance_scale=scales,
            steps=self.steps or row.steps or DEFAULT_STEPS,
        )


@dataclass(frozen=True, kw_only=True)
class AppSettings(Settings):
    """Settings of ``scripts/app.py``."""

    checkpoint: str | None = setting(None, SNAPSHOT, group="Model", source=True)
    vae: str | None = vae_setting()
    guide: str | None = guide_setting()
    guide_weight: NotNegative | None = guide_weight_setting()
    mixed_precision: Literal["no", "bf16"] = setting("no", "bf16: cast the denoiser, for speed; images change slightly")
    max_images: Count = setting(64, "largest number of images in one request", group="Sampling")
    preview_share: BelowOne = setting(
        0.25, "fraction of the time that previews of unfinished images may take; 0 shows finished ones only"
    )
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 accepts connections from the network", group="Server"
    )
    port: Port = setting(7860, "port to listen on")
    share: bool = setting(False, "also open a public address, through Gradio's servers; nothing else uses the internet")

    def check(self) -> None:
        check_guide(self.guide, self.guide_weight)
