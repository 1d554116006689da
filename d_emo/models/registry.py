"""Names of the networks, as in the papers' tables, and how a name becomes a network."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from d_emo.errors import InputError
from d_emo.models.backbone import BACKBONES, EMO, build_backbone
from d_emo.models.video import VIDEO_BACKBONES
from d_emo.tables import BLOCKS, FRAMES, denoisers, family_of, load, systems
from d_emo.text import command

if TYPE_CHECKING:
    from d_emo.models.contract import DenoiserFrame  # diffusers, which classifiers can do without

TIMM = "timm:"
"""Begins the names of `d_emo.models.timm_models`."""

HYBRIDS = tuple(f"{frame}_{kind}" for frame in ("deit_tiny", "pvt_tiny") for kind in ("irmb", "i2rmb"))
"""Those of `d_emo.models.hybrids`, which imports timm and is imported itself when one of them is built."""


def list_models(pattern: str | None = None) -> list[str]:
    """Names that `create_model` knows, by family and size.

    Args:
        pattern: a name; else keep the names that match this shell pattern ("emov2_*"), or contain it if it has no
            wildcard. Case does not matter.
    """
    names = [*denoisers(), *BACKBONES, *HYBRIDS, *VIDEO_BACKBONES, *systems()]
    if pattern is None:
        return names
    if exact := [name for name in names if name.lower() == pattern.lower()]:
        return exact
    wildcard = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatchcase(name.lower(), wildcard.lower())]


def resolve_name(name: str) -> str:
    """The registered spelling of a model name: "D-EMOv2-S/2" means "D-EMOv2-S-2", and case does not matter.

    Names that begin with ``timm:`` are timm's and stay as they are.

    Raises:
        InputError: for an unknown name, with the nearest known ones.
    """
    if str(name).startswith(TIMM):
        return str(name)
    spellings = {known.lower(): known for known in list_models()}
    wanted = str(name).replace("/", "-").lower()
    if wanted in spellings:
        return spellings[wanted]
    near = [spellings[n] for n in difflib.get_close_matches(wanted, spellings, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else "d_emo.list_models() names them all."
    raise InputError(f"Unknown model {name!r}; {hint}")


def create_model(name: str, **overrides: Any) -> DenoiserFrame | EMO | nn.Module:
    """Build a network by name, with freshly initialised weights.

    Args:
        name: one of `list_models`, e.g. "D-EMOv2-S-2" (or "D-EMOv2-S/2"), "DiT-S-2", "emov2_5m", "ssdlite-emov2_5m";
            or ``timm:`` and the name of one of timm's classifiers, e.g. "timm:resnet18".
        overrides: settings of the network to replace, e.g. ``num_classes=10``.

    Returns:
        A denoiser, an `EMO`, a detector or segmenter on one, DeiT or PVT with its block, or one of timm's.
        ``model.config`` records how to build it again.

    Raises:
        InputError: for an unknown name or setting, or values that do not fit together.
    """
    name = resolve_name(name)
    if name.startswith(TIMM):
        return load("d_emo.models.timm_models:create_timm_model")(name, **overrides)
    frame, (system, backbone) = frame_of(name), systems().get(name, (None, ""))
    network = load(system.network) if system else frame or EMO
    allowed = [key for key in inspect.signature(network).parameters if not (system and key == "backbone")]
    if name in HYBRIDS:
        allowed = load("d_emo.models.hybrids:hybrid_settings")(name)
    for key in overrides:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(allowed)}."
            raise InputError(f"{name} has no setting {key!r}; {hint}")
    if system:
        model = network(*filter(None, [backbone]), **{**system.options, **overrides})
        model.config = {"name": name, **overrides, "num_classes": model.num_classes}
        return model
    if name in HYBRIDS:
        model = load("d_emo.models.hybrids:HYBRIDS")[name](**overrides)
        model.config = {"name": name, **overrides, "num_classes": model.num_classes}
        return model
    if frame is None:
        return build_backbone(name, VIDEO_BACKBONES.get(name), **overrides)
    settings = {**denoisers()[name], **overrides}
    block = BLOCKS[settings["block"]]
    of_blocks = {option for row in BLOCKS.values() for option in row.options}
    foreign = [key for key in overrides if key in of_blocks and key not in block.options]
    if foreign:
        raise InputError(f"{name} has {block.name} blocks, which know no {', '.join(foreign)}; leave it out.")
    return network(**settings)


def check_memory(name: str, **overrides: Any) -> None:
    """Refuse a network, as `create_model` takes it, whose weights alone are more than this machine's memory.

    Raises:
        InputError: So it is; or see `create_model`.
    """
    with torch.device("meta"):
        check_weights(create_model(name, **overrides), f"{name} with {overrides}")


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse a network, built on the device "meta", whose weights alone are more than this machine's memory.

    Raises:
        InputError: So it is.
    """
    size = sum(parameter.nbytes for parameter in model.parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        raise InputError(
            f"{name} has weights of {size / 1e9:,.0f} GB, and this machine {there / 1e9:,.0f} GB of "
            "memory; choose smaller `model_options`"
        )


def model_kind(name: str) -> str:
    """What a name stands for: "denoiser", "classifier", "video classifier", "detector" or "segmenter".

    Raises:
        InputError: for an unknown name.
    """
    name = resolve_name(name)
    if name in systems():
        return {"detection": "detector", "segmentation": "segmenter"}[systems()[name][0].task]
    if name in VIDEO_BACKBONES:
        return "video classifier"
    return "classifier" if name in (*BACKBONES, *HYBRIDS) or name.startswith(TIMM) else "denoiser"


def check_kind(name: str, wanted: str) -> None:
    """Refuse to train a network as what it is not.

    Raises:
        InputError: It is of another kind than ``wanted``, a value of `model_kind`; or see there.
    """
    if (kind := model_kind(name)) != wanted:
        what = {"denoiser": "", "video classifier": "-video"}.get(kind, f"-{kind}")
        script = f"train{what.replace('-', '_') or '_dit'}.py"
        raise InputError(f"{name} is a {kind}; train it with `{command(f'train{what}', script)}`")


def frame_of(name: str) -> type[DenoiserFrame] | None:
    """The class of a denoiser's name, None for any other network's.

    Raises:
        InputError: for an unknown name.
    """
    family = family_of(resolve_name(name))
    return None if family is None else load(FRAMES[family.frame].denoiser)
