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


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one clear sentence with a remedy; exit code 2."""


def setting(default: Any = MISSING, help: str = "", flag: str | None = None) -> Any:
    """A field of a settings class: its default and the sentence that ``--help`` shows."""
    metadata = {"help": help, "flag": flag}
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
    batch_size: int = setting(256, "images per step over all processes (global)")
    micro_batch_size: int | None = setting(
        None, "images that a process takes at once; gradients accumulate. Default: 32 on a CPU, all on a GPU"
    )
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW")
    weight_decay: float = setting(0.0, "AdamW weight decay, on matrices and convolutions only")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after the warm-up")
    grad_clip: float | None = setting(None, "largest gradient norm; none by default, as DiT")
    ema_decay: float = setting(0.9999, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(False, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    seed: int = setting(0, "seed of weights, data order, noise, timesteps and label dropout")
    resume: str = setting("auto", "auto (newest state in the run folder), never, or the path of a state")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(None, "default: bf16 on a GPU that has it, else no")
    compile: bool = setting(False, "torch.compile the model")
    num_workers: int | None = setting(None, "data loading processes per rank. Default: 0 on a CPU, up to 8 on a GPU")
    log_every: int = setting(50, "steps between TensorBoard points")
    snapshot_every: int = setting(50_000, "steps between snapshots (with sample grids); the last step always has one")
    state_every: int = setting(5_000, "steps between training states; the newest two are kept")

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "log_every", "snapshot_every", "state_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise InputError(f"--micro-batch-size must be at least 1, not {self.micro_batch_size}")
        if not self.learning_rate > 0:
            raise InputError(f"--learning-rate must be positive, not {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema-decay must lie in [0, 1), not {self.ema_decay}")


@dataclass(kw_only=True)
class DataSettings:
    """Which images to train on."""

    dataset: Literal["shapes", "digits"] = setting("shapes", "built-in data set, when --data-dir is not given")
    data_dir: str | None = setting(None, "folder with one sub-folder of images per class, as ImageNet's train folder")
    image_size: int = setting(256, "side of the (centre-cropped) images in pixels")
    num_images: int | None = setting(None, "how many different images of Shapes-1000 to draw. Default: a million")
    skip_corrupt: bool = setting(False, "pass over unreadable or too small images, naming and counting them")

    def run_folder(self, model: str) -> str:
        """The run folder of a model trained on these data, when none is named."""
        data = self.dataset if self.data_dir is None else Path(self.data_dir).resolve().name
        return f"results/{model.replace('/', '-')}-{data}-{self.image_size}"


@dataclass(kw_only=True)
class TrainSettings(DataSettings, RunSettings):
    """Settings of ``scripts/train_dit.py``; the defaults are DiT's recipe for ImageNet 256 x 256."""

    model: str = setting("D-EMOv2-S-2", "a name of list_models()")
    model_options: dict[str, Any] | None = setting(None, "changes to the named model, e.g. '{depth: 6}'")
    vae: str | None = setting(
        None, "codec: pixels, d-emo-f8, a local AutoencoderKL folder or a hub name. "
        "Default: d-emo-f8 for built-in data, stabilityai/sd-vae-ft-ema for --data-dir"
    )
    cache_latents: bool = setting(False, "encode the data set once, before training, and keep the latents in memory")
    objective: Literal["eps"] = setting("eps", "eps: predict the noise, and the variance by the variational bound")
    label_dropout: float = setting(0.1, "share of labels replaced by the null class, for guidance")
    label_init_std: float = setting(
        0.02, "spread of the label table at the start, as DiT; runs of a few thousand steps want 0.1 to 1, or they "
        "learn to draw before they learn to obey the class"
    )
    label_lr_scale: float = setting(1.0, "learning rate of the label table over that of the rest; as above, about 30")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass to save memory")
    preview_guidance: float = setting(4.0, "guidance scale of the sample grids")

    def __post_init__(self):
        super().__post_init__()
        self.output_dir = self.output_dir or self.run_folder(self.model)
        if not 0 <= self.label_dropout <= 1:
            raise InputError(f"--label-dropout must lie in [0, 1], not {self.label_dropout}")


