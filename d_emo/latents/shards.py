"""Files of encoded latents: a folder of safetensors shards and ``index.json``, which is written when all are there.

Shard k holds images k S to (k + 1) S in the data set's order, S being the shard size, as ``moments`` (what
``Codec.moments`` gives; where images may be mirrored those of the mirror image follow along the channels) of shape
(n, C', h, w), and ``labels`` (n,). Its header carries what it was made from and a checksum, so a shard can be checked
alone, and whoever finishes last can write the index.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from d_emo.config import check_values
from d_emo.config.ranges import Count, ImageSide
from d_emo.data import ClassImages, Reading
from d_emo.errors import InputError, RunError
from d_emo.files import FORMAT, digest, digest_of_tensors, read_json, remove_left, write_file, write_json
from d_emo.latents.codec import Codec, Factor
from d_emo.text import command

INDEX, TENSORS = "index.json", ("moments", "labels")
RESUME = "re-run the same command to resume"


def encode_command() -> str:
    """What makes such a folder, as whoever runs this process would run it."""
    return command("encode", "encode_latents.py")


def repeat() -> str:
    """How what is missing or damaged is made."""
    return f"run `{encode_command()}` again with the same arguments: it makes what is missing or damaged"


class ShardError(Exception):
    """A file that is not there, or not a shard."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a folder of latents was made from; the same for each of its shards.

    Older folders do not say how their images were read: not turned by EXIF, and without regard to transparency.
    """

    data: str
    seed: int
    images: int
    classes: str
    image_size: int
    codec: str
    encoder: str
    scaling: Factor
    shift: Factor
    dtype: str
    mirrored: bool
    shard_size: int
    format: int = FORMAT
    exif: bool = False
    background: str | None = None

    @classmethod
    def of(cls, images: ClassImages, codec: Codec, *, dtype: str, shard_size: int) -> Origin:
        """That of images encoded by a codec."""
        reading = {} if images.reading is None else asdict(images.reading)
        return cls(
            data=images.name, seed=getattr(images, "seed", 0), images=len(images), image_size=images.image_size,
            classes=digest(json.dumps(images.class_names))[:16], mirrored=images.flip, codec=codec.name,
            encoder=codec.fingerprint, scaling=codec.scaling, shift=codec.shift, dtype=dtype, shard_size=shard_size,
            **reading,
        )

    @property
    def num_shards(self) -> int:
        """How many shards the images make."""
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

    def check_same(self, other: dict[str, Any], folder: Path) -> None:
        """Raise InputError for latents of something else; a codec's name may change, its encoder may not."""
        mine = asdict(self)
        unsaid = mine if (folder / INDEX).exists() else {"exif": Origin.exif, "background": Origin.background}
        made = {key: other.get(key, unsaid.get(key)) for key in mine}  # what is finished stays what it is
        changed = ["other classes, or in another order" if key == "classes" else f"{key} {made[key]}, not {value}"
                   for key, value in mine.items() if key != "codec" and made[key] != value]
        if changed:
            raise InputError(
                f"{folder} holds latents made from something else ({'; '.join(changed)}); remove it or choose another "
                "folder"
            )


