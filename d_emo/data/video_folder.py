"""Clips of stored videos: random crops and RandAugment to train, several clips and crops to measure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from d_emo.data.augmented import random_change, seeded
from d_emo.data.images import to_tensor
from d_emo.data.stored import StoredImages
from d_emo.data.video_lists import VideoList
from d_emo.data.videos import ClipSampler, read_frames


class StoredVideos(StoredImages):
    """Labelled videos in files.

    Args:
        videos: The files and their classes.
        image_size: Side of the frames in pixels.
        sampler: Which frames make a clip.
        skip_corrupt: See `StoredImages`.

    Attributes:
        repeated: Which of the videos were shorter than a clip, so far.
    """

    name, unit = "videos", "video"

    def __init__(
        self, videos: VideoList, image_size: int, *, sampler: ClipSampler, skip_corrupt: bool | None = False
    ):
        super().__init__(videos.labels, videos.class_names, image_size, skip_corrupt=skip_corrupt)
        self.files, self.left_out, self.sampler = videos.files, videos.left_out, sampler
        self.repeated = torch.zeros(len(videos.files), dtype=torch.bool).share_memory_()

    @abstractmethod
    def times(self, shown: np.ndarray, end: float, index: int) -> np.ndarray:
        """When the frames of the clips are shown; see `ClipSampler`. Shape: -> (K, T)."""

    @abstractmethod
    def views(self, frames: dict[int, Image.Image], index: int) -> list[dict[int, Image.Image]]:
        """Squares of ``image_size`` of each frame, of all alike; one set or more."""

    def source(self, index: int) -> Any:
        return self.files[index]

    def origin(self, index: int) -> str:
        return str(self.files[index])

    def load(self, index: int) -> torch.Tensor:
        """Video ``index``, or an `InputError` that names it. Shape: (K views, 3, T, H, W), K times the crops."""
        frames, numbers, count = read_frames(
            self.files[index], lambda shown, end: self.times(shown, end, index)
        )
        pictures = {number: Image.fromarray(pixels) for number, pixels in frames.items()}
        self.enlarged[index] = min(next(iter(pictures.values())).size) < self.image_size
        self.repeated[index] = count < numbers.shape[1]
        found = []
        for view in self.views(pictures, index):
            made = {number: to_tensor(picture) for number, picture in view.items()}
            found += [torch.stack([made[number] for number in clip], dim=1) for clip in numbers.tolist()]
        return torch.stack(found)

    def remarks(self, count: Callable[[torch.Tensor], Any] = torch.count_nonzero) -> list[str]:
        lines = super().remarks(count)
        if repeated := int(count(self.repeated)):
            lines.append(f"repeated  frames of {repeated:,} video{'s' * (repeated > 1)} with fewer than "
                         f"{self.sampler.frames}")  # fmt: skip
        return lines


class TrainingVideos(StoredVideos):
    """A clip at random places of each video, cropped at random, changed by RandAugment and mirrored, all frames alike.

    What is drawn depends on (seed, epoch, index) alone, so neither workers nor a resumed run change it.

    Args:
        videos, image_size, sampler, skip_corrupt: See `StoredVideos`.
        crop_scale, rand_augment, seed: See `AugmentedFolder`.
        mirror: Whether half of the clips are mirrored.

    Shape: a clip is (3, T, H, W) in [-1, 1].
    """

    flip = False  # it is done here

    def __init__(
        self, videos: VideoList, image_size: int, *, sampler: ClipSampler, crop_scale: Sequence[float],
        rand_augment: str | None, mirror: bool, seed: int, skip_corrupt: bool | None = False,
    ):  # fmt: skip
        super().__init__(videos, image_size, sampler=sampler, skip_corrupt=skip_corrupt)
        self.change, self.mirror, self.seed = random_change(image_size, crop_scale, rand_augment), mirror, seed

    def times(self, shown: np.ndarray, end: float, index: int) -> np.ndarray:
        rng = np.random.default_rng(self._seed(index))
        return self.sampler.times(shown, end, rng=rng)

    def views(self, frames: dict[int, Image.Image], index: int) -> list[dict[int, Image.Image]]:
        mirrored = self.mirror and np.random.default_rng([*self._seed(index), 1]).random() < 0.5
        changed = {}
        for number, frame in frames.items():
            with seeded(*self._seed(index)):
                changed[number] = self.change(frame)
            if mirrored:
                changed[number] = changed[number].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return [changed]

    def load(self, index: int) -> torch.Tensor:
        return super().load(index)[0]

    def _seed(self, index: int) -> tuple[int, int, int]:
        return self.seed, getattr(index, "epoch", 0), int(index)


class MeasuredVideos(StoredVideos):
    """Clips spread evenly over each video, of one square in the middle of its frames or three along their longer side.

    Args:
        videos, image_size, sampler, skip_corrupt: See `StoredVideos`.
        clips: Of a video.
        crops: 1, or 3, which are as large as the shorter side.
        crop_share: Of one crop: its side over the shorter side of the frame.

    Shape: a video is (clips times crops, 3, T, H, W) in [-1, 1].
    """

    def __init__(
        self, videos: VideoList, image_size: int, *, sampler: ClipSampler, clips: int = 1, crops: int = 1,
        crop_share: float = 0.875, skip_corrupt: bool | None = False,
    ):  # fmt: skip
        super().__init__(videos, image_size, sampler=sampler, skip_corrupt=skip_corrupt)
        self.clips, self.crops = clips, crops
        self.shorter = round(image_size / crop_share) if crops == 1 else image_size

    def times(self, shown: np.ndarray, end: float, index: int) -> np.ndarray:
        return self.sampler.times(shown, end, clips=self.clips)

    def views(self, frames: dict[int, Image.Image], index: int) -> list[dict[int, Image.Image]]:
        size, (width, height) = self.image_size, next(iter(frames.values())).size
        scale = self.shorter / min(width, height)
        whole = max(size, round(width * scale)), max(size, round(height * scale))
        resized = {number: frame.resize(whole, Image.Resampling.BICUBIC) for number, frame in frames.items()}
        found = []
        for place in [0.5] if self.crops == 1 else [0.0, 0.5, 1.0]:
            across, down = (place if side == max(whole) else 0.5 for side in whole)
            left, top = int(across * (whole[0] - size)), int(down * (whole[1] - size))
            found.append({number: frame.crop((left, top, left + size, top + size))
                          for number, frame in resized.items()})  # fmt: skip
        return found
