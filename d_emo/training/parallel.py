"""How the processes of a run share its work: what accelerate is told, and the gradients and the update of a step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, is_deepspeed_available
from torch import nn

from d_emo.config import RunSettings
from d_emo.errors import InputError
from d_emo.io.training_state import gather_training, restore_training


def precision_of(settings: RunSettings, device: torch.device) -> str:
    """What a run computes in: "no", "bf16" or "fp16"."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.mixed_precision or ("bf16" if bf16 else "no")


def micro_batch_of(settings: RunSettings, per_rank: int, device: torch.device) -> int:
    """How many of a process's images go through the network at once."""
    return min(settings.micro_batch_size or (8 if device.type == "cpu" else per_rank), per_rank)


def open_accelerator(settings: RunSettings, *, accumulation: int, precision: str) -> Accelerator:
    """What `accelerate launch` started this process for.

    Args:
        settings: ``tracker`` and ``output_dir``.
        accumulation: Micro-batches per step and process.
        precision: "no", "bf16" or "fp16".

    Raises:
        InputError: DeepSpeed is asked for and missing, or asked for what it cannot do here.
    """
    options = {}
    if _launched_with("DEEPSPEED"):
        options = _deepspeed(precision)
    if precision == "bf16" and (_launched_with("DEEPSPEED") or _launched_with("FSDP")):
        # Both would turn weights, timesteps and sums of gradients into bf16; Updates autocasts over float32 instead.
        precision = "no"
    accelerator = Accelerator(
        mixed_precision=precision, log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=settings.output_dir, **options,
    )
    accelerator.gradient_accumulation_steps = accumulation  # the launcher's files may hold another number
    return accelerator


