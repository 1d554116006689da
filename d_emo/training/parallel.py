"""How the processes of a run share its work: what accelerate is told, and the gradients and the update of a step."""

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from torch import nn
from torch.nn.utils import get_total_norm

from d_emo.config import RunSettings
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.io.training_state import gather_training, restore_training


def precision_of(settings: RunSettings, device: torch.device) -> str:
    """What a run computes in: "no", "bf16" or "fp16"."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.mixed_precision or ("bf16" if bf16 else "no")


def micro_batch_of(settings: RunSettings, per_rank: int, device: torch.device) -> int:
    """How many of a process's images go through the network at once; on a CPU as many up to 8 as divide them."""
    if settings.micro_batch_size or device.type != "cpu":
        return min(settings.micro_batch_size or per_rank, per_rank)
    return max(count for count in range(1, 9) if per_rank % count == 0)


def open_processes() -> PartialState:
    """The processes that share the work of a verb that does not train: those of `accelerate launch` or torchrun.

    Raises:
        InputError: They do not know of each other.
    """
    state = PartialState(cpu=_share_cpus())
    check_processes(state.num_processes)
    if state.device.type == "cpu":
        state.device = torch.device("cpu")  # safetensors knows no cpu:0
    return state


def check_processes(found: int) -> None:
    """Raise InputError unless accelerate found as many processes as were started."""
    if found != (started := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(
            f"the launcher started {started} processes, of which {found} know of each other; start them with `torchrun "
            "--nproc_per_node` or `accelerate launch`"
        )


def _share_cpus() -> bool:
    """Whether several processes were started where there is no GPU; accelerate would take each for the only one."""
    return best_device().type == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1


def open_accelerator(settings: RunSettings, *, accumulation: int, precision: str) -> Accelerator:
    """What `accelerate launch` started this process for.

    Args:
        settings: ``tracker`` and ``output_dir``.
        accumulation: Micro-batches per step and process.
        precision: "no", "bf16" or "fp16".

    Raises:
        InputError: DeepSpeed is asked for.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError("DeepSpeed is not used here; shard with `accelerate launch --use_fsdp` instead")
    if precision == "bf16" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # It would turn weights, timesteps and sums of gradients into bf16; Updates autocasts over float32 instead.
        precision = "no"
    accelerator = Accelerator(
        mixed_precision=precision, log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=settings.output_dir, cpu=_share_cpus(),
    )
    accelerator.gradient_accumulation_steps = accumulation  # the launcher's files may hold another number
    return accelerator


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
        self.bare_model = model  # DDP wraps it, FSDP2 shards it in place

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next update, times the scale of each group of parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss. Shape: loss ()."""
        self.accelerator.backward(loss)

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the whole gradient, which is clipped. Shape: -> ()."""
        if self.clip or self.accelerator.distributed_type == DistributedType.FSDP:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        else:  # clipping to infinity would go over all gradients once more
            self.accelerator.unscale_gradients()
            norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self) -> bool:
        """Update the weights; whether it was done, which an overflow under fp16 prevents."""
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.step()  # accelerate's own looks for packages at every step
            return True
        self.optimizer.step()
        return not self.accelerator.optimizer_step_was_skipped

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.optimizer.zero_grad()

    def gather(self) -> dict[str, Any]:
        """Model, optimizer and scaler for a state, whole; a joint act of all processes."""
        scaler = self.accelerator.scaler
        return {**gather_training(self.bare_model, self.optimizer.optimizer),
                "scaler": None if scaler is None else scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `gather` gave, in whichever way the model was spread then.

        Raises:
            InputError, KeyError, RuntimeError: The state is that of another model.
        """
        restore_training(self.bare_model, self.optimizer.optimizer, state)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
