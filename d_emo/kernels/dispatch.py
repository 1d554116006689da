"""Which form of an operator runs: the one place that decides it, and can say why.

An operator has a table of forms, fastest first. Each is asked for what it has against its inputs, in one sentence, and
the first that has nothing runs. The last form takes everything: it calls the layers as modules, in standard operators.
Where it depends on the machine which form is faster they are rivals, and `d_emo.kernels.autotune` finds the fastest.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as modules

from d_emo.errors import InputError, RunError
from d_emo.kernels.autotune import in_words, preferences, tuner

HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether this build of the library has oneDNN's product and this CPU AVX-512."""


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, whose import of the compiler takes a second even where none is used."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Form(NamedTuple):
    """One way to compute an operator.

    Attributes:
        name: what explanations call it.
        run: takes the operator's inputs, the map first.
        refuses: takes the same; says why this form does not take them, or None. The last form of a table has none.
        rival: whether its place in the table is for measurement to decide, among the rivals that take the inputs.
    """

    name: str
    run: Callable[..., Tensor]
    refuses: Callable[..., str | None] | None = None
    rival: bool = False


class Call(NamedTuple):
    """What `record` keeps of one call of an operator: the map's shape, the form that ran, and (form, why not) of those
    above it and of its rivals."""

    operator: str
    shape: tuple[int, ...]
    form: str
    refused: tuple[tuple[str, str], ...]


_plain, _fixed = preferences.plain, False
_calls: list[Call] | None = None


def run(operator: str, forms: tuple[Form, ...], x: Tensor, *inputs: Any, **state: Any) -> Any:
    """The operator's result, by the first of its forms that takes the inputs.

    ``state`` is what a form moves beside its result, such as running statistics; a trial does without.

    Shape: x (B, H, W, C); what else goes in and what comes out is the operator's.

    Raises:
        RunError: A form broke the GPU; see `passes_trial`.
        InputError: D_EMO_KERNELS names a form that the operator does not have.
    """
    standard = why_standard()
    if standard is None and type(x) not in PLAIN_TENSORS:
        standard = f"the map is a {type(x).__name__}"
    chosen, times = forms[-1], {}
    if standard is None:
        for form in forms:
            if form.refuses is None or form.refuses(x, *inputs) is None:
                chosen = form
                break
        if preferences.forms:
            chosen = _asked_for(operator, forms, x, inputs) or chosen
        if chosen.rival and not _fixed and x.device.type == "cpu" and not torch.compiler.is_compiling():
            fast, times = _fastest(operator, forms, chosen, x, inputs)
            if fast is chosen or fast.refuses is None or fast.refuses(x, *inputs) is None:  # layers may have changed
                chosen = fast
    if _calls is not None:
        note(operator, tuple(x.shape), chosen.name, _refused(forms, chosen, standard, times, x, inputs))
    return chosen.run(x, *inputs, **state)


