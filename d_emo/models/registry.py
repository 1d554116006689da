"""Names of the networks, and how a name becomes a network."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from typing import Any

from d_emo.errors import InputError
from d_emo.models.backbone import BACKBONES, EMO, build_backbone
from d_emo.models.denoiser import DENOISERS, Denoiser, build_denoiser


def list_models(pattern: str | None = None) -> list[str]:
    """Names that `create_model` knows, by family and size.

    Args:
        pattern: keep the names that match this shell pattern ("emov2_*"), or contain it if it has no wildcard; case
            does not matter.
    """
    names = [*DENOISERS, *BACKBONES]
    if pattern is None:
        return names
    wildcard = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatchcase(name.lower(), wildcard.lower())]


def resolve_name(name: str) -> str:
    """The registered spelling of a model name: "D-EMOv2-S/2" means "D-EMOv2-S-2", and case does not matter.

    Raises:
        InputError: for an unknown name, with the nearest known ones.
    """
    spellings = {known.lower(): known for known in list_models()}
    wanted = str(name).replace("/", "-").lower()
    if wanted in spellings:
        return spellings[wanted]
    near = [spellings[n] for n in difflib.get_close_matches(wanted, spellings, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else "d_emo.list_models() names them all."
    raise InputError(f"Unknown model {name!r}; {hint}")


def create_model(name: str, **overrides: Any) -> Denoiser | EMO:
    """Build a network by name, with freshly initialised weights.

    Args:
        name: one of `list_models`, e.g. "D-EMOv2-S-2" (or "D-EMOv2-S/2"), "DiT-S-2", "emov2_5m".
        overrides: settings of `Denoiser` or `EMO` to replace, e.g. ``num_classes=10``.

    Returns:
        A `Denoiser` or an `EMO`. ``model.config`` records how to build it again.

    Raises:
        InputError: for an unknown name or setting, or values that do not fit together.
    """
    name = resolve_name(name)
    network, build = (Denoiser, build_denoiser) if name in DENOISERS else (EMO, build_backbone)
    allowed = [key for key in inspect.signature(network.__init__).parameters if key != "self"]
    for key in overrides:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(allowed)}."
            raise InputError(f"{name} has no setting {key!r}; {hint}")
    return build(name, **overrides)
