"""Typed run settings, from a YAML file and from flags that override it. The only home of defaults; free of torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

S = TypeVar("S")

DEFAULT_SCHEDULERS = {"eps": "dpm++", "flow": "euler"}
"""The sampler of each objective, where none is named."""
DEFAULT_GUIDANCE, DEFAULT_STEPS = 4.0, 30
"""Of pictures; tables say their own."""


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one clear sentence with a remedy; exit code 2."""


class RunError(RuntimeError):
    """A run that began well cannot go on: a sentence for the user; exit code 1. What was saved before stays."""


def setting(default: Any = MISSING, help: str = "", flag: str | None = None, nargs: int | None = None) -> Any:
    """A field of a settings class: its default and the sentence that ``--help`` shows."""
    metadata = {"help": help, "flag": flag, "nargs": nargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class VAESettings:
    """Settings of ``scripts/train_vae.py``; the defaults made the VAE that ships with the package."""

    output_dir: str = setting("results/vae", "folder for the VAE, its card and a picture of reconstructions")
    image_size: int = setting(64, "side of the training images in pixels")
    block_out_channels: list[int] = setting([24, 48, 96, 128], "channels from full to eighth resolution")
    max_steps: int = setting(6000, "optimizer steps")
    batch_size: int = setting(16, "images per step")
    digits_share: float = setting(0.25, "share of digits in a batch; the rest is Shapes-1000")
    learning_rate: float = setting(1e-3, "peak of the one-cycle (warm-up, then cosine) schedule")
    kl_weight: float = setting(1e-4, "weight of the mean Kullback-Leibler term per latent value")
    seed: int = setting(0, "seed of the initial weights, the data order and the posterior noise")


@dataclass(kw_only=True)
class RunSettings:
    """What every training run has in common: the loop of ``d_emo.training.loop.fit``."""

    output_dir: str | None = setting(
        None, "run folder: settings, snapshots, states, samples, logs. Default: results/<model>-<data>-<size>"
    )
    max_steps: int = setting(400_000, "optimizer steps of the whole run")
    max_minutes: float | None = setting(None, "save and stop after so many minutes; the same command goes on")
    batch_size: int = setting(256, "images per step over all processes (global)")
    micro_batch_size: int | None = setting(
        None, "images that a process takes at once; gradients accumulate. Default: 8 on a CPU, all on a GPU"
    )
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW")
    weight_decay: float = setting(0.0, "AdamW weight decay, on matrices and convolutions only")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after the warm-up")
    grad_clip: float | None = setting(None, "largest gradient norm; none by default, as DiT")
    nan: Literal["stop", "skip"] = setting(
        "stop", "what to do when a loss or gradient is not finite: stop before the update, or skip the step (and stop "
        "after ten in a row)"
    )
    sync_batchnorm: bool = setting(
        False, "BatchNorm over the micro-batches of all processes, instead of each process by itself"
    )
    ema_decay: float = setting(0.9999, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(False, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    seed: int = setting(0, "seed of weights, data order, noise, timesteps and label dropout")
    resume: str = setting("auto", "auto (newest state in the run folder), never, or the path of a state")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(None, "default: bf16 on a GPU that has it, else no")
    compile: bool = setting(False, "torch.compile the model")
    num_workers: int | None = setting(None, "data loading processes per rank. Default: 0 on a CPU, up to 8 on a GPU")
    tracker: Literal["tensorboard", "wandb", "none"] = setting("tensorboard", "where curves and sample grids go")
    log_every: int = setting(50, "steps between points of the tracker's curves")
    snapshot_every: int = setting(50_000, "steps between snapshots (with sample grids); the last step always has one")
    state_every: int = setting(5_000, "steps between training states; the newest two are kept")
    validate_every: int | None = setting(
        None, "steps between measurements on held-out data (the averaged weights; the same noise every time)"
    )
    validate_images: int = setting(1000, "held-out images to measure, at most")
    push_to_hub: str | None = setting(
        None, "OWNER/NAME on the Hugging Face hub: push the last snapshot there when the run is complete. A new "
        "repository is private; log in with `hf auth login` first"
    )

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "log_every", "snapshot_every", "state_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("micro_batch_size", "max_minutes", "validate_every", "validate_images", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} must be positive, not {value}")
        if not self.learning_rate > 0:
            raise InputError(f"--learning-rate must be positive, not {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema-decay must lie in [0, 1), not {self.ema_decay}")


def is_folder(data_dir: str) -> bool:
    """Whether ``--data-dir`` names an image folder, not tar shards or a data set of the library ``datasets``."""
    return data_dir.partition(":")[0] not in ("wds", "hf")


@dataclass(kw_only=True)
class DataSettings:
    """Which images to train on."""

    dataset: Literal["shapes", "digits"] = setting("shapes", "built-in data set, when --data-dir is not given")
    data_dir: str | None = setting(
        None, "folder with one sub-folder of images per class, as ImageNet's train folder; or wds:SHARDS.tar, or "
        "hf:DATASET[?split=...&image=...&label=...] (README, \"Your own data\")"
    )
    validate_dir: str | None = setting(None, "such data of held-out images, with the same classes")
    image_size: int = setting(256, "side of the (centre-cropped) images in pixels")
    num_images: int | None = setting(None, "how many different images of Shapes-1000 to draw. Default: a million")
    skip_corrupt: bool = setting(False, "pass over unreadable or too small images, naming and counting them")

    def run_folder(self, model: str) -> str:
        """The run folder of a model trained on these data, when none is named."""
        data = self.dataset
        if self.data_dir is not None:
            scheme, _, rest = self.data_dir.partition(":")
            path = Path(self.data_dir if is_folder(self.data_dir) else rest.partition("?")[0]).resolve()
            data = path.parent.name if scheme == "wds" else path.name
        return f"results/{model.replace('/', '-')}-{data}-{self.image_size}"


@dataclass(kw_only=True)
class TrainSettings(DataSettings, RunSettings):
    """Settings of ``scripts/train_dit.py``; the defaults are DiT's recipe for ImageNet 256 x 256."""

    model: str = setting("D-EMOv2-S-2", "a name of list_models()")
    model_options: dict[str, Any] | None = setting(None, "changes to the named model, e.g. '{depth: 6}'")
    image_size: int | None = setting(
        None, "side of the (centre-cropped) images in pixels. Default: 256, or that of --latents"
    )
    latents: str | None = setting(None, "folder that scripts/encode_latents.py wrote, instead of images")
    vae: str | None = setting(
        None, "codec: pixels, d-emo-f8, a local AutoencoderKL folder or a hub name. "
        "Default: that of --latents; else d-emo-f8 for built-in data, stabilityai/sd-vae-ft-ema for --data-dir"
    )
    cache_latents: bool = setting(False, "encode the data set once, before training, into the run folder")
    objective: Literal["eps", "flow"] | None = setting(
        None, "eps: predict the noise, and the variance by the variational bound; flow: predict the velocity of the "
        "straight path from data to noise, as SiT. Default: flow for SiT models, else eps"
    )
    init_from: str | None = setting(
        None, "fine-tune: start from this snapshot's weights. Classes and image size may be others; the rest may not"
    )
    unconditional: bool = setting(False, "one class for all images, no label dropout; --data-dir may then be flat")
    label_dropout: float = setting(0.1, "share of labels replaced by the null class, for guidance")
    label_init_std: float = setting(
        0.02, "spread of the label table at the start, as DiT; runs of a few thousand steps want 0.1 to 1, or they "
        "learn to draw before they learn to obey the class"
    )
    label_lr_scale: float = setting(1.0, "learning rate of the label table over that of the rest; as above, about 30")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass to save memory")
    preview_guidance: float = setting(4.0, "guidance scale of the sample grids")

    def run_folder(self, model: str) -> str:
        if self.latents is None:
            return super().run_folder(model)
        return f"results/{model.replace('/', '-')}-{Path(self.latents).resolve().name}"

    def __post_init__(self):
        super().__post_init__()
        if self.latents is not None and self.data_dir is not None:
            raise InputError(f"--latents {self.latents} takes the place of --data-dir {self.data_dir}; give one only")
        if self.latents is None and self.image_size is None:
            self.image_size = 256
        self.output_dir = self.output_dir or self.run_folder(self.model)
        if not 0 <= self.label_dropout <= 1:
            raise InputError(f"--label-dropout must lie in [0, 1], not {self.label_dropout}")
        is_sit = self.model.lower().startswith("sit-")
        if is_sit and self.objective == "eps":
            raise InputError(
                f"{self.model} is DiT with --objective flow; for --objective eps choose --model DiT{self.model[3:]}"
            )
        self.objective = self.objective or ("flow" if is_sit else "eps")
        if self.unconditional:
            self.label_dropout = 0.0
        if self.label_dropout == 0:
            self.preview_guidance = 1.0  # the null class is never trained


@dataclass(kw_only=True)
class EncodeSettings(DataSettings):
    """Settings of ``scripts/encode_latents.py``."""

    output: str = setting(help="folder for the shards and their index; a folder that was begun is gone on with")
    vae: str | None = setting(
        None, "codec: pixels, d-emo-f8, a local AutoencoderKL folder or a hub name. "
        "Default: d-emo-f8 for built-in data, stabilityai/sd-vae-ft-ema for --data-dir"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = setting("float16", "of the stored means and deviations")
    batch_size: int = setting(64, "images that a process encodes at once")
    shard_size: int = setting(4096, "images per file; what a stopped run may have to encode again")
    num_workers: int | None = setting(None, "data loading processes per rank. Default: 0 on a CPU, up to 8 on a GPU")

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


@dataclass(kw_only=True)
class ClassifierSettings(DataSettings, RunSettings):
    """Settings of ``scripts/train_classifier.py``; the defaults are the paper's recipe for ImageNet."""

    model: str = setting("emov2_1m", "a classifier name of list_models()")
    model_options: dict[str, Any] | None = setting(
        None, "changes to the named model, e.g. '{drop_path_rate: 0.1, window_size: 8}'; the window fits --image-size"
    )
    validate_dir: str | None = setting(
        None, "such data of held-out images, with the same classes. Default: the folder val in --data-dir, where that "
        "has both train and val"
    )
    image_size: int = setting(224, "side of the images in pixels")
    batch_size: int = setting(2048, "images per step over all processes (global)")
    learning_rate: float = setting(6e-3, "peak learning rate of AdamW")
    weight_decay: float = setting(0.05, "AdamW weight decay, on matrices and convolutions only")
    schedule: Literal["constant", "cosine"] = setting("cosine", "learning rate after the warm-up")
    epochs: float | None = setting(None, "passes over the data; sets --max-steps, and --warmup-steps by warmup_epochs")
    warmup_epochs: float = setting(20, "with --epochs: passes of linear warm-up, at most a tenth of them all")
    warmup_steps: int = setting(12_511, "steps of linear warm-up; 20 epochs of ImageNet")
    max_steps: int = setting(187_670, "optimizer steps of the whole run; 300 epochs of ImageNet")
    snapshot_every: int = setting(12_511, "steps between snapshots, each with its accuracy; the last step has one")
    grad_clip: float | None = setting(5.0, "largest gradient norm")
    ema_decay: float = setting(0.9998, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    label_smoothing: float = setting(0.1, "label smoothing of the cross-entropy")
    shift: float = setting(0.0, "random translation of the training images, as a share of their side")
    rand_augment: str | None = setting(
        None, "timm's name of a RandAugment policy for folders, or none. Default: rand-m9-mstd0.5-inc1, the paper's"
    )
    crop_scale: list[float] = setting([0.08, 1.0], "shares of an image's area that random crops of folders have")
    crop_share: float = setting(0.875, "when measuring: side of the centre crop over the image's shorter side")
    teacher: str | None = setting(
        None, "distillation: a timm model, a folder made by convert_weights.py, or a snapshot of a classifier"
    )
    teacher_weights: str | None = setting(None, "weights file of a timm teacher. Default: timm's pretrained ones")
    distill_weight: float = setting(5.0, "weight of the teacher's soft logits beside the labels")
    distill_tau: float = setting(1.0, "temperature of the soft logits")

    def __post_init__(self):
        super().__post_init__()
        self.output_dir = self.output_dir or self.run_folder(self.model)
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise InputError(f"--crop-scale must be two rising shares in (0, 1], not {self.crop_scale}")
        for name in ("distill_tau", "crop_share", "epochs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if self.crop_share > 1:
            raise InputError(f"--crop-share must be at most 1, not {self.crop_share}")
        if self.rand_augment is None:
            folder = self.data_dir is not None and is_folder(self.data_dir)
            self.rand_augment = "rand-m9-mstd0.5-inc1" if folder else "none"
        if self.rand_augment != "none" and self.data_dir is not None and not is_folder(self.data_dir):
            raise InputError(
                f"--rand-augment {self.rand_augment} needs a folder of images; with {self.data_dir} use none"
            )


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
    num_images: int | None = setting(None, "measure on so many images. Default: a folder's all, else at most 2,000")
    batch_size: int = setting(64, "images per forward pass")
    num_workers: int = setting(0, "data loading processes")
    output: str | None = setting(None, "JSON file to write the result to")


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
    guidance_scale: float | None = setting(
        None, "classifier-free guidance; 1 is none. Default: 4, or 1 for a snapshot trained without label dropout"
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
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.steps > 1000:
            raise InputError(f"--steps must be at most 1000, not {self.steps}")
        low, *rest = self.guidance_interval
        if len(rest) != 1 or not 0 <= low <= rest[0] <= 1:
            raise InputError(f"--guidance-interval must be two rising numbers in [0, 1], not {self.guidance_interval}")
        if self.interpolate is not None and (len(self.interpolate) != 2 or self.classes or self.num_images < 2):
            raise InputError("--interpolate takes two classes, at least two --num-images, and no --class")
        if self.format == "png" and (self.trajectory or self.interpolate):
            raise InputError("--format png writes single images; leave it out with --trajectory or --interpolate")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"--guidance-scale must be finite and not negative, not {self.guidance_scale}")

    def fill_in(self, *, objective: str, label_dropout: float) -> None:
        """Settle what depends on how the snapshot was trained.

        Raises:
            InputError: Guidance from a denoiser that never saw the null class.
        """
        self.scheduler = self.scheduler or DEFAULT_SCHEDULERS[objective]
        if label_dropout == 0 and self.guidance_scale not in (None, 1):
            raise InputError(
                f"--guidance-scale {self.guidance_scale:g} needs a null class, but this snapshot was trained without "
                "label dropout; use --guidance-scale 1"
            )
        if self.guidance_scale is None:
            self.guidance_scale = DEFAULT_GUIDANCE if label_dropout else 1.0


@dataclass(kw_only=True)
class JudgeSettings:
    """Settings of ``scripts/judge.py``."""

    checkpoint: str = setting(help="snapshot or run folder of the denoiser")
    classifier: str = setting(help="snapshot or run folder of a classifier of the same classes")
    data_dir: str | None = setting(None, "folder of real images, for a denoiser that was trained on a folder")
    num_images: int = setting(500, "images to draw and judge, spread evenly over the classes")
    guidance_scale: float = setting(1.5, "classifier-free guidance; 1 is none")
    steps: int = setting(30, "denoising steps of the snapshot's default sampler: dpm++, or euler for flow")
    output: str = setting(
        "samples/judged.png", "PNG of ten classes, ten drawings each, beside it the figures as JSON; written anew "
        "every time"
    )
    write_card: bool = setting(False, "put picture and figures into the snapshot's card too")


METRICS = ("fid", "sfid", "isc", "prc", "kid")
PUBLISHED_COUNT = 50_000
"""FID falls with the number of samples; tables are measured with this many."""


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
    output: str | None = setting(None, "folder for the pictures, written anew. Default: samples/explain-<image>")


@dataclass(kw_only=True)
class ExportSettings:
    """Settings of ``scripts/export.py``."""

    model: str = setting(
        help="a snapshot or run folder of a denoiser or classifier, a released .pth file, a folder made by "
        "convert_weights.py, or a name of list_models() with random weights", flag="MODEL"
    )
    output: str = setting(help="file to write, ending in .onnx, .pt2 (torch.export) or .mlpackage", flag="OUT")
    image_size: int | None = setting(None, "side of a classifier's images in pixels. Default: the classifier's")
    tolerance: float = setting(1e-4, "largest difference from PyTorch's outputs, as a share of the largest of them")


@dataclass(kw_only=True)
class ConvertSettings:
    """Settings of ``scripts/convert_weights.py``."""

    source: str = setting(help="a released .pth file, or a snapshot folder of a classifier", flag="IN")
    output: str = setting(help="folder to write model.safetensors and config.json to", flag="OUT")
    model: str | None = setting(None, "the variant that the file should hold. Default: whatever it holds")


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
            raise InputError("give either --samples (images that exist) or --checkpoint (a snapshot to draw from)")
        if self.reference is None and self.metrics != ["isc"]:
            raise InputError(f"--metrics {' '.join(self.metrics)} compares with real images; give --reference")
        if self.checkpoint is None:
            for name in ("save_npz", "save_png", "work_dir"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name.replace('_', '-')} is for images drawn from a --checkpoint only")
            return
        self.num_images = PUBLISHED_COUNT if self.num_images is None else self.num_images
        if self.num_images < 2:
            raise InputError(f"{self.num_images} images were asked for (--num-images); a covariance needs at least two")
        if not 1 <= self.steps <= 1000:
            raise InputError(f"--steps must lie between 1 and 1000, not {self.steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"--guidance-scale must be finite and not negative, not {self.guidance_scale}")


def parse_metrics(names: Sequence[str]) -> list[str]:
    """Metric names, separated by commas or one by one, in the order of tables and each once.

    Raises:
        InputError: A name that is none.
    """
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r} (--metrics); known are {', '.join(METRICS)}")
    if not wanted:
        raise InputError(f"--metrics names nothing to measure; known are {', '.join(METRICS)}")
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
            raise InputError(f"--batch-size {self.batch_size} is too small; use at least 1")
        if Path(self.output).suffix.lower() != ".npz" and not Path(self.output).is_dir():
            raise InputError(f"--output {self.output} must end in .npz")
        if self.num_workers < 0:
            raise InputError(f"--num-workers must not be negative, not {self.num_workers}")
        if self.kept_images < 0:
            raise InputError(f"--kept-images must not be negative, not {self.kept_images}")


@dataclass(kw_only=True)
class PlotSettings:
    """Settings of ``scripts/plot_loss.py``."""

    runs: list[str] = setting(help="run folders", flag="runs")
    output: str = setting("samples/loss.png", "PNG to write; written anew every time")
    published: str = setting("auto", "published curve on top: auto (of the runs' models), none, or a model's name")
    smooth: int = setting(0, "draw running means over so many steps")

    def __post_init__(self):
        if self.smooth < 0:
            raise InputError(f"--smooth must not be negative, not {self.smooth}")


def parse_settings(settings_class: type[S], description: str, argv: Sequence[str] | None = None) -> S:
    """Read settings from the command line; ``--config FILE`` reads YAML first, later flags override it.

    Raises:
        InputError: An unknown key or flag, or a value of a wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it")
    hints = get_type_hints(settings_class)
    for each in fields(settings_class):
        options: dict[str, Any] = {"type": hints[each.name], "help": each.metadata.get("help", "")}
        if each.default is not MISSING:
            options["default"] = each.default
        elif each.default_factory is not MISSING:
            options["default"] = each.default_factory()
            options["nargs"] = "+"
            options["type"] = options["type"].__args__[0]
        elif each.metadata.get("flag") == each.name:  # without dashes: positional
            parser.add_argument(each.name, nargs="+", type=options["type"].__args__[0], help=options["help"])
            continue
        else:
            options["required"] = True
        if options["type"] is bool:
            options |= {"nargs": "?", "const": True}  # --compile means --compile true
        if each.metadata.get("nargs"):
            options["nargs"], options["type"] = each.metadata["nargs"], str
        flag = each.metadata.get("flag") or "--" + each.name.replace("_", "-")
        if flag.isupper():  # the word for a positional argument in --help
            options.pop("required", None)
            parser.add_argument(each.name, metavar=flag, **options)
        else:
            parser.add_argument(flag, dest=each.name, **options)
    try:
        values = parser.parse_args(argv)
    except ArgumentError as error:
        message = " ".join(str(error).split())
        message = re.sub(r'Parser key "(\w+)":', lambda key: f"--{key[1].replace('_', '-')}:", message)
        message = re.sub(r"<class '(\w+)'>", r"\1", message)
        raise InputError(f"{message} (--help lists what is accepted)") from None
    return settings_class(**{each.name: values[each.name] for each in fields(settings_class)})


def write_yaml(settings: Any, path: Path) -> None:
    """Write resolved settings (a dataclass) for ``--config`` to read back; a kill leaves the old file or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    temporary.replace(path)


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's ``main``; an :class:`InputError` becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        sentence = str(error).splitlines()[-1]  # from a data worker it arrives below that worker's traceback
        print(f"error: {sentence.removeprefix('d_emo.config.InputError: ')}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
