"""Fine-tuning: a new model that starts from the weights of a snapshot."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.models import Denoiser


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
            f"codec of this run has {mine.in_channels}; choose `vae` {old.codec} or one with as many channels"
        )
    free = ("num_classes", "sample_size", "window_size")
    parts = inspect.signature(Denoiser.__init__).parameters.keys() - {"self", *free}
    differ = [f"{key} is {theirs[key]} there, {mine[key]} here" for key in sorted(parts) if theirs[key] != mine[key]]
    if differ:
        raise InputError(
            f"the snapshot {old.path} is of another model ({'; '.join(differ)}); give the `model` and `model_options` "
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
