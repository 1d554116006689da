"""Reads the released EMOv2, EMOv1 and DiT checkpoints into our modules.

A file is trusted with nothing: pickles are read by PyTorch's weights-only loader, and every name and shape is checked
before the first weight is written.
"""

import argparse
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from d_emo.errors import InputError
from d_emo.models.backbone import BACKBONES, EMO
from d_emo.models.registry import create_model
from d_emo.tables import denoisers
from d_emo.weights import check_finite, differences, shapes_of

WRAPPINGS = ("ema", "net_E", "state_dict_ema", "model_ema", "net", "model", "state_dict", "module")
"""Keys under which projects file their weights, averaged weights first: those are what the papers report."""

PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""Left in names by DataParallel and by torch.compile."""

# Our name -> released name, tried in order; a 1x1 convolution in the release is a linear layer here.
STAGE_NAMES = [
    (r"^stages\.(\d)\.", lambda match: f"stage{int(match[1]) + 1}."),
    (r"^(stage\d\.\d+\.norm)\.(weight|bias)$", r"\1.norm.\2"),
    (r"^norm\.", "norm.norm."),
    (r"\.bn\.", "."),
    (r"\.operator\.local\.", ".conv_local."),
    (r"\.operator\.proj\.", ".proj.conv."),
    (r"\.layer_scale\.", ".ls."),
]
RELEASED_NAMES: dict[str, list[tuple[str, Any]]] = {
    "i2rmb": [
        (r"^stem\.conv\.", "stage0.0."),
        (r"^stem\.local\.", "stage0.1."),
        (r"^stem\.proj\.", "stage0.2.conv."),
        *STAGE_NAMES,
        (r"\.operator\.expand\.(qk|v)\.", r".eops.0.\1.conv."),
        (r"\.operator\.expand\.0\.", ".eops.0.net.conv."),
    ],
    "irmb": [
        (r"^stem\.conv\.conv\.", "stage0.0.convs.0.0."),
        (r"^stem\.conv\.norm\.", "stage0.0.convs.0.1."),
        (r"^stem\.local\.", "stage0.1.conv_local."),
        (r"^stem\.gate\.", "stage0.1.se."),
        (r"^stem\.proj\.", "stage0.1.proj.conv."),
        *STAGE_NAMES,
        (r"\.operator\.expand\.(qk|v)\.", r".\1.conv."),
        (r"\.operator\.expand\.0\.", ".v.conv."),
    ],
    "dit": [],
}
CLASS_ROWS = ("head.weight", "head.bias", "y_embedder.embedding_table.weight")
"""Released names whose shape depends on the number of classes."""


def load_released(model: nn.Module, path_or_state_dict: str | PathLike | Mapping[str, Any]) -> nn.Module:
    """Load a released EMOv2, EMOv1 or DiT checkpoint into ``model``, in place.

    Args:
        model: the matching network from `create_model`.
        path_or_state_dict: a ``.pth``, ``.pt`` or ``.safetensors`` file, or what was read from one. Weights may be
            wrapped ("net", "net_E", "ema", "model", "state_dict", nested too); averaged weights are preferred.

    Returns:
        The same model.

    Raises:
        InputError: if the file cannot be read, or does not fit; the message says what the file is, or names every key
            that is missing, unexpected or of a wrong shape. The model is unchanged then.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, content = "the given state dict", path_or_state_dict
    else:
        source, content = str(path_or_state_dict), read_checkpoint(Path(path_or_state_dict))
    weights = unwrap(content, source)
    names = released_names(model)
    check_fit(model, names, weights, source)
    own = model.state_dict()
    model.load_state_dict({name: weights[names[name]].reshape(own[name].shape) for name in own})
    return model


