"""Settings of what trains and runs segmenters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from d_emo.config.base import ReadingSettings, overwrite_setting, setting
from d_emo.config.dense import DenseSettings
from d_emo.config.exact import with_exact_snapshots
from d_emo.config.paths import folder_of, followed
from d_emo.config.ranges import (
    BelowOne,
    ClassifierSide,
    Colour,
    Count,
    NotNegative,
    Positive,
    PositiveFraction,
    Whole,
)  # fmt: skip
from d_emo.errors import InputError

Blend = Literal["mean", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings(DenseSettings):
    """Settings of ``scripts/train_segmenter.py``; the defaults are the papers' recipe for SegFormer on ADE20K."""

    model: str = setting("segformer-emov2_5m", "a segmenter's name of list_models()", group="Model")
    model_options: dict[str, Any] | None = setting(
        None, "changes to the named model, e.g. '{aux: true, backbone_options: {output_stride: 16}}'"
    )
    init_from: str | None = setting(
        None, "start the backbone from a classifier of the same name: a snapshot, a released file, a folder made by "
        "d-emo convert", source=True, snapshot=True
    )
    freeze_backbone: bool = setting(False, "train the heads only; batch norms of the backbone keep their statistics")
    data_dir: str | None = setting(
        None, "folder of images and masks: as ADE20K, Cityscapes, HRF, DRIVE, or images/ and masks/ with classes.txt "
        "(docs/segmentation.md). Default: the pictures of --dataset",
        resumable=True, decisive=True, source=True, group="Data"
    )
    validate_dir: str | None = setting(
        None, "another such folder with held-out images. Default: the folder val(idation) of --data-dir",
        resumable=True, source=True
    )
    image_size: ClassifierSide = setting(512, "side of the training crops, and shorter side in measuring, in pixels")
    stride: Count | None = setting(
        None, "measure images at their own size, by windows of --image-size so many pixels apart. Default: whole ones",
        resumable=True
    )
    blend: Blend = setting("mean", "of the logits where windows overlap, or weighted by a Gaussian", resumable=True)
    picture_size: ClassifierSide | None = setting(
        None, "side of built-in pictures in pixels, of which crops are taken. Default: --image-size"
    )
    background: Colour = setting("white", "colour behind what is transparent, a name or '#rrggbb'")
    field_of_view: bool = setting(
        False, "of fundus photographs as HRF and DRIVE keep them, leave out the pixels outside the round field of view"
    )
    scale_range: list[Positive] = setting(
        [0.5, 2.0], "shorter side of an image before the crop, as multiples of --image-size", group="Augmentation"
    )
    largest_share: PositiveFraction = setting(0.75, "of one class in a crop; with more another crop is tried")
    colours: bool = setting(True, "distort brightness, contrast, saturation and hue")
    aux_weight: NotNegative = setting(0.4, "weight of the auxiliary head's loss", group="Loss")
    class_weights: list[NotNegative] | None = setting(
        None, "factor on the cross-entropy of each class's pixels, in the order of the classes, as mmseg's class_weight"
    )
    dice_weight: NotNegative = setting(
        0.0, "weight of the Dice loss of the decode head, for classes with few pixels; mmseg's DiceLoss is often used "
        "with 3"
    )
    batch_size: Count = setting(32, "images per step over all processes (global)", group="Optimisation")
    learning_rate: Positive = setting(1.2e-4, "peak learning rate of AdamW", aliases=["--lr"])
    head_lr_scale: NotNegative = setting(10.0, "factor on the learning rate of the heads, a feature pyramid left out")
    warmup_steps: Whole = setting(1500, "steps of linear warm-up")
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 160,000", resumable=True, decisive=True
    )
    ema_decay: BelowOne = setting(0.999, "decay of the moving average of weights and float buffers")
    snapshot_every: Count = setting(
        16_000, "steps between snapshots, each measured, with a picture; the last step has one", resumable=True
    )

    def check(self) -> None:
        if not (len(self.scale_range) == 2 and self.scale_range[0] <= self.scale_range[1]):
            raise InputError(f"`scale_range` must be two rising factors, not {self.scale_range}")
        if self.stride is not None and self.stride > self.image_size:
            raise InputError(f"`stride` {self.stride} leaves pixels out between windows of {self.image_size}")
        if self.validate_dir is not None and self.data_dir is None:
            raise InputError(f"`validate_dir` {self.validate_dir} belongs to a `data_dir`; built-in data hold out "
                             "some of their own")  # fmt: skip
        if self.picture_size is not None and self.data_dir is not None:
            raise InputError(f"`picture_size` {self.picture_size} is of built-in pictures; those of a `data_dir` have "
                             "sizes of their own")  # fmt: skip
        super().check()

    @property
    def own_data(self) -> str | None:
        """The path of data that are not built in."""
        return self.data_dir

    def resolve(self, **facts: Any) -> SegmenterSettings:
        """Fill in what is left open; ``epochs`` once the data are known.

        Args:
            facts: "images", how many there are to train on.
        """
        data = self.dataset if self.data_dir is None else followed(folder_of(self.data_dir)).name
        return with_exact_snapshots(replace(
            self, output_dir=self.output_dir or f"results/{self.model}-{data}-{self.image_size}",
            flip=self.mirrors if self.flip is None else self.flip,
            max_steps=self.steps(facts.get("images"), 160_000),
        ))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(ReadingSettings):
    """Settings of ``scripts/segment.py``."""

    images: list[str] = setting(
        help="image files, folders of them, or quoted patterns such as 'photos/*.jpg'", flag="IMAGES", group="Input",
        source="or a pattern"
    )
    skip_corrupt: bool = setting(False, "pass over images that cannot be read, with their names and number")
    model: str = setting(
        help="segmenter: a snapshot or run folder, or a name of list_models() with random weights",
        source="or a name"
    )
    image_size: ClassifierSide | None = setting(
        None, "pixels of the shorter side that the network sees. Default: as it was trained"
    )
    crop: ClassifierSide | None = setting(
        None, "side of the windows that an image goes through the network in. Default: as it was measured in training, "
        "which may be whole"
    )
    stride: Count | None = setting(None, "pixels from a window to the next. Default: two thirds of the window's side")
    blend: Blend | None = setting(
        None, "mean of the logits where windows overlap, or weighted by a Gaussian. Default: as it was trained"
    )
    output: str | None = setting(
        None, "folder for pictures, masks and JSON. Default: samples/segment-<first image>, numbered if it exists",
        group="Output", output="folder"
    )
    overwrite: bool = overwrite_setting()
