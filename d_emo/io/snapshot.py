"""Snapshots: what people sample from and share.

A snapshot is a folder with ``snapshot.json`` (kind, step, codec, class names, ...), the model's weights (the moving
average) as safetensors with the model's config, for a denoiser also its noise schedule, and a card. It is written
under a temporary name and renamed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from d_emo.config import write_yaml
from d_emo.errors import InputError
from d_emo.files import write_folder, write_json
from d_emo.io.card import write_card
from d_emo.io.training_state import MANIFEST, step_of
from d_emo.latents import SHIPPED
from d_emo.models import EMO, create_model
from d_emo.models.contract import DenoiserFrame
from d_emo.tables import FRAMES, load, objective_of

SHIPPED_SNAPSHOT = SHIPPED / "demo-shapes"
_META = "snapshot.json"


@dataclass
class DenoiserSnapshot:
    """A trained denoiser in eval mode, with what sampling needs."""

    path: Path
    model: DenoiserFrame
    scheduler_config: dict[str, Any]
    codec: str
    class_names: list[str]
    image_size: int
    meta: dict[str, Any]

    @property
    def objective(self) -> str:
        """What it was trained for, a name of ``OBJECTIVES``; an older snapshot tells it by its noise schedule."""
        return self.meta.get("objective") or objective_of(self.scheduler_config)

    @property
    def label_dropout(self) -> float:
        """Share of labels that were replaced by the null class; without any there is nothing to guide with."""
        return self.meta.get("label_dropout", 0.1)


@dataclass
class ClassifierSnapshot:
    """A trained classifier in eval mode; it takes images in [-1, 1] of ``image_size`` pixels."""

    path: Path
    model: EMO
    class_names: list[str]
    image_size: int
    meta: dict[str, Any]


def save_denoiser(
    folder: Path, model: DenoiserFrame, *, scheduler: Any, meta: dict[str, Any], settings: Any
) -> None:
    """Write a denoiser's snapshot; ``meta`` must name codec, class_names, image_size, step and weights."""

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary / "transformer")
        scheduler.save_pretrained(temporary / "scheduler")
        _write_meta(temporary, "denoiser", meta, settings)

    write_folder(folder, write)


def save_classifier(folder: Path, model: EMO, *, meta: dict[str, Any], settings: Any) -> None:
    """Write a classifier's snapshot; ``meta`` must name class_names, image_size, step and weights."""

    def write(temporary: Path) -> None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()},
                  temporary / "model.safetensors")
        _write_meta(temporary, "classifier", {"model": model.config, **meta}, settings)

    write_folder(folder, write)


def load_denoiser(path: str | Path) -> DenoiserSnapshot:
    """Open a denoiser's snapshot, or the newest one of a run folder.

    Raises:
        InputError: There is none, it is of another kind, or it is damaged.
    """
    path, meta = _open_snapshot(path, "denoiser")
    try:
        frame = json.loads((path / "transformer" / "config.json").read_text())["_class_name"]
        model = load(FRAMES[frame].denoiser).from_pretrained(
            path / "transformer", use_safetensors=True, low_cpu_mem_usage=False
        )
        scheduler_config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    except Exception as error:  # diffusers and safetensors raise many types for a damaged folder
        raise _damaged(path, error) from None
    if len(meta["class_names"]) != model.num_classes:
        raise InputError(
            f"the snapshot {path} names {len(meta['class_names'])} classes, but its denoiser has "
            f"{model.num_classes}; its {_META} belongs to another"
        )
    return DenoiserSnapshot(path, model.eval(), scheduler_config, meta["codec"], meta["class_names"],
                            meta["image_size"], meta)


def load_meta(path: str | Path) -> dict[str, Any]:
    """What a denoiser's snapshot says of itself, without its weights."""
    return _open_snapshot(path, "denoiser")[1]


def load_classifier(path: str | Path) -> ClassifierSnapshot:
    """Open a classifier's snapshot, or the newest one of a run folder.

    Raises:
        InputError: There is none, it is of another kind, or it is damaged.
    """
    path, meta = _open_snapshot(path, "classifier")
    try:
        model = create_model(**meta["model"])
        model.load_state_dict(load_file(path / "model.safetensors"))
    except Exception as error:
        raise _damaged(path, error) from None
    return ClassifierSnapshot(path, model.eval(), meta["class_names"], meta["image_size"], meta)


def newest_denoiser(results: Path = Path("results")) -> Path:
    """The most recently written denoiser snapshot under ``results``, else the one that ships with the package."""
    found = [file for file in results.glob(f"**/snapshots/step-*/{_META}") if _kind(file) == "denoiser"]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else SHIPPED_SNAPSHOT


def kind_of(path: str | Path) -> str | None:
    """ "denoiser" or "classifier" for a snapshot or a run folder, None for anything else."""
    path = Path(path)
    newest = max((path / "snapshots").glob("step-*"), key=step_of, default=path)
    return _kind((path if (path / _META).exists() else newest) / _META)


def _kind(meta_file: Path) -> str | None:
    try:
        return json.loads(meta_file.read_text()).get("kind")
    except Exception:  # of another program
        return None


def _open_snapshot(path: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"the snapshot folder {path} does not exist")
    if not (path / _META).exists() and (path / "snapshots").is_dir():
        path = max((path / "snapshots").glob("step-*"), key=step_of, default=path)
    if not (path / _META).exists():
        state = " (a training state, made for `resume`)" if (path / MANIFEST).exists() else ""
        raise InputError(f"{path} is not a snapshot{state}: it has no {_META}")
    try:
        meta = json.loads((path / _META).read_text())
        found = meta["kind"]
        if found == kind:
            [meta[key] for key in ("class_names", "image_size", "step", *(("codec",) if kind == "denoiser" else ()))]
    except Exception as error:
        raise _damaged(path, error) from None
    if found != kind:
        raise InputError(f"the snapshot {path} holds a {found}, not a {kind}")
    return path, meta


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"the snapshot {path} is damaged or incomplete ({type(error).__name__}: {reason})")


def _write_meta(folder: Path, kind: str, meta: dict[str, Any], settings: Any) -> None:
    write_json(folder / _META, {"format": 1, "kind": kind, **meta})
    write_yaml(settings, folder / "config.yaml")
    write_card(folder)
