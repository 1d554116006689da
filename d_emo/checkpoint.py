"""Snapshots (what people sample from and share) and training states (what a resume needs); never mixed.

A snapshot is a folder with ``snapshot.json`` (kind, step, codec, class names, ...), the model's weights (the moving
average) as safetensors with the model's config, for a denoiser also its noise schedule, and a card. A training state
is a folder with ``state.pt`` and a manifest with its checksum. Both are written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from d_emo.card import write_card
from d_emo.config import InputError, write_yaml
from d_emo.latents import SHIPPED
from d_emo.models import EMO, Denoiser, create_model
from d_emo.objective import objective_of

SHIPPED_SNAPSHOT = SHIPPED / "demo-shapes"
_META, _MANIFEST = "snapshot.json", "manifest.json"


@dataclass
class DenoiserSnapshot:
    """A trained denoiser in eval mode, with what sampling needs."""

    path: Path
    model: Denoiser
    scheduler_config: dict[str, Any]
    codec: str
    class_names: list[str]
    image_size: int
    meta: dict[str, Any]

    @property
    def objective(self) -> str:
        """What it was trained for: "eps" or "flow"."""
        return objective_of(self.scheduler_config)

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


# ---- snapshots -------------------------------------------------------------------------------------------------------


def save_denoiser(
    folder: Path, model: Denoiser, *, scheduler: Any, meta: dict[str, Any], settings: Any
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
        model = Denoiser.from_pretrained(path / "transformer", use_safetensors=True, low_cpu_mem_usage=False)
        scheduler_config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(path, error) from None
    if len(meta["class_names"]) != model.config.num_classes:
        raise InputError(
            f"the snapshot {path} names {len(meta['class_names'])} classes, but its denoiser has "
            f"{model.config.num_classes}; its {_META} belongs to another"
        )
    return DenoiserSnapshot(path, model.eval(), scheduler_config, meta["codec"], meta["class_names"],
                            meta["image_size"], meta)


def load_meta(path: str | Path) -> dict[str, Any]:
    """What a denoiser's snapshot says of itself, without its weights."""
    return _open_snapshot(path, "denoiser")[1]


def start_from(
    path: str | Path, model: Denoiser, *, class_names: list[str], objective: str, keep_labels: bool = True
) -> tuple[str, dict[str, Any]]:
    """Copy a snapshot's weights into a new model for fine-tuning.

    Classes and latent size may be others: the label table keeps the rows of classes with the same name and the null
    row, and the position embedding stays the new model's. The objective may be another too: what a network knows of
    its images serves both, and only what it says of them is learnt anew. All else must be alike.

    Args:
        path: Snapshot folder, or a run folder for its newest one.
        model: Freshly built; changed in place.
        class_names: Of the new model.
        objective: Of the new run.
        keep_labels: Off leaves all classes the new model's rows.

    Returns:
        What was taken, in a sentence, and how long it had been trained: "step" and, where known, "training_minutes".

    Raises:
        InputError: No such snapshot, or one that does not fit; names what differs.
    """
    old = load_denoiser(path)
    theirs, mine = old.model.config, model.config
    if theirs.in_channels != mine.in_channels:
        raise InputError(
            f"the snapshot {old.path} denoises latents of {theirs.in_channels} channels (codec {old.codec}), but the "
            f"codec of this run has {mine.in_channels}; choose --vae {old.codec} or one with as many channels"
        )
    free = ("num_classes", "sample_size", "window_size")
    parts = inspect.signature(Denoiser.__init__).parameters.keys() - {"self", *free}
    differ = [f"{key} is {theirs[key]} there, {mine[key]} here" for key in sorted(parts) if theirs[key] != mine[key]]
    if differ:
        raise InputError(
            f"the snapshot {old.path} is of another model ({'; '.join(differ)}); give the --model and --model-options "
            "in its config.yaml"
        )
    state, fresh, known = old.model.state_dict(), model.state_dict(), 0
    table = fresh["y_embedder.embedding_table.weight"].clone()
    rows = state["y_embedder.embedding_table.weight"]
    table[-1] = null = rows[0] if len(old.class_names) == 1 else rows[-1]  # a single class means "no class" as well
    if len(class_names) == 1:
        table[0] = null
    for label, name in enumerate(class_names):
        if keep_labels and name in old.class_names:
            table[label] = rows[old.class_names.index(name)]
            known += 1
    model.load_state_dict({**state, "y_embedder.embedding_table.weight": table, "pos_embed": fresh["pos_embed"]})
    step = old.meta["step"]
    rows = f"which knows {known} of the {len(class_names)} classes by name" if keep_labels else "with a new label table"
    trained = {key: old.meta[key] for key in ("step", "training_minutes") if key in old.meta}
    other = "" if old.objective == objective else f", trained with {old.objective}"
    return f"Weights from {old.path} (step {step:,}{other}), {rows}.", trained


