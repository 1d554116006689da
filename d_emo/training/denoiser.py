"""The task of training a denoiser on latents."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from d_emo.config import TrainSettings
from d_emo.data import ClassImages, OneClass, Reading, in_recorded_order, open_dataset, open_held_out, spread
from d_emo.errors import InputError
from d_emo.frechet import RunningMoments
from d_emo.io.card import describe_hardware
from d_emo.io.snapshot import load_meta, pipeline_index, save_denoiser
from d_emo.latents import Codec, LatentDataset, default_codec, encode, latent_side, load_codec, sample_moments
from d_emo.models import create_model
from d_emo.models.counting import trained_parameters
from d_emo.models.registry import check_kind, check_memory, frame_of
from d_emo.objective import StepNoise
from d_emo.tables import DATASETS, OBJECTIVES, check_start, load
from d_emo.text import command
from d_emo.training.finetuning import start_from, train_only
from d_emo.training.judging import open_judge
from d_emo.training.parallel import precision_of
from d_emo.training.progress import means
from d_emo.training.rehearsal import TYPES
from d_emo.training.words import start_from_words
from d_emo.weights import check_library

OF_TRAINING = ("projector", "moments")
"""Parts of a model that training states keep and snapshots have not: of alignment, and of objectives of few steps."""

BASE_SIZE = 4 * 32 * 32
"""Values of the latents that are not shifted: Stable Diffusion's at 256 px, as in RAE (Zheng et al., 2025)."""