_LATER = {each.name for each in fields(Reading)}  # older folders do not say how their images were read
_KINDS: dict[str, Any] = {
    "data": str, "images": Count, "classes": str, "image_size": ImageSide, "codec": str, "encoder": str,
    "dtype": Literal["float16", "bfloat16", "float32"], "mirrored": bool, "shard_size": Count, "exif": bool,
    "moments_shape": list[Count], "class_names": list[str], "shards": list[dict[str, Any]],
}  # fmt: skip
_KEYS = (*(each.name for each in fields(Origin)), "moments_shape", "class_names", "shards")  # of an index


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard, counted from 0."""
    return folder / f"shard-{shard:05}.safetensors"


def write_shard(path: Path, moments: torch.Tensor, labels: torch.Tensor, origin: Origin) -> None:
    """Write one shard, all or nothing; RunError if the disk is full, say.

    Shape: moments (n, C, h, w), labels (n,).
    """
    tensors, made_from = {"moments": moments, "labels": labels}, json.dumps(asdict(origin))
    header = json.dumps({"made_from": made_from, "sha256": _checksum(made_from, tensors)})
    content = save(tensors, metadata={"d_emo": header})  # one entry: the order of several is not always the same
    remove_left(path)
    write_file(path, content, f"the finished shards stay; {RESUME}")


def is_finished(path: Path, origin: Origin) -> bool:
    """Whether a shard is there and intact; reads all of it. One that is damaged is named and removed."""
    if not path.exists():
        return False
    try:
        header, tensors = read_shard(path)
        problem = "does not match its checksum"
        if header["sha256"] == _checksum(header["made_from"], tensors):
            origin.check_same(json.loads(header["made_from"]), path.parent)
            return True
    except ShardError:
        problem = "cannot be read"
    print(f"the shard {path} {problem}; making it anew", file=sys.stderr, flush=True)
    path.unlink()
    return False


def read_shard(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Header and tensors of a shard, which are maps of the file, not read until they are looked at.

    Raises:
        ShardError: It is missing or damaged.
        RunError: It is there and cannot be opened, for want of permission, say.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise ShardError(type(error).__name__) from None
    except OSError as error:
        reason = f"cannot be read ({error.strerror}) and is kept"
        raise RunError(f"the shard {path} {reason}; see to it, then {RESUME}") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
            header = json.loads(file.metadata()["d_emo"])
            return {name: str(header[name]) for name in ("made_from", "sha256")}, tensors
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ShardError(type(error).__name__) from None


def write_index(folder: Path, origin: Origin, class_names: list[str]) -> bool | None:
    """Write ``index.json`` if every shard is there, unless it says already what they hold.

    Returns:
        Whether it was written; None if a shard is missing.
    """
    shards, shape, paths = [], None, [shard_path(folder, shard) for shard in range(origin.num_shards)]
    for path in paths:
        try:
            header, tensors = read_shard(path)
        except ShardError:  # another process is not done yet
            return None
        shape = list(tensors["moments"].shape[1:])
        shards.append({"file": path.name, "images": len(tensors["labels"]), "bytes": path.stat().st_size,
                       "sha256_of_content": header["sha256"]})
    index = {**asdict(origin), "moments_shape": shape, "class_names": class_names, "shards": shards}
    index = json.loads(json.dumps(index))
    index["sha256"] = _seal(index)
    file = folder / INDEX
    try:
        if json.loads(file.read_text()) == index:
            return False
        problem = "does not say what the shards hold"
    except FileNotFoundError:
        problem = ""
    except (OSError, ValueError):
        problem = "cannot be read"
    if problem:
        print(f"{file} {problem}; writing it anew", file=sys.stderr, flush=True)
    write_json(file, index, RESUME)
    return True


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished folder of latents; InputError if it is not finished, or a shard is not of its size."""
    if not folder.is_dir():
        raise InputError(f"the folder of latents {folder} does not exist; `{encode_command()}` makes one")
    missing = [] if (folder / INDEX).exists() else [INDEX]
    if missing and not any(folder.glob("shard-*.safetensors")):
        raise InputError(f"{folder} holds no latents; `{encode_command()}` makes them")
    sizes: dict[str, int] = {}

    def read(index: dict[str, Any]) -> dict[str, Any]:
        [check_values(index, _KINDS)[name] for name in _KEYS if name not in _LATER]
        sizes.update({entry["file"]: entry["bytes"] for entry in index["shards"]})
        if sum(entry["images"] for entry in index["shards"]) != index["images"]:
            raise ValueError("images")
        if index.get("sha256") not in (None, _seal(index)):  # older ones have none
            raise ValueError("sha256")
        return index

    index = {} if missing else read_json(folder / INDEX, read, repeat())
    if missing := missing + [name for name in sizes if not (folder / name).exists()]:
        raise InputError(f"the latents in {folder} are not complete ({missing[0]} is missing); {repeat()}")
    for name, size in sizes.items():
        if (folder / name).stat().st_size != size:
            raise InputError(f"the shard {folder / name} is not of its size; {repeat()}")
    return index


def _seal(index: dict[str, Any]) -> str:
    """A checksum of all else that an index says."""
    return digest(json.dumps({key: value for key, value in index.items() if key != "sha256"}, sort_keys=True))


def _checksum(made_from: str, tensors: dict[str, torch.Tensor]) -> str:
    named = ((f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}", tensors[name]) for name in TENSORS)
    return digest_of_tensors(named, made_from)