def _refused(
    forms: tuple[Form, ...], chosen: Form, standard: str | None, times: dict[str, float], x: Tensor,
    inputs: tuple[Any, ...],
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """The forms above the chosen one, and its rivals below where something was to be timed; with the reasons."""
    refused, above = {}, True
    for form in forms:
        if form.name == chosen.name:
            above = False
        elif above or (form.rival and chosen.rival and not (_fixed or tuner.fixed)):
            why = standard or (form.refuses and form.refuses(x, *inputs))
            if why or above or form.name in times:
                refused[form.name] = why or slower(form.name, chosen.name, times)
    return tuple(refused.items())


def slower(form: str, chosen: str, times: dict[str, float]) -> str:
    """Why a form is not the chosen one, which both take the inputs."""
    if form in times and chosen in times:
        return f"{times[form]:.2g} ms here, where {chosen} takes {times[chosen]:.2g}"
    return f"{chosen} was asked for, or is kept from another run"


def _asked_for(operator: str, forms: tuple[Form, ...], x: Tensor, inputs: tuple[Any, ...]) -> Form | None:
    """The form that D_EMO_KERNELS names, if it takes the inputs."""
    name = preferences.forms.get(operator)
    if name is None:
        return None
    named = {form.name: form for form in forms}
    if name not in named:
        raise InputError(f"D_EMO_KERNELS asks for {name!r}; the forms of {operator} are {', '.join(map(repr, named))}")
    form = named[name]
    return form._replace(rival=False) if form.refuses is None or form.refuses(x, *inputs) is None else None


def _fastest(
    operator: str, forms: tuple[Form, ...], first: Form, x: Tensor, inputs: tuple[Any, ...]
) -> tuple[Form, dict[str, float]]:
    """The fastest of the rivals that take the inputs, and the times that say so; ``first`` is the first of them."""
    gradients = torch.is_grad_enabled()
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    key = (operator, torch.get_num_threads(), gradients, low, *[
        (value.shape, value.dtype, value.is_contiguous(), value.requires_grad) if isinstance(value, Tensor) else value
        for value in (x, *inputs)
    ])  # fmt: skip
    found = tuner.memo.get(key)
    if found is None:
        words, rivals = in_words(key), {first.name: first}
        if not tuner.fixed or tuner.used.get(words, first.name) != first.name:  # or the others need not be there at all
            rivals |= {f.name: f for f in forms if f.rival and (f.refuses is None or f.refuses(x, *inputs) is None)}
        choice = tuner.choose(words, list(rivals), lambda name: _try(rivals[name], x, inputs, gradients))
        found = tuner.memo[key] = rivals[choice.form], choice.times
    return found


def _try(form: Form, x: Tensor, inputs: tuple[Any, ...], gradients: bool) -> None:
    """Run a form on copies without a history, there and back; nobody else is to see it."""
    operands = [
        value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for value in (x, *inputs)
    ]
    with record(), torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        out = form.run(*operands)
        wanted = [value for value in operands if isinstance(value, Tensor) and value.requires_grad]
        if gradients and wanted:
            torch.autograd.grad(out, wanted, torch.ones_like(out))


@constant
def note(*call: Any) -> None:
    """Keep a call for `record`; of a compiled network as it is traced."""
    if _calls is not None:
        _calls.append(Call(*call))


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Within this context every call of an operator is noted in the list; of compiled networks, when it is traced."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within this context every operator takes its plain form, in standard operators: for counting and comparing.

    The environment variable D_EMO_KERNELS=plain does the same for a whole process.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """Within this context nothing is timed, and the first form that takes the inputs runs: for results whose last bits
    must not depend on what was measured on a machine."""
    global _fixed
    before, _fixed = _fixed, True
    try:
        yield
    finally:
        _fixed = before


def asked_fixed() -> bool:
    """Whether D_EMO_KERNELS or `fixed` asks for results that do not depend on what a machine is good at."""
    return _fixed or preferences.fixed


def why_standard() -> str | None:
    """Why every operator takes its plain form, or None.

    It was asked for, or a tracer, a dispatch mode, a transform or a hook is to see all modules and operators.
    """
    if _plain:
        return "the plain form was asked for"
    if torch.compiler.is_compiling():
        if is_exporting():
            return "the network is exported or traced"
    elif is_fx_symbolic_tracing() or torch.jit.is_tracing():
        return "the network is exported or traced"
    elif torch._C._len_torch_dispatch_stack():
        return MODE
    elif torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func is to see all operators"
    if modules._global_forward_hooks or modules._global_forward_pre_hooks or (
        modules._global_backward_hooks or modules._global_backward_pre_hooks
    ):  # fmt: skip
        return HOOK
    return None


@constant
def is_exporting() -> bool:
    """Whether torch.export is at work. Asked outside of traced code: before PyTorch 2.12 it is traced as True."""
    return torch.compiler.is_exporting()


PLAIN_TENSORS = (Tensor, nn.Parameter)

KNOWN: set[type[nn.Module]] = {
    nn.Linear, nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GELU, nn.SiLU, nn.Identity,
}  # fmt: skip
"""The modules whose work an operator may do itself, without calling them."""


def known(kind: type[nn.Module]) -> type[nn.Module]:
    """Let operators do the work of a class of modules, which its owner writes as they know it; a decorator."""
    KNOWN.add(kind)
    return kind


HANGS, CALLED, BROKEN = "something hangs", "has to be called as a module", "do not work on this GPU"
HOOK, MODE = "a hook of all modules is there", "a dispatch mode is to see all operators"


def avoidable(calls: list[Call]) -> list[str]:
    """For whoever waits for a network: each form that the machine has and these calls did not take, and why, once."""
    marks = HANGS, CALLED, BROKEN, HOOK, MODE
    return list(dict.fromkeys(
        f"{call.operator}: not by '{form}', because {why}"
        for call in calls for form, why in call.refused if any(mark in why for mark in marks)
    ))  # fmt: skip


def opaque(*layers: nn.Module) -> str | None:
    """Why one of the layers has to be called as a module, or None.

    It is of another class than those in `KNOWN` (a subclass is another: LoRA, quantised, parametrised or synchronised
    layers), its weight is not an ordinary tensor, or something is wrapped around its call or hung on it.
    """
    for layer in layers:
        own = layer.__dict__
        if type(layer) not in KNOWN:
            return f"{type(layer).__name__} {CALLED}"
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return f"{HANGS} on the call of {type(layer).__name__}"
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return f"{HANGS} on the backward pass of {type(layer).__name__}"
        weight = own["_parameters"].get("weight")
        if weight is not None and type(weight) not in PLAIN_TENSORS:
            return f"the weight of {type(layer).__name__} is a {type(weight).__name__}"
    return None


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is where Triton's kernels run."""
    return x.is_cuda


def triton_refuses(*tensors: Tensor) -> str | None:
    """Why Triton's kernels do not run for these, or None: on an NVIDIA GPU that `triton_works` on, in 32 bits or fewer.

    Compiled networks take them too, as operators that the compiler does not look into.
    """
    for x in tensors:
        if not on_gpu(x):
            return "not on an NVIDIA GPU"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no kernels for {x.dtype}"
    return None if triton_works(tensors[0].device.index) else f"Triton's kernels {BROKEN}"


@constant
def triton_works(index: int) -> bool:
    """`passes_trial`; the compiler, which would look into a cached function, calls this one and takes its word.

    False while a CUDA graph is recorded, unless they were tried before: nothing can be tried then.
    """
    if index not in _tried:
        if torch.cuda.is_current_stream_capturing():
            return False
        _tried[index] = passes_trial(index)
    return _tried[index]


_tried: dict[int, bool] = {}
"""By GPU, whether `passes_trial`."""


def passes_trial(index: int) -> bool:
    """Whether every kernel of `d_emo.kernels.gpu` runs on this GPU and equals its plain form.

    Raises:
        RunError: A kernel failed so that this process can no longer use the GPU.
    """
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        from d_emo.kernels import gpu

        gpu.check(torch.device("cuda", index))
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # of the compiler, the driver, or a difference: all mean the plain form
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        try:
            torch.cuda.synchronize(index)
        except Exception:  # such as an illegal address, after which CUDA refuses everything
            remedy = "start again with D_EMO_KERNELS=plain in the environment, which turns them off"
            raise RunError(f"Triton's kernels broke off on this GPU ({reason}); {remedy}") from None
        warnings.warn(
            f"Triton's kernels are not used on this GPU, the library's take their place: {reason}", stacklevel=2
        )
        return False
    return True


def onednn_refuses(*tensors: Tensor | None) -> str | None:
    """Why oneDNN is not the faster library for products of these, or None: float32, on a CPU with AVX-512."""
    if not HAS_ONEDNN:
        return "no oneDNN, or a CPU without AVX-512"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for x in tensors:
        if x is not None and (x.device.type != "cpu" or x.dtype != torch.float32):
            return "not in float32 on a CPU"
    return None


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast on their device wants a product's operands; as they are where it is off.

    Shape: any -> same.
    """
    device = "cuda" if tensors[0].is_cuda else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) if t.dtype == torch.float32 else t for t in tensors)
