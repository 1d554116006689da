"""Settings of what measures and shows."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from d_emo.config.base import ReadingSettings, Settings, overwrite_setting, setting
from d_emo.config.ranges import (
    ClassifierSide,
    Count,
    Fraction,
    Images,
    ImageSide,
    NotNegative,
    PositiveFraction,
    Seed,
    Stage,
    Steps,
    Whole,
    Workers,
)
from d_emo.config.sampling import (
    TABLE_STEPS,
    check_guidance,
    check_guide,
    guide_setting,
    guide_weight_setting,
    read_sampler,
    vae_setting,
)
from d_emo.errors import InputError
from d_emo.tables import DATASETS, METRICS, SCHEDULERS, check_compared, parse_features, parse_metrics

PUBLISHED_COUNT = 50_000
"""FID falls with the number of samples; tables are measured with this many."""
SAMPLING, SAVING = "Sampling, with --checkpoint", "Files of samples, with --checkpoint"


@dataclass(frozen=True, kw_only=True)
class EvaluateClassifierSettings(ReadingSettings):
    """Settings of ``scripts/evaluate_classifier.py``."""

    model: str = setting(
        help="a snapshot or run folder, a released .pth file, or a folder made by d-emo convert", flag="MODEL",
        group="Model", source="or a name",
    )
    weights: Literal["ema", "raw"] = setting(
        "ema", "of a snapshot: the averaged weights (EMA), or the raw ones that the training state of its step keeps"
    )
    data_dir: str | None = setting(
        None, "folder with one sub-folder of images per class. Default: the folder that the snapshot's run was "
        "validated on, or a built-in data set", group="Data", source=True
    )
    dataset: str | None = setting(
        None, "held-out images of a built-in data set. Default: that of the snapshot", choices=DATASETS
    )
    image_size: ClassifierSide | None = setting(None, "side of the images in pixels. Default: the snapshot's, else 224")
    crop_share: PositiveFraction = setting(0.875, "side of the centre crop over the image's shorter side")
    num_images: Count | None = setting(
        None, "number of images or videos to measure on, spread evenly over the data. Default: all, and 2,000 of "
        "Shapes-1000"
    )
    clips: Count = setting(1, "clips of a video, spread evenly over it; their probabilities are averaged")
    crops: Literal[1, 3] = setting(
        1, "squares of a video's frames: the middle, or three along the longer side, as large as the shorter one"
    )
    batch_size: Count = setting(64, "images per forward pass", group="Machine")
    num_workers: Workers = setting(0, "data loading processes")
    output: str | None = setting(None, "JSON file to write the result to", group="Output", output="file")
    overwrite: bool = overwrite_setting()


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(ReadingSettings):
    """Settings of ``scripts/judge.py``."""

    checkpoint: str = setting(help="snapshot or run folder of the denoiser", group="Models", source=True)
    classifier: str = setting(help="snapshot or run folder of a classifier of the same classes", source=True)
    vae: str | None = vae_setting()
    data_dir: str | None = setting(
        None, "folder of real images, for a denoiser that was trained on a folder", group="Data", source=True
    )
    validate_dir: str | None = setting(
        None, "folder of held-out images of the same classes, with --data-dir", source=True
    )
    through_codec: bool = setting(
        False, "measure real held-out images that only went through the codec, too: what its latents allow"
    )
    num_images: Images = setting(
        500, "number of samples to draw and measure, spread evenly over the classes", group="Sampling"
    )
    guidance_scale: NotNegative | None = setting(
        None, "classifier-free guidance scale; 1 is no guidance. Default: 1.5, or 1 for a snapshot trained without "
        "label dropout"
    )
    steps: Steps | None = setting(
        None, "denoising steps of the objective's default sampler: dpm++, euler for flow or lcm for four-step. "
        "Default: 30, or the only number that the objective has"
    )
    samplers: list[str] = setting(
        [], "compare samplers instead, each given as NAME:STEPS, e.g. ddpm:250 ddim:50 dpm++:20: a table of FID, "
        "precision, recall, class accuracy, time and images/s"
    )
    output: str = setting(
        "samples/judged.png", "PNG of ten samples of each of ten classes, with the metrics as JSON beside it (with "
        "--samplers: the table as .md, with .json beside it). The default is numbered if it exists", group="Output",
        output="picture",
    )
    overwrite: bool = overwrite_setting()
    write_card: bool = setting(False, "also put the samples and metrics into the snapshot's model card")

    def check(self) -> None:
        if self.samplers and self.write_card:
            raise InputError("`samplers` makes a table, `write_card` a card; run the two apart")
        if self.samplers and self.through_codec:
            raise InputError("`samplers` makes a table of drawings alone; run `through_codec` apart")
        self.sampler_steps()

    def files_of(self, output: Path) -> list[Path]:
        return [output.with_suffix(".md") if self.samplers else output, output.with_suffix(".json")]

    def sampler_steps(self) -> list[tuple[str, int]]:
        """Name and steps of each sampler to compare.

        Raises:
            InputError: One is not NAME:STEPS.
        """
        return [read_sampler(each) for each in self.samplers]


@dataclass(frozen=True, kw_only=True)
class ExplainSettings(ReadingSettings):
    """Settings of ``scripts/explain.py``."""

    image: str = setting(help="image file to explain", flag="IMAGE", group="Input", source=True)
    model: str = setting(
        help="classifier: a snapshot or run folder, a released .pth file, a folder made by d-emo convert, or a "
        "name of list_models() with random weights", source="or a name"
    )
    image_size: ClassifierSide | None = setting(None, "side of the centre crop in pixels. Default: the classifier's")
    label: Whole | None = setting(
        None, "class to explain. Default: the most likely", flag="--class", group="Explanation"
    )
    stage: Stage = setting(4, "stage whose map Grad-CAM and the receptive field show; 3 has twice the resolution of 4")
    output: str | None = setting(
        None, "folder for the images. Default: samples/explain-<image>, numbered if it exists", group="Output",
        output="folder",
    )
    overwrite: bool = overwrite_setting()


@dataclass(frozen=True, kw_only=True)
class FidSettings(ReadingSettings):
    """Settings of ``scripts/fid.py``."""

    samples: str | None = setting(
        None, "images to measure: folder, zip, or .npz in ADM's layout", group="Images", source=True
    )
    checkpoint: str | None = setting(
        None, "snapshot or run folder to sample from and measure, instead of --samples", source=True
    )
    reference: str | None = setting(
        None, "real images to compare with: folder, zip, or .npz (arr_0, or mu and sigma) of d-emo reference or ADM",
        source=True,
    )
    num_images: Count | None = setting(
        None, f"number of samples to measure. Default: all of --samples, {PUBLISHED_COUNT:,} of --checkpoint"
    )
    skip_corrupt: bool = setting(False, "leave out images that cannot be read, and say how many and why")
    metrics: list[str] = setting(["fid"], "metrics to compute", choices=METRICS, group="Metrics")
    features: str = setting("inception", "inception, or emov2:SNAPSHOT for a classifier trained here")
    inception_weights: str | None = setting(None, "file of torch-fidelity's Inception weights", source=True)
    batch_size: Count = setting(64, "images per forward pass, of sampling and of the feature network")
    labels: Literal["random", "balanced"] = setting(
        "random", "class labels: uniformly random, as ADM, or all classes in turn", group=SAMPLING
    )
    scheduler: str | None = setting(
        None, "sampler. Default: ddpm, euler for flow snapshots, or lcm for four-step ones", choices=SCHEDULERS
    )
    steps: Steps | None = setting(
        None, f"denoising steps. Default: {TABLE_STEPS}, or the only number that the objective has"
    )
    guidance_scale: NotNegative = setting(1.0, "classifier-free guidance scale; 1 is no guidance, as in most tables")
    guidance_channels: Literal["all", "3"] = setting("all", "latent channels to guide; DiT's tables guided the first 3")
    guidance_interval: list[Fraction] = setting(
        [0.0, 1.0], "guide only in this interval of noise levels, from 0 (data) to 1 (noise), e.g. 0.1 0.7"
    )
    vae: str | None = vae_setting()
    guide: str | None = guide_setting()
    guide_weight: NotNegative | None = guide_weight_setting()
    mixed_precision: Literal["no", "bf16"] = setting(
        "no", "bf16: cast the denoiser, for speed; the FID changes slightly"
    )
    compile: bool = setting(False, "torch.compile the denoiser")
    seed: Seed = setting(0, "image i starts from the noise of seed + i")
    save_npz: str | None = setting(
        None, "write the samples to this .npz, in ADM's layout", group=SAVING, output="part"
    )
    save_png: str | None = setting(None, "write the samples into this folder", output="run")
    work_dir: str | None = setting(
        None, "folder for the features of the samples, to resume from. Default: results/fid/<settings' digest>",
        output="run",
    )
    output: str | None = setting(None, "JSON file to write the result to", group="Output", output="file")
    overwrite: bool = overwrite_setting()

    def check(self) -> None:
        if (self.samples is None) == (self.checkpoint is None):
            raise InputError("give either `samples` (images that exist) or `checkpoint` (a snapshot to draw from)")
        check_compared(parse_metrics(self.metrics), self.reference)
        parse_features(self.features)
        group = None
        for each in fields(self) if self.checkpoint is None else ():
            group = each.metadata["group"] or group
            default = each.default_factory() if each.default is MISSING else each.default
            if group in (SAMPLING, SAVING) and getattr(self, each.name) != default:
                raise InputError(f"`{each.name}` is for images drawn from a `checkpoint` only")
        check_guidance(self.guidance_scale, self.guidance_interval)
        check_guide(self.guide, self.guide_weight)

    def resolve(self, **facts: Any) -> FidSettings:
        """Metrics in the order of their table; the number of images that are drawn."""
        drawn = PUBLISHED_COUNT if self.checkpoint is not None else None
        return replace(self, metrics=parse_metrics(self.metrics), num_images=self.num_images or drawn)


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings(ReadingSettings):
    """Settings of ``scripts/make_reference.py``."""

    dataset: str = setting("shapes", "built-in data set, when --data-dir is not given", choices=DATASETS, group="Data")
    data_dir: str | None = setting(
        None, "folder with one sub-folder of images per class, as ImageNet's train folder", source=True
    )
    split: Literal["train", "test"] = setting("train", "split of a built-in data set")
    image_size: ImageSide = setting(256, "side of the images in pixels, cropped as in training")
    num_images: Count | None = setting(
        None, "number of images, spread evenly over the data. Default: all (50,000 of Shapes-1000)"
    )
    skip_corrupt: bool = setting(False, "leave out images that cannot be read, and say how many and why")
    features: str = setting("inception", "inception, or emov2:SNAPSHOT for a classifier trained here", group="Features")
    inception_weights: str | None = setting(None, "file of torch-fidelity's Inception weights", source=True)
    batch_size: Count = setting(64, "images per forward pass")
    num_workers: Workers = setting(0, "data loading processes")
    output: str = setting(help=".npz to write, in ADM's layout", group="Output", output="file")
    overwrite: bool = overwrite_setting()
    kept_images: Whole = setting(
        10_000, "number of images stored for precision, recall and KID, spread evenly; ADM stores as many"
    )

    def check(self) -> None:
        if Path(self.output).suffix.lower() != ".npz" and not Path(self.output).is_dir():
            raise InputError(f"`output` {self.output} must end in .npz")
        parse_features(self.features)


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """Settings of ``scripts/plot_loss.py``."""

    runs: list[str] = setting(help="run folders", flag="RUNS", group="Curves", source=True)
    published: str = setting("auto", "published curve to add: auto (of the runs' models), none, or a model's name")
    smooth: Whole = setting(0, "window of a running mean, in steps")
    output: str = setting(
        "samples/loss.png", "PNG to write. The default is numbered if it exists", group="Output", output="picture"
    )
    overwrite: bool = overwrite_setting()


@dataclass(frozen=True, kw_only=True)
class ModelsSettings(Settings):
    """Settings of ``d-emo models``."""

    match: str | None = setting(None, "only names that match, e.g. 'D-EMO*' or emov2", group="Table")
    ablations: bool = setting(False, "the ablations of emov2_5m instead of the models")
