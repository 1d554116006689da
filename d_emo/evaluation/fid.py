"""The Frechet distance between two sets of images (FID), and the report that says how it was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from d_emo.config import FidSettings, InputError
from d_emo.evaluation.features import FeatureExtractor, create_extractor
from d_emo.evaluation.images import ImageSource, as_text, open_images
from d_emo.evaluation.npz import holds_statistics, read_statistics
from d_emo.evaluation.statistics import FeatureStatistics, StoredStatistics, frechet_distance

PUBLISHED_COUNT = 50_000  # FID falls with the number of samples; tables are measured with this many
CONSTANT_SPREAD = 1e-12  # variance over squared mean that float32 features of one and the same image can reach


@dataclass(frozen=True)
class FidResult:
    """A distance, and all that is needed to compare it with another.

    Attributes:
        fid: Frechet distance.
        num_samples: How many samples were measured.
        num_reference: How many reference images; None if their statistics came from a file.
        features: Name of the feature extractor and of its weights.
        samples: Where the samples came from.
        reference: Where the reference came from.
        warnings: What a reader must know before comparing, one sentence each.
    """

    fid: float
    num_samples: int
    num_reference: int | None
    features: str
    samples: str
    reference: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        value = f"{self.fid:.2f}" if self.fid >= 1 else f"{self.fid:.3g}"
        count = "stored statistics" if self.num_reference is None else f"{self.num_reference} images"
        return (
            f"FID-{self.num_samples}  {value}  "
            f"(features {self.features}, samples {self.samples}, reference {self.reference}: {count})"
        )

    def to_json(self) -> str:
        """The result as a JSON object, one field per attribute."""
        return json.dumps({"metric": "fid", **asdict(self)}, indent=2) + "\n"


def compute_statistics(
    source: str | Path | Iterable[torch.Tensor],
    extractor: FeatureExtractor,
    *,
    num_images: int | None = None,
    batch_size: int = FidSettings.batch_size,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> FeatureStatistics:
    """Mean and covariance of the features of a set of images, one batch in memory at a time.

    Args:
        source: Folder, ``.npz`` file, or batches. Shape of a batch: (B, 3, H, W) uint8.
        extractor: Feature network.
        num_images: How many images to take; from stored sets, spread evenly over their order.
        batch_size: Images per call of the network, for folders and files.
        device: Where the extractor runs; batches are moved there.
        progress: Show a progress bar on a terminal.

    Raises:
        InputError: The images cannot be used, see ``open_images``, or a feature is not finite.
    """
    _check_batch_size(batch_size)
    images = open_images(source, num_images=num_images)
    return _gather(images, extractor, batch_size=batch_size, device=device, progress=progress)


def measure_fid(
    samples: str | Path,
    reference: str | Path,
    *,
    features: str = FidSettings.features,
    inception_weights: str | Path | None = None,
    num_images: int | None = None,
    batch_size: int = FidSettings.batch_size,
    output: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FidResult:
    """Measure the FID of samples against a reference; all that can be refused early is refused before a network runs.

    Args:
        samples: Folder or ``.npz`` file of images.
        reference: Folder or ``.npz`` file of images; ``mu`` and ``sigma`` in it serve the Inception features.
        features: ``inception`` or ``emov2:SNAPSHOT``.
        inception_weights: Weights file of the Inception network; torch-fidelity's own by default.
        num_images: How many samples to take, spread evenly over their order; all by default. The reference is
            always taken whole.
        batch_size: Images per call of the network.
        output: JSON file to write; never overwritten.
        device: Where the network runs; by default the GPU if there is one.
        progress: Show progress bars on a terminal.

    Raises:
        InputError: Any of these cannot be used; one sentence says which and why.
    """
    _check_batch_size(batch_size)
    if output is not None:
        _check_output(Path(output))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sample_images = open_images(samples, num_images=num_images)
    serves_statistics = features == "inception" and holds_statistics(reference)
    reference_images = None if serves_statistics else open_images(reference)
    extractor = create_extractor(features, inception_weights=inception_weights, device=device)
    stored = read_statistics(reference, extractor.dim) if reference_images is None else None

    how = {"batch_size": batch_size, "device": device, "progress": progress}
    sampled = _gather(sample_images, extractor, **how)
    referred = _gather(reference_images, extractor, **how) if stored is None else stored
    if _is_constant(referred):
        raise InputError(
            f"all images of the reference {reference} have the same features; they are one picture, or the feature "
            "network is untrained"
        )
    result = FidResult(
        fid=frechet_distance(sampled.mean, sampled.covariance, referred.mean, referred.covariance),
        num_samples=sampled.count,
        num_reference=referred.count,
        features=extractor.name,
        samples=str(samples),
        reference=str(reference),
        warnings=tuple(_warnings(sample_images, reference_images, sampled, extractor)),
    )
    if output is not None:
        _write_new(Path(output), result.to_json())
    return result


def _gather(
    images: ImageSource, extractor: FeatureExtractor, *, batch_size: int, device: torch.device | str, progress: bool
) -> FeatureStatistics:
    statistics = FeatureStatistics(extractor.dim)
    hidden = None if progress else True  # None: shown on a terminal only
    with tqdm(total=images.num_images, desc=images.name, unit="image", disable=hidden, leave=False) as bar:
        for batch in images.batches(batch_size):
            statistics.update(extractor(batch.to(device)))
            bar.update(len(batch))
    return statistics


def _warnings(
    samples: ImageSource, reference: ImageSource | None, sampled: FeatureStatistics, extractor: FeatureExtractor
) -> Iterator[str]:
    count = sampled.count
    if count < PUBLISHED_COUNT:
        yield (
            f"FID falls as the number of samples grows; FID-{count} compares with other FID-{count} only, "
            f"published tables use {PUBLISHED_COUNT} samples"
        )
    if samples.num_jpegs:
        yield (
            f"{samples.num_jpegs} of the {count} samples are JPEG files, whose compression changes the FID; "
            "save samples as PNG"
        )
    if reference is not None and samples.image_size != reference.image_size:
        yield (
            f"the samples are {as_text(samples.image_size)} px and the reference {as_text(reference.image_size)} px; "
            "the resizing enters the FID"
        )
    if not extractor.published:
        yield "these are not the published Inception weights; the FID compares with no published one"
    if _is_constant(sampled):
        yield f"all {count} samples have the same features; they are one picture, or close to it"


def _is_constant(statistics: FeatureStatistics | StoredStatistics) -> bool:
    """Whether the features vary by no more than float32 rounding."""
    return bool(statistics.covariance.trace().abs() <= CONSTANT_SPREAD * statistics.mean.square().sum())


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is too small; use at least 1")


def _check_output(path: Path) -> None:
    if path.exists():
        raise InputError(f"the output {path} exists and is not overwritten; remove it or name another")
    if not path.parent.is_dir():
        raise InputError(f"the output {path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"the output {path} cannot be written: no permission to write into {path.parent}")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x") as stream:
            stream.write(text)
    except OSError as error:
        raise InputError(f"the output {path} cannot be written: {error.strerror}") from error
