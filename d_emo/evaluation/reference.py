"""The other side of a measurement: real images, or statistics of them that were stored in ADM's layout."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from d_emo.data import AS_VIEWED, Reading, spread
from d_emo.errors import InputError
from d_emo.evaluation import npz
from d_emo.evaluation.features import FeatureExtractor
from d_emo.evaluation.images import ImageSource, open_images
from d_emo.evaluation.metrics import Gathered, check_count
from d_emo.evaluation.statistics import FeatureStatistics, StoredStatistics, is_constant
from d_emo.tables import METRICS

ADM_FEATURES = "inception"  # what a file's statistics are of where it does not say so, as ADM's do not
COMPARED = 10_000  # reference images in precision, recall and KID, as in ADM's files; their features are stored


class Reference:
    """A reference that has been opened and checked as far as can be done before a network runs.

    ADM's files hold statistics of a whole training set (``mu``, ``sigma``; ``mu_s``, ``sigma_s``) and 10,000 of its
    images (``arr_0``): FID and sFID are measured against the statistics, precision, recall and KID against the images.

    Args:
        path: Folder, zip, or ``.npz``; statistics in a file are of the features that it names, else of Inception's.
        metrics: What is to be measured.
        features: In which features.
        reading: How stored images become RGB.
        skip_corrupt: Leave out images that cannot be read.

    Attributes:
        name: The path.
        images: Images to run through the network, or None if stored statistics are all that is needed.
        pooled, spatial: Statistics, after `gather`; None where no metric needs them.
        rows: Features of at most 10,000 single images, after `gather`; None where no metric needs them.

    Raises:
        InputError: It cannot be used, or lacks what a metric needs.
    """

    def __init__(
        self, path: str | Path, metrics: Sequence[str], features: str, reading: Reading = AS_VIEWED,
        skip_corrupt: bool = False,
    ):  # fmt: skip
        self.name, self._path = str(path), Path(path)
        metrics = [name for name in metrics if METRICS[name].compares]

        def needing(*what: str) -> list[str]:
            return [name for name in metrics if METRICS[name].needs & {*what}]

        self._needs = {what for name in metrics for what in METRICS[name].needs}
        is_npz = self._path.suffix.lower() == ".npz" and not self._path.is_dir()
        keys = npz.archive_keys(self._path) if is_npz else set()
        self._stored = set(npz.POOLED_KEYS) <= keys and (features == ADM_FEATURES or npz.FEATURES_KEY in keys)
        if self._stored and needing("spatial") and not set(npz.SPATIAL_KEYS) <= keys:
            names = ", ".join(needing("spatial"))
            raise InputError(f"{path} holds mu and sigma but not mu_s and sigma_s, which {names} needs; leave it out")
        if self._stored and needing("rows") and npz.IMAGES_KEY not in keys:
            names = " and ".join(needing("rows"))
            raise InputError(
                f"{path} holds statistics but no images ({npz.IMAGES_KEY}), which {names} need; leave them out, or "
                f"write another with `{npz.make_command()}`"
            )
        if not self._stored and set(npz.POOLED_KEYS) <= keys and npz.IMAGES_KEY not in keys:
            raise InputError(
                f"{path} holds statistics without the name of their features, which are then Inception's, not "
                f"{features}; write another with `{npz.make_command()}`"
            )
        from_images = self._needs & ({"rows"} if self._stored else {"pooled", "spatial", "rows"})
        self.images: ImageSource | None = None
        options = {"reading": reading, "any_size": True, "skip_corrupt": skip_corrupt}
        if from_images:
            self.images = open_images(path, **options)
        if from_images == {"rows"} and self.images.num_images > COMPARED:
            self.images = open_images(path, num_images=COMPARED, **options)
        if from_images:
            check_count(needing(*from_images), self.images.num_images)
        self._from_images = from_images
        self.pooled: FeatureStatistics | StoredStatistics | None = None
        self.spatial: FeatureStatistics | StoredStatistics | None = None
        self.rows: torch.Tensor | None = None

    def crop_to(self, size: tuple[int, int]) -> int | None:
        """Crop images of several sizes as training does, to the (width, height) of the samples; returns their side.

        Raises:
            InputError: That is no square.
        """
        if self.images is None or not self.images.mixed:
            return None
        self.images.crop_to(size)
        return size[0]

    def read(self, extractor: FeatureExtractor) -> None:
        """Read stored statistics, if there are any.

        Raises:
            InputError: They are damaged, or of other features.
        """
        if not self._stored:
            return
        found = npz.read_text(self._path, npz.FEATURES_KEY)
        if found is not None and _content(found) != _content(extractor.name):
            raise InputError(
                f"{self._path} holds statistics of the features {found}, not of {extractor.name}, which are in use; "
                f"measure with the same, or write another with `{npz.make_command()}`"
            )
        if "pooled" in self._needs:
            self.pooled = npz.read_statistics(self._path, extractor.dim)
        if "spatial" in self._needs:
            self.spatial = npz.read_statistics(self._path, extractor.spatial_dim, npz.SPATIAL_KEYS)
        self._check_spread()

    def gather(
        self, extractor: FeatureExtractor, run: Callable[[ImageSource], Iterable[dict[str, torch.Tensor]]], folder: Path
    ) -> None:
        """Run the images through the network, if that is needed; features of single images go to ``folder``."""
        if self.images is None:
            return
        count = self.images.num_images
        kept = npz.choose_evenly(count, min(count, COMPARED), self.name)
        gathered = Gathered(extractor, self._from_images, count, folder=folder, kept=kept)
        gathered.update_all(run(self.images))
        self.pooled, self.spatial = self.pooled or gathered.pooled, self.spatial or gathered.spatial
        self.rows = gathered.rows
        self._check_spread()

    def _check_spread(self) -> None:
        if self.pooled is not None and is_constant(self.pooled):
            raise InputError(
                f"all images of the reference {self.name} have the same features; they are one picture, or the feature "
                "network is untrained"
            )

    @property
    def num_images(self) -> int | None:
        """How many images the statistics are over (or, without any, were compared with); None if unknown."""
        statistics = self.pooled or self.spatial
        return statistics.count if statistics is not None else len(self.rows)


def write_reference(
    path: Path, batches: Iterable[torch.Tensor], extractor: FeatureExtractor, *, num_images: int,
    image_size: tuple[int, int], kept_images: int,
) -> None:
    """Write a reference in ADM's layout: statistics of all images, and some of the images.

    Beside ADM's arrays the file says over how many images the statistics are, and of which features.

    ``num_images`` images will come, of which ``kept_images`` are stored, from all over them.
    Shape: batches (B, 3, H, W) uint8; image_size is (width, height).

    Raises:
        InputError: A feature is not finite.
    """
    gathered = Gathered(extractor, {"pooled", "spatial"} if extractor.spatial_dim else {"pooled"}, num_images)
    kept = set(spread(num_images, kept_images)) if kept_images else set()

    def chosen() -> Iterator[torch.Tensor]:
        for images in batches:
            rows = [row for row in range(len(images)) if gathered.pooled.count + row in kept]
            gathered.update(extractor.extract(images))
            if rows:
                yield images[rows].cpu()

    def arrays() -> dict[str, Any]:
        found = {npz.POOLED_KEYS: gathered.pooled, npz.SPATIAL_KEYS: gathered.spatial}
        moments = {keys: (each.mean, each.covariance) for keys, each in found.items() if each is not None}
        named = {key: value for keys, pair in moments.items() for key, value in zip(keys, pair, strict=True)}
        return {**named, npz.COUNT_KEY: gathered.pooled.count, npz.FEATURES_KEY: extractor.name}

    npz.write_npz(path, chosen(), kept_images, image_size, arrays)


def _content(features: str) -> tuple[str, str]:
    """Kind and digest of features, without the path that their weights had."""
    return re.split("[:@]", features)[0], features.rpartition("@")[2]
