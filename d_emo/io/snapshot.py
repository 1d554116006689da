"""Snapshots: what people sample from and share.

A snapshot is a folder with ``snapshot.json`` (kind, step, codec, class names, ...), the model's weights (the moving
average) as safetensors with the model's config, for a denoiser also its noise schedule, and a card. It is written
under a temporary name and renamed. ``snapshot.json`` has a checksum of each file that decides what the model does.
A denoiser's and an autoencoder's have what diffusers looks for too: ``config.json``, of a denoiser
``model_index.json`` and the pipeline's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from d_emo.config import write_yaml
from d_emo.errors import InputError, PackageError
from d_emo.files import META, check_sums, digest_of_file, newest_snapshot, read_json, sealed, write_folder, write_json
from d_emo.io.card import write_card
from d_emo.io.schema import noise_schedule, snapshot_meta
from d_emo.io.training_state import MANIFEST
from d_emo.latents import SHIPPED
from d_emo.models import EMO, create_model
from d_emo.tables import FRAMES, OBJECTIVES, load, objective_of
from d_emo.weights import check_library, first_line, load_pretrained, load_weights

if TYPE_CHECKING:
    from d_emo.models.contract import DenoiserFrame  # diffusers, which classifiers can do without

SHIPPED_SNAPSHOT = SHIPPED / "demo-shapes"

PIPELINE_CODE = '''"""The pipeline, for diffusers' custom_pipeline."""

from d_emo import DEMOPipeline

