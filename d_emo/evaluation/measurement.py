"""All of it wired together: two sets of images in, distances and scores out."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from d_emo.claims import claimed
from d_emo.config import PUBLISHED_COUNT, FidSettings
from d_emo.data import AS_VIEWED, Reading
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.evaluation.feature_shards import (
    ALONE,
    IDENTITY_KEY,
    FeatureShards,
    Generate,
    Ranks,
    claim_folder,
    digest_of_settings,
    read_provenance,
)
from d_emo.evaluation.features import create_extractor
from d_emo.evaluation.images import ImageSource, as_text, cropping, open_images
from d_emo.evaluation.metrics import Gathered, check_count
from d_emo.evaluation.npz import is_intact, read_text
from d_emo.evaluation.reference import Reference
from d_emo.evaluation.result import Result
from d_emo.evaluation.statistics import is_constant
from d_emo.files import write_file
from d_emo.tables import METRICS, check_compared, load, parse_features, parse_metrics


class Measurement:
    """A measurement whose arguments have been checked as far as can be done before a network runs.

    Args:
        reference: Folder, zip, or ``.npz`` (images, or statistics of the same features); may be None where no metric
            compares with one.
        metrics: Names in ``d_emo.tables.METRICS``.
        features, inception_weights: As ``create_extractor`` takes them.
        batch_size: Images per call of the network.
        output: JSON file to write.
        overwrite: Whether files that exist may be replaced: ``output`` here, ``save_npz`` later.
        device: Where the network runs; None: the best one that is there.
        progress: Show progress bars on a terminal.
        reading: How stored images become RGB.
        skip_corrupt: Leave out stored images that cannot be read; a warning counts them.

    Raises:
        InputError: Any of these cannot be used; one sentence says which and why.
    """

    def __init__(
        self, reference: str | Path | None, *, metrics: Sequence[str] = ("fid",), features: str = FidSettings.features,
        inception_weights: str | Path | None = None, batch_size: int = FidSettings.batch_size,
        output: str | Path | None = None, overwrite: bool = False, device: torch.device | str | None = None,
        progress: bool = True, reading: Reading = AS_VIEWED, skip_corrupt: bool = False,
    ):  # fmt: skip
        self._metrics = parse_metrics(metrics)
        if batch_size < 1:
            raise InputError(f"`batch_size` {batch_size} is too small; use at least 1")
        if output is not None:
            check_output(Path(output), overwrite=overwrite)
        check_compared(self._metrics, reference)
        for name in self._metrics:
            if "spatial" in METRICS[name].needs and not parse_features(features)[0].spatial:
                raise InputError(f"{METRICS[name].title} ({name}) cannot be had of {features}; leave {name} out")
        compares = any(METRICS[name].compares for name in self._metrics)
        self._reference = None
        if compares:
            self._reference = Reference(reference, self._metrics, features, reading, skip_corrupt)
        self._features, self._inception_weights = features, inception_weights
        self._batch_size, self._output, self._overwrite, self._progress = batch_size, output, overwrite, progress
        self._device, self._reading, self._skip_corrupt = best_device(device), reading, skip_corrupt

    def of_images(self, samples: str | Path, *, num_images: int | None = None) -> Result:
        """Measure stored images; ``num_images`` of them, spread evenly over their order, or all.

        Raises:
            InputError: The images cannot be used, or see the class.
        """
        images = open_images(samples, num_images=num_images, reading=self._reading, skip_corrupt=self._skip_corrupt)
        self._prepare(images.num_images, images.image_size)
        with tempfile.TemporaryDirectory(prefix="d-emo-fid-") as folder:
            sampled = self._gathered(images.num_images, Path(folder))
            sampled.update_all(self._run(images))
            warnings = self._warnings(images.num_images, images.image_size, images)
            return self._finish(sampled, Path(folder), str(samples), read_provenance(samples), warnings)

    def of_generated(
        self, generate: Generate, num_images: int, *, image_size: tuple[int, int], name: str, sampling: dict[str, Any],
        identity: dict[str, Any], work_dir: str | Path | None = None, save_npz: str | Path | None = None,
        save_png: str | Path | None = None, ranks: Ranks = ALONE,
    ) -> Result | None:  # fmt: skip
        """Draw images and measure them in one go; the same call again resumes where an earlier one stopped.

        Parts are recognised by their checksums and by the settings that are written down beside them, an ``.npz`` file
        by the digest of these in it; nothing that is there is drawn again.

        Args:
            generate: Draws images by their indices; an image must depend on nothing but its index.
            num_images: How many.
            image_size: (width, height) in pixels.
            name, sampling: Where the samples come from and how they are drawn, for the report.
            identity: Everything that the images depend on, beside their index.
            work_dir: Where features are kept, 4 bytes a number: 16 kB an image with Inception.
            save_npz, save_png: File (in ADM's layout) and folder to write the images to.
            ranks: Which of the processes that share the work this one is.

        Returns:
            The result in process 0, None in others.

        Raises:
            InputError: As of the class; or a folder holds something else.
        """
        self._prepare(num_images, image_size)
        identity = {**identity, "sampling": sampling, "features": self.extractor.name}
        own = digest_of_settings({**identity, "features": None, "num_images": num_images})
        if save_npz is not None and is_own(Path(save_npz), own, overwrite=self._overwrite):
            save_npz = None  # it is there
        folder = Path(work_dir or Path("results", "fid", digest_of_settings(identity)))
        with ExitStack() as claims:
            if ranks.rank == 0:
                claims.enter_context(claimed(folder, folder=True))
                claim_folder(folder, identity)
                if save_png is not None:
                    claims.enter_context(claimed(Path(save_png), folder=True))
                    claim_folder(Path(save_png), {**identity, "features": None})
            ranks.wait()
            return self._draw(generate, num_images, folder, own, image_size=image_size, name=name, sampling=sampling,
                              save_npz=save_npz, save_png=save_png, ranks=ranks)  # fmt: skip

    def _draw(
        self, generate: Generate, num_images: int, folder: Path, identity: str, *, image_size: tuple[int, int],
        name: str, sampling: dict[str, Any], save_npz: str | Path | None, save_png: str | Path | None, ranks: Ranks,
    ) -> Result | None:  # fmt: skip
        """What `of_generated` does once its folders are claimed."""
        layers = {"pooled": self.extractor.dim, "spatial": self.extractor.spatial_dim}
        shards = FeatureShards(
            folder, num_images, {layer: dim for layer, dim in layers.items() if dim},
            png_folder=save_png and Path(save_png), keep_pixels=save_npz is not None,
        )  # fmt: skip
        if ranks.rank == 0:
            left = sum(map(len, shards.missing()))
            if left < num_images:
                print(f"resuming in {folder}: {num_images - left:,} of {num_images:,} images are there", flush=True)
            else:
                print(f"features of {num_images:,} images go to {folder}; re-run the command to resume", flush=True)
        speed = shards.write(generate, self.extractor, ranks, device=self._device, progress=self._progress)
        if ranks.rank != 0:
            return None
        if save_npz is not None:
            shards.write_npz(Path(save_npz), image_size, sampling, identity)
        shards.drop_pixels()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-rows-") as rows:
            sampled = self._gathered(num_images, Path(rows)).update_all(shards.read(self._device))
            return self._finish(sampled, Path(rows), name, sampling, self._warnings(num_images, image_size), speed)

    def _prepare(self, num_images: int, image_size: tuple[int, int]) -> None:
        """Open the network; refuse what a look at the numbers of images and of features is enough for."""
        check_count(self._metrics, num_images)
        self._cropped = self._reference and self._reference.crop_to(image_size)
        self.extractor = create_extractor(
            self._features, inception_weights=self._inception_weights, device=self._device
        )
        if self._reference is not None:
            self._reference.read(self.extractor)

    def _gathered(self, count: int, folder: Path) -> Gathered:
        needs = set().union({"pooled"}, *(METRICS[name].needs for name in self._metrics))  # pooled: do images differ?
        return Gathered(self.extractor, needs, count, folder=folder)

    def _run(self, images: ImageSource) -> Iterator[dict[str, torch.Tensor]]:
        hidden = None if self._progress else True  # None: shown on a terminal only
        with tqdm(total=images.num_images, desc=images.name, unit="image", disable=hidden, leave=False) as bar:
            for batch in images.batches(self._batch_size):
                yield self.extractor.extract(batch.to(self._device))
                bar.update(len(batch))

    def _finish(
        self, sampled: Gathered, folder: Path, name: str, sampling: dict[str, Any], warnings: Iterable[str],
        speed: float | None = None,
    ) -> Result:  # fmt: skip
        reference = self._reference
        if is_constant(sampled.pooled):
            raise InputError(
                f"all {sampled.pooled.count} samples have the same features; they are one picture, or the feature "
                "network is untrained"
            )
        if reference is not None:
            (folder / "reference").mkdir()
            reference.gather(self.extractor, self._run, folder / "reference")
        result = Result(
            values={
                name: value for metric in self._metrics
                for name, value in load(METRICS[metric].compute)(sampled, reference, self._device).items()
            },
            num_samples=sampled.pooled.count,
            num_reference=reference and reference.num_images,
            num_compared=len(reference.rows) if reference and reference.rows is not None else None,
            features=self.extractor.name,
            samples=name,
            reference=reference and reference.name,
            sampling=sampling,
            images_per_second=speed,
            reference_cropped=self._cropped,
            warnings=tuple(warnings),
        )
        if self._output is not None:
            write_file(Path(self._output), result.to_json())
        return result

    def _warnings(
        self, count: int, image_size: tuple[int, int], samples: ImageSource | None = None
    ) -> Iterator[str]:
        reference = self._reference and self._reference.images
        if count < PUBLISHED_COUNT:
            yield (
                f"FID falls as the number of samples grows; FID-{count} compares with other FID-{count} only, "
                f"published tables use {PUBLISHED_COUNT} samples"
            )
        for what, images in (("samples", samples), ("reference", reference)):
            for told in filter(None, (images.left_out, images.skipped) if images is not None else ()):
                yield f"of the {what}, {told}"
        if samples is not None and samples.num_jpegs:
            yield (
                f"{samples.num_jpegs} of the {count} samples are JPEG files, whose compression changes the FID; "
                "save samples as PNG"
            )
        if reference is not None and image_size != reference.image_size:
            yield (
                f"the samples are {as_text(image_size)} px and the reference {as_text(reference.image_size)} "
                "px; the resizing enters the FID" + self._remedy(image_size)
            )
        if not self.extractor.published:
            yield "these are not the published Inception weights; the FID compares with no published one"


    def _remedy(self, size: tuple[int, int]) -> str:
        """What crops a folder of real images to the size of the samples, as a part of a sentence."""
        if size[0] != size[1] or not Path(self._reference.name).is_dir():
            return ""
        return f"; {cropping(self._reference.name, size[0])} crops the reference as in training"


def measure(samples: str | Path, reference: str | Path | None, *, num_images: int | None = None, **options) -> Result:
    """Measure stored images against a reference; ``options`` are those of `Measurement`."""
    return Measurement(reference, **options).of_images(samples, num_images=num_images)


def is_own(path: Path, identity: str, *, overwrite: bool = False) -> bool:
    """Whether images of this identity are in an ``.npz`` file, intact; if not, it may be written.

    Raises:
        InputError: It holds something else, or cannot be written.
    """
    try:
        found = path.is_file() and read_text(path, IDENTITY_KEY)
    except InputError:  # not an .npz file at all
        found = None
    check_output(path, overwrite=overwrite or found == identity)
    return found == identity and is_intact(path)


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that exists, unless it may be replaced, or that cannot be written.

    Raises:
        InputError: The file exists, or its folder does not, or cannot be written to.
    """
    if path.exists() and not overwrite:
        raise InputError(f"the output {path} exists and is not overwritten; name another, or give `overwrite`")
    if not path.parent.is_dir():
        raise InputError(f"the output {path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"the output {path} cannot be written: no permission to write into {path.parent}")