class DenoiserTask:
    """Class-conditional diffusion in the latents of a codec, by one of ``OBJECTIVES``.

    Args:
        settings: Resolved settings; ``vae`` and ``image_size`` are filled in if they were left open.

    Raises:
        InputError: Settings that cannot work together; a data set, codec or model that cannot be opened.
    """

    smaller = "A small one for such a machine: `d-emo train --config configs/shapes64_ti.yaml`."

    def __init__(self, settings: TrainSettings):
        check_library()
        if settings.init_from is not None:
            load_meta(settings.init_from)  # which is of a denoiser
        settings = settings.resolve()
        check_kind(settings.model, "denoiser")
        frame = frame_of(settings.model)
        self.dataset, self.codec, self.facts = _open_data(settings)
        self.settings = settings = settings.resolve(**self.facts)
        self.images = self.dataset
        self.held_out = None
        if settings.validate_every:
            self.held_out = open_held_out(settings, self.images.class_names, one_class=settings.unconditional)
        self.encoded = settings.latents is not None or settings.cache_latents
        size = latent_side(self.codec, settings.image_size)
        options = frame.settings_for((self.codec.channels, size, size), len(self.images.class_names))
        taken = sorted({"name", *options} & (settings.model_options or {}).keys())
        if taken:
            raise InputError(
                f"`model_options` names {', '.join(taken)}, which the data and the codec decide; leave it out"
            )
        if settings.model_options:
            check_memory(settings.model, **options, **settings.model_options)
        torch.manual_seed(settings.seed)
        self.model = create_model(settings.model, **options, **(settings.model_options or {}))
        _init_labels(self.model.label_rows(), self.images.class_names, settings)
        self.parameters = trained_parameters(self.model)
        self.start, self.started_from = [], None
        if settings.init_from is not None:
            words, self.started_from = start_from(
                settings.init_from, self.model, class_names=self.images.class_names, objective=settings.objective,
                keep_labels=settings.label_init is None, train=settings.train,
            )
            head = (self.model.label_parameter, *self.model.head)
            self.start = [words, settings.as_there(), train_only(self.model, settings.train, head=head)]
        self.lr_scales = {self.model.label_parameter: settings.label_lr_scale}
        if settings.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.objective = load(OBJECTIVES[settings.objective].loss)(
            null_class=self.model.null_class, label_dropout=settings.label_dropout,
            learn_sigma=self.model.predicts_variance,
            logit_normal=(settings.logit_mean, settings.logit_std) if settings.timestep_sampling != "uniform" else None,
            **_terms(settings, self.model.latent_shape),
        )
        self.scheduler = self.objective.noise_schedule()
        self.averaged, self.judge = self.model, None
        if OBJECTIVES[settings.objective].starts_from is not None:
            self._judge_by(settings)
        self.alignment = None
        if settings.align is not None:
            from d_emo.training.alignment import Alignment  # and timm, which takes a second

            self.alignment = Alignment(self.model, settings.align, settings.align_weight, settings.align_block)
            self.alignment.target.teacher = self._under_less_noise

    def _judge_by(self, settings: TrainSettings) -> None:
        """What the objectives of few steps need: a judge, and a place for its statistics in the model."""
        check_start(settings.objective, settings.init_from and pipeline_index(settings.init_from)["objective"])
        self.judge = open_judge(
            settings, self.codec, self.images.class_names, latent_side=self.model.latent_shape[1], encoded=self.encoded
        )
        channels = self.codec.channels if self.judge.codec is None else 3
        with torch.no_grad():
            dim = self.judge.features(torch.zeros(1, channels, *[self.judge.side] * 2)).shape[1]
        self.model.moments = nn.ModuleList(
            RunningMoments(self.judge.width(dim), settings.fd_decay) for _ in range(self.objective.steps)
        )
        self.objective.kept = {"judge": self.judge, "moments": self.model.moments, "average": self._average}

    def _average(self, *args: Any, **options: Any) -> Any:
        """The moving average, at the precision of the run."""
        device = args[0].device
        precision = precision_of(self.settings, device)
        with torch.autocast(device.type, TYPES.get(precision), enabled=precision in TYPES):
            return self.averaged(*args, **options)

    @torch.no_grad()
    def _learn_real_images(self, device: torch.device) -> None:
        self.judge.to(device)
        features, labels = [], []
        chosen = spread(len(self.images), self.settings.fd_images)
        generator = torch.Generator(device).manual_seed(self.settings.seed)  # of all noise, alike on a resume
        for start in range(0, len(chosen), 32):
            values, classes = default_collate([self.dataset[index][:2] for index in chosen[start : start + 32]])
            values, step = values.to(device), self.draw(generator, len(values))
            seen = self._latents(values, step) if self.judge.codec is None else self._mirrored(values, step)
            features.append(self.judge.features(seen, generator))
            labels.append(classes.to(device))
        self.judge.learn(torch.cat(features), torch.cat(labels))

    def introduction(self) -> list[str]:
        settings, millions = self.settings, self.parameters / 1e6
        built_in, shape = DATASETS[settings.dataset], " x ".join(map(str, self.model.latent_shape))
        classes = f"{len(self.images.class_names)} classes, " * (len(self.images.class_names) > 1)
        trained = "trained " * (settings.train == "all")  # else a line below says how many are
        lines = [
            f"No data named: training on the built-in {built_in.title}, drawn on the fly. For ImageNet: "
            f"`{command('train', 'train_dit.py')} --data-dir /path/to/imagenet/train`"
        ] if settings.data_dir is settings.latents is None and built_in.drawn else []  # fmt: skip
        return [
            *lines,
            f"{settings.model}: {millions:.2f} M {trained}parameters, {classes}latents {shape} from "
            f"{self.codec.name}, {len(self.images):,} images; run folder {settings.output_dir}",
            *filter(None, [self.images.left_out, *self.start]),
        ]

    def keep_classes(self, recorded: Sequence[str] | None) -> None:
        self.dataset = self.images = in_recorded_order(self.images, recorded)
        self.held_out = self.held_out and in_recorded_order(self.held_out, self.images.class_names)

    def prepare(self, device: torch.device, folder: Path) -> None:
        self.codec.to(device)
        self.objective.to(device)
        if self.alignment is not None:
            self.alignment.target.to(device)
        if self.encoded and self.settings.latents is None:
            encode(self.images, self.codec, folder / "latents", device=device)
            self.dataset = LatentDataset(folder / "latents")
        if self.judge is not None:
            self._learn_real_images(device)

    def draw(self, generator: torch.Generator, batch_size: int) -> StepNoise:
        return self.objective.draw(generator, batch_size, self.model.latent_shape)

    def loss(self, model: nn.Module, batch: list[torch.Tensor], step: StepNoise) -> dict[str, torch.Tensor]:
        values, labels = batch
        if self.judge is not None:  # whose own noise is all that it needs, but for the loss of flow
            latents = self._latents(values, step) if self.settings.flow_weight else step.noise
            return self.objective(model, latents, labels, step)
        latents = self._latents(values, step)
        if self.alignment is None:
            return self.objective(model, latents, labels, step)
        recorded = Recorded(model)
        losses = self.objective(recorded, latents, labels, step)
        images = self._mirrored(values, step) if self.alignment.needs_images else None
        aligned = self.alignment.loss(recorded.output.features, images, latents, labels, step)
        return {**losses, "loss": losses["loss"] + self.alignment.weight * aligned, "align": aligned.detach()}

    def _under_less_noise(
        self, latents: torch.Tensor, labels: torch.Tensor, step: StepNoise, share: torch.Tensor
    ) -> torch.Tensor:
        """What the moving average makes of latents whose timestep is less by a share of T. Shape: share (B,)."""
        less = (step.timesteps - share * self.objective.num_train_timesteps).clamp(min=0).to(step.timesteps.dtype)
        noisy = self.objective.noised(latents, step._replace(timesteps=less))
        labels = torch.where(step.drop_label, self.model.null_class, labels)
        return self.averaged.features(self.alignment.later_block, noisy, less, labels)

    def seen(self, batch: list[torch.Tensor], step: StepNoise) -> torch.Tensor:
        return self.codec.decode(self._latents(batch[0], step))

    @torch.no_grad()
    def _latents(self, values: torch.Tensor, step: StepNoise) -> torch.Tensor:
        """Latents of images or of stored moments, mirrored where the draw says so. Shape: -> (B, C, h, w)."""
        if not self.encoded:
            moments = self.codec.moments(self._mirrored(values, step))
        else:
            moments = values.float()
            if self.images.flip:
                plain, mirrored = moments.chunk(2, dim=1)
                moments = torch.where(step.flip[:, None, None, None], mirrored, plain)
        return sample_moments(moments, step.posterior_noise)

    def _mirrored(self, images: torch.Tensor, step: StepNoise) -> torch.Tensor:
        """Images, mirrored where the draw says so. Shape: (B, 3, H, W) -> same."""
        return torch.where(step.flip[:, None, None, None] & self.images.flip, images.flip(-1), images)

    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Sums of the losses over this process's held-out images, and their number.

        Noise and timestep of an image come from its index alone; no label is dropped.
        """
        device, batch_size = next(model.parameters()).device, 32
        mine = spread(len(self.held_out), self.settings.validate_images)[rank::world_size]
        totals: dict[str, torch.Tensor] = {}
        for start in range(0, max(1, len(mine)), batch_size):
            indices = mine[start : start + batch_size]
            count, indices = len(indices), indices or [0]  # a process without any still names its sums
            images, labels = default_collate([self.held_out[index] for index in indices])
            step = StepNoise(*(torch.cat(part).to(device) for part in zip(
                *(self.draw(torch.Generator().manual_seed(index), 1) for index in indices), strict=True
            )))
            step = step._replace(drop_label=torch.zeros_like(step.drop_label))
            latents = sample_moments(self.codec.moments(images.to(device)), step.posterior_noise)
            losses = self.objective(model, latents, labels.to(device), step)
            for name, value in {**losses, "count": torch.ones((), device=device)}.items():
                totals[name] = totals.get(name, 0) + value.float() * count
        return totals

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return means(sums)

    def remarks(self, count: Callable[[torch.Tensor], Any]) -> list[str]:
        return self.images.remarks(count)

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings = self.settings
        meta = {
            "step": step, "weights": "ema", "model": settings.model, "objective": settings.objective,
            "codec": self.codec.name, "encoder": self.codec.fingerprint, "scaling": self.codec.scaling,
            "shift": self.codec.shift, "image_size": settings.image_size, "data": self.images.name,
            "class_names": self.images.class_names, "label_dropout": settings.label_dropout,
            "num_images": len(self.images), "parameters": self.parameters,
            "training_minutes": round(minutes, 1), "hardware": describe_hardware(next(model.parameters()).device),
        }
        if self.started_from:
            meta["started_from"] = self.started_from
        parts = {name: part for name in OF_TRAINING if (part := model._modules.pop(name, None)) is not None}
        try:
            for name in parts:
                setattr(model, name, None)
            save_denoiser(folder, model, scheduler=self.scheduler, meta=meta, settings=settings)
        finally:
            for name, part in parts.items():
                setattr(model, name, part)


def _terms(settings: TrainSettings, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments that only some objectives have."""
    terms = {name: getattr(settings, name) for name in OBJECTIVES[settings.objective].takes}
    if terms.get("time_shift") == "auto":
        terms["time_shift"] = math.sqrt(math.prod(latent_shape) / BASE_SIZE)
    return terms