__all__ = ["DEMOPipeline"]
'''
"""What lies beside a ``model_index.json``: diffusers finds the pipeline by it where nobody has imported d_emo."""


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
    """A trained network in eval mode; a classifier takes images in [-1, 1] of ``image_size`` pixels.

    Where ``meta`` has a "latent_side", it takes latents of that side by the "codec" instead, enlarged to ``image_size``
    by ``interpolate(latents, (image_size, image_size), mode="bilinear")``.
    """

    path: Path
    model: EMO | nn.Module
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
        write_json(temporary / "model_index.json", pipeline_index(temporary, type(model)))
        (temporary / "pipeline.py").write_text(PIPELINE_CODE)

    write_folder(folder, write)


def save_classifier(
    folder: Path, model: nn.Module, *, meta: dict[str, Any], settings: Any, kind: str = "classifier"
) -> None:
    """Write the snapshot of a classifier, detector or segmenter; ``meta`` must name class_names, image_size, step and
    weights."""

    def write(temporary: Path) -> None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()},
                  temporary / "model.safetensors")
        _write_meta(temporary, kind, {"model": model.config, **meta}, settings)

    write_folder(folder, write)


def save_autoencoder(
    folder: Path, vae: nn.Module, *, meta: dict[str, Any], settings: Any, more: Callable[[Path], None]
) -> None:
    """Write an autoencoder's snapshot, a folder of diffusers; ``more`` writes what belongs beside it."""

    def write(temporary: Path) -> None:
        vae.save_pretrained(temporary)
        more(temporary)
        _write_meta(temporary, "autoencoder", {"model": {"name": type(vae).__name__}, **meta}, settings)

    write_folder(folder, write)


def load_denoiser(path: str | Path) -> DenoiserSnapshot:
    """Open a denoiser's snapshot, or the newest one of a run folder.

    Raises:
        InputError: There is none, it is of another kind, or it is damaged.
    """
    path, meta = _open_snapshot(path, "denoiser")
    with _refusing(path):
        model = load_pretrained(_class_of(path), path / "transformer")
        scheduler_config = read_json(path / "scheduler" / "scheduler_config.json", noise_schedule)
        OBJECTIVES[meta.get("objective") or objective_of(scheduler_config)]
        check_sums(path)
    _check_names(path, meta, model.num_classes)
    return DenoiserSnapshot(path, model, scheduler_config, meta["codec"], meta["class_names"],
                            meta["image_size"], meta)


def pipeline_index(path: str | Path, kind: type[DenoiserFrame] | None = None) -> dict[str, Any]:
    """What ``model_index.json`` says to diffusers of a denoiser's snapshot: the arguments of `DEMOPipeline`.

    Args:
        path: the snapshot.
        kind: the denoiser's class, where it is known.

    Raises:
        InputError: See `load_denoiser`; weights are not read.
    """
    path, meta = _open_snapshot(path, "denoiser")
    with _refusing(path):
        kind = kind or _class_of(path)
        schedule = read_json(path / "scheduler" / "scheduler_config.json", noise_schedule)
        objective = meta.get("objective") or objective_of(schedule)
    return {
        "_class_name": "DEMOPipeline", "_diffusers_version": version("diffusers"),
        "transformer": [kind.__module__, kind.__name__], "scheduler": [None, None], "vae": [None, None],
        "id2label": {str(label): name for label, name in enumerate(meta["class_names"])},
        "label_dropout": meta.get("label_dropout", 0.1), "objective": objective, "codec": meta["codec"],
        "noise_schedule": schedule,
    }  # fmt: skip


def load_meta(path: str | Path, kind: str = "denoiser") -> dict[str, Any]:
    """What a snapshot says of itself, without its weights; InputError for one of another kind."""
    return _open_snapshot(path, kind)[1]


def load_classifier(path: str | Path, kind: str = "classifier", *, latents: bool = False) -> ClassifierSnapshot:
    """Open the snapshot of a classifier, detector or segmenter, or the newest one of a run folder.

    Args:
        path: The folder.
        kind: What it has to hold.
        latents: Whether a classifier of a codec's latents will do too; its ``meta`` has "codec" and "latent_side".

    Raises:
        InputError: There is none, it is of another kind, or it is damaged; or it looks at latents.
    """
    path, meta = _open_snapshot(path, kind)
    if "latent_side" in meta and not latents:
        raise InputError(
            f"the snapshot {path} is a classifier of latents of the codec {meta['codec']}, for d-emo distill "
            "to train in its features; this needs one of images"
        )
    with _refusing(path):
        model, weights = create_model(**meta["model"]), path / "model.safetensors"
        load_weights(model, weights, str(weights))
        check_sums(path)
    _check_names(path, meta, model.num_classes)
    return ClassifierSnapshot(path, model.eval(), meta["class_names"], meta["image_size"], meta)


def newest_denoiser(results: Path = Path("results")) -> Path:
    """The most recently written denoiser snapshot under ``results``, else the one that ships with the package."""
    found = [file for file in results.glob(f"**/snapshots/step-*/{META}") if _kind(file) == "denoiser"]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else SHIPPED_SNAPSHOT


def kind_of(path: str | Path) -> str | None:
    """What a snapshot or a run folder holds, such as "denoiser" or "classifier"; None for anything else."""
    return _kind(newest_snapshot(Path(path)) / META)


def _class_of(path: Path) -> type[DenoiserFrame]:
    check_library()
    return load(read_json(path / "transformer" / "config.json", lambda config: FRAMES[config["_class_name"]]).denoiser)


def find_snapshot(path: str | Path) -> Path:
    """A snapshot's folder, also for the folder of its run: the newest. InputError where there is no denoiser's."""
    return _open_snapshot(path, "denoiser")[0]


def _kind(meta_file: Path) -> str | None:
    try:
        return json.loads(meta_file.read_text()).get("kind")
    except Exception:  # of another program
        return None


def _open_snapshot(path: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"the snapshot folder {path} does not exist")
    path = newest_snapshot(path)
    if not (path / META).exists() and (path / "states").is_dir():
        raise InputError(
            f"the run {path} has no snapshot yet; training writes one every `snapshot_every` steps and after its last"
        )
    if not (path / META).exists():
        state = " (a training state, made for `resume`)" if (path / MANIFEST).exists() else ""
        raise InputError(f"{path} is not a snapshot{state}: it has no {META}")
    with _refusing(path):
        meta = read_json(path / META, snapshot_meta)
    if meta["kind"] != kind:
        raise InputError(f"the snapshot {path} holds a {meta['kind']}, not a {kind}")
    return path, meta


def _check_names(path: Path, meta: dict[str, Any], num_classes: int) -> None:
    if len(meta["class_names"]) != num_classes:
        raise InputError(
            f"the snapshot {path} names {len(meta['class_names'])} classes, but its {meta['kind']} has {num_classes}; "
            f"its {META} belongs to another"
        )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever goes wrong in here is a snapshot that cannot be used, in a sentence; or a package that is missing."""
    try:
        yield
    except PackageError:
        raise
    except ImportError as error:  # of a block or a frame of the user's own; see `check_library` for those of libraries
        raise PackageError(f"the snapshot {path} needs what cannot be imported here ({first_line(error)})") from None
    except Exception as error:  # settings of a model that does not exist, say
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the snapshot {path} is damaged or incomplete ({reason})") from None


def _write_meta(folder: Path, kind: str, meta: dict[str, Any], settings: Any) -> None:
    sums = {name: digest_of_file(file) for name, file in sealed(folder).items()}
    write_json(folder / META, {"format": 1, "kind": kind, **meta, "sha256": sums})
    write_yaml(settings.resolve(), folder / "config.yaml")
    write_card(folder)
