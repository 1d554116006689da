"""Metrics of images by a classifier of their classes: distances in its features, and whether it sees their class."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from d_emo.data import AS_VIEWED, ClassImages, Reading, in_order_of, open_dataset, spread, to_uint8
from d_emo.errors import InputError
from d_emo.evaluation.features import FeatureExtractor
from d_emo.evaluation.metrics import Gathered
from d_emo.evaluation.statistics import is_constant
from d_emo.tables import CLASS_ACCURACY, DATASETS, EMPTY, LABEL_BASE, METRICS, MetricValue, class_values, load
from d_emo.text import markdown_table

if TYPE_CHECKING:
    from d_emo.latents import Codec

REAL_IMAGES, HELD_OUT_IMAGES = 5000, 1000  # at most, of training and of held-out data
BATCH = 100


class ClassifierMetrics:
    """A classifier that measures sets of images against real ones of its classes, a batch of pixels at a time.

    It measures the rows of ``d_emo.tables.METRICS`` that are marked ``by_classifier``, in its features, and
    ``class_values``, by its answers.

    Args:
        extractor: Its features and logits, on ``device``.
        real: Real images, of which at most 5000 are looked at.
        data: Name of the data set, whose row says what the classes and their parts are; any name, or None.

    Attributes:
        values: What it measures, in the order of tables.

    Raises:
        InputError: Fewer than two real images, or features that are not finite or all the same.
    """

    def __init__(
        self, extractor: FeatureExtractor, real: ClassImages, *, data: str | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.extractor, self._device = extractor, device
        self._rows = [row for row in METRICS.values() if row.by_classifier]
        in_features = [value for row in self._rows for value in row.values]
        self.values: tuple[MetricValue, ...] = (*in_features, *class_values(data))
        self._data = DATASETS[data] if data in DATASETS else None
        self._real = self._gather(batches_of(real, REAL_IMAGES), min(len(real), REAL_IMAGES))
        if is_constant(self._real.pooled):
            raise InputError(f"{extractor.name} gives all real images the same features; name a trained classifier")

    def measure(
        self, batches: Iterable[torch.Tensor], labels: torch.Tensor,
        by_part: dict[str, dict[int, float]] | None = None,
    ) -> dict[str, float]:
        """Measure a set of images: numbers by the names of ``values``, those of classes in percent.

        A metric that needs more images than these is left out.

        Args:
            batches: The images. Shape: (B, 3, H, W) uint8.
            labels: Their classes, or those that were asked for. Shape: (N,) int64.
            by_part: Gets, for each part of the class id, the percentage right by what was asked for ("shape": {0: 98.0,
                1: 95.0, ...}).

        Raises:
            ValueError: There are more images than labels, or fewer.
        """
        answers: list[torch.Tensor] = []
        empty: list[torch.Tensor] = []
        gathered = self._gather(batches, len(labels), answers, empty)
        classes = torch.cat(answers) if answers else labels[:0]
        if len(classes) != len(labels):
            raise ValueError(f"{len(classes)} images came with {len(labels)} labels; give one label per image")
        measured: dict[str, float] = {}
        for row in self._rows:
            if row.least <= len(labels):
                measured |= load(row.compute)(gathered, self._real, "cpu")
        right = {CLASS_ACCURACY.name: classes == labels}
        for part, place in (self._data.label_parts if self._data else {}).items():
            asked = labels // place % LABEL_BASE
            right[part] = classes // place % LABEL_BASE == asked
            if by_part is not None:
                by_part[part] = {
                    digit: 100 * right[part][asked == digit].float().mean().item() for digit in asked.unique().tolist()
                }
        if empty:
            right[EMPTY.name] = torch.cat(empty)
        return measured | {name: 100 * each.float().mean().item() for name, each in right.items()}

    def measure_real(
        self, images: ClassImages, limit: int | None = None, codec: Codec | None = None
    ) -> dict[str, float]:
        """The same of real images, at most ``limit`` of them (default: 1000): what drawn ones could reach.

        Args:
            codec: Encodes and decodes them first, at the mean of their latents: what images out of its latents could
                reach.
        """
        limit = limit or HELD_OUT_IMAGES
        labels = torch.tensor([images.label(index) for index in spread(len(images), limit)])
        batches = batches_of(images, limit)
        return self.measure(batches if codec is None else self._through(codec, batches), labels)

    def _through(self, codec: Codec, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for images in batches:
            mean, _ = codec.moments(images.to(self._device) / 127.5 - 1).chunk(2, dim=1)
            yield to_uint8(codec.decode(mean))

    def measure_noise(self, count: int, image_size: tuple[int, int]) -> dict[str, float]:
        """What is measured in features, of noise of (height, width) pixels: what images of nothing get."""
        generator = torch.Generator().manual_seed(0)
        sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
        noise = (torch.randint(256, (size, 3, *image_size), generator=generator, dtype=torch.uint8) for size in sizes)
        measured = self.measure(noise, torch.zeros(count, dtype=torch.long))
        by_classes = {value.name for value in class_values(self._data and self._data.name)}
        return {name: value for name, value in measured.items() if name not in by_classes}

    def _gather(
        self, batches: Iterable[torch.Tensor], count: int, answers: list | None = None, empty: list | None = None
    ) -> Gathered:
        """Features of all images; the likeliest class of each goes to ``answers``, whether it is empty to ``empty``."""
        gathered = Gathered(self.extractor, {"pooled"}.union(*(row.needs for row in self._rows)), count)
        is_empty = load(self._data.is_empty) if self._data and self._data.is_empty else None
        for images in batches:
            features = self.extractor.extract(images.to(self._device))
            gathered.update(features)
            if answers is not None:
                answers.append(self.extractor.logits(features["pooled"]).argmax(dim=1).cpu())
            if empty is not None and is_empty is not None:
                empty.append(is_empty(images))
        return gathered


class ComparedValue(NamedTuple):
    """A metric value of drawn images, as a number and as text, and what real images and noise get, in words."""

    name: str
    value: float
    shown: str
    remark: str

    def to_dict(self) -> dict[str, str | float]:
        """As snapshots' cards take it."""
        return {"name": self.name, "value": float(f"{self.value:.5g}"), "remark": self.remark}


