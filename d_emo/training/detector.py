"""The task of training a detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from d_emo.config import DetectorSettings
from d_emo.data import Reading, spread
from d_emo.detection.augment import ObjectImages, TrainingImages, augmentation
from d_emo.detection.average_precision import measure_detector
from d_emo.detection.coco import CocoImages
from d_emo.detection.drawing import grid_of_objects
from d_emo.detection.masks import rle
from d_emo.errors import InputError
from d_emo.io.card import describe_hardware
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import save_classifier
from d_emo.io.training_state import is_sharded
from d_emo.models import create_model
from d_emo.models.counting import trained_parameters
from d_emo.models.registry import check_kind, check_memory
from d_emo.tables import SCENES, load, system_of
from d_emo.training.progress import means
from d_emo.weights import differences, shapes_of

HELD_OUT = 200
"""Built-in pictures to measure on, at most."""
PICTURES = 16
"""Of a batch, how many are drawn before a run."""


class DetectorTask:
    """torchvision's losses of a detector, on pictures with objects.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; data or a model that cannot be opened.
    """

    lr_scales: dict[str, float] = {}
    smaller = "Choose fewer steps, smaller images or a GPU."

    def __init__(self, settings: DetectorSettings):
        check_kind(settings.model, "detector")
        self.settings = settings = settings.resolve()
        system = system_of(settings.model).name
        self.masks = system == "maskrcnn"
        self.source, self.held_out = open_objects(settings, masks=self.masks)
        self.facts = {"images": len(self.source)}
        self.settings = settings = settings.resolve(**self.facts)
        options = self._options(system)
        check_memory(settings.model, **options)
        torch.manual_seed(settings.seed)
        self.model = create_model(settings.model, **options)
        self.start = "" if settings.init_from is None else start_backbone(self.model, settings.init_from)
        side = self.model.input_size[0] if system.startswith("ssdlite") else None
        change = augmentation(settings.augment, flip=settings.flip, side=side)
        self.dataset = TrainingImages(
            self.source, change, first_label=self.model.first_label, seed=settings.seed, masks=self.masks
        )
        self.measures = self.held_out is not None and find_spec("faster_coco_eval") is not None
        if self.measures:
            rle()  # a broken one is told before the run

    def _options(self, system: str) -> dict[str, Any]:
        """Arguments of the model; InputError for those that the data or other settings decide."""
        size, given = self.settings.image_size, self.settings.model_options or {}
        sizes: dict[str, Any] = {}
        if size is not None:
            square = {"image_size": size}
            sizes = square if system.startswith("ssdlite") else {"min_size": size, "max_size": size * 1333 // 800}
        options = {"num_classes": len(self.source.class_names), **sizes}
        if taken := sorted({"name", "num_classes", "image_size"} & given.keys()):
            raise InputError(f"`model_options`: {taken[0]} follows from the data or other settings; leave it out")
        return {**options, **given}

    def introduction(self) -> list[str]:
        settings, millions = self.settings, trained_parameters(self.model) / 1e6
        held_out = f", {len(self.held_out):,} held out" if self.held_out is not None else ""
        return [
            f"{settings.model}: {millions:.2f} M trained parameters, {len(self.source.class_names)} classes; "
            f"{len(self.source):,} images of {self.source.name}{held_out}; run folder {settings.output_dir}",
            *filter(None, [self.start]),
            *["mAP is not measured: pip install 'd-emo[detection]'"][self.held_out is None or self.measures :],
        ]

    def keep_classes(self, recorded: Sequence[str] | None) -> None:
        if recorded is not None and list(recorded) != list(self.dataset.class_names):
            raise InputError("the categories of `annotations` are not those that the run began with, in their order")

    def prepare(self, device: torch.device, folder: Path) -> None:
        """Pictures are read as they are needed."""

    def draw(self, generator: torch.Generator, batch_size: int) -> torch.Tensor:
        return torch.empty(batch_size, 0)  # pictures draw their own

    def loss(self, model: nn.Module, batch: list[Any], draws: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = model(*batch)
        return {"loss": sum(losses.values()), **losses}

    @torch.no_grad()
    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Sums of the losses over this process's held-out pictures, and their number."""
        device = next(model.parameters()).device
        plain = TrainingImages(
            self.held_out, augmentation("none", flip=False, side=None), first_label=self.model.first_label, seed=0
        )
        mine = spread(len(plain), self.settings.validate_images)[rank::world_size]
        totals: dict[str, torch.Tensor] = {}
        with losses_in_eval_mode(model), torch.random.fork_rng():
            for index in mine or [0]:  # a process without any still names its sums
                torch.manual_seed(index)  # some losses draw regions
                image, target = plain[index]
                losses = model([image.to(device)], [{name: value.to(device) for name, value in target.items()}])
                for name, value in {"loss": sum(losses.values()), **losses, "count": torch.ones(())}.items():
                    totals[name] = totals.get(name, 0) + value.float().to(device) * bool(mine)
        return totals

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return means(sums)

    def remarks(self, count: Callable[[torch.Tensor], Any]) -> list[str]:
        return []

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings = self.settings
        meta: dict[str, Any] = {
            "step": step, "weights": "ema", "image_size": settings.image_size or min(model.input_size),
            "data": self.source.name, "class_names": self.source.class_names, "num_images": len(self.source),
            "parameters": trained_parameters(self.model), "training_minutes": round(minutes, 1),
            "hardware": describe_hardware(next(model.parameters()).device),
        }  # fmt: skip
        if self.measures and not is_sharded(model):
            chosen = spread(len(self.held_out), settings.validate_images)
            meta["average_precision"] = measure_detector(model, self.held_out, chosen, masks=self.masks)
        save_classifier(folder, model, meta=meta, settings=settings, kind="detector")

    def picture(self, batch: list[Any]) -> tuple[Image.Image, int]:
        """The first pictures of a batch of the data set, with their boxes and masks, and how many these are."""
        images, targets = (part[:PICTURES] for part in batch)
        targets = [{**target, "labels": target["labels"] - self.model.first_label} for target in targets]
        return grid_of_objects(images, targets, self.source.class_names), len(images)


