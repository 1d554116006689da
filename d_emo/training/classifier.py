"""The task of training a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from d_emo.config import ClassifierSettings, folder_of, is_folder
from d_emo.data import (
    AugmentedFolder,
    ClassImages,
    Reading,
    find_splits,
    in_recorded_order,
    list_folders,
    open_dataset,
    open_held_out,
    spread,
)
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.io.card import describe_hardware
from d_emo.io.snapshot import load_meta, save_classifier
from d_emo.io.training_state import is_sharded
from d_emo.models import create_model
from d_emo.models.counting import trained_parameters
from d_emo.models.registry import check_kind, check_memory
from d_emo.threads import loader_workers
from d_emo.training.accuracy import Accuracy, measure_accuracy, sum_over
from d_emo.training.finetuning import head_of, start_classifier_from, train_only
from d_emo.training.progress import means
from d_emo.training.teacher import distillation_loss, load_teacher
from d_emo.training.words import head_of_words, start_from_words, with_plain_head


class Augmentation(NamedTuple):
    """Random changes to the images of a step."""

    flip: torch.Tensor  # (B,) bool
    shift: torch.Tensor  # (B, 2), as shares of half the image side
    level: torch.Tensor | None = None  # (B, 1, 1, 1), the share t of noise in (1 - t) image + t noise
    noise: torch.Tensor | None = None  # (B, 3, H, W)


class ClassifierTask:
    """Cross-entropy with label smoothing, and optionally a teacher's soft logits, on augmented images.

    Images of a folder are cropped at random and pass RandAugment; others can be randomly shifted. All are mirrored
    where the data allow it. With noise the classifier sees it, and a teacher does not.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; a data set or model that cannot be opened.
    """

    kind = "classifier"
    lr_scales: dict[str, float] = {}
    more_meta: dict[str, Any] = {}  # what its snapshots say beside the usual
    smaller = "Choose fewer steps, smaller images or a GPU."

    def __init__(self, settings: ClassifierSettings):
        if settings.init_from is not None:
            load_meta(settings.init_from, "classifier")
        self.facts: dict[str, Any] = {"validate_dir": own_splits(settings.data_dir)[1]}
        settings = settings.resolve(**self.facts)
        check_kind(settings.model, "classifier")
        self.dataset, self.held_out = self.open(settings)
        self.facts |= {"images": len(self.dataset), "flip": self.dataset.flip}
        self.settings = settings = settings.resolve(**self.facts)
        self.more_meta = self.more_of_snapshots()
        options = settings.model_options or {}
        for name in {"name", "num_classes", "in_channels", "in_chans"} & options.keys():
            raise InputError(f"`model_options`: {name} follows from the data or from `model`; leave it out")
        given = self.input_options()
        if options:
            check_memory(settings.model, **{**given, **options})
        torch.manual_seed(settings.seed)
        self.model = create_model(settings.model, **{**given, **options})
        if settings.label_init == "names":
            start_head_from_words(self.model, self.dataset.class_names, settings.seed)
        self.parameters = trained_parameters(self.model)
        self.start, self.started_from = [], None
        if settings.init_from is not None:
            words, self.started_from = start_classifier_from(
                settings.init_from, self.model, class_names=self.dataset.class_names,
                latents=settings.latents is not None,
            )
            self.start = [words, settings.as_there()]
        if settings.head == "words":
            self.start.append(head_of_words(self.model, self.dataset.class_names))
        if settings.init_from is not None:
            self.start.append(train_only(self.model, settings.train, head=head_of(self.model)))
        self.teacher = None
        if settings.teacher is not None:
            self.teacher = load_teacher(settings.teacher, settings.teacher_weights, self.dataset.class_names)

    def open(self, settings: ClassifierSettings) -> tuple[ClassImages, ClassImages | None]:
        """The data to train on, and those to measure accuracy on, where there are some."""
        return open_both(settings)

    def more_of_snapshots(self) -> dict[str, Any]:
        """What its snapshots say beside the usual; whoever takes its features mixes as much noise."""
        return {"noise": self.settings.noise} if self.settings.noise else {}

    def input_options(self) -> dict[str, Any]:
        """The arguments of `create_model` that the data decide."""
        return {"num_classes": len(self.dataset.class_names), "img_size": self.settings.image_size}

    def named_data(self) -> str:
        """The data, in words."""
        return self.settings.data_dir or self.settings.dataset

    def introduction(self) -> list[str]:
        settings = self.settings
        return [
            f"{settings.model} on {self.named_data()}: {len(self.dataset):,} images, "
            f"{len(self.dataset.class_names)} classes, {settings.image_size} px; run folder {settings.output_dir}",
            *filter(None, [self.dataset.left_out, *self.start, settings.teacher and f"teacher: {settings.teacher}"]),
        ]

    def keep_classes(self, recorded: Sequence[str] | None) -> None:
        self.dataset = in_recorded_order(self.dataset, recorded)
        self.held_out = self.held_out and in_recorded_order(self.held_out, self.dataset.class_names)

    def prepare(self, device: torch.device, folder: Path) -> None:
        """Images are read as they are needed; only the teacher has to move."""
        if self.teacher is not None:
            self.teacher.to(device)

    def draw(self, generator: torch.Generator, batch_size: int) -> Augmentation:
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
        moved = Augmentation(
            flip=(torch.rand(batch_size, **drawn) < 0.5) & self.dataset.flip,
            shift=(torch.rand(batch_size, 2, **drawn) * 4 - 2) * self.settings.shift,
        )
        if not self.settings.noise:
            return moved
        size, level = self.settings.image_size, torch.rand(batch_size, 1, 1, 1, **drawn) * self.settings.noise
        return moved._replace(level=level, noise=torch.randn(batch_size, 3, size, size, **drawn))

    def loss(self, model: nn.Module, batch: list[torch.Tensor], draws: Augmentation) -> dict[str, torch.Tensor]:
        settings, labels = self.settings, batch[1]
        images, noisy = self.views(batch[0], draws)
        logits = model(noisy).float()
        losses = {"loss": F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)}
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(images)
            losses["distillation"] = distillation_loss(logits, wanted, settings.distill_tau)
            losses["loss"] = losses["loss"] + settings.distill_weight * losses["distillation"]
        return {**losses, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def views(self, images: torch.Tensor, draws: Augmentation) -> tuple[torch.Tensor, torch.Tensor]:
        """What a teacher sees, and what the network does. Shape: (B, 3, H, W) -> the same twice."""
        images = augment(images, draws)
        return images, mixed(images, draws)

    def seen(self, batch: list[torch.Tensor], draws: Augmentation) -> torch.Tensor:
        return self.views(batch[0], draws)[1]

    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Sums of loss and right answers over this process's share of the held-out images, and their number."""
        share = spread(len(self.held_out), self.settings.validate_images)[rank::world_size]
        return sum_over(self.as_measured(model), self.held_out, share, num_workers=self._workers(world_size))

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return means(sums)

    def remarks(self, count: Callable[[torch.Tensor], Any]) -> list[str]:
        return self.dataset.remarks(count)

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings = self.settings
        meta: dict[str, Any] = {
            "step": step, "weights": "ema", "image_size": settings.image_size, "data": self.dataset.name,
            "class_names": self.dataset.class_names, "num_images": len(self.dataset),
            "parameters": self.parameters, "training_minutes": round(minutes, 1),
            "hardware": describe_hardware(next(model.parameters()).device),
        }
        if self.started_from:
            meta["started_from"] = self.started_from
        meta |= self.more_meta
        if self.held_out is not None:
            measured = {"ema": self.measure(model)}
            if not is_sharded(self.model):
                measured["raw"] = self.measure(self.model)  # shards can only be run by all processes together
            meta["accuracy"] = {weights: asdict(each) for weights, each in measured.items()}
            meta["held_out_accuracy"] = round(measured["ema"].top1, 4)
        save_classifier(folder, with_plain_head(model), meta=meta, settings=settings, kind=self.kind)

    def as_measured(self, model: nn.Module) -> nn.Module:
        """The network that takes what the held-out data give."""
        return model

    def measure(self, model: nn.Module) -> Accuracy:
        """Accuracy of ``model`` on the held-out images."""
        return measure_accuracy(self.as_measured(model), self.held_out, num_workers=self._workers(1))

    def _workers(self, world_size: int) -> int:
        """Data loading processes for the held-out images; built-in ones are quick to make."""
        asked = 0 if self.settings.num_workers is None and self.settings.data_dir is None else self.settings.num_workers
        return loader_workers(asked, best_device(), world_size)


