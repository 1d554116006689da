"""The local branch of a block, with its skip; in training with the projection after it.

    c = DWConv(a),  y = a + SiLU(BN(c)),  out = Wo y

Step by step, a network keeps the wide maps a, c, BN(c) and y for its backward pass. Here it keeps a and c. The backward
pass makes the other two anew; on a CPU some rows at a time, so that they stay in the cache between the steps, and on a
GPU as `d_emo.kernels.gpu.local` says.
"""

from typing import Any

import torch
from torch import Tensor, nn

from d_emo.kernels.activation import add
from d_emo.kernels.depthwise import folded, geometry_refuses, one_pass_refuses, triton_size_refuses
from d_emo.kernels.dispatch import Form, lowered, opaque, run, triton_refuses
from d_emo.kernels.linear import linear, product
from d_emo.kernels.local_steps import LOCAL_GRADIENTS, LOCAL_STEPS, Running

PARAMETERS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
"""The precision of the parameters that goes with that of the map; bfloat16 is autocast's."""


def local_branch(local: nn.Module, proj: nn.Module, a: Tensor, *, skip: bool) -> Tensor:
    """``proj(a + local(a))``, without ``skip`` ``proj(local(a))``.

    Args:
        local: `d_emo.models.layers.LocalConv`, with ``conv``, ``norm`` and ``act``; anything else is called.
        proj: the projection Wo.
        a: the map.
        skip: whether the local convolution's input is added to its output.

    Shape: a (B, H, W, M) -> (B, ceil(H / stride), ceil(W / stride), C).
    """
    return run("local_branch", LOCAL_BRANCH, a, local, proj, skip)