@dataclass(kw_only=True)
class ClassifierSettings(DataSettings, RunSettings):
    """Settings of ``scripts/train_classifier.py``; the defaults are the paper's recipe for ImageNet."""

    model: str = setting("emov2_1m", "a classifier name of list_models()")
    model_options: dict[str, Any] | None = setting(
        None, "changes to the named model, e.g. '{drop_path_rate: 0.1, window_size: 8}'; the window fits --image-size"
    )
    val_dir: str | None = setting(
        None, "folder of images to measure accuracy on, laid out as --data-dir. Default: --data-dir has train and val"
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
        None, "timm's name of a RandAugment policy for --data-dir, or none. Default: rand-m9-mstd0.5-inc1, the paper's"
    )
    crop_scale: list[float] = setting([0.08, 1.0], "shares of an image's area that random crops of --data-dir have")
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
            self.rand_augment = "none" if self.data_dir is None else "rand-m9-mstd0.5-inc1"


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

    classes: list[str] = setting([], "class ids or names, e.g. --class 207 or --class cat dog", flag="--class")
    checkpoint: str | None = setting(
        None, "snapshot folder. Default: the newest under results/, else the one that ships with the package"
    )
    num_images: int = setting(8, "images per class")
    guidance_scale: float = setting(4.0, "classifier-free guidance; 1 is none")
    scheduler: Literal["ddpm", "ddim", "dpm++"] = setting("dpm++", "sampler")
    steps: int = setting(30, "denoising steps (tables of DiT use --scheduler ddpm --steps 250)")
    seed: int = setting(0, "image i starts from the noise of seed + i")
    batch_size: int = setting(64, "images denoised at once")
    output: str | None = setting(None, "PNG to write. Default: samples/<classes>-seed<seed>.png, numbered if it exists")

    def __post_init__(self):
        if not self.classes:
            raise InputError("name at least one class: --class 207, or several ids or names")
        for name in ("num_images", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.steps > 1000:
            raise InputError(f"--steps must be at most 1000, not {self.steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"--guidance-scale must be finite and not negative, not {self.guidance_scale}")


@dataclass(kw_only=True)
class JudgeSettings:
    """Settings of ``scripts/judge.py``."""

    checkpoint: str = setting(help="snapshot or run folder of the denoiser")
    classifier: str = setting(help="snapshot or run folder of a classifier of the same classes")
    data_dir: str | None = setting(None, "folder of real images, for a denoiser that was trained on a folder")
    num_images: int = setting(500, "images to draw and judge, spread evenly over the classes")
    guidance_scale: float = setting(1.5, "classifier-free guidance; 1 is none")
    steps: int = setting(30, "denoising steps of dpm++")
    output: str = setting("samples/judged.png", "PNG of ten classes, ten drawings each; written anew every time")


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

    samples: str = setting(help="folder of images, or .npz in ADM's layout, to judge")
    reference: str = setting(help="folder of real images, or .npz (arr_0, or mu and sigma), to compare with")
    features: str = setting("inception", "inception, or emov2:SNAPSHOT for a classifier trained here")
    inception_weights: str | None = setting(None, "file of torch-fidelity's Inception weights")
    num_images: int | None = setting(None, "use only so many samples. Default: all")
    batch_size: int = setting(64, "images per forward pass")
    output: str | None = setting(None, "JSON file to write the result to")


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
        else:
            options["required"] = True
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
    """Write resolved settings (a dataclass) so that ``--config`` reads them back."""
    path.write_text(yaml.safe_dump(asdict(settings), sort_keys=False))


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's ``main``; an :class:`InputError` becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        sentence = str(error).splitlines()[-1]  # from a data worker it arrives below that worker's traceback
        print(f"error: {sentence.removeprefix('d_emo.config.InputError: ')}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
