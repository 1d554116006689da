"""Fine-tuning: a new model that starts from the weights of a snapshot."""

import inspect
from pathlib import Path
from typing import Any

import torch

from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.models.contract import DenoiserFrame


@torch.no_grad()
def start_from(
    path: str | Path, model: DenoiserFrame, *, class_names: list[str], objective: str, keep_labels: bool = True
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
    channels, wanted = old.model.latent_shape[0], model.latent_shape[0]
    if channels != wanted:
        raise InputError(
            f"the snapshot {old.path} denoises latents of {channels} channels (codec {old.codec}), but the codec of "
            f"this run has {wanted}; `vae` may be {old.codec} or one with as many channels"
        )
    theirs, mine = ({"frame": type(each).__name__, **each.config} for each in (old.model, model))
    parts = inspect.signature(type(model).__init__).parameters.keys() - {"self", *model.free_settings} | {"frame"}
    differ = [f"{key} is {theirs.get(key)} there, {mine[key]} here" for key in sorted(parts)
              if theirs.get(key) != mine[key]]
    if differ:
        raise InputError(
            f"the snapshot {old.path} is of another model ({'; '.join(differ)}); `model` and `model_options` must be "
            "those in its config.yaml"
        )
    rows, table, known = old.model.label_rows(), model.label_rows().detach().clone(), 0
    table[-1] = null = rows[0] if len(old.class_names) == 1 else rows[-1]  # a single class means "no class" as well
    if len(class_names) == 1:
        table[0] = null
    theirs, ours = _by_name(old.class_names), _by_name(class_names)
    for name, labels in ours.items() if keep_labels else ():
        if len(theirs.get(name, ())) == len(labels):  # of several classes of one name, the first is the first there
            table[labels] = rows[theirs[name]]
            known += len(labels)
    unclear = [name for name in ours if name in theirs and len(theirs[name]) != len(ours[name])] if keep_labels else []
    own = {name: value for name, value in model.state_dict().items() if name in model.fixed_tensors}
    model.load_state_dict({**old.model.state_dict(), **own, model.label_parameter: table})
    step = old.meta["step"]
    rows = f"which knows {known} of the {len(class_names)} classes by name" if keep_labels else "with a new label table"
    if unclear:
        name, count = unclear[0], len(ours[unclear[0]])
        rows += f" (not {name}, of which there are {len(theirs[name])} there and {count} here)"
    trained = {key: old.meta[key] for key in ("step", "training_minutes") if key in old.meta}
    other = "" if old.objective == objective else f", trained with {old.objective}"
    return f"Weights from {old.path} (step {step:,}{other}), {rows}.", trained


def _by_name(class_names: list[str]) -> dict[str, list[int]]:
    """The ids of each name, which may stand more than once."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        labels.setdefault(name, []).append(label)
    return labels
