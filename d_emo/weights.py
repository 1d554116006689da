"""Weights from files, taken whole or refused: names and shapes are compared before the first tensor is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from d_emo.errors import InputError, PackageError, unmet
from d_emo.files import read_json

Model = TypeVar("Model", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]

RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION = re.compile(rf"(?<=\.)(?:{'|'.join(RENAMED)})(?=\.(?:weight|bias)$)")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEM, SHOWN = "diffusion_pytorch_model", 4  # as diffusers names its files; how many tensors a sentence names


def check_library() -> None:
    """Have diffusers import what writing a network takes: before a run, not at its first snapshot.

    Raises:
        PackageError: It lacks a package, such as one that an installed PEFT needs.
    """
    with telling_unmet():
        import_module("diffusers.hooks")


def load_pretrained(kind: type[Model], folder: Path) -> Model:
    """A network in the layout of diffusers' ``save_pretrained``, in eval mode and float32, its values unchecked.

    Where a tensor is missing, diffusers itself warns and leaves it without data, or as the memory happened to be.

    Args:
        kind: A ``diffusers.ModelMixin``.
        folder: With ``config.json`` and safetensors: one file, shards with their index, or a variant only.

    Raises:
        InputError: It is of another class, is damaged, or does not hold every tensor in its shape and no others.
    """
    variant = check_pretrained(kind, folder)
    try:
        with telling_unmet():
            model = kind.from_pretrained(folder, variant=variant, use_safetensors=True, low_cpu_mem_usage=False)
    except InputError:
        raise
    except Exception as error:  # diffusers and safetensors raise many types for a damaged file
        raise InputError(f"{folder} cannot be read ({first_line(error)})") from None
    return model.eval()


def check_pretrained(kind: type[nn.Module], folder: Path, variant: str | None = None) -> str | None:
    """Compare a folder's files, unread, with the network that its config makes; return the variant to read.

    Raises:
        InputError: See `load_pretrained`.
    """
    config = read_json(folder / "config.json", dict)
    if config.get("_class_name") != kind.__name__:
        raise InputError(f"{folder} holds {config.get('_class_name', 'another network')}, not {kind.__name__}")
    files, variant = find_weights(folder, variant)
    try:
        with telling_unmet(), torch.device("meta"):
            wanted = shapes_of(kind.from_config(config).state_dict())
    except PackageError:
        raise
    except Exception as error:
        raise InputError(f"{folder / 'config.json'} makes no {kind.__name__} ({first_line(error)})") from None
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= _header(file)
    if len(files) == 1:  # where diffusers renames what attention once called its layers, as Stable Diffusion's VAEs do
        old = {name: OLD_ATTENTION.sub(lambda match: RENAMED[match[0]], name) for name in found}
        found = {name if name in wanted else old[name]: shape for name, shape in found.items()}
    if found != wanted:
        where = files[0] if len(files) == 1 else folder
        raise InputError(f"{where} does not hold a whole {kind.__name__}: {differences(found, wanted)}")
    return variant


def find_weights(folder: Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """The safetensors files of a folder, and their variant: that asked for, else none, else the only one.

    Raises:
        InputError: There are none, or several variants to choose from.
    """
    for each in dict.fromkeys((variant, None)):
        if files := _files(folder, each):
            return files, each
    names = sorted(path.name for path in folder.glob(f"{STEM}*"))
    matches = (re.fullmatch(rf"{STEM}(?:\.safetensors\.index)?\.(\w+)\.(?:safetensors|json)", name) for name in names)
    variants = sorted({match[1] for match in matches if match})
    if len(variants) != 1:
        found = f"the variants {', '.join(variants)}; keep one" if variants else min(names, default="none")
        raise InputError(f"{folder} must hold {STEM}.safetensors, but there is {found}")
    print(f"{folder} has its weights as {variants[0]} only; taking these", file=sys.stderr, flush=True)
    return _files(folder, variants[0]), variants[0]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor] | Path, source: str) -> None:
    """Load a state dict, or a safetensors file of one, into a network; InputError unless it fits whole.

    Nothing is changed then. The sentence begins with ``source``.
    """
    wanted = shapes_of(model.state_dict())
    found = _header(weights) if isinstance(weights, Path) else shapes_of(weights)
    if found != wanted:
        raise InputError(f"{source} does not fit this model: {differences(found, wanted)}")
    if isinstance(weights, Path):
        with safe_open(weights, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in found}
    check_finite(weights, source)
    model.load_state_dict(weights)


def without_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose LoRA adapters, as PEFT names them and with alpha = rank, are added to the weights."""
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if name.endswith(".lora_A.default.weight"):
            layer, up = name.removesuffix(".lora_A.default.weight"), name.replace(".lora_A.", ".lora_B.")
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + weights[up] @ down
    return plain


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError, naming the first tensors, where some hold NaN or infinite values."""
    # A sum reads each tensor once and needs no memory of its size.
    bad = [name for name, tensor in weights.items()
           if tensor.dtype in FLOATS and not tensor.is_meta and not tensor.sum(dtype=torch.float32).isfinite()]
    if bad:
        raise InputError(f"{source} holds NaN or infinite values, in {some(bad)}; it is damaged")


def differences(found: Shapes, wanted: Shapes) -> str:
    """What is missing, unexpected and of a wrong shape among named tensors, with the first names of each."""
    first = next(iter(wanted), "")
    prefix = next((name.removesuffix(first) for name in found if name.endswith(f".{first}")), "")
    if prefix and {f"{prefix}{name}": shape for name, shape in wanted.items()} == found:
        return f"all its names begin with {prefix!r}, which whatever wrapped the network left; write them without"
    parts = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "wrong shape": [f"{name} {found[name]} instead of {shape}" for name, shape in wanted.items()
                        if found.get(name, shape) != shape],
    }  # fmt: skip
    return "; ".join(f"{title}: {some(names)}" for title, names in parts.items() if names)


def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


@contextmanager
def telling_unmet() -> Iterator[None]:
    """Inside, an import that fails within a library is a PackageError. diffusers raises a RuntimeError from it."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        failed: BaseException | None = error
        while isinstance(failed, RuntimeError):
            failed = failed.__cause__
        if not isinstance(failed, ImportError):
            raise
        raise unmet(failed) from None


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a variant, or of none; an empty list where there are no such."""
    ending = "" if variant is None else f".{variant}"
    whole, index = folder / f"{STEM}{ending}.safetensors", folder / f"{STEM}.safetensors.index{ending}.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    shards = read_json(index, lambda content: sorted({Path(name).name for name in content["weight_map"].values()}))
    return [folder / name for name in shards]


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except Exception as error:
        raise InputError(f"{file} cannot be read ({first_line(error)})") from None