def compare_with_real(
    metrics: ClassifierMetrics, drawn: Mapping[str, float], count: int, held_out: ClassImages | None,
    image_size: tuple[int, int], codec: Codec | None = None,
) -> list[ComparedValue]:
    """What was measured of drawn images, each value between those of real held-out images and of noise.

    Args:
        metrics: By which ``drawn`` was measured, of ``count`` images.
        held_out: Real images that the denoiser has not seen; may be None.
        image_size: (height, width) of the noise in pixels.
        codec: Where given, the held-out images are measured after their way through it, too.
    """
    real = {} if held_out is None else metrics.measure_real(held_out)
    decoded = {} if held_out is None or codec is None else metrics.measure_real(held_out, codec=codec)
    others = count if held_out is None else min(len(held_out), HELD_OUT_IMAGES)
    noise = metrics.measure_noise(others, image_size)
    compared = []
    for value in metrics.values:
        if value.name in drawn:
            found = {f"{others} real held-out images": real, f"{others} of them through the codec": decoded,
                     f"{others} images of noise": noise}  # fmt: skip
            remark = ", ".join(f"{value.show(each)} of {what}" for what, each in found.items() if value.name in each)
            compared.append(ComparedValue(value.title_for(count), drawn[value.name], value.show(drawn), remark))
    return compared


