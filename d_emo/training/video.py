"""The task of training a classifier of videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from d_emo.config import VideoSettings
from d_emo.data import ClassImages
from d_emo.data.moving import MovingDigits, held_out_digits
from d_emo.data.video_folder import MeasuredVideos, TrainingVideos
from d_emo.data.video_lists import list_videos, split_videos
from d_emo.data.videos import ClipSampler, import_av
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import kind_of, load_classifier
from d_emo.io.video import KIND, PLAIN, ClipNormalized, VideoClassifier
from d_emo.models import EMO, create_model
from d_emo.models.counting import trained_parameters
from d_emo.models.registry import check_kind, check_memory, model_kind
from d_emo.models.video import classify_clips, inflate
from d_emo.training.classifier import ClassifierTask
from d_emo.training.finetuning import start_classifier_from
from d_emo.weights import load_weights


class VideoTask(ClassifierTask):
    """Cross-entropy with label smoothing on clips of videos.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; data or a model that cannot be opened.
    """

    kind = KIND
    smaller = "Choose fewer steps, fewer or smaller frames or a GPU."

    def __init__(self, settings: VideoSettings):
        if model_kind(settings.model) != "classifier":
            check_kind(settings.model, KIND)
        own = settings.data_dir is not None
        self.facts: dict[str, Any] = {"validate_dir": split_videos(settings.data_dir)[1] if own else None}
        settings = settings.resolve(**self.facts)
        self.dataset, self.held_out = open_videos(settings)
        self.facts |= {"images": len(self.dataset)}
        self.settings = settings = settings.resolve(**self.facts)
        options = settings.model_options or {}
        for name in {"name", "num_classes", "in_channels", "img_size", "spatial_dims"} & options.keys():
            raise InputError(f"`model_options`: {name} follows from the data or from `model`; leave it out")
        options = {"num_classes": len(self.dataset.class_names), "img_size": settings.image_size, **options}
        check_memory(settings.model, **options)
        torch.manual_seed(settings.seed)
        self.model: EMO = create_model(settings.model, **options)
        self.parameters, self.teacher = trained_parameters(self.model), None
        self.start, self.started_from, self.normalisation = [], None, PLAIN
        if settings.init_from is not None:
            self._start_from(settings.init_from)
        self.input = ClipNormalized(*self.normalisation)
        self.more_meta = {
            "frames": settings.frames, "sampling": settings.sampling, "frame_interval": settings.frame_interval,
            "normalisation": dict(zip(("mean", "std"), map(list, self.normalisation), strict=True)),
        }  # fmt: skip

    def _start_from(self, source: str) -> None:
        """Take the weights of a classifier of images or videos, and its normalisation."""
        if kind_of(source) == KIND:
            there = load_classifier(source, KIND)
            name, network = str(there.path), there.model
            self.normalisation = tuple(there.meta.get("normalisation", {"mean": PLAIN[0], "std": PLAIN[1]}).values())
            if network.spatial_dims == self.model.spatial_dims:
                words, self.started_from = start_classifier_from(
                    source, self.model, class_names=self.dataset.class_names, kind=KIND
                )
                self.start = [words]
                return
        else:
            classifier = open_classifier(source)
            name, network = classifier.name, classifier.emo
            if cfg := getattr(network, "pretrained_cfg", None):
                self.normalisation = tuple(cfg["mean"]), tuple(cfg["std"])
        weights, words = network.state_dict(), f"Weights from {name}"
        if self.model.spatial_dims == 3:
            weights = inflate(weights, self.model, self.settings.inflate)
            divided = {"divide": "divided by their depth", "repeat": "not divided by their depth"}
            words += f", inflated, {divided[self.settings.inflate]}."
        else:
            head = {key: value for key, value in self.model.state_dict().items() if key.startswith("head.")}
            weights, words = {**weights, **head}, f"{words}, all but the head."
        load_weights(self.model, weights, f"the classifier {source}")
        self.start = [words]

    def introduction(self) -> list[str]:
        settings = self.settings
        held_out = "none" if self.held_out is None else f"{len(self.held_out):,}"
        return [
            f"{settings.model}: {self.parameters / 1e6:.2f} M trained parameters, {len(self.dataset.class_names)} "
            f"classes; {len(self.dataset):,} videos of {settings.data_dir or self.dataset.name}, {held_out} held out; "
            f"clips of {settings.frames} frames of {settings.image_size} px; run folder {settings.output_dir}",
            *filter(None, [self.dataset.left_out, *self.start]),
        ]

    def prepare(self, device: torch.device, folder: Path) -> None:
        self.input.to(device)

    def draw(self, generator: torch.Generator, batch_size: int) -> torch.Tensor:
        return torch.empty(batch_size, 0)  # videos draw their own

    def loss(self, model: nn.Module, batch: list[torch.Tensor], draws: torch.Tensor) -> dict[str, torch.Tensor]:
        clips, labels = batch
        logits = classify_clips(model, self.input(clips), self.model.spatial_dims).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def as_measured(self, model: nn.Module) -> nn.Module:
        return VideoClassifier(model, *self.normalisation).to(next(model.parameters()).device)


def open_videos(settings: VideoSettings) -> tuple[ClassImages, ClassImages | None]:
    """The videos to train on, and those to measure on: None where data of one's own come without.

    InputError for data of one class only, or that do not belong together.
    """
    size, sampler = settings.image_size, ClipSampler(settings.frames, settings.sampling, settings.frame_interval)
    if settings.data_dir is None:
        made = {"frames": settings.frames, "num_videos": settings.num_videos, "seed": settings.seed}
        return MovingDigits(size, **made), held_out_digits(size, settings.frames)
    import_av()
    videos = list_videos(split_videos(settings.data_dir)[0])
    if len(videos.class_names) < 2:
        raise InputError(
            f"{settings.data_dir} has only the class {videos.class_names[0]}; a classifier needs two or more"
        )
    train = TrainingVideos(
        videos, size, sampler=sampler, crop_scale=settings.crop_scale, seed=settings.seed, mirror=settings.flip,
        rand_augment=None if settings.rand_augment == "none" else settings.rand_augment,
        skip_corrupt=settings.skip_corrupt,
    )  # fmt: skip
    if settings.validate_dir is None:
        if settings.validate_every is not None:
            raise InputError("`validate_every` needs held-out videos: give their folder or list as `validate_dir`")
        return train, None
    return train, MeasuredVideos(
        list_videos(settings.validate_dir, videos.class_names), size, sampler=sampler, crop_share=settings.crop_share,
        skip_corrupt=settings.skip_corrupt,
    )  # fmt: skip