def own_names(content: Mapping[str, Any], model: EMO) -> Mapping[str, Any]:
    """What timm read from a checkpoint: a release's weights under our names and in our shapes, all else unchanged.

    This is timm's checkpoint filter. Nothing is checked here; what does not fit is left for the loading to name.
    """
    try:
        weights = unwrap(content, "the checkpoint")
    except InputError:
        return content
    own, names = model.state_dict(), released_names(model)
    if not any(released != name and released in weights for name, released in names.items()):
        return weights
    translated = {name: weights.pop(released) for name, released in names.items() if released in weights}
    fits = {name for name, tensor in translated.items() if tensor.numel() == own[name].numel()}
    return weights | {name: x.reshape(own[name].shape) if name in fits else x for name, x in translated.items()}


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint file on the CPU, else InputError; no code from the file is run."""
    if not path.is_file():
        raise InputError(f"the checkpoint file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # DiT's training checkpoints carry their command line as a Namespace; nothing else but tensors is allowed.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen unrelated types for a damaged file
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is truncated, not a checkpoint, or holds objects other than "
            f"tensors ({type(error).__name__})."
        ) from error


def unwrap(content: Any, source: str) -> dict[str, Tensor]:
    """The mapping from names to tensors inside a checkpoint's wrappings, without prefixes; else InputError."""
    while not (isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())):
        wrapped = content if isinstance(content, Mapping) else {}
        inner = (wrapped[key] for key in WRAPPINGS if isinstance(wrapped.get(key), Mapping) and wrapped[key])
        content = next(inner, None)
        if content is None:
            raise InputError(
                f"{source} holds no model weights; expected named tensors, bare or under {', '.join(WRAPPINGS)}."
            )
    return {PREFIXES.sub("", name): tensor for name, tensor in content.items()}


def released_names(model: nn.Module) -> dict[str, str]:
    """Our state-dict names, each with the name it has in the release.

    Raises:
        InputError: The model was never released.
    """
    if isinstance(model, EMO):
        rules = RELEASED_NAMES[model.block]
    elif getattr(getattr(model, "config", None), "block", None) == "dit":
        rules = RELEASED_NAMES["dit"]
    else:
        raise InputError(
            "load_released reads EMOv1, EMOv2 and DiT checkpoints; no D-EMO weights were ever released. "
            "Load one of our own snapshots with Denoiser.from_pretrained."
        )
    names = {name: name for name in model.state_dict()}
    for pattern, replacement in rules:
        names = {ours: re.sub(pattern, replacement, released) for ours, released in names.items()}
    return names


def released_shapes(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shape that every tensor of ``model`` has in the release."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        released, shape = names[name], tuple(tensor.shape)
        if released.endswith("ls.gamma"):
            shape = (1, *shape, 1, 1)
        elif re.search(r"\.(conv|conv_reduce|conv_expand)\.weight$", released) and len(shape) == 2:
            shape = (*shape, 1, 1)
        shapes[released] = shape
    return shapes


def check_fit(model: nn.Module, names: Mapping[str, str], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError unless the file holds what the model needs, saying what it is or naming the differences."""
    wanted = released_shapes(model, names)
    found = shapes_of(weights)
    if found == wanted:
        check_finite(weights, source)
        return
    reason = explain(found, wanted)
    if reason:
        raise InputError(f"{source} does not fit this model: {reason}.")
    raise InputError(f"{source} does not fit this model. {differences(found, wanted)}.")


def explain(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """A clause that says what the file is, or nothing where that cannot be told."""
    different = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    if different <= set(CLASS_ROWS):
        rows = next((str(found[name][0]) for name in CLASS_ROWS if name in found), "no")
        return f"it has another number of classes ({rows} rows of them); build the model with the file's num_classes"
    if different == {"pos_embed"}:
        return "it was trained at another sample_size; build the model with that one"
    variant = variant_of(found)
    return f"it holds the weights of {variant}, so build that model" if variant else ""


def variant_of(found: Mapping[str, tuple[int, ...]], pattern: str = "") -> str | None:
    """The model whose release has these names and shapes, class rows aside; among names that start as ``pattern``."""
    # Meta tensors make the comparison cheap.
    telling = {name: shape for name, shape in found.items() if name not in (*CLASS_ROWS, "pos_embed")}
    for name in [*(name for name, settings in denoisers().items() if settings["block"] == "dit"), *BACKBONES]:
        if not re.match(pattern, name):
            continue
        with torch.device("meta"):
            candidate = create_model(name)
        shapes = released_shapes(candidate, released_names(candidate))
        if {key: shape for key, shape in shapes.items() if key not in (*CLASS_ROWS, "pos_embed")} == telling:
            return name
    return None