def open_real(
    data: str | None, image_size: int, class_names: Sequence[str], *, data_dir: str | None = None,
    validate_dir: str | None = None, reading: Reading = AS_VIEWED,
) -> tuple[ClassImages, ClassImages | None]:
    """Open the images that a denoiser was trained on, and held-out ones where there are any.

    Args:
        data: Name of the built-in data set, when ``data_dir`` is not given.
        image_size: Side in pixels.
        class_names: Of the denoiser.
        data_dir, validate_dir: Its training images and held-out ones, if it was trained on a folder.
        reading: How these become RGB.

    Raises:
        InputError: They cannot be opened or have other classes.
    """
    def opened(folder: str | None, split: str, limit: int) -> ClassImages:
        images = open_dataset(
            dataset=data, data_dir=folder, split=split, image_size=image_size, num_images=limit, reading=reading
        )
        ordered = in_order_of(images, class_names)
        if ordered is None:
            raise InputError(f"the images of {folder or data} have other classes than the snapshot; name its own data")
        return ordered

    if data_dir is None and validate_dir is not None:
        raise InputError(f"`validate_dir` {validate_dir} belongs to a `data_dir`; give both or neither")
    if data_dir is None and data not in DATASETS:
        raise InputError("the snapshot was trained on no built-in data; name the folder of its images (`data_dir`)")
    real = opened(data_dir, "train", REAL_IMAGES)
    if data_dir is not None and validate_dir is None:
        return real, None
    return real, opened(validate_dir, "test", HELD_OUT_IMAGES)


def batches_of(images: ClassImages, limit: int) -> Iterator[torch.Tensor]:
    """At most ``limit`` images, spread evenly over the set. Shape: -> batches (B, 3, H, W) uint8."""
    chosen = spread(len(images), limit)
    for start in range(0, len(chosen), BATCH):
        yield to_uint8(torch.stack([images[index][0] for index in chosen[start : start + BATCH]]))


def even_labels(count: int, classes: int) -> torch.Tensor:
    """Class ids to draw: every class equally often, or of as many parts of the classes one each. Shape: -> (count,)."""
    return torch.tensor(spread(classes, count)) if count < classes else torch.arange(count) * classes // count


def words_of_parts(class_names: Sequence[str], place: int) -> dict[int, str]:
    """What the classes that share a digit of their id, and no others, are called: {0: "circle", 1: "square", ...}.

    Args:
        class_names: By class id.
        place: Of the digit, as in ``label_parts`` of a row of ``d_emo.tables.DATASETS``.
    """
    shared: dict[int, list[str]] = {}
    for label, name in enumerate(class_names):
        words, digit = name.split(), label // place % LABEL_BASE
        shared[digit] = [word for word in shared.get(digit, words) if word in words]
    return {
        digit: " ".join(word for word in words if not all(word in each for each in shared.values())) or str(digit)
        for digit, words in shared.items()
    }


def measure_timed(metrics: ClassifierMetrics, batches: Iterable[torch.Tensor], labels: torch.Tensor) -> dict[str, Any]:
    """`ClassifierMetrics.measure` while images are drawn, with "seconds" and "images_per_second" of the drawing alone.

    Shape: batches (B, 3, H, W) uint8, labels (N,).
    """
    seconds = 0.0

    def timed() -> Iterator[torch.Tensor]:
        nonlocal seconds
        started = time.perf_counter()
        for images in batches:
            seconds += time.perf_counter() - started
            yield images
            started = time.perf_counter()

    measured = metrics.measure(timed(), labels)
    return measured | {"seconds": seconds, "images_per_second": len(labels) / seconds}


def sampler_table(values: Sequence[MetricValue], rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """Rows of `measure_timed` of ``count`` images, each with its ``scheduler`` and ``steps``, as a Markdown table."""
    shown = [value for value in values if all(value.name in row for row in rows)]
    titles = ["sampler", "steps", *(value.title_for(count) for value in shown), "time", "images/s"]
    return markdown_table(titles, (
        [row["scheduler"], row["steps"], *(value.show(row) for value in shown), f"{row['seconds']:.0f} s",
         f"{row['images_per_second']:.2f}"] for row in rows
    ))  # fmt: skip