def augment(images: torch.Tensor, draws: Augmentation) -> torch.Tensor:
    """Mirror and translate, repeating the border. Shape: (B, 3, H, W) -> same."""
    images = torch.where(draws.flip[:, None, None, None], images.flip(-1), images)
    if not draws.shift.any():
        return images
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrix[:, :, 2] = draws.shift
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mixed(images: torch.Tensor, draws: Augmentation) -> torch.Tensor:
    """Mix with noise, (1 - t) image + t noise. Shape: (B, 3, H, W) -> same."""
    return images if draws.level is None else (1 - draws.level) * images + draws.level * draws.noise


@torch.no_grad()
def start_head_from_words(model: nn.Module, class_names: Sequence[str], seed: int) -> None:
    """Start the rows of a classifier's head as sums over the words of the class names, each of about unit length."""
    head = tuple(head_of(model))
    for name, parameter in model.named_parameters():
        if name.startswith(head) and parameter.ndim > 1:
            rows = parameter.flatten(1)  # a view; some heads are convolutions
            start_from_words(rows, class_names, std=rows.shape[1] ** -0.5, seed=seed)


def own_splits(data_dir: str | None) -> tuple[str | None, str | None]:
    """The folders train and val of a folder that has both (timm finds training and validation too); else itself."""
    if data_dir is not None and not data_dir.startswith("folder:") and folder_of(data_dir).is_dir():
        train, held_out = find_splits(list_folders(folder_of(data_dir))) or ([], [])
        if len(train) == 1 and held_out and held_out[0].name.lower().startswith("val"):
            return str(train[0]), str(held_out[0])
    return data_dir, None


