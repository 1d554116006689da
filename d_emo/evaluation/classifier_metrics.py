"""A classifier as the judge of drawings of its own classes: FID in its features, and whether it sees what was asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from d_emo.data import ClassImages, open_dataset, spread, to_uint8
from d_emo.errors import InputError
from d_emo.evaluation.features import FeatureExtractor
from d_emo.evaluation.statistics import FeatureStatistics, frechet_distance, is_constant

REAL_IMAGES, HELD_OUT_IMAGES = 5000, 1000  # at most, of training and of held-out data
BATCH = 100
SHAPES_PARTS = {"shape": 100, "colour": 10, "ground": 1}  # class id = 100 shape + 10 colour + ground, each 0 to 9


class Figure(NamedTuple):
    """One number of a measurement, and what it says."""

    name: str
    value: float
    remark: str


class Verdict(NamedTuple):
    """What a judge saw in a set of images.

    Attributes:
        statistics: Of their features.
        features: Of each image, for precision and recall. Shape: (N, dim) float32.
        classes: The likeliest class of each. Shape: (N,) int64.
    """

    statistics: FeatureStatistics
    features: torch.Tensor
    classes: torch.Tensor


class Judge:
    """A classifier that measures images against real ones of its classes, a batch in memory at a time.

    Args:
        extractor: Its features and logits.
        real: Batches of real images. Shape: (B, 3, H, W) uint8.
        device: Where the classifier is.

    Attributes:
        real: What it saw in the real images.

    Raises:
        InputError: Fewer than two real images, or features that are not finite or all the same.
    """

    def __init__(
        self, extractor: FeatureExtractor, real: Iterable[torch.Tensor], *, device: torch.device | str = "cpu"
    ):
        self.extractor, self._device = extractor, device
        self.real = self.look(real)
        if is_constant(self.real.statistics):
            raise InputError(f"{extractor.name} gives all real images the same features; name a trained classifier")

    def look(self, batches: Iterable[torch.Tensor]) -> Verdict:
        """See a set of images. Shape of a batch: (B, 3, H, W) uint8."""
        dim, classes = self.extractor.dim, [torch.zeros(0, dtype=torch.long)]
        statistics, features = FeatureStatistics(dim), [torch.zeros(0, dim)]
        for images in batches:
            pooled = self.extractor(images.to(self._device))
            statistics.update(pooled)
            features.append(pooled.float().cpu())
            classes.append(self.extractor.logits(pooled).argmax(dim=1).cpu())
        return Verdict(statistics, torch.cat(features), torch.cat(classes))

    def fid(self, verdict: Verdict) -> float:
        """Distance of a set of images from the real ones."""
        ours, real = verdict.statistics, self.real.statistics
        return frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance)


def open_real(
    data: str | None, image_size: int, class_names: Sequence[str], *, data_dir: str | None = None,
    validate_dir: str | None = None,
) -> tuple[ClassImages, ClassImages | None]:
    """Open the images that a denoiser was trained on, and held-out ones where there are any.

    Args:
        data: Name of the built-in data set, when ``data_dir`` is not given.
        image_size: Side in pixels.
        class_names: Of the denoiser.
        data_dir: Its training images, if it was trained on a folder.
        validate_dir: Held-out images of the same classes, for such.

    Raises:
        InputError: They cannot be opened or have other classes.
    """
    def opened(folder: str | None, split: str, limit: int) -> ClassImages:
        images = open_dataset(dataset=data, data_dir=folder, split=split, image_size=image_size, num_images=limit)
        if list(images.class_names) != list(class_names):
            raise InputError(f"the images of {folder or data} have other classes than the snapshot; name its own data")
        return images

    if data_dir is None and validate_dir is not None:
        raise InputError(f"`validate_dir` {validate_dir} belongs to a `data_dir`; give both or neither")
    real = opened(data_dir, "train", REAL_IMAGES)
    if data_dir is not None and validate_dir is None:
        return real, None
    return real, opened(validate_dir, "test", HELD_OUT_IMAGES)


def batches_of(images: ClassImages, limit: int) -> Iterator[torch.Tensor]:
    """At most ``limit`` images, spread evenly over the set. Shape of a batch: (B, 3, H, W) uint8."""
    chosen = spread(len(images), limit)
    for start in range(0, len(chosen), BATCH):
        yield to_uint8(torch.stack([images[index][0] for index in chosen[start : start + BATCH]]))


def even_labels(count: int, classes: int) -> torch.Tensor:
    """Class ids to draw: every class equally often, or of as many parts of the classes one each. Shape: -> (count,)."""
    return torch.tensor(spread(classes, count)) if count < classes else torch.arange(count) * classes // count


def judge_drawings(
    judge: Judge, drawn: Verdict, labels: torch.Tensor, *, held_out: ClassImages | None, image_size: int,
    parts: Mapping[str, int] | None = None,
) -> list[Figure]:
    """All figures of a set of drawings: its FID between those of real images and of noise, and what was recognised.

    Args:
        judge: The judge.
        drawn: What it saw in the drawings.
        labels: Classes that were asked for. Shape: (N,).
        held_out: Real images that the denoiser has not seen, for the floor; may be None.
        image_size: Side of the noise in pixels, for the ceiling.
        parts: Places of the decimal digits of a class id, by name, where they mean something.
    """
    count = len(drawn.classes)
    figures = [Figure(f"FID-{count}", judge.fid(drawn), f"of drawn images, in the features of {judge.extractor.name}")]
    shares = [("recognised", drawn.classes == labels, "of the drawn images are the class asked for, to the classifier")]
    if held_out is not None:
        real = judge.look(batches_of(held_out, HELD_OUT_IMAGES))
        real_count = len(real.classes)
        figures.append(Figure("floor", judge.fid(real), f"FID-{real_count} of real held-out images"))
        asked = torch.tensor([held_out.label(index) for index in spread(len(held_out), HELD_OUT_IMAGES)])
        shares.append(("real", real.classes == asked, "of real held-out images are their class, to it"))
        count = real_count
    generator = torch.Generator().manual_seed(0)
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    noise = (torch.randint(256, (size, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
             for size in sizes)  # fmt: skip
    figures.append(Figure("ceiling", judge.fid(judge.look(noise)), f"FID-{count} of noise"))
    for name, place in (parts or {}).items():
        right = drawn.classes // place % 10 == labels // place % 10
        shares.append((name, right, f"of the drawn images have the {name}"))
    return figures + [Figure(name, 100 * right.float().mean().item(), f"% {words}") for name, right, words in shares]


def judge_sampler(judge: Judge, batches: Iterable[torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """Judge drawings while they are made: their FID, the share recognised, and the time of the drawing alone.

    Args:
        judge: The judge.
        batches: StepNoise. Shape: (B, 3, H, W) uint8, on the CPU.
        labels: Classes that were asked for. Shape: (N,).
    """
    seconds = 0.0

    def timed() -> Iterator[torch.Tensor]:
        nonlocal seconds
        started = time.perf_counter()
        for images in batches:
            seconds += time.perf_counter() - started
            yield images
            started = time.perf_counter()

    verdict = judge.look(timed())
    recognised = 100 * (verdict.classes == labels).float().mean().item()
    return {"fid": judge.fid(verdict), "recognised": recognised, "seconds": seconds,
            "images_per_second": len(labels) / seconds}  # fmt: skip


def sampler_table(rows: Sequence[Mapping[str, Any]], num_images: int) -> str:
    """The rows of :func:`judge_sampler`, each with its ``scheduler`` and ``steps``, as a Markdown table."""
    head = f"| sampler | steps | FID-{num_images} | recognised | time | images/s |\n|---|---:|---:|---:|---:|---:|"
    return "\n".join([head, *(
        "| {scheduler} | {steps} | {fid:.2f} | {recognised:.1f} % | {seconds:.0f} s | {images_per_second:.2f} |"
        .format_map(row) for row in rows
    )])  # fmt: skip