@torch.no_grad()
def _init_labels(table: torch.Tensor, class_names: list[str], settings: TrainSettings) -> None:
    """Start values of the label table. Shape: table (classes + 1, C); the last row is the null class."""
    torch.nn.init.normal_(table, std=settings.label_init_std)
    if settings.label_init == "names":
        start_from_words(table, class_names, std=settings.label_init_std, seed=settings.seed)


def _open_data(settings: TrainSettings) -> tuple[ClassImages | LatentDataset, Codec, dict[str, Any]]:
    """Images or latents, their codec, and what the settings leave to them."""
    if settings.latents is None:
        images = open_dataset(
            dataset=settings.dataset, data_dir=settings.data_dir, image_size=settings.image_size,
            num_images=settings.num_images, skip_corrupt=settings.skip_corrupt, one_class=settings.unconditional,
            sequential=settings.cache_latents, reading=Reading.of(settings), flip=settings.flip,
        )
        reading = {} if images.reading is None else asdict(images.reading)
        codec = load_codec(settings.vae or default_codec(settings.data_dir))
        return images, codec, {**reading, "flip": images.flip, "images": len(images), "vae": codec.name}
    latents = LatentDataset(settings.latents, flip=settings.flip)
    codec = load_codec(settings.vae or latents.codec)
    latents.check(
        codec, settings.image_size or latents.image_size, exif=settings.exif, background=settings.background
    )
    facts = {"vae": codec.name, "images": len(latents)} | {
        name: getattr(latents, name) for name in ("image_size", "exif", "background", "flip")
    }
    return OneClass(latents) if settings.unconditional else latents, codec, facts


class Recorded:
    """A denoiser that is called as ever, and keeps its last output."""

    def __init__(self, model: nn.Module):
        self.model, self.output = model, None

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.output = self.model(*args, **options)
        return self.output
