"""Classifiers of timm by its own names, to train and measure beside the EMOs: ``timm:resnet18``."""

import difflib
from typing import Any

import timm
from torch import nn

from d_emo.errors import InputError
from d_emo.models.registry import TIMM

FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""What makes `timm.create_model` read weights."""


def create_timm_model(name: str, **overrides: Any) -> nn.Module:
    """Build one of timm's networks, with freshly initialised weights.

    Args:
        name: ``timm:`` and a name of `timm.list_models`, without the tag that names pretrained weights.
        overrides: what `timm.create_model` takes. ``img_size`` reaches networks of a fixed size only, as transformers
            are; others take any.

    Raises:
        InputError: timm knows no such name or setting, the values do not fit together, or are of pretrained weights.
    """
    known = name.removeprefix(TIMM)
    if refused := sorted(FETCHING & overrides.keys()):
        raise InputError(f"{name} begins with random weights; leave {', '.join(refused)} out of its settings")
    if "." in known or not timm.is_model(known):
        near = difflib.get_close_matches(known.partition(".")[0], timm.list_models(), n=3, cutoff=0.6)
        raise InputError(f"Unknown model {name!r}; " + (
            f"did you mean {' or '.join(TIMM + other for other in near)}?" if near
            else "timm.list_models() names what may follow `timm:`."
        ))  # fmt: skip
    cfg = timm.get_pretrained_cfg(known)
    takes_size = cfg is not None and cfg.fixed_input_size
    given = {key: value for key, value in overrides.items() if key != "img_size" or takes_size}
    try:
        model = timm.create_model(known, **given)
    except Exception as error:  # whatever the network's own code makes of them
        reason = " ".join(str(error).split()).removeprefix(f"{known}.").removeprefix("__init__() ")
        raise InputError(f"{name} cannot be built with {given}: {reason}") from error
    model.config = {"name": name, **overrides, "num_classes": model.num_classes}
    return model
