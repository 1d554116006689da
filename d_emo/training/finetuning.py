"""Fine-tuning: a new model that starts from the weights of a snapshot, all of which or a part are trained."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from d_emo.errors import InputError, imported
from d_emo.io.snapshot import load_classifier, load_denoiser
from d_emo.models import EMO
from d_emo.models.counting import trained_parameters
from d_emo.weights import differences, shapes_of, without_adapters

if TYPE_CHECKING:
    from d_emo.models.contract import DenoiserFrame  # diffusers, which classifiers can do without


@torch.no_grad()
def start_from(
    path: str | Path, model: DenoiserFrame, *, class_names: list[str], objective: str, keep_labels: bool = True,
    train: str = "all",
) -> tuple[str, dict[str, Any]]:
    """Copy a snapshot's weights into a new model for fine-tuning.

    Classes and latent size may be others: the label table keeps the rows of classes with the same name and the null
    row, and the position embedding stays the new model's. The patch size may be another: the weights that read and
    write patches are resized. The objective may be another too: what a network knows of its images serves both, and
    only what it says of them is learnt anew. All else must be alike.

    Args:
        path: Snapshot folder, or a run folder for its newest one.
        model: Freshly built; changed in place.
        class_names: Of the new model.
        objective: Of the new run.
        keep_labels: Off leaves all classes the new model's rows.
        train: Which weights the run trains.

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
            "those in its config.yaml, but for the patch size"
        )
    sides = theirs.get("patch_size"), mine.get("patch_size")
    resized = f", patches resized from {sides[0]} to {sides[1]}" if sides[0] != sides[1] else ""
    if resized and train != "all":
        raise InputError(f"`train` {train} keeps the weights that read patches, which were learnt for a patch size of "
                         f"{sides[0]}, not {sides[1]}; train all")
    rows, table = old.model.label_rows(), model.label_rows().detach().clone()
    table[-1] = null = rows[0] if len(old.class_names) == 1 else rows[-1]  # a single class means "no class" as well
    if len(class_names) == 1:
        table[0] = null
    known, words = same_names(old.class_names, class_names) if keep_labels else ({}, "with a new label table")
    table[list(known)] = rows[list(known.values())]
    own = {name: value for name, value in model.state_dict().items() if name in model.fixed_tensors}
    weights = {**model.weights_from(old.model), **own, model.label_parameter: table}
    if differ := differences(shapes_of(weights), shapes_of(model.state_dict())):
        raise InputError(f"the snapshot {old.path} does not fit the model of this run ({differ})")
    model.load_state_dict(weights)
    other = "" if old.objective == objective else f", trained with {old.objective}"
    return f"Weights from {old.path} (step {old.meta['step']:,}{other}){resized}, {words}.", trained_before(old.meta)


@torch.no_grad()
def start_classifier_from(
    path: str | Path, model: EMO, *, class_names: list[str], kind: str = "classifier", latents: bool = False
) -> tuple[str, dict[str, Any]]:
    """`start_from` for a classifier of images, latents or videos: the head keeps rows by name of the class.

    Raises:
        InputError: No such snapshot, or one of another model; names what differs.
    """
    old = load_classifier(path, kind, latents=latents)
    theirs, mine = old.model.state_dict(), model.state_dict()
    head = {name for name in mine if name.startswith(tuple(head_of(model)))}
    if differ := differences(*(shapes_of({k: v for k, v in each.items() if k not in head}) for each in (theirs, mine))):
        raise InputError(
            f"the snapshot {old.path} is of another model ({differ}); `model` and `model_options` must be those in its "
            "config.yaml"
        )
    known, words = same_names(old.class_names, class_names)
    for name in head:
        mine[name][list(known)] = theirs[name][list(known.values())]
    model.load_state_dict({**theirs, **{name: mine[name] for name in head}})
    return f"Weights from {old.path} (step {old.meta['step']:,}), {words}.", trained_before(old.meta)


def head_of(model: nn.Module) -> list[str]:
    """Beginnings of the names of a classifier's last layer's parameters."""
    last = model.get_classifier()
    last = last if isinstance(last, tuple) else (last,)  # timm's distilled transformers have two
    return [f"{name}." for name, module in model.named_modules() if any(module is each for each in last)]


def train_only(model: nn.Module, part: str, *, head: Sequence[str]) -> str:
    """Freeze what is not to be trained. Batch norms' running statistics still follow the data, as in any training.

    Args:
        model: Changed in place.
        part: "all", "head" or "lora:RANK".
        head: Beginnings of the names of parameters that are trained in any case.

    Returns:
        What is trained, in a sentence; "" for all.

    Raises:
        InputError: PEFT is not installed, or adapters of the rank would be larger than the layers that they adapt.
    """
    if part == "all":
        return ""
    whole = trained_parameters(model)
    model.requires_grad_(False)
    if part.startswith("lora:"):
        layers = {name: module.weight.shape for name, module in model.named_modules()
                  if type(module) is nn.Linear and not f"{name}.".startswith(tuple(head))}  # fmt: skip
        if not layers:
            raise InputError(f"`train` {part}: there are no linear layers to adapt beside the head")
        rank = int(part.removeprefix("lora:"))
        most = sum(map(prod, layers.values())) // max(1, sum(map(sum, layers.values())))
        if rank > most:
            raise InputError(f"`train` {part}: adapters of a rank above {most} are larger than the layers they adapt")
        peft = imported("peft", f"`train` {part} needs PEFT", "d-emo[lora]")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(head)):
            parameter.requires_grad_(True)
    trained = trained_parameters(model)
    return f"`train` {part}: {trained:,} trainable parameters, {trained / whole:.1%} of the {whole:,} of the model."


def adapted(model: nn.Module) -> list[str]:
    """Names of the layers with an adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]


def merged(model: nn.Module) -> nn.Module:
    """A network as it was before `train_only`, the adapters added to its weights: a copy, or itself without any."""
    if not (names := adapted(model)):
        return model
    plain, weights = copy.deepcopy(model), without_adapters(model.state_dict())
    for name in names:
        plain.set_submodule(name, plain.get_submodule(name).base_layer)
    plain.load_state_dict(weights)
    return plain


def trained_before(meta: dict[str, Any]) -> dict[str, Any]:
    """How long a snapshot had been trained, as far as it says so."""
    return {key: meta[key] for key in ("step", "training_minutes") if key in meta}


def same_names(theirs: list[str], ours: list[str]) -> tuple[dict[int, int], str]:
    """By label here the label there of classes of the same name, and how many these are, in words.

    Of several classes of one name the first here is the first there, if there are as many.
    """
    there, here = _by_name(theirs), _by_name(ours)
    both = [name for name in here if name in there]
    unclear = [name for name in both if len(there[name]) != len(here[name])]
    known = {label: old for name in both if name not in unclear
             for label, old in zip(here[name], there[name], strict=True)}
    words = f"which knows {len(known)} of the {len(ours)} classes by name"
    if unclear:
        name = unclear[0]
        words += f" (not {name}, of which there are {len(there[name])} there and {len(here[name])} here)"
    return known, words


def _by_name(class_names: list[str]) -> dict[str, list[int]]:
    """The ids of each name, which may stand more than once."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        labels.setdefault(name, []).append(label)
    return labels
