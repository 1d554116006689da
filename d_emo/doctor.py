"""What a data set holds, and what training would do with it, before anything is trained."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from PIL import Image

from d_emo.data import ClassImages, spread, to_uint8
from d_emo.data.describing import describe_passes, describe_sizes, some
from d_emo.data.reading import naming, orientation_of
from d_emo.errors import InputError
from d_emo.files import digest
from d_emo.latents import Codec
from d_emo.sampling.grids import draw_grid
from d_emo.threads import thread_count

SHEET_SIDE = 8
"""Images along a side of the contact sheet."""
FAR_FROM_NORMAL = 0.5, 2.0
"""Deviations of a latent channel outside of these are far from the noise's, which is 1; so are such means."""


@dataclass(frozen=True)
class Header:
    """What a file says of its picture.

    Attributes:
        format: As Pillow names it.
        size: Width and height in pixels, as stored.
        mode: Of the pixels, as Pillow names it.
        turned: Whether its EXIF orientation is not the stored one.
        transparent: Whether some of it may be transparent.
        coloured: Whether it has a colour profile (ICC) other than sRGB, which is not applied.
    """

    format: str
    size: tuple[int, int]
    mode: str
    turned: bool
    transparent: bool
    coloured: bool

    @classmethod
    def of(cls, image: Image.Image) -> Header:
        """That of an open picture, whose pixels need not be read."""
        turned = orientation_of(image) not in (0, 1)
        profile = image.info.get("icc_profile") or b"sRGB"
        coloured = not any("sRGB".encode(coding) in profile for coding in ("ascii", "utf-16-be"))
        return cls(image.format or "unknown", image.size, image.mode, turned, image.has_transparency_data, coloured)


@dataclass
class Findings:
    """What was seen of the images of a data set.

    Attributes:
        images: The data set.
        headers: What the files say, by index; empty for images that are drawn.
        digests: Of the pixels as training sees them, by index of the image.
        labels: Their classes, by index.
        unreadable: Why images could not be read, by index.
    """

    images: ClassImages
    headers: dict[int, Header] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)

    def copies(self) -> list[list[int]]:
        """Groups of indices of images that are the same, pixel for pixel."""
        groups = defaultdict(list)
        for index, pixels in self.digests.items():
            groups[pixels].append(index)
        return [group for group in groups.values() if len(group) > 1]


_BY_INDEX = ("headers", "digests", "labels", "unreadable")


def examine(images: ClassImages, count: int | None = None) -> Findings:
    """Read images as training does, and go on where one cannot be read.

    Args:
        images: The data set.
        count: How many, from all over the data set, a stream's from its start. Default: all.
    """
    count = min(count or len(images), len(images))
    indices = range(count) if images.sequential or count == len(images) else spread(len(images), count)
    found = Findings(images)

    def look(index: int) -> None:
        header = None
        try:
            if (source := images.source(index)) is not None:
                with naming(lambda: images.origin(index)), Image.open(source) as image:
                    header = Header.of(image)
            pixels, found.labels[index] = images[index]
            if header is not None:
                found.headers[index] = header
            found.digests[index] = digest(to_uint8(pixels).numpy().tobytes())
        except InputError as error:
            found.unreadable[index] = str(error)

    with ThreadPoolExecutor(1 if images.sequential else thread_count()) as pool:
        list(pool.map(look, indices))
    by_index = {name: dict(sorted(getattr(found, name).items())) for name in _BY_INDEX}
    return replace(found, **by_index)  # not by which thread was first


def describe(
    found: Findings, *, batch_size: int, max_steps: int, held_out: Findings | None = None
) -> list[tuple[str, str]]:
    """Lines of (topic, text) about the files, the classes, and what training would do; what looks wrong says LOOK."""
    images, seen = found.images, len(found.digests) + len(found.unreadable)
    counts = Counter(found.labels.values() if images.sequential else map(images.label, range(len(images))))
    size = f"{len(images):,} images of {len(images.class_names):,} classes"
    lines = [("data", f"{images.name}: {size}; {seen:,} looked at")]
    if images.left_out:
        lines.append(("beside", images.left_out))
    lines += _files(found) + _classes(counts, images.class_names)
    if found.unreadable:
        reasons = some(found.unreadable.values(), "; ")
        what = "which training passes over" if getattr(images, "skip_corrupt", False) else (
            "training stops at them unless `skip_corrupt` passes over them"
        )
        lines.append(("LOOK", f"{len(found.unreadable):,} unreadable, {what}: {reasons}"))
    lines += _copies(found)
    if held_out is not None:
        lines += _held_out(found, held_out)
    lines.append(("training", f"{describe_passes(len(images), batch_size, max_steps)}; images are "
                              f"{'mirrored at random' if images.flip else 'not mirrored'}"))
    return lines


def _files(found: Findings) -> list[tuple[str, str]]:
    headers, side = list(found.headers.values()), found.images.image_size
    if not headers:
        return [("files", f"none: the images are drawn at {side} px")]
    small, sizes = sum(min(header.size) < side for header in headers), [header.size for header in headers]
    formats = _counted(Counter(header.format for header in headers))
    formats += f"; modes {_counted(Counter(header.mode for header in headers))}"
    lines = [("sizes", describe_sizes(sizes)), ("formats", formats)]
    turned, clear, coloured = (
        sum(getattr(header, kind) for header in headers) for kind in ("turned", "transparent", "coloured")
    )
    if turned:
        lines.append(("EXIF", f"{turned:,} with an orientation"))
    if clear:
        lines.append(("alpha", f"{clear:,} transparent"))
    if coloured:
        lines.append(("LOOK", f"{coloured:,} with a colour profile other than sRGB, which is not applied: a viewer "
                              "shows other colours; convert to sRGB"))
    if small:
        lines.append(("LOOK", f"{small:,} smaller than {side} px, to be enlarged"))
    return lines


