"""Settings of training runs and of their data."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from d_emo.config.base import ReadingSettings, Settings, setting
from d_emo.config.exact import with_exact_snapshots
from d_emo.config.finetuning import FineTuningSettings
from d_emo.config.objective import ObjectiveSettings
from d_emo.config.of_latents import LatentClassifierSettings
from d_emo.config.paths import folder_of, followed, is_folder
from d_emo.config.ranges import (
    BelowOne,
    ClassifierSide,
    Colour,
    Count,
    Fraction,
    ImageSide,
    NotNegative,
    Positive,
    PositiveFraction,
    Seed,
    Whole,
    Workers,
)  # fmt: skip
from d_emo.errors import InputError
from d_emo.tables import DATASETS, FAMILIES, OBJECTIVES, OPTIMIZERS, family_of, parse_alignment

_SIDE = re.compile(r"-\d+$")  # of the patches, at the end of a denoiser's name


@dataclass(frozen=True, kw_only=True)
class RehearsedSettings(Settings):
    """What a run has that can be tried before."""

    dry_run: bool = setting(
        False, "train nothing: print what the data hold, steps an epoch, memory and time by trying a few images, and "
        "write a picture of these as the network sees them", resumable=True, group="Run"
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What every training run has in common: the loop of ``d_emo.training.loop.fit``."""

    output_dir: str | None = setting(
        None, "run folder: settings, snapshots, states, samples, logs. Default: results/<model>-<data>-<size>",
        resumable=True, group="Run", output="run"
    )
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 400,000", resumable=True, decisive=True
    )
    epochs: Positive | None = setting(
        None, "passes over the data, instead of --max-steps", resumable=True, decisive=True
    )
    max_minutes: Positive | None = setting(
        None, "save and stop after this many minutes; re-run the same command to resume", resumable=True
    )
    batch_size: Count = setting(256, "images per step over all processes (global)", group="Optimisation")
    micro_batch_size: Count | None = setting(
        None, "images that a process takes at once; gradients accumulate. Default: up to 8 on a CPU, all on a GPU",
        resumable=True, decisive=True
    )
    learning_rate: Positive = setting(1e-4, "peak learning rate of AdamW", aliases=["--lr"])
    weight_decay: NotNegative = setting(0.0, "AdamW weight decay, on matrices and convolutions only")
    warmup_steps: Whole = setting(0, "steps of linear warm-up")
    schedule: Literal["constant", "cosine", "constant-cosine"] = setting(
        "constant", "learning rate after the warm-up; constant-cosine: constant for the first half of the run"
    )
    grad_clip: Positive | None = setting(None, "largest gradient norm; none by default, as DiT")
    nan: Literal["stop", "skip"] = setting(
        "stop", "what to do when a loss or gradient is not finite: stop before the update, or skip the step (and stop "
        "after ten in a row)", resumable=True
    )
    sync_batchnorm: bool = setting(
        False, "BatchNorm over the micro-batches of all processes, instead of each process by itself"
    )
    ema_decay: BelowOne = setting(0.9999, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(False, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    seed: Seed = setting(0, "seed of weights, data order, noise, timesteps and label dropout")
    resume: str = setting(
        "auto", "auto (newest state in the run folder), never, or the path of a state", resumable=True,
        source="or a name"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(
        None, "default: bf16 on a GPU that has it, else no", resumable=True, decisive=True, group="Machine"
    )
    compile: bool = setting(False, "torch.compile the model", resumable=True)
    num_workers: Workers | None = setting(
        None, "data loading processes per rank. Default: 0 on a CPU, up to 8 on a GPU", resumable=True
    )
    tracker: Literal["tensorboard", "wandb", "none"] = setting(
        "tensorboard", "logger of metrics and sample grids", resumable=True, group="Output"
    )
    log_every: Count = setting(50, "steps between logged metrics", resumable=True)
    snapshot_every: Count = setting(
        50_000, "steps between snapshots (with sample grids); the last step always has one", resumable=True
    )
    state_every: Count = setting(5_000, "steps between training states; the newest two are kept", resumable=True)
    validate_every: Count | None = setting(
        None, "steps between measurements on held-out data (the averaged weights; the same noise every time)",
        resumable=True
    )
    validate_images: Count = setting(1000, "held-out images to measure, at most", resumable=True)
    push_to_hub: str | None = setting(
        None, "OWNER/NAME on the Hugging Face hub: push the last snapshot there when the run is complete. A new "
        "repository is private; log in with `hf auth login` first", resumable=True
    )

    def steps(self, images: int | None, default: int) -> int | None:
        """``max_steps``, or what ``epochs`` passes over so many images are; None where these are not known yet.

        Raises:
            InputError: They contradict each other.
        """
        if self.epochs is None or images is None:
            return self.max_steps or (default if self.epochs is None else None)
        steps = max(1, round(self.epochs * images / self.batch_size))
        if self.max_steps not in (None, steps):
            raise InputError(
                f"`epochs` {self.epochs:g} over {images:,} images are {steps:,} steps, but `max_steps` is "
                f"{self.max_steps:,}; give one of them (and the other as null, where a configuration says it)"
            )
        return steps


@dataclass(frozen=True, kw_only=True)
class DataSettings(ReadingSettings):
    """Which images to train on."""

    flip: bool | None = setting(
        None, "mirror images at random, in latents: store mirror images too; --no-flip for text, digits and whatever "
        "has a side. Default: yes for --data-dir, no for built-in data"
    )

    dataset: str = setting("shapes", "built-in data set, when --data-dir is not given", group="Data", choices=DATASETS)
    data_dir: str | None = setting(
        None, "folder with one sub-folder of images per class, as ImageNet's train folder; or wds:SHARDS.tar, or "
        "hf:DATASET[?split=...&image=...&label=...] (README, \"Your own data\")",
        resumable=True, decisive=True, source=True
    )
    image_size: ImageSide = setting(256, "side of the (centre-cropped) images in pixels")
    num_images: Count | None = setting(None, "number of different images of Shapes-1000. Default: a million")
    skip_corrupt: bool = setting(
        False, "pass over images that cannot be read, with their names and number", resumable=True
    )

    def run_folder(self, model: str) -> str:
        """The run folder of a model trained on these data, when none is named."""
        if (latents := getattr(self, "latents", None)) is not None:
            return f"results/{model.replace('/', '-')}-{followed(latents).name}"
        return f"results/{model.replace('/', '-')}-{self.data_name()}-{self.image_size}"

    def data_name(self) -> str:
        """What the images are called: the built-in data set, or the folder or repository of the user's own."""
        if self.data_dir is None:
            return self.dataset
        scheme, _, rest = self.data_dir.partition(":")
        path = followed(folder_of(self.data_dir if is_folder(self.data_dir) else rest.partition("?")[0]))
        return path.parent.name if scheme == "wds" else path.name


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings(DataSettings):
    """Which images to train on, and which to keep for measuring."""

    validate_dir: str | None = setting(
        None, "held-out images of the same classes, in the same form", resumable=True, source=True, group="Data"
    )

    def check(self) -> None:
        if self.validate_dir is not None and self.data_dir is getattr(self, "latents", None) is None:
            raise InputError(
                f"`validate_dir` {self.validate_dir} belongs to a `data_dir`; built-in data hold out some of their own"
            )
        super().check()


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ObjectiveSettings, FineTuningSettings, HeldOutSettings, RunSettings, RehearsedSettings):
    """Settings of ``scripts/train_dit.py``; the defaults are DiT's recipe for ImageNet 256 x 256."""

    exif: bool | None = setting(
        None, "turn images upright as their EXIF tag says; with --no-exif they stay as the file has them, as ADM, DiT "
        "and timm train on them. Default: yes, or as --latents were made", group="Images"
    )
    background: Colour | None = setting(
        None, "colour behind what is transparent, a name or '#rrggbb'. Default: white, or as --latents were made"
    )
    model: str | None = setting(None, "a name of list_models(). Default: D-EMOv2-S-2", group="Model")
    model_options: dict[str, Any] | None = setting(None, "changes to the named model, e.g. '{depth: 6}'")
    image_size: ImageSide | None = setting(
        None, "side of the (centre-cropped) images in pixels. Default: 256, or that of --latents"
    )
    latents: str | None = setting(
        None, "folder that d-emo encode wrote, instead of images",
        resumable=True, decisive=True, source=True
    )
    vae: str | None = setting(
        None, "codec: pixels, d-emo-f8, a local folder of a VAE, a run folder of train-vae (its newest snapshot, whose "
        "name is kept) or a hub name. "
        "Default: that of --latents; else d-emo-f8 for built-in data, stabilityai/sd-vae-ft-ema for --data-dir",
        source="or a name", snapshot=True
    )
    cache_latents: bool = setting(False, "encode the data set once, before training, into the run folder")
    unconditional: bool = setting(
        False, "one class for all images, no label dropout; --data-dir may then be flat", group="Objective"
    )
    label_dropout: Fraction = setting(
        0.1, "fraction of labels replaced by the null class, for classifier-free guidance"
    )
    label_init: Literal["normal", "names"] | None = setting(
        None, "initial class embeddings: normal, independent; names, sums of random vectors, one for each word of the "
        "class name, so that 'red star on sky' and 'red ring on sky' start out alike. Default: normal, or with "
        "--init-from those of the snapshot for the classes that it has"
    )
    label_init_std: NotNegative = setting(
        0.02, "standard deviation of the initial class embeddings, as DiT; runs of a few thousand steps need 0.1 to 1, "
        "or they learn images before they learn classes"
    )
    label_lr_scale: NotNegative = setting(
        1.0, "factor on the learning rate of the class embeddings; short runs need 3 to 30"
    )
    optimizer: str = setting(
        "adamw", "adamw; or muon: Muon on the matrices of the blocks, q, k and v apart, at the same learning rate, and "
        "AdamW on all else", choices=OPTIMIZERS
    )
    gradient_checkpointing: bool = setting(
        False, "recompute blocks in the backward pass to save memory", resumable=True
    )
    preview_guidance: NotNegative = setting(4.0, "guidance scale of the sample grids", resumable=True)

    def check(self) -> None:
        if self.latents is not None and self.data_dir is not None:
            raise InputError(f"`latents` {self.latents} takes the place of `data_dir` {self.data_dir}; give one only")
        if self.align is not None and parse_alignment(self.align)[0].images:
            if given := "latents" if self.latents is not None else "cache_latents" if self.cache_latents else None:
                raise InputError(f"`align` {self.align} looks at images, of which `{given}` leaves none; use vae")
        if self.optimizer == "muon" and self.train != "all":
            raise InputError(f"`optimizer` muon is for whole matrices; with `train` {self.train} use adamw")
        super().check()
        family = self.model and family_of(self.model)
        kin = [row for row in FAMILIES.values() if family and (row.block, row.frame) == (family.block, family.frame)]
        first = kin[0] if kin else family
        if family is not first and self.objective not in (None, family.objective):
            raise InputError(
                f"{self.model} is {first.name} with `objective` {family.objective}; for `objective` {self.objective} "
                f"choose `model` {first.name}{self.model[len(family.name):]}"
            )

    def resolve(self, **facts: Any) -> TrainSettings:
        """Fill in what is left open: ``image_size`` by the facts of the data, all else by the others.

        Args:
            facts: "image_size" of the data, once they are open, "vae", by which their codec is opened again, "images",
                how many there are, and "exif", "background" and "flip".
        """
        self = self.settled()
        model = self.model or "D-EMOv2-S-2"
        family = family_of(model)
        objective = family.objective if family else next(iter(OBJECTIVES))  # a name that nobody knows is refused later
        chosen = self.objective or objective
        few_steps = chosen in OBJECTIVES and OBJECTIVES[chosen].steps is not None  # drawn as it is trained: unguided
        dropout = 0.0 if self.unconditional or few_steps else self.label_dropout
        size = self.image_size or facts.get("image_size") or (256 if self.latents is None else None)
        left_open = [name for name in ("exif", "background", "flip") if getattr(self, name) is None]
        return with_exact_snapshots(replace(
            self, model=model, image_size=size, max_steps=self.steps(facts.get("images"), 400_000),
            output_dir=self.output_dir or replace(self, image_size=size).run_folder(model),
            **{name: facts.get(name) for name in left_open}, **self.objective_settings(self.objective or objective),
            vae=facts.get("vae", self.vae), label_dropout=dropout,
            preview_guidance=self.preview_guidance if dropout else 1.0,  # else the null class is never trained
        ))  # fmt: skip

    def same_model(self, there: dict[str, Any]) -> bool:
        """Whether the model is the snapshot's but for the patch size that ends its name, or left open."""
        mine, theirs = (_SIDE.sub("", str(name).replace("/", "-").lower()) for name in (self.model, there.get("model")))
        return self.model is None or mine == theirs

    def options_there(self, there: dict[str, Any]) -> dict[str, Any]:
        options = super().options_there(there)
        if self.model is None or super().same_model(there):
            return options
        return {name: value for name, value in options.items() if name != "patch_size"}  # the model's name has it

    def taken(self, there: dict[str, Any]) -> list[str]:
        names = ["vae", "image_size"] if self.latents is None else []  # what is encoded has its own
        if self.same_model(there):
            names += ["model", "objective"]
            names += self.timesteps_taken(there)
        return names


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(FineTuningSettings, LatentClassifierSettings, HeldOutSettings, RunSettings, RehearsedSettings):
    """Settings of ``scripts/train_classifier.py``; the defaults are the paper's recipe for ImageNet."""

    validate_dir: str | None = setting(
        None, "held-out images of the same classes, in the same form. Default: the folder val in --data-dir, where "
        "that has both train and val", resumable=True, source=True, group="Data"
    )
    model: str | None = setting(
        None, "a classifier name of list_models(), or timm:NAME for one of timm's. Default: emov2_1m", group="Model"
    )
    model_options: dict[str, Any] | None = setting(
        None, "changes to the named model, e.g. '{drop_path_rate: 0.1, window_size: 8}'; the window fits --image-size"
    )
    image_size: ClassifierSide | None = setting(
        None, "side of the images in pixels. Default: 224; of --latents: 4 times theirs, at least 32"
    )
    batch_size: Count = setting(2048, "images per step over all processes (global)", group="Optimisation")
    learning_rate: Positive = setting(6e-3, "peak learning rate of AdamW", aliases=["--lr"])
    weight_decay: NotNegative = setting(0.05, "AdamW weight decay, on matrices and convolutions only")
    schedule: Literal["constant", "cosine", "constant-cosine"] = setting("cosine", "learning rate after the warm-up")
    epochs: Positive | None = setting(
        None, "passes over the data, instead of --max-steps; sets --warmup-steps by --warmup-epochs",
        resumable=True, decisive=True
    )
    warmup_epochs: NotNegative = setting(20, "with --epochs: passes of linear warm-up, at most a tenth of them all")
    warmup_steps: Whole = setting(12_511, "steps of linear warm-up; 20 epochs of ImageNet")
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 187,670, 300 epochs of ImageNet", resumable=True,
        decisive=True
    )
    snapshot_every: Count = setting(
        12_511, "steps between snapshots, each with its accuracy; the last step has one", resumable=True
    )
    grad_clip: Positive | None = setting(5.0, "largest gradient norm")
    ema_decay: BelowOne = setting(0.9998, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    label_smoothing: Fraction = setting(0.1, "label smoothing of the cross-entropy", group="Loss")
    shift: NotNegative = setting(
        0.0, "random translation of the training images, as a fraction of their side", group="Augmentation"
    )
    noise: Fraction = setting(
        0.0, "mix training images with normal noise, (1 - t) image + t noise, t uniform up to this; for classifiers "
        "whose features d-emo distill uses (--fd-features)"
    )
    rand_augment: str | None = setting(
        None, "timm's name of a RandAugment policy for folders, or none. Default: rand-m9-mstd0.5-inc1, the paper's"
    )
    crop_scale: list[PositiveFraction] = setting(
        [0.08, 1.0], "range of the area of random crops of folders, as fractions of the image's area"
    )
    crop_share: PositiveFraction = setting(
        0.875, "in evaluation: side of the centre crop over the image's shorter side"
    )
    teacher: str | None = setting(
        None, "distillation: a timm model, a released EMO file, a folder made by d-emo convert, or a snapshot "
        "of a classifier", group="Distillation", source="or a name", snapshot=True
    )
    teacher_weights: str | None = setting(
        None, "weights file of a timm teacher. Default: timm's pretrained ones", source=True
    )
    distill_weight: NotNegative = setting(
        5.0, "weight of the distillation loss (the teacher's soft logits), relative to that of the labels"
    )
    distill_tau: Positive = setting(1.0, "temperature of the soft logits")

    def check(self) -> None:
        if not (len(self.crop_scale) == 2 and self.crop_scale[0] <= self.crop_scale[1]):
            raise InputError(f"`crop_scale` must be two rising shares in (0, 1], not {self.crop_scale}")
        super().check()
        if self.rand_augment not in (None, "none") and self.data_dir is not None and not is_folder(self.data_dir):
            raise InputError(
                f"`rand_augment` {self.rand_augment} needs a folder of images; with {self.data_dir} use none"
            )

    def resolve(self, **facts: Any) -> ClassifierSettings:
        """Fill in what is left open; ``epochs`` and a folder with train and val once the data are known.

        Args:
            facts: "images", how many there are to train on, and "flip" of them; "validate_dir", where the data bring
                held-out ones; "image_size", of latents.
        """
        self = self.settled()
        folder, model = self.data_dir is not None and is_folder(self.data_dir), self.model or "emov2_1m"
        size = self.image_size or (224 if self.latents is None else facts.get("image_size"))
        warmup = self.warmup_steps
        if self.epochs is not None and "images" in facts:
            warmup = round(min(self.warmup_epochs, self.epochs / 10) * facts["images"] / self.batch_size)
        return with_exact_snapshots(replace(
            self, model=model, image_size=size, max_steps=self.steps(facts.get("images"), 187_670), warmup_steps=warmup,
            output_dir=self.output_dir or replace(self, image_size=size).run_folder(model),
            rand_augment=self.rand_augment or ("rand-m9-mstd0.5-inc1" if folder else "none"),
            validate_dir=self.validate_dir or facts.get("validate_dir"),
            flip=facts.get("flip") if self.flip is None else self.flip,
        ))  # fmt: skip
