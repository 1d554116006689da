"""Settings of what trains and of what prepares training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d_emo.config.base import check_image_side, setting
from d_emo.errors import InputError


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
                raise InputError(f"`{name}` must be at least 1, not {getattr(self, name)}")
        for name in ("micro_batch_size", "max_minutes", "validate_every", "validate_images", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"`{name}` must be positive, not {value}")
        if not self.learning_rate > 0:
            raise InputError(f"`learning_rate` must be positive, not {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"`ema_decay` must lie in [0, 1), not {self.ema_decay}")


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
    timestep_sampling: Literal["uniform", "logit-normal"] = setting(
        "uniform", "how training draws timesteps t in [0, T): uniform, as DiT and SiT, or logit-normal: the logit of "
        "t / T is normal, so that the middle comes more often and short runs learn shapes sooner"
    )
    logit_mean: float = setting(0.0, "of logit-normal: mean of the logit; 0 is half-way, negative is less noise")
    logit_std: float = setting(1.0, "of logit-normal: standard deviation of the logit")
    init_from: str | None = setting(
        None, "fine-tune: start from this snapshot's weights. Classes and image size may be others; the rest may not"
    )
    unconditional: bool = setting(False, "one class for all images, no label dropout; --data-dir may then be flat")
    label_dropout: float = setting(0.1, "share of labels replaced by the null class, for guidance")
    label_init: Literal["normal", "names"] | None = setting(
        None, "label table at the start: normal, each class by itself; names, sums of random vectors, one for each "
        "word of the class name, so that 'red star on sky' and 'red ring on sky' start out alike. Default: normal, or "
        "with --init-from that snapshot's rows, where it knows the class"
    )
    label_init_std: float = setting(
        0.02, "spread of the label table at the start, as DiT; runs of a few thousand steps want 0.1 to 1, or they "
        "learn to draw before they learn to obey the class"
    )
    label_lr_scale: float = setting(1.0, "learning rate of the label table over that of the rest; as above, 3 to 30")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass to save memory")
    preview_guidance: float = setting(4.0, "guidance scale of the sample grids")

    def run_folder(self, model: str) -> str:
        if self.latents is None:
            return super().run_folder(model)
        return f"results/{model.replace('/', '-')}-{Path(self.latents).resolve().name}"

    def __post_init__(self):
        super().__post_init__()
        if self.latents is not None and self.data_dir is not None:
            raise InputError(f"`latents` {self.latents} takes the place of `data_dir` {self.data_dir}; give one only")
        if self.latents is None and self.image_size is None:
            self.image_size = 256
        self.output_dir = self.output_dir or self.run_folder(self.model)
        if not 0 <= self.label_dropout <= 1:
            raise InputError(f"`label_dropout` must lie in [0, 1], not {self.label_dropout}")
        if not self.logit_std > 0:
            raise InputError(f"`logit_std` must be positive, not {self.logit_std}")
        is_sit = self.model.lower().startswith("sit-")
        if is_sit and self.objective == "eps":
            raise InputError(
                f"{self.model} is DiT with `objective` flow; for `objective` eps choose `model` DiT{self.model[3:]}"
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
                raise InputError(f"`{name}` must be at least 1, not {getattr(self, name)}")


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
        None, "distillation: a timm model, a released EMO file, a folder made by convert_weights.py, or a snapshot "
        "of a classifier"
    )
    teacher_weights: str | None = setting(None, "weights file of a timm teacher. Default: timm's pretrained ones")
    distill_weight: float = setting(5.0, "weight of the teacher's soft logits beside the labels")
    distill_tau: float = setting(1.0, "temperature of the soft logits")

    def __post_init__(self):
        super().__post_init__()
        check_image_side(self.image_size)
        self.output_dir = self.output_dir or self.run_folder(self.model)
        for name in ("weight_decay", "warmup_steps", "warmup_epochs", "distill_weight", "shift"):
            if not getattr(self, name) >= 0:
                raise InputError(f"`{name}` must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.label_smoothing <= 1:
            raise InputError(f"`label_smoothing` must lie in [0, 1], not {self.label_smoothing}")
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise InputError(f"`crop_scale` must be two rising shares in (0, 1], not {self.crop_scale}")
        for name in ("distill_tau", "crop_share", "epochs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"`{name}` must be positive, not {getattr(self, name)}")
        if self.crop_share > 1:
            raise InputError(f"`crop_share` must be at most 1, not {self.crop_share}")
        if self.rand_augment is None:
            folder = self.data_dir is not None and is_folder(self.data_dir)
            self.rand_augment = "rand-m9-mstd0.5-inc1" if folder else "none"
        if self.rand_augment != "none" and self.data_dir is not None and not is_folder(self.data_dir):
            raise InputError(
                f"`rand_augment` {self.rand_augment} needs a folder of images; with {self.data_dir} use none"
            )
