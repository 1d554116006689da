"""From a stored picture to the pixels that an image viewer shows, whatever way the file keeps them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from d_emo.config import ReadingSettings
from d_emo.errors import InputError, PackageError, imported

PHOTOGRAPHS = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
}  # fmt: skip
"""Kinds of pictures, of a film the first; what else Pillow opens (PSD, ICNS) is most often no picture to train on."""
SIGNED = "its pixels are signed or of 32 bits, and no range is known of them; 8 or 16 bits can be read"
HEIF = {".heic", ".heif"}
KEY_OF_PIXELS: dict[str, Callable[[Any], Any]] = {
    "1": lambda key: 255 * bool(key), "L;2": lambda key: key * 85, "L;4": lambda key: key * 17,
    "RGB;16B": lambda key: tuple(value >> 8 for value in key),
}  # fmt: skip
"""A PNG's transparent colour is of the file's depth, Pillow's pixels are of 8 bits; by Pillow's name of that depth."""


PILLOWS_LIMIT, LIMIT = 1024**3 // 12, 2**29
"""Of pixels, beyond which Pillow warns; from twice as many it refuses."""


@cache
def prepare_pillow() -> None:
    """Let Pillow read HEIF, where its plug-in is installed, and large pictures, once in each process.

    Its limit is for what strangers send; a scan or a satellite's picture of 200 megapixels is none of that. A limit
    that somebody else has set stays.
    """
    with suppress(PackageError):  # told where files are left out
        _heif().register_heif_opener()
    if Image.MAX_IMAGE_PIXELS == PILLOWS_LIMIT:
        Image.MAX_IMAGE_PIXELS = LIMIT


def _heif() -> ModuleType:
    return imported("pillow_heif", ".heic and .heif are read by pillow-heif", "d-emo[heif]")


@cache
def image_endings() -> frozenset[str]:
    """Endings of the files that are taken for images: `PHOTOGRAPHS` that Pillow or an installed plug-in of it reads."""
    prepare_pillow()
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(PHOTOGRAPHS & readable)


def is_image(name: str | Path) -> bool:
    """Whether a file is taken for an image, by its name."""
    return Path(name).suffix.lower() in image_endings()


def describe_left_out(names: Iterable[str | Path]) -> str:
    """The sentence on files that are no images, with their endings; empty where there are none."""
    endings = Counter(Path(name).suffix.lower() or "without an ending" for name in names)
    if not endings:
        return ""
    count = endings.total()
    shown = ", ".join(f"{ending} {number:,}" for ending, number in endings.most_common(8))
    more = ", ..." if len(endings) > 8 else ""
    remedy = ""
    if endings.keys() & HEIF:
        try:
            _heif()
        except PackageError as error:
            remedy = f"; {error}"
    return f"{count:,} file{'s' * (count > 1)} of other kinds left out: {shown}{more}{remedy}"


def no_images(where: str, names: Iterable[str | Path]) -> InputError:
    """The error of a place that holds these files, no images among them."""
    wanted = f"{where} holds no images ({', '.join(sorted(image_endings()))})"
    return InputError("; ".join(filter(None, [wanted, describe_left_out(names)])))


@contextmanager
def naming(name: Callable[[], str], unit: str = "image") -> Iterator[None]:
    """Whatever goes wrong inside becomes an `InputError` that names the file; decoders raise anything at all."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        known = not isinstance(error, UnidentifiedImageError)  # whose text names a Python object
        reason = " ".join(str(error).split()).rstrip(".") if known else "no image of a kind that can be read"
        raise InputError(
            f"cannot read the {unit} {name()} ({reason or type(error).__name__}); repair or replace it"
        ) from None