def _launched_with(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"


def _deepspeed(precision: str) -> dict[str, Any]:
    if not is_deepspeed_available():
        raise InputError("DeepSpeed is not installed: pip install -e '.[deepspeed]', or shard with "
                         "--config_file configs/accelerate/fsdp.yaml instead")
    if precision == "fp16":
        raise InputError("--mixed-precision fp16 does not go with DeepSpeed here; use bf16 or no")

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Tells transformers of ZeRO 3; there is neither here."""

    plugin = Plugin()
    config, zero = plugin.deepspeed_config, plugin.deepspeed_config["zero_optimization"]
    offloads = [(zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")]
    casts = [config.get(kind, {}).get("enabled") is True for kind in ("bf16", "fp16", "torch_autocast")]
    if zero["stage"] != 2 or any(offloads + casts) or config.keys() & {"optimizer", "scheduler"}:
        raise InputError(
            "of DeepSpeed only ZeRO stage 2 is used here, without offloading and with the precision, optimizer and "
            "schedule of this program; take configs/accelerate/deepspeed.yaml, or fsdp.yaml beside it to shard more"
        )
    # Without GPUs accelerate knows no way for DeepSpeed's processes to talk unless it is told one.
    handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    return {"deepspeed_plugin": plugin, "kwargs_handlers": handlers}


def make_updates(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, settings: RunSettings, precision: str
) -> Updates:
    """Spread model and optimizer over the processes in the way that the launcher was asked for."""
    kind = ZeroUpdates if accelerator.distributed_type == DistributedType.DEEPSPEED else Updates
    return kind(accelerator, model, optimizer, settings, precision)


class Updates:
    """Gradients, updates and states by accelerate's own means: one process, DDP, FSDP2.

    Args:
        accelerator: From `open_accelerator`.
        model, optimizer: On the device, not yet spread over the processes.
        settings: ``batch_size`` and ``grad_clip``.
        precision: As given to `open_accelerator`; where accelerate was not told of bf16, it is autocast here.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, settings: RunSettings,
        precision: str,
    ):
        self.accelerator, self.clip = accelerator, settings.grad_clip
        if precision == "bf16" and accelerator.mixed_precision == "no":
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare_model = accelerator.unwrap_model(self.model)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss."""
        self.accelerator.backward(loss)

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the whole gradient, which is clipped."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self) -> bool:
        """Update the weights; whether it was done, which an overflow under fp16 prevents."""
        self.optimizer.step()
        return not self.accelerator.optimizer_step_was_skipped

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gather(self) -> dict[str, Any]:
        """Model, optimizer and scaler for a state, whole; a joint act of all processes."""
        scaler = self.accelerator.scaler
        return {**gather_training(self.bare_model, self.optimizer.optimizer),
                "scaler": None if scaler is None else scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `gather` gave, in whichever way the model was spread then.

        Raises:
            KeyError, RuntimeError, ValueError: The state is that of another model.
        """
        restore_training(self.bare_model, self.optimizer.optimizer, state)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class ZeroUpdates(Updates):
    """The same by DeepSpeed's ZeRO, stage 2: a process keeps its share of the gradients and of the optimizer's state.

    accelerate would let DeepSpeed update within ``backward``; here the update waits until the loop has judged the step.
    Weights stay whole and float32 on every process. DeepSpeed lays the parameters of a group end to end and gives each
    process an equal piece.

    Raises:
        InputError: DeepSpeed lays the pieces out in another order.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, settings: RunSettings,
        precision: str,
    ):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        accumulation = accelerator.gradient_accumulation_steps
        config |= {
            "train_batch_size": settings.batch_size, "gradient_accumulation_steps": accumulation,
            "train_micro_batch_size_per_gpu": settings.batch_size // accumulation // accelerator.num_processes,
            "gradient_clipping": settings.grad_clip or 0.0, "communication_data_type": "fp32",
        }
        config["zero_optimization"].setdefault("reduce_bucket_size", 2**25)  # its own default holds a whole XL
        self.members = [list(group["params"]) for group in optimizer.param_groups]
        super().__init__(accelerator, model, optimizer, settings, precision)
        self.zero = self.model.optimizer  # its .optimizer in turn is ours, now over the pieces
        for members, group in zip(self.members, self.zero.optimizer.param_groups, strict=True):
            if not torch.equal(self._piece(members, *group["params"]), *group["params"]):
                raise InputError(
                    "this DeepSpeed lays its shares out in another order than states are written in; use a version "
                    "that pyproject.toml names, and configs/accelerate/deepspeed.yaml"
                )

    def backward(self, loss: torch.Tensor) -> None:
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(loss)

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the whole gradient, which DeepSpeed clips in `step`."""
        mine = nn.utils.get_total_norm([grad for grads in self.zero.averaged_gradients.values() for grad in grads])
        return self.accelerator.reduce(mine.to(self.accelerator.device).square(), "sum").sqrt()

    def step(self) -> bool:
        self.model.step()
        return self.model.was_step_applied()

    def clear(self) -> None:
        self.zero.zero_grad()  # which leaves this process's share of a refused step
        for gradients in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))

    def gather(self) -> dict[str, Any]:
        own, states, groups = self.zero.optimizer.state_dict(), {}, []
        for number, (members, group) in enumerate(zip(self.members, own["param_groups"], strict=True)):
            indices = list(range(len(states), len(states) + len(members)))
            groups.append({**group, "params": indices})
            whole = {name: self._whole(value, members) for name, value in own["state"].get(number, {}).items()}
            states |= {index: {name: values[at] for name, values in whole.items()} for at, index in enumerate(indices)}
        started = {index: state for index, state in states.items() if state}
        return {"model": self.bare_model.state_dict(), "optimizer": {"state": started, "param_groups": groups},
                "scaler": None}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        saved, pieces, groups = state["optimizer"], {}, []
        own = self.zero.optimizer.param_groups
        for number, (group, mine) in enumerate(zip(saved["param_groups"], own, strict=True)):
            each = [saved["state"][index] for index in group["params"] if saved["state"]]
            pieces[number] = {
                name: self._piece([one[name] for one in each], *mine["params"]) if value.ndim else value.clone()
                for name, value in (each[0] if each else {}).items()
            }
            groups.append({**group, "params": [number]})
        self.bare_model.load_state_dict(state["model"])
        self.zero.refresh_fp32_params()
        self.zero.optimizer.load_state_dict({"state": {n: p for n, p in pieces.items() if p}, "param_groups": groups})

    def _whole(self, value: torch.Tensor, members: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What a group's pieces hold for each of its parameters; a number (the step) is that of all of them."""
        if not value.ndim:
            return [value.clone() for _ in members]
        sizes = [parameter.numel() for parameter in members]
        parts = self.accelerator.gather(value)[: sum(sizes)].cpu().split(sizes)
        return [part.view(parameter.shape).clone() for part, parameter in zip(parts, members, strict=True)]

    def _piece(self, values: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """This process's piece of tensors laid end to end; the last one is filled up with zeros."""
        start, piece = self.accelerator.process_index * like.numel(), torch.zeros_like(like)
        mine = torch.cat([value.detach().flatten() for value in values])[start : start + like.numel()]
        piece[: len(mine)] = mine.to(like)
        return piece