def _classes(counts: Counter[int], names: Sequence[str]) -> list[tuple[str, str]]:
    (most, largest), (least, smallest) = counts.most_common(1)[0], counts.most_common()[-1]
    text = f"{smallest:,} ({names[least]}) to {largest:,} ({names[most]}) images, median {median(counts.values()):g}"
    lines = [("classes", text if len(names) > 1 else names[0])]
    if missing := [name for label, name in enumerate(names) if label not in counts]:
        lines.append(("LOOK", f"{len(missing):,} class{'es' * (len(missing) > 1)} without an image: {some(missing)}"))
    if largest > 10 * smallest:
        lines.append(("LOOK", f"{names[most]} has {largest / smallest:.0f} times the images of {names[least]}, and "
                              "training draws it as much more often"))
    return lines


def _copies(found: Findings) -> list[tuple[str, str]]:
    images, groups = found.images, found.copies()
    if not groups:
        return [("duplicates", "none among those that were read")]
    more = sum(len(group) - 1 for group in groups)
    lines = [("duplicates", f"{more:,} the same as another, such as {_names(images, groups[0])}")]
    if torn := [group for group in groups if len({found.labels[index] for index in group}) > 1]:
        lines.append(("LOOK", f"{len(torn):,} of them in several classes, such as {_names(images, torn[0])}"))
    return lines


def _held_out(found: Findings, held_out: Findings) -> list[tuple[str, str]]:
    known = {pixels: index for index, pixels in found.digests.items()}
    both = [(index, known[pixels]) for index, pixels in held_out.digests.items() if pixels in known]
    lines = [("held out", f"{len(held_out.images):,} images; {len(held_out.digests):,} looked at")]
    if held_out.unreadable:
        lines.append(("LOOK", f"{len(held_out.unreadable):,} held-out images unreadable: "
                              f"{some(held_out.unreadable.values(), '; ')}"))
    if both:
        one, other = both[0]
        lines.append(("LOOK", f"{len(both):,} of them trained on, such as {held_out.images.origin(one)}, which is "
                              f"{found.images.origin(other)}"))
    return lines


def sheet_of(found: Findings) -> tuple[list[int], torch.Tensor]:
    """Images from all over those that were read, by class, for a contact sheet; at most 64.

    Shape: indices, and (N, 3, H, W) float32 in [-1, 1].
    """
    read = list(found.digests)
    chosen = read[: SHEET_SIDE**2] if found.images.sequential else [read[i] for i in spread(len(read), SHEET_SIDE**2)]
    pixels = {index: found.images[index][0] for index in chosen}
    chosen.sort(key=lambda index: (found.labels[index], index))
    return chosen, torch.stack([pixels[index] for index in chosen])


def contact_sheet(found: Findings, chosen: Sequence[int], pixels: torch.Tensor) -> Image.Image:
    """The images as training sees them, the classes of a row above it. Shape: pixels (N, 3, H, W) in [-1, 1]."""
    images, columns = found.images, min(SHEET_SIDE, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    canvas = pixels.new_ones(rows * columns, *pixels.shape[1:])
    canvas[: len(pixels)] = pixels
    captions = []
    for row in range(rows):
        labels = dict.fromkeys(found.labels[index] for index in chosen[row * columns : (row + 1) * columns])
        captions.append(", ".join(images.class_names[label] for label in labels))
    return draw_grid(to_uint8(canvas), captions, columns)


@torch.no_grad()
def describe_latents(codec: Codec, pixels: torch.Tensor) -> list[tuple[str, str]]:
    """Lines about the latents of images, and how well the codec gives the images back. Shape: (N, 3, H, W)."""
    means, squares, errors = [], [], []
    for batch in pixels.split(8):
        mean, std = codec.moments(batch).float().chunk(2, dim=1)
        means.append(mean.mean(dim=(2, 3)))
        squares.append((mean**2 + std**2).mean(dim=(2, 3)))
        errors.append((codec.decode(mean) - batch).float().pow(2).mean(dim=(1, 2, 3)))
    mean = torch.cat(means).mean(dim=0)
    std = (torch.cat(squares).mean(dim=0) - mean**2).sqrt()
    psnr = (10 * torch.log10(4 / torch.cat(errors).clamp_min(1e-10))).mean()
    lines = [("latents", f"of {codec.name}, {len(pixels)} images; decoded again they have {psnr:.1f} dB PSNR"),
             ("  mean", _numbers(mean)), ("  deviation", _numbers(std))]
    low, high = FAR_FROM_NORMAL
    odd = [str(channel) for channel in range(len(std)) if not low <= std[channel] <= high or abs(mean[channel]) > high]
    if odd:
        lines.append(("LOOK", f"the latent channels {', '.join(odd)} are far from mean 0 and deviation 1, which the "
                              "noise has; is this the VAE for these images?"))
    return lines


def _numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:+.2f}" for value in values.tolist())


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def _names(images: ClassImages, group: Sequence[int]) -> str:
    return " and ".join(images.origin(index) for index in group[:2])

