"""Classifiers of videos in [-1, 1], ready to run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from d_emo.config import EvaluateClassifierSettings
from d_emo.data import ClassImages
from d_emo.data.moving import held_out_digits
from d_emo.data.video_folder import MeasuredVideos
from d_emo.data.video_lists import list_videos, split_videos
from d_emo.data.videos import ClipSampler
from d_emo.errors import InputError
from d_emo.io.classifier import Normalized, open_snapshot, validate_dir_of
from d_emo.models import EMO
from d_emo.models.video import classify_clips

KIND = "video classifier"
PLAIN = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation with which videos in [-1, 1] stay as they are."""


class ClipNormalized(nn.Module):
    """Clips in [-1, 1] as a network takes them. Shape: (B, 3, T, H, W) -> same."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.frames = Normalized(nn.Identity(), tuple(mean), tuple(std))

    def forward(self, clips: Tensor) -> Tensor:
        return self.frames(clips.transpose(1, 2)).transpose(1, 2)


class VideoClassifier(nn.Module):
    """A network that takes videos in [-1, 1] of one view or several, and answers with the mean of its probabilities.

    Args:
        model: An `EMO` of videos, or one of images, whose logits are then the mean over a clip's frames.
        mean, std: Of the pixels that it was trained with, in [0, 1].

    Shape: (B, 3, T, H, W) or (B, views, 3, T, H, W) -> (B, num_classes), logarithms of probabilities.
    """

    def __init__(self, model: EMO, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model, self.input = model, ClipNormalized(mean, std)

    def forward(self, videos: Tensor) -> Tensor:
        views = [videos] if videos.ndim == 5 else videos.unbind(dim=1)
        answers = (classify_clips(self.model, self.input(view), self.model.spatial_dims) for view in views)
        return (sum(answer.float().softmax(dim=1) for answer in answers) / len(views)).log()


@dataclass(frozen=True)
class OpenVideoClassifier:
    """A classifier of videos in eval mode, and what is known of the videos it was trained on.

    ``validate_dir`` holds those that its run was measured on, where they were the user's own; ``built_in`` says that
    they were moving digits.
    """

    name: str
    model: VideoClassifier
    class_names: list[str]
    image_size: int
    sampler: ClipSampler
    validate_dir: str | None
    built_in: bool


def open_videos(settings: EvaluateClassifierSettings, classifier: OpenVideoClassifier) -> ClassImages:
    """The videos to measure on: a folder or list, else those that the run of the classifier was measured on.

    Raises:
        InputError: None are named and none are known; they have other classes.
    """
    if settings.dataset is not None:
        raise InputError(f"`dataset` {settings.dataset} holds images, and {classifier.name} is a {KIND}; leave it away")
    size, source = settings.image_size or classifier.image_size, settings.data_dir or classifier.validate_dir
    if source is None and classifier.built_in:
        return held_out_digits(size, classifier.sampler.frames)
    if source is None:
        raise InputError(f"{classifier.name} was trained without held-out videos; name some with `data_dir`")
    train, held_out = split_videos(source)
    return MeasuredVideos(
        list_videos(held_out or train, classifier.class_names), size, sampler=classifier.sampler, clips=settings.clips,
        crops=settings.crops, crop_share=settings.crop_share, skip_corrupt=None,
    )  # fmt: skip


def open_video_classifier(source: str, weights: str = "ema") -> OpenVideoClassifier:
    """A snapshot or run folder of ``d-emo train-video``; with ``weights`` "raw", those before averaging.

    Raises:
        InputError: It is none, or damaged; there are no raw weights.
    """
    snapshot, name = open_snapshot(Path(source), weights, KIND)
    meta = snapshot.meta
    if lacking := [key for key in ("frames", "sampling", "frame_interval", "normalisation") if key not in meta]:
        raise InputError(f"the snapshot {snapshot.path} does not say its {lacking[0]}; it is damaged")
    model = VideoClassifier(snapshot.model, meta["normalisation"]["mean"], meta["normalisation"]["std"]).eval()
    sampler = ClipSampler(meta["frames"], meta["sampling"], meta["frame_interval"])
    return OpenVideoClassifier(
        name, model, snapshot.class_names, snapshot.image_size, sampler, validate_dir_of(snapshot),
        meta.get("data") == "moving-digits",
    )