def _training_refuses(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> str | None:
    """Why the one step of training is not for this branch, or None; whatever the device."""
    if not torch.is_grad_enabled():
        return "gradients are off"
    if not skip:
        return "no inner skip"
    if a.numel() <= a.shape[-1]:
        return "one value per channel has no variance"  # the library refuses it in its own words
    if why := opaque(local, proj):
        return why
    conv, bn = local.conv, getattr(local.norm, "bn", None)
    if type(bn) is not nn.BatchNorm2d or type(local.act) is not nn.SiLU or type(proj) is not nn.Linear:
        return "not a batch norm, SiLU and a linear layer"
    if why := opaque(local.norm, bn, local.act) or geometry_refuses(conv):
        return why
    if not (bn.training and bn.affine and bn.track_running_stats) or bn.momentum is None:
        return "batch norm is not in training mode with running statistics"
    return None if conv.bias is proj.bias is None else "the convolution or the projection has a bias"


def _triton_training_refuses(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> str | None:
    if why := triton_refuses(a) or _training_refuses(a, local, proj, skip):
        return why
    return triton_refuses(*_parameters(local, proj)) or triton_size_refuses(local.conv)


def _cpu_training_refuses(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> str | None:
    if a.device.type != "cpu":
        return "not on a CPU"
    if why := _training_refuses(a, local, proj, skip):
        return why
    precision = PARAMETERS.get(lowered(a)[0].dtype)
    for parameter in _parameters(local, proj):
        if parameter.dtype != precision or parameter.device.type != "cpu":
            return f"a map in {a.dtype} does not go with parameters in {parameter.dtype}"
    return None


def _inference_refuses(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> str | None:
    if not skip:
        return "no inner skip"
    if torch.is_grad_enabled():
        return "gradients are on"
    return triton_refuses(a) or opaque(local) or one_pass_refuses(a, local.conv, local.norm, local.act)


def _parameters(local: nn.Module, proj: nn.Module) -> tuple[Tensor, ...]:
    return local.conv.weight, local.norm.bn.weight, local.norm.bn.bias, proj.weight


def _triton_training(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> Tensor:
    from d_emo.kernels.gpu import local as gpu

    bn = local.norm.bn
    out, mean, var = gpu.local_projection(lowered(a)[0], *_parameters(local, proj), bn.eps)
    _update(bn, a, mean, var)
    return out


def _cpu_training(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> Tensor:
    bn, (kernel, gamma, beta, projection) = local.norm.bn, _parameters(local, proj)
    a, kernel, projection = lowered(a, kernel, projection)
    operands = a, kernel, gamma, beta, projection, bn.eps
    if torch.compiler.is_compiling():
        out, _, mean, var = _local_projection(*operands)
        _update(bn, a, mean, var)
        return out
    bn.num_batches_tracked.add_(1)
    return _LocalProjection.apply(*operands, (bn.running_mean, bn.running_var, bn.momentum))


@torch.no_grad()
def _update(bn: nn.BatchNorm2d, a: Tensor, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics as batch norm does, by mean and biased variance over the pixels."""
    pixels = a.numel() // a.shape[-1]
    bn.num_batches_tracked.add_(1)
    bn.running_mean.lerp_(mean.detach().to(bn.running_mean.dtype), bn.momentum)
    bn.running_var.lerp_((var.detach() * (pixels / (pixels - 1))).to(bn.running_var.dtype), bn.momentum)


def _triton_inference(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> Tensor:
    from d_emo.kernels.gpu import local as gpu

    return linear(proj, gpu.depthwise_silu(lowered(a)[0], *folded(local.conv, local.norm), skip=True))


def _steps(a: Tensor, local: nn.Module, proj: nn.Module, skip: bool) -> Tensor:
    y = local(a)
    return linear(proj, add(y, a, local, local.conv, local.norm, local.act) if skip else y)


LOCAL_BRANCH = (
    Form("Triton, one step of training", _triton_training, _triton_training_refuses),
    Form("CPU, one step of training", _cpu_training, _cpu_training_refuses),
    Form("Triton, one pass and the projection", _triton_inference, _inference_refuses),
    Form("local convolution, sum, projection", _steps),
)


def forward(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, c, and mean and variance of c; the running statistics are updated.

    Shape: a (B, H, W, M), projection (C, M) -> (B, H, W, C), c (B, H, W, M), (M,), (M,).
    """
    with torch.autocast("cpu", enabled=False):
        y, *kept = run("local_steps", LOCAL_STEPS, a, kernel, gamma, beta, eps, running=running)
        return product(y, projection), *kept


def backward(
    grad: Tensor, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, c: Tensor, mean: Tensor,
    var: Tensor, eps: float, needs_kernel: bool, needs_projection: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the first five arguments of `forward`. Shape: grad (B, H, W, C); gradients as their tensors."""
    grad_y = product(grad, projection.t())  # (B, H, W, M)
    y, *grads = run("local_gradients", LOCAL_GRADIENTS, grad_y, a, kernel, gamma, beta, c, mean, var, eps, needs_kernel)
    grad_projection = product(grad.flatten(0, -2).t(), y.flatten(0, -2).t()) if needs_projection else None  # (C, M)
    return *grads, grad_projection


class _LocalProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float,
        running: tuple[Tensor, Tensor, float],
    ) -> Tensor:  # fmt: skip
        a, ctx.eps = a.contiguous(), eps
        out, *kept = forward(a, kernel, gamma, beta, projection, eps, running)
        ctx.save_for_backward(a, kernel, gamma, beta, projection, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        return *backward(grad, *ctx.saved_tensors, ctx.eps, *needs), None, None


@torch.library.custom_op("d_emo::local_projection_on_cpu", mutates_args=())
def _local_projection(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` as an operator that the compiler calls as it is; its caller updates the running statistics."""
    return forward(a.contiguous(), kernel, gamma, beta, projection, eps)


@_local_projection.register_fake
def _(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, ...]:
    out = a.new_empty((*a.shape[:-1], len(projection)))
    return out, a.new_empty(a.shape), torch.empty_like(gamma), torch.empty_like(gamma)


@torch.library.custom_op("d_emo::local_projection_on_cpu_backward", mutates_args=())
def _local_projection_backward(
    grad: Tensor, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, c: Tensor, mean: Tensor,
    var: Tensor, eps: float, needs_kernel: bool, needs_projection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` as an operator; what is not needed is empty."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        operands = a.contiguous(), kernel, gamma, beta, projection
        grads = backward(grad.contiguous(), *operands, c, mean, var, eps, needs_kernel, needs_projection)
    return tuple(a.new_empty(0) if one is None else one for one in grads)


@_local_projection_backward.register_fake
def _(grad: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    wanted = True, operands[-2], True, True, operands[-1]
    return tuple(x.new_empty(x.shape if one else 0) for x, one in zip(operands[:5], wanted, strict=True))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.eps = inputs
    ctx.set_materialize_grads(False)  # of c and its statistics, which nobody asks for
    ctx.save_for_backward(*operands, *output[1:])


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    _, needs_kernel, *_, needs_projection, _ = ctx.needs_input_grad
    grads = _local_projection_backward(grad, *ctx.saved_tensors, ctx.eps, needs_kernel, needs_projection)
    wanted = True, needs_kernel, True, True, needs_projection
    return *(one if kept else None for one, kept in zip(grads, wanted, strict=True)), None


_local_projection.register_autograd(_gradients, setup_context=_keep)
