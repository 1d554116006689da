"""Settings of what trains networks on videos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from d_emo.config.base import setting
from d_emo.config.exact import with_exact_snapshots
from d_emo.config.paths import folder_of, followed
from d_emo.config.ranges import (
    BelowOne,
    ClassifierSide,
    Count,
    Fraction,
    NotNegative,
    Positive,
    PositiveFraction,
    Whole,
)
from d_emo.config.training import RehearsedSettings, RunSettings
from d_emo.errors import InputError


@dataclass(frozen=True, kw_only=True)
class VideoSettings(RunSettings, RehearsedSettings):
    """Settings of ``scripts/train_video.py``; the defaults are V-EMO's recipe for Kinetics-400."""

    model: str = setting(
        "v-emov2_5m", "a video classifier's name of list_models(), or an image classifier's, which answers with the "
        "mean over a clip's frames", group="Model"
    )
    model_options: dict[str, Any] | None = setting(
        None, "changes to the named model, e.g. '{drop_rate: 0.2, window_size: [2, 5, 5]}'"
    )
    init_from: str | None = setting(
        None, "start from the weights of an image classifier of the same size (a snapshot, a released file, a folder "
        "made by d-emo convert), whose kernels are inflated, or of a snapshot of a video classifier",
        source=True, snapshot=True
    )
    inflate: Literal["divide", "repeat"] = setting(
        "divide", "kernels of an image classifier are repeated along time, and divided by their depth or not"
    )
    data_dir: str | None = setting(
        None, "folder with a sub-folder of videos for each class, or with train and val of such; a CSV file of paths "
        "and labels, or the folder of train.csv and val.csv (docs/video.md). Default: moving digits, drawn on the fly",
        resumable=True, decisive=True, source=True, group="Data"
    )
    validate_dir: str | None = setting(
        None, "held-out videos of the same classes, in the same form. Default: val beside train in --data-dir",
        resumable=True, source=True
    )
    image_size: ClassifierSide | None = setting(
        None, "side of the frames in pixels. Default: 160; 48 of moving digits"
    )
    frames: Count | None = setting(None, "frames of a clip. Default: 4; 8 of moving digits")
    sampling: Literal["uniform", "dense"] = setting(
        "uniform", "frames of a clip: uniform, one of each of as many equal parts of the video; dense, "
        "--frame-interval apart"
    )
    frame_interval: Count = setting(8, "of dense sampling: frames of the video from one of the clip to the next")
    num_videos: Count = setting(2000, "number of different moving digits")
    skip_corrupt: bool = setting(
        False, "pass over videos that cannot be read, with their names and number", resumable=True
    )
    flip: bool | None = setting(None, "mirror videos at random. Default: yes for --data-dir, no for moving digits")
    rand_augment: str | None = setting(
        None, "timm's name of a RandAugment policy for the videos of --data-dir, the same changes for all frames, or "
        "none. Default: rand-m7-n4", group="Augmentation"
    )
    crop_scale: list[PositiveFraction] = setting(
        [0.08, 1.0], "range of the area of random crops, as fractions of the frame's area"
    )
    crop_share: PositiveFraction = setting(
        0.875, "in measuring: side of the centre crop over the frame's shorter side"
    )
    label_smoothing: Fraction = setting(0.0, "label smoothing of the cross-entropy", group="Loss")
    batch_size: Count = setting(256, "videos per step over all processes (global)", group="Optimisation")
    learning_rate: Positive = setting(1e-4, "peak learning rate of AdamW", aliases=["--lr"])
    weight_decay: NotNegative = setting(0.05, "AdamW weight decay, on matrices and convolutions only")
    schedule: Literal["constant", "cosine", "constant-cosine"] = setting("cosine", "learning rate after the warm-up")
    warmup_steps: Whole = setting(28_200, "steps of linear warm-up; 30 epochs of Kinetics-400")
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 188,000, 200 epochs of Kinetics-400", resumable=True,
        decisive=True
    )
    grad_clip: Positive | None = setting(20.0, "largest gradient norm")
    ema_decay: BelowOne = setting(0.9998, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    snapshot_every: Count = setting(
        9_400, "steps between snapshots, each with its accuracy; the last step has one", resumable=True
    )

    def check(self) -> None:
        if not (len(self.crop_scale) == 2 and self.crop_scale[0] <= self.crop_scale[1]):
            raise InputError(f"`crop_scale` must be two rising shares in (0, 1], not {self.crop_scale}")
        if self.data_dir is None and self.validate_dir is not None:
            raise InputError(
                f"`validate_dir` {self.validate_dir} belongs to a `data_dir`; moving digits hold out their own"
            )
        if self.data_dir is None and self.flip:
            raise InputError("`flip`: a mirrored motion is of another class; leave it away")
        if self.data_dir is None and self.rand_augment not in (None, "none"):
            raise InputError(f"`rand_augment` {self.rand_augment} needs videos of your own; leave it away")

    def resolve(self, **facts: Any) -> VideoSettings:
        """Fill in what is left open; ``epochs`` and a folder with train and val once the data are known.

        Args:
            facts: "images", how many videos there are to train on; "validate_dir", where the data bring held-out ones.
        """
        own = self.data_dir is not None
        size = self.image_size or (160 if own else 48)
        data = followed(folder_of(self.data_dir)).name if own else "moving-digits"
        return with_exact_snapshots(replace(
            self, image_size=size, frames=self.frames or (4 if own else 8),
            output_dir=self.output_dir or f"results/{self.model}-{data}-{size}",
            max_steps=self.steps(facts.get("images"), 188_000), flip=own if self.flip is None else self.flip,
            rand_augment=self.rand_augment or ("rand-m7-n4" if own else "none"),
            validate_dir=self.validate_dir or facts.get("validate_dir"),
        ))  # fmt: skip
