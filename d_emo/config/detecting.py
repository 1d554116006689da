"""Settings of what trains detectors and of what detects with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from d_emo.config.base import ReadingSettings, overwrite_setting, setting
from d_emo.config.dense import DenseSettings
from d_emo.config.exact import with_exact_snapshots
from d_emo.config.ranges import BelowOne, ClassifierSide, Count, Fraction, Positive, Whole


@dataclass(frozen=True, kw_only=True)
class DetectorSettings(ReadingSettings, DenseSettings):
    """Settings of ``scripts/train_detector.py``; the defaults are EMOv2's recipe for SSDLite on COCO."""

    annotations: str | None = setting(
        None, "objects to train on, a JSON file in COCO's format. Default: those of --dataset",
        resumable=True, decisive=True, source=True, group="Data"
    )
    images: str | None = setting(
        None, "folder of the images that --annotations names", resumable=True, decisive=True, source=True
    )
    validate_annotations: str | None = setting(
        None, "held-out objects to measure mAP on, of the same categories", resumable=True, source=True
    )
    validate_images_dir: str | None = setting(
        None, "folder of the images of --validate-annotations. Default: --images", resumable=True, source=True
    )
    augment: Literal["ssd", "flip", "none"] | None = setting(
        None, "ssd: zoomed out, cropped around some objects, resized to a square, mirrored, and colours changed; flip: "
        "mirrored; none. Default: ssd for SSDLite, flip for others"
    )
    model: str = setting("ssdlite-emov2_1m", "a detector's name of list_models()", group="Model")
    model_options: dict[str, Any] | None = setting(
        None, "changes to the named model, e.g. '{anchors: scaled}' of SSDLite"
    )
    image_size: ClassifierSide | None = setting(
        None, "side that pictures are resized to, in pixels: of the square of SSDLite, else the shorter side. Default: "
        "the model's; 160 for --dataset"
    )
    init_from: str | None = setting(
        None, "start the backbone from a classifier: a snapshot, a released file, or a folder made by "
        "d-emo convert", source=True, snapshot=True
    )
    batch_size: Count = setting(192, "images per step over all processes (global)", group="Optimisation")
    learning_rate: Positive = setting(2.4e-3, "peak learning rate of AdamW", aliases=["--lr"])
    warmup_steps: Whole = setting(500, "steps of linear warm-up")
    grad_clip: Positive | None = setting(0.1, "largest gradient norm")
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 366,500, 600 passes over COCO's train2017", resumable=True,
        decisive=True
    )
    snapshot_every: Count = setting(
        6_108, "steps between snapshots, each with its mAP; the last step has one", resumable=True
    )
    ema_decay: BelowOne = setting(0.9998, "decay of the moving average of weights and float buffers")

    @property
    def own_data(self) -> str | None:
        """The path of data that are not built in."""
        return self.annotations

    def resolve(self, **facts: Any) -> DetectorSettings:
        """Fill in what is left open; ``epochs`` once the data are known.

        Args:
            facts: "images", how many there are to train on.
        """
        built_in = self.annotations is None
        size = self.image_size or (160 if built_in else None)
        data = self.dataset if built_in else Path(self.annotations).stem
        return with_exact_snapshots(replace(
            self, image_size=size, max_steps=self.steps(facts.get("images"), 366_500),
            output_dir=self.output_dir or f"results/{self.model}-{data}-{size or 'own'}",
            flip=self.mirrors if self.flip is None else self.flip,
            augment=self.augment or ("ssd" if self.model.lower().startswith("ssdlite") else "flip"),
            validate_images_dir=self.validate_images_dir or (self.images if self.validate_annotations else None),
        ))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetectSettings(ReadingSettings):
    """Settings of ``scripts/detect.py``."""

    images: list[str] = setting(
        help="image files, folders of them, or quoted patterns such as 'photos/*.jpg'", flag="IMAGES", group="Input",
        source="or a pattern"
    )
    skip_corrupt: bool = setting(False, "pass over images that cannot be read, with their names and number")
    checkpoint: str = setting(help="snapshot or run folder of a detector", source=True)
    score: Fraction = setting(0.3, "least score of what is shown and written", group="Detection")
    output: str | None = setting(
        None, "folder for the pictures and detections.json. Default: samples/detect-<first image>, numbered if it "
        "exists", group="Output", output="folder"
    )
    overwrite: bool = overwrite_setting()