def load_classifier(path: str | Path) -> ClassifierSnapshot:
    """Open a classifier's snapshot, or the newest one of a run folder.

    Raises:
        InputError: There is none, it is of another kind, or it is damaged.
    """
    path, meta = _open_snapshot(path, "classifier")
    try:
        model = create_model(**meta["model"])
        model.load_state_dict(load_file(path / "model.safetensors"))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
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
    except (OSError, ValueError, AttributeError):
        return None


def _open_snapshot(path: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"there is no snapshot folder {path}")
    if not (path / _META).exists() and (path / "snapshots").is_dir():
        path = max((path / "snapshots").glob("step-*"), key=step_of, default=path)
    if not (path / _META).exists():
        state = " (a training state, made for --resume)" if (path / _MANIFEST).exists() else ""
        raise InputError(f"{path} is not a snapshot{state}: it has no {_META}")
    try:
        meta = json.loads((path / _META).read_text())
        found = meta["kind"]
        if found == kind:
            [meta[key] for key in ("class_names", "image_size", "step", *(("codec",) if kind == "denoiser" else ()))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    if found != kind:
        raise InputError(f"the snapshot {path} holds a {found}, not a {kind}")
    return path, meta


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"the snapshot {path} is damaged or incomplete ({type(error).__name__}: {reason})")


def _write_meta(folder: Path, kind: str, meta: dict[str, Any], settings: Any) -> None:
    (folder / _META).write_text(json.dumps({"format": 1, "kind": kind, **meta}, indent=1) + "\n")
    write_yaml(settings, folder / "config.yaml")
    write_card(folder)


# ---- training states -------------------------------------------------------------------------------------------------


def save_state(states: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the state of one step, then delete all but the newest ``keep``."""

    def write(temporary: Path) -> None:
        torch.save(state, temporary / "state.pt")
        manifest = {"step": step, "sha256": _checksum(temporary / "state.pt")}
        (temporary / _MANIFEST).write_text(json.dumps(manifest) + "\n")

    folder = states / f"step-{step}"
    write_folder(folder, write)
    for old in sorted(states.glob("step-*"), key=step_of)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def find_state(states: Path, *, say: Callable[[str], None] = print) -> Path | None:
    """The newest complete state of a run, or None; a damaged one is named (by ``say``) and passed over."""
    for folder in sorted(states.glob("step-*"), key=step_of, reverse=True):
        problem = _state_problem(folder)
        if problem is None:
            return folder
        say(f"passing over the training state {folder}: {problem}")
    return None


def gather_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer as a state keeps them, whole also where they are sharded (FSDP2); runs on all processes."""

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    return tree_map(whole, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@torch.no_grad()
def restore_training(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back what :func:`gather_training` gave, sharded as the model is now.

    Raises:
        KeyError, RuntimeError, ValueError: The state is that of another model.
    """

    def sharded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

    now = model.state_dict()
    model.load_state_dict({name: sharded(value, now[name]) for name, value in state["model"].items()})
    optimizer.load_state_dict(state["optimizer"])
    for parameter, moments in optimizer.state.items():
        moments.update({name: sharded(value, parameter) for name, value in moments.items()})


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read a state on the CPU.

    Raises:
        InputError: It is missing, incomplete or damaged.
    """
    folder = Path(folder)
    problem = _state_problem(folder)
    if problem is not None:
        raise InputError(f"cannot resume from {folder}: {problem}")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def step_of(folder: Path) -> int:
    """The step in a folder name such as ``step-500``; -1 for other names."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _state_problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        intact = manifest["sha256"] == _checksum(folder / "state.pt")
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    return None if intact else "state.pt does not match its checksum"


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside ``folder``, then put it in its place, so that readers see all or nothing."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in (*temporary.rglob("*"), temporary):
            _flush(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Have the file system write a file, or a folder's list of names, to the disk, so that a power cut spares it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
