"""Settings of what measures and shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

from d_emo.config.base import check_image_side, setting
from d_emo.config.sampling import check_guidance, check_seed
from d_emo.errors import InputError

METRICS = ("fid", "sfid", "isc", "prc", "kid")
PUBLISHED_COUNT = 50_000
"""FID falls with the number of samples; tables are measured with this many."""


@dataclass(kw_only=True)
class EvaluateClassifierSettings:
    """Settings of ``scripts/evaluate_classifier.py``."""

    model: str = setting(
        help="a snapshot or run folder, a released .pth file, or a folder made by convert_weights.py", flag="MODEL"
    )
    data_dir: str | None = setting(None, "folder with one sub-folder of images per class. Default: built-in data")
    dataset: Literal["shapes", "digits"] | None = setting(
        None, "held-out images of a built-in data set. Default: that of the snapshot"
    )
    image_size: int | None = setting(None, "side of the images in pixels. Default: the snapshot's, else 224")
    crop_share: float = setting(0.875, "side of the centre crop over the image's shorter side")
    weights: Literal["ema", "raw"] = setting(
        "ema", "of a snapshot: the averaged ones, or the raw ones that the training state of its step keeps"
    )
    num_images: int | None = setting(
        None, "measure on so many images, from all over the data. Default: all, and 2,000 of Shapes-1000"
    )
    batch_size: int = setting(64, "images per forward pass")
    num_workers: int = setting(0, "data loading processes")
    output: str | None = setting(None, "JSON file to write the result to")

    def __post_init__(self):
        check_image_side(self.image_size)
        for name, least in (("num_images", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"`{name}` must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.crop_share <= 1:
            raise InputError(f"`crop_share` must lie in (0, 1], not {self.crop_share}")
        if self.output is not None and not Path(self.output).parent.is_dir():
            raise InputError(f"`output` {self.output}: its folder does not exist; make it first")


@dataclass(kw_only=True)
class JudgeSettings:
    """Settings of ``scripts/judge.py``."""

    checkpoint: str = setting(help="snapshot or run folder of the denoiser")
    classifier: str = setting(help="snapshot or run folder of a classifier of the same classes")
    data_dir: str | None = setting(None, "folder of real images, for a denoiser that was trained on a folder")
    validate_dir: str | None = setting(None, "folder of held-out images of the same classes, with --data-dir")
    num_images: int = setting(500, "images to draw and judge, spread evenly over the classes")
    guidance_scale: float = setting(1.5, "classifier-free guidance; 1 is none")
    steps: int = setting(30, "denoising steps of the snapshot's default sampler: dpm++, or euler for flow")
    samplers: list[str] = setting(
        [], "compare samplers instead, each given as NAME:STEPS, e.g. ddpm:250 ddim:50 dpm++:20; a table of FID, "
        "images recognised, time and images/s"
    )
    output: str = setting(
        "samples/judged.png", "PNG of ten classes, ten drawings each, beside it the figures as JSON (with --samplers: "
        "the table as .md, beside it .json); written anew every time"
    )
    write_card: bool = setting(False, "put picture and figures into the snapshot's card too")

    def __post_init__(self):
        if self.num_images < 2:
            raise InputError(f"{self.num_images} images were asked for (`num_images`); a covariance needs at least two")
        if not 1 <= self.steps <= 1000:
            raise InputError(f"`steps` must lie between 1 and 1000, not {self.steps}")
        check_guidance(self.guidance_scale)
        if self.samplers and self.write_card:
            raise InputError("`samplers` makes a table, `write_card` a card; run the two apart")
        self.sampler_steps()

    def sampler_steps(self) -> list[tuple[str, int]]:
        """Name and steps of each sampler to compare."""
        pairs = [each.rpartition(":")[::2] for each in self.samplers]
        for each, (name, steps) in zip(self.samplers, pairs, strict=True):
            if not name or not steps.isdecimal():
                raise InputError(f"`samplers` takes NAME:STEPS, e.g. ddpm:250, not {each}")
        return [(name, int(steps)) for name, steps in pairs]


@dataclass(kw_only=True)
class ExplainSettings:
    """Settings of ``scripts/explain.py``."""

    image: str = setting(help="image file to look at", flag="IMAGE")
    model: str = setting(
        help="classifier: a snapshot or run folder, a released .pth file, a folder made by convert_weights.py, or a "
        "name of list_models() with random weights"
    )
    label: int | None = setting(None, "class to explain. Default: the likeliest", flag="--class")
    image_size: int | None = setting(None, "side of the centre crop in pixels. Default: the classifier's")
    stage: int = setting(4, "stage whose map Grad-CAM and the receptive field show; 3 has twice the resolution of 4")
    output: str | None = setting(None, "folder for the pictures, written anew. Default: samples/explain-<image>")

    def __post_init__(self):
        check_image_side(self.image_size)
        if not 1 <= self.stage <= 4:
            raise InputError(f"`stage` must be from 1 to 4, not {self.stage}")


DRAWING = {
    "labels", "scheduler", "steps", "guidance_scale", "guidance_channels", "guidance_interval", "mixed_precision",
    "compile", "seed", "save_npz", "save_png", "work_dir",
}  # fmt: skip
"""Settings of ``scripts/fid.py`` that say how images are drawn; images that exist leave nothing to say."""


@dataclass(kw_only=True)
class FidSettings:
    """Settings of ``scripts/fid.py``."""

    samples: str | None = setting(None, "images to judge: folder, zip, or .npz in ADM's layout")
    checkpoint: str | None = setting(None, "snapshot or run folder to sample from and judge, instead of --samples")
    reference: str | None = setting(
        None, "real images to compare with: folder, zip, or .npz (arr_0, or mu and sigma) of make_reference.py or ADM"
    )
    metrics: list[str] = setting(
        ["fid"], f"any of {' '.join(METRICS)} (prc: precision and recall; isc: Inception Score)"
    )
    features: str = setting("inception", "inception, or emov2:SNAPSHOT for a classifier trained here")
    inception_weights: str | None = setting(None, "file of torch-fidelity's Inception weights")
    num_images: int | None = setting(
        None, f"how many samples to measure. Default: all of --samples, {PUBLISHED_COUNT:,} of --checkpoint"
    )
    batch_size: int = setting(64, "images per forward pass, of sampling and of the feature network")
    labels: Literal["random", "balanced"] = setting("random", "classes to draw: uniformly random, as ADM, or in turn")
    scheduler: str | None = setting(None, "sampler. Default: ddpm, or euler for flow snapshots")
    steps: int = setting(250, "denoising steps")
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1 is none, as in most tables")
    guidance_channels: Literal["all", "3"] = setting("all", "latent channels to guide; DiT's tables guided the first 3")
    guidance_interval: list[float] = setting(
        [0.0, 1.0], "guide only on this part of the noise path, from 0 (data) to 1 (noise), e.g. 0.1 0.7"
    )
    mixed_precision: Literal["no", "bf16"] = setting("no", "bf16: cast the denoiser, for speed; the FID changes a bit")
    compile: bool = setting(False, "torch.compile the denoiser")
    seed: int = setting(0, "image i starts from the noise of seed + i")
    save_npz: str | None = setting(None, "write the images that were drawn to this .npz, in ADM's layout")
    save_png: str | None = setting(None, "write the images that were drawn into this folder")
    work_dir: str | None = setting(
        None, "where features of drawn images are kept, to go on after a stop. Default: results/fid/<settings' digest>"
    )
    output: str | None = setting(None, "JSON file to write the result to")

    def __post_init__(self):
        self.metrics = parse_metrics(self.metrics)
        if (self.samples is None) == (self.checkpoint is None):
            raise InputError("give either `samples` (images that exist) or `checkpoint` (a snapshot to draw from)")
        if self.reference is None and self.metrics != ["isc"]:
            raise InputError(f"`metrics` {' '.join(self.metrics)} compares with real images; give `reference`")
        if self.checkpoint is None:
            for each in fields(self):
                default = each.default_factory() if each.default is MISSING else each.default
                if each.name in DRAWING and getattr(self, each.name) != default:
                    raise InputError(f"`{each.name}` is for images drawn from a `checkpoint` only")
            return
        self.num_images = PUBLISHED_COUNT if self.num_images is None else self.num_images
        if self.num_images < 2:
            raise InputError(f"{self.num_images} images were asked for (`num_images`); a covariance needs at least two")
        if not 1 <= self.steps <= 1000:
            raise InputError(f"`steps` must lie between 1 and 1000, not {self.steps}")
        check_guidance(self.guidance_scale, self.guidance_interval)
        check_seed(self.seed)


def parse_metrics(names: Sequence[str]) -> list[str]:
    """Metric names, separated by commas or one by one, in the order of tables and each once.

    Raises:
        InputError: A name that is none.
    """
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r} (`metrics`); known are {', '.join(METRICS)}")
    if not wanted:
        raise InputError(f"`metrics` names nothing to measure; known are {', '.join(METRICS)}")
    return [name for name in METRICS if name in wanted]


@dataclass(kw_only=True)
class ReferenceSettings:
    """Settings of ``scripts/make_reference.py``."""

    output: str = setting(help=".npz to write, in ADM's layout")
    dataset: Literal["shapes", "digits"] = setting("shapes", "built-in data set, when --data-dir is not given")
    data_dir: str | None = setting(None, "folder with one sub-folder of images per class, as ImageNet's train folder")
    split: Literal["train", "test"] = setting("train", "which part of a built-in data set")
    image_size: int = setting(256, "side of the images in pixels, cropped as in training")
    num_images: int | None = setting(None, "how many images, spread evenly. Default: all (50,000 of Shapes-1000)")
    kept_images: int = setting(10_000, "images stored for precision, recall and KID, spread evenly; ADM's number")
    skip_corrupt: bool = setting(False, "pass over unreadable or too small images, naming and counting them")
    features: str = setting("inception", "inception, or emov2:SNAPSHOT for a classifier trained here")
    inception_weights: str | None = setting(None, "file of torch-fidelity's Inception weights")
    batch_size: int = setting(64, "images per forward pass")
    num_workers: int = setting(0, "processes that decode images")

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"`batch_size` {self.batch_size} is too small; use at least 1")
        if Path(self.output).suffix.lower() != ".npz" and not Path(self.output).is_dir():
            raise InputError(f"`output` {self.output} must end in .npz")
        if self.num_workers < 0:
            raise InputError(f"`num_workers` must not be negative, not {self.num_workers}")
        if self.kept_images < 0:
            raise InputError(f"`kept_images` must not be negative, not {self.kept_images}")


@dataclass(kw_only=True)
class PlotSettings:
    """Settings of ``scripts/plot_loss.py``."""

    runs: list[str] = setting(help="run folders", flag="runs")
    output: str = setting("samples/loss.png", "PNG to write; written anew every time")
    published: str = setting("auto", "published curve on top: auto (of the runs' models), none, or a model's name")
    smooth: int = setting(0, "draw running means over so many steps")

    def __post_init__(self):
        if self.smooth < 0:
            raise InputError(f"`smooth` must not be negative, not {self.smooth}")


@dataclass(kw_only=True)
class ModelsSettings:
    """Settings of ``d-emo models``."""

    match: str | None = setting(None, "only names that match, e.g. 'D-EMO*' or emov2")
    ablations: bool = setting(False, "the switches of emov2_5m instead of the models")