@dataclass(frozen=True)
class Reading:
    """How stored pictures become RGB of 8 bits.

    Attributes:
        exif: Turn a picture upright as its EXIF tag says. False: as Pillow opens it, as ADM and DiT do.
        background: Colour behind what is transparent, as ``PIL.ImageColor`` knows it.
    """

    exif: bool = ReadingSettings.exif
    background: str = ReadingSettings.background

    @classmethod
    def of(cls, settings: ReadingSettings) -> "Reading":
        """As settings say it; what they leave open is the default."""
        given = {each.name: getattr(settings, each.name) for each in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def read(self, source: Path | BytesIO, name: Callable[[], str]) -> Image.Image:
        """The picture, of a film or a file of many pages the first; ``name`` gives what a message calls it.

        Raises:
            InputError: It cannot be read, or its pixels have no range that a viewer would know; the sentence names it.
        """
        prepare_pillow()
        with naming(name), Image.open(source) as image:
            return self.as_viewed(image)

    def size(self, source: Path | BytesIO, name: Callable[[], str]) -> tuple[int, int]:
        """Width and height of what `read` gives, from the head of the file where that tells; fails as it does."""
        prepare_pillow()
        with naming(name), Image.open(source) as image:
            if image.width == image.height or not self.exif or orientation_of(image) == 1:
                return image.size
            return self.as_viewed(image).size

    def as_viewed(self, image: Image.Image) -> Image.Image:
        """An open picture, or one in memory, in RGB.

        Raises:
            InputError: Its pixels have no range that a viewer would know.
        """
        _decode(image)
        if 2 in getattr(image, "tag_v2", {}).get(339, ()):  # SampleFormat: of 16 bits Pillow's mode tells it, of 8 not
            raise InputError(SIGNED)
        if self.exif and orientation_of(image) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        alpha = None
        if image.mode.startswith("I") or image.mode == "F":
            image, alpha = _eight_bits(image)
        elif image.mode == "La":
            image = image.convert("LA")
        if alpha is None and image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            alpha = image.getchannel("A")
        if alpha is None or alpha.getextrema()[0] == 255:
            return image.convert("RGB")
        viewed = Image.new("RGB", image.size, self.background)
        viewed.paste(image.convert("RGB"), mask=alpha)
        return viewed


AS_VIEWED = Reading()


def orientation_of(image: Image.Image) -> int:
    """EXIF's number of the side that is up; 1 where there is none or it cannot be read, which spoils no pixels."""
    with suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _decode(image: Image.Image) -> None:
    """Load an image and bring its transparent colour to the depth of its pixels."""
    tiles, key = getattr(image, "tile", None), image.info.get("transparency")
    stored = tiles[0][3] if tiles else None
    image.load()
    if image.format == "PNG" and key is not None and stored in KEY_OF_PIXELS:
        image.info["transparency"] = KEY_OF_PIXELS[stored](key)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey pixels of more than 8 bits in 8, nearest, and their opacity where one grey is transparent.

    Black and white are the ends of the file's range: 0 to 65535 (or of fewer bits, where a TIFF says so), 0 to 1 of
    floating-point pixels.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        low, high, white = float(values.min()), float(values.max()), 1.0
        if not (low >= 0 and high <= white):
            raise InputError(f"its floating-point pixels are from {low:g} to {high:g}, where viewers show 0 to 1")
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # in these two it stands for 16 bits
        raise InputError(SIGNED)
    else:
        white = 2.0 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
    scaled = np.rint(values * np.float32(255 / white))
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow heeds up to 8 bits only
        scaled = 255 - scaled
    key = image.info.get("transparency")
    opaque = None if key is None else Image.fromarray((values != key).astype(np.uint8) * 255)
    return Image.fromarray(scaled.astype(np.uint8)), opaque


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Square centre crop as ADM and DiT prepare ImageNet: halve by box filter while twice too large, then bicubic.

    A smaller picture is enlarged.

    Raises:
        InputError: The picture is so narrow that nothing could hold it when enlarged.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > 2**28:
        raise InputError(
            f"{image.width} x {image.height} px is too narrow: with sides of {image_size} px and more it would be "
            f"{width} x {height} px"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