def open_objects(settings: DetectorSettings, *, masks: bool) -> tuple[ObjectImages, ObjectImages | None]:
    """The pictures to train on and those to measure on; InputError for settings or categories that do not fit."""
    for given, needed in (("images", "annotations"), ("annotations", "images"), ("validate_annotations", "annotations"),
                          ("validate_images_dir", "validate_annotations")):  # fmt: skip
        if getattr(settings, given) is not None and getattr(settings, needed) is None:
            raise InputError(f"`{given}` {getattr(settings, given)} needs `{needed}`")
    if settings.validate_every and settings.annotations and settings.validate_annotations is None:
        raise InputError("`validate_every` needs held-out objects: give `validate_annotations`")
    if settings.annotations is None:
        scenes, size = load(SCENES[settings.dataset].scenes), settings.image_size
        return scenes(size, num_images=settings.num_images), scenes(size, num_images=HELD_OUT, split="test")
    options: dict[str, Any] = {"reading": Reading.of(settings), "with_masks": masks}
    source = CocoImages(settings.annotations, settings.images, **options)
    if settings.validate_annotations is None:
        return source, None
    held_out = CocoImages(settings.validate_annotations, settings.validate_images_dir, **options)
    if held_out.class_names != source.class_names:
        odd = ", ".join(sorted(set(held_out.class_names) ^ set(source.class_names))[:3])
        raise InputError(
            f"the categories of {settings.validate_annotations} are not those of {settings.annotations}"
            + (f"; only one of the two has {odd}" if odd else ", or in another order")
        )
    return source, held_out


@torch.no_grad()
def start_backbone(detector: nn.Module, source: str) -> str:
    """Copy a classifier's weights into a detector's backbone, all but its last norm and head; says so.

    Raises:
        InputError: It is no classifier, or of another size.
    """
    (emo,) = (module.emo for module in detector.modules() if hasattr(module, "emo"))
    classifier = open_classifier(source)
    given = {name: value for name, value in classifier.emo.state_dict().items()
             if not name.startswith(("norm.", "head."))}  # fmt: skip
    if problem := differences(shapes_of(given), shapes_of(emo.state_dict())):
        raise InputError(f"`init_from` {source} does not fit the backbone: {problem}")
    emo.load_state_dict(given)
    return f"the backbone starts from the weights of {classifier.name}"


@contextmanager
def losses_in_eval_mode(detector: nn.Module) -> Iterator[None]:
    """Inside, a detector in eval mode gives its losses: torchvision asks the outer modules, not norms, for the mode."""
    outer = [getattr(detector, name, None) for name in ("rpn", "roi_heads")]
    outer = [detector, *filter(None, outer)]
    try:
        for module in outer:
            module.training = True
        yield
    finally:
        for module in outer:
            module.training = False