def open_both(settings: ClassifierSettings) -> tuple[ClassImages, ClassImages | None]:
    """The images to train on, and those to measure accuracy on: None where a data set of one's own comes without.

    A folder with sub-folders train and val, as ImageNet is laid out, stands for these two. InputError for data of one
    class only, or that do not belong together.
    """
    data_dir, size = own_splits(settings.data_dir)[0], settings.image_size
    images: ClassImages
    if data_dir is not None and is_folder(data_dir):
        images = AugmentedFolder(
            data_dir, size, crop_scale=settings.crop_scale, seed=settings.seed, skip_corrupt=settings.skip_corrupt,
            rand_augment=None if settings.rand_augment == "none" else settings.rand_augment,
            reading=Reading.of(settings),
        )  # fmt: skip
        images.flip = settings.flip is not False
    else:
        images = open_dataset(
            dataset=settings.dataset, data_dir=data_dir, image_size=size, num_images=settings.num_images,
            skip_corrupt=settings.skip_corrupt, reading=Reading.of(settings), flip=settings.flip,
        )  # fmt: skip
    names = images.class_names
    if len(names) < 2:
        raise InputError(f"{data_dir} has only the class {names[0]}; a classifier needs two or more")
    if data_dir is not None and settings.validate_dir is None and settings.validate_every is None:
        return images, None
    return images, open_held_out(settings, names, crop_share=settings.crop_share)
