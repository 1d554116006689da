"""Training states: all that an exact resume needs. A folder with ``state.pt`` and a manifest with its checksum."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from d_emo.errors import InputError
from d_emo.files import digest_of_file, read_json, step_of, write_folder, write_json
from d_emo.io.schema import training_state
from d_emo.weights import differences, shapes_of

MANIFEST = "manifest.json"


def save_state(states: Path, step: int, state: dict[str, Any], *, own: list[Path], keep: int = 2) -> Path:
    """Write the state of one step and add it to ``own``, of which all but the last ``keep`` are deleted.

    ``own`` are the folders that the run has written, the newest last: see `states_until`. No other is touched.
    """

    def write(temporary: Path) -> None:
        torch.save(state, temporary / "state.pt")
        manifest = {"step": step, "sha256": digest_of_file(temporary / "state.pt")}
        write_json(temporary / MANIFEST, manifest)

    folder = states / f"step-{step}"
    write_folder(folder, write)
    own[:] = [each for each in own if each != folder] + [folder]
    while len(own) > keep:
        shutil.rmtree(own.pop(0), ignore_errors=True)
    return folder


def states_until(states: Path, last: int | None = None) -> list[Path]:
    """The folders ``step-N`` of a run by step, up to one; copies under other names are not among them."""
    found = sorted((each for each in states.glob("step-*") if step_of(each) >= 0), key=step_of)
    return [each for each in found if last is None or step_of(each) <= last]


def find_state(states: Path, *, say: Callable[[str], None] = print) -> Path | None:
    """The newest complete state of a run, or None; a damaged one is named (by ``say``) and passed over."""
    for folder in reversed(states_until(states)):
        problem = _state_problem(folder)
        if problem is None:
            return folder
        say(f"passing over the training state {folder}: {problem}")
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of a network are shared out over processes, as DTensors (FSDP2)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def gather_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer as a state keeps them, whole also where they are sharded (FSDP2); runs on all processes."""

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value  # a DTensor

    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return tree_map(whole, kept) | {"moments": len(kept["optimizer"]["state"])}


@torch.no_grad()
def restore_training(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back what `gather_training` gave, sharded as the model is now.

    Raises:
        InputError, KeyError, RuntimeError: The state is that of another model.
    """

    from torch.distributed.tensor import DTensor, distribute_tensor  # half a second, which opening files can do without

    def sharded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

    now = model.state_dict()
    if problem := differences(shapes_of(state["model"]), shapes_of(now)):
        raise InputError(problem)
    model.load_state_dict({name: sharded(value, now[name]) for name, value in state["model"].items()})
    optimizer.load_state_dict(state["optimizer"])
    if (wanted := state.get("moments", len(optimizer.state))) != len(optimizer.state):
        raise InputError(f"its optimizer has moments of {len(optimizer.state)} of {wanted} parameters")
    for matrices in (True, False):  # an optimizer may keep other moments of matrices
        params = [p for group in optimizer.param_groups if ("matrices" in group) == matrices for p in group["params"]]
        kinds = {frozenset(optimizer.state[parameter]) for parameter in params if parameter in optimizer.state}
        if len(kinds) > 1:
            some = sorted(frozenset.union(*kinds) - frozenset.intersection(*kinds))
            raise InputError(f"its optimizer lacks {', '.join(some)} of some parameters")
    for parameter, moments in optimizer.state.items():
        odd = [name for name, value in moments.items() if value.dim() and value.shape != parameter.shape]
        if odd:  # PyTorch takes them
            shapes = f"{tuple(moments[odd[0]].shape)} for a parameter of {tuple(parameter.shape)}"
            raise InputError(f"its optimizer's {odd[0]} has the shape {shapes}")
        moments.update({name: sharded(value, parameter) for name, value in moments.items()})


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read a state on the CPU.

    Raises:
        InputError: It is missing, incomplete or damaged, or holds something else.
    """
    folder = Path(folder)
    problem = _state_problem(folder)
    if problem is not None:
        raise InputError(f"cannot resume from {folder}: {problem}")
    try:
        state = training_state(torch.load(folder / "state.pt", map_location="cpu", weights_only=True))
        if step_of(folder) not in (-1, state.get("step")):
            raise InputError(f"it is of step {state.get('step')}")
        return state
    except Exception as error:  # whatever unpickling raises
        reason = error if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"cannot resume from {folder}: state.pt cannot be used: {reason}") from None


def _state_problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "it does not exist"
    try:
        wanted = read_json(folder / MANIFEST, lambda manifest: manifest["sha256"])
        intact = wanted == digest_of_file(folder / "state.pt")
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"state.pt cannot be read ({error.strerror})"
    return None if intact else "state.pt does not match its checksum"
