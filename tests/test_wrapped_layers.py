"""What is wrapped around a layer, or hung on it, is never passed by: hooks, adapters, quantised layers."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from d_emo import kernels
from d_emo.models import create_model
from d_emo.models.layers import fold_batch_norms

NAMES = ("D-EMOv2-Ti-2", "DiT-S-2", "emov2_1m", "emov1_1m", "parallel", "conv-attention")


def network(name):
    """A small network, all of whose layers matter, and its inputs."""
    torch.manual_seed(0)
    if name[0] in "D":
        model = create_model(name, depth=2, hidden_size=24, num_heads=2, sample_size=8, num_classes=5)
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 5])
    else:
        named, options = (name, {}) if name.startswith("emo") else ("emov2_1m", {"arrangement": name})
        model = create_model(named, depths=(1, 1, 2, 1), num_classes=5, drop_path_rate=0.0, **options)
        inputs = (torch.randn(2, 3, 48, 48),)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.05)
    return model, inputs


def note(fired, *_):
    fired.append(1)


def output(model, inputs):
    out = model(*inputs)
    return out if isinstance(out, torch.Tensor) else out.sample


def called(model):
    """The modules that a forward pass calls, by name: neither lists nor the drop path of blocks without a residual."""
    idle = {id(m.drop_path) for m in model.modules() if not getattr(m, "residual", True)}
    return {
        key: module for key, module in model.named_modules()
        if not isinstance(module, nn.ModuleList) and id(module) not in idle
    }  # fmt: skip


MODES = {"train": (True, torch.enable_grad), "eval": (False, torch.enable_grad), "no_grad": (False, torch.no_grad),
         "inference": (False, torch.inference_mode), "train without gradients": (True, torch.no_grad)}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_hook_on_any_module_fires_once_in_every_mode(name, mode, autocast):
    (training, gradients), (model, inputs) = MODES[mode], network(name)
    model.train(training)
    if mode == "inference":
        fold_batch_norms(model)
    fired = []
    with gradients(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        without = output(model, inputs)
        for key, module in called(model).items():
            module.register_forward_hook(lambda *_, key=key: fired.append(key))
        out = output(model, inputs)
    assert sorted(fired) == sorted(called(model))
    torch.testing.assert_close(out, without, rtol=2e-2 if autocast else 1e-4, atol=3e-2 if autocast else 1e-4)


@pytest.mark.parametrize("name", ["D-EMOv2-Ti-2", "emov2_1m"])
def test_a_hook_fires_under_gradient_checkpointing_too(name):
    """Inside of a block a second time, when it is computed again."""
    model, inputs = network(name)
    model.train()
    model.set_grad_checkpointing() if name == "emov2_1m" else model.enable_gradient_checkpointing()
    fired = []
    for key, module in called(model).items():
        module.register_forward_hook(lambda *_, key=key: fired.append(key))
    output(model, inputs)
    assert sorted(fired) == sorted(called(model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_hook_fires_on_one_module_by_itself_and_the_others_keep_their_forms(name, training):
    model, inputs = network(name)
    model.train(training)

    def forms(calls):  # the steps inside of a local branch go with it
        return {call.form for call in calls if call.operator != "local_steps"}

    with torch.set_grad_enabled(training), kernels.record() as calls:
        output(model, inputs)
        before = len(forms(calls))
        for key, module in called(model).items():
            fired = []
            handle = module.register_forward_hook(functools.partial(note, fired))
            calls.clear()
            output(model, inputs)
            handle.remove()
            assert fired == [1], key
            assert len(forms(calls)) >= before - 1, key


@pytest.mark.parametrize("register", [
    nn.Module.register_forward_pre_hook, nn.Module.register_full_backward_hook,
    nn.Module.register_full_backward_pre_hook,
])  # fmt: skip
@pytest.mark.parametrize("name", ["D-EMOv2-Ti-2", "emov2_1m"])
def test_other_hooks_fire_too(name, register):
    model, inputs = network(name)
    leaves, fired = {key: m for key, m in called(model).items() if not list(m.children())}, set()
    for key, module in leaves.items():
        register(module, lambda *args, key=key: fired.add(key) and None)
    output(model, tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)).square().sum().backward()
    unused = {key for key, m in leaves.items() if isinstance(m, nn.Embedding)}  # whose input has no gradient
    assert fired | unused == set(leaves)


def test_a_hook_of_all_modules_sees_all_of_them():
    model, inputs = network("emov2_1m")
    model.eval()
    fired = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: fired.append(module))
    try:
        with torch.no_grad():
            output(model, inputs)
    finally:
        handle.remove()
    assert set(fired) == set(called(model).values())


def test_what_a_hook_keeps_is_not_overwritten():
    model, inputs = network("emov2_1m")
    kept = {}
    for key, module in model.eval().named_modules():
        module.register_forward_hook(lambda module, args, out, key=key: kept.update({key: (out, out.clone())}))
    with torch.no_grad():
        output(model, inputs)
    assert all(torch.equal(out, then) for out, then in kept.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["D-EMOv2-Ti-2", "emov2_1m"])
def test_a_compiled_network_calls_what_a_hook_hangs_on(name, training):
    torch._dynamo.reset()
    model, inputs = network(name)
    model.train(training)
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, out: 1.01 * out)
    with torch.set_grad_enabled(training):
        eager = output(copy.deepcopy(model), inputs)
        compiled = output(torch.compile(model, backend="eager"), inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


class LoRA(nn.Module):
    """A linear layer with a low-rank addition, as PEFT wraps it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def linear_layers(model):
    return [key for key, module in model.named_modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_every_linear_layer_equals_its_merged_weights_in_training_and_in_sampling(name, subclass):
    """Wrapped, or as a subclass of ``nn.Linear`` put in a layer's place."""
    model, inputs = network(name)
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    keys = linear_layers(model)
    assert len(keys) == {"D-EMOv2-Ti-2": 12, "DiT-S-2": 14}.get(name, len(keys)) and len(keys) > 9
    for key in keys:
        lora = LoRA(adapted.get_submodule(key))
        if subclass:
            class Adapted(nn.Linear):
                def forward(self, x):
                    return super().forward(x) + self.up(self.down(x))

            base, layer = lora.base_layer, Adapted(1, 1)
            layer.weight, layer.bias, layer.up, layer.down = base.weight, base.bias, lora.up, lora.down
        else:
            layer = lora
        adapted.set_submodule(key, layer)
        merged.get_submodule(key).weight.data += lora.up.weight @ lora.down.weight
    for training in (True, False):
        for one in (model, adapted, merged):
            one.train(training)
        with torch.set_grad_enabled(training):
            ours, theirs, base = (output(one, inputs) for one in (adapted, merged, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert (base - theirs).abs().max() > 0.02
        if training:
            ours.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for key, p in adapted.named_parameters() if ".up." in key)
    fold_batch_norms(model.eval())


def test_an_adapter_on_one_layer_leaves_the_others_their_forms():
    model, inputs = network("D-EMOv2-Ti-2")
    model.blocks[0].operator.expand.v = LoRA(model.blocks[0].operator.expand.v)
    with kernels.record() as calls:
        output(model.train(), inputs)
    assert [c.form for c in calls if c.operator == "local_branch"] == ["CPU, one step of training"] * 2
    why = [dict(c.refused) for c in calls if c.operator == "linear" and "LoRA" in str(c.refused)]
    assert len(why) == 1 and why[0]["products"] == "LoRA has to be called as a module"


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_quantisation_replaces_every_linear_layer_and_the_network_runs(name):
    ao = pytest.importorskip("torch.ao.quantization")
    model, inputs = network(name)
    count = len(linear_layers(model))
    quantised = ao.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
    assert not linear_layers(quantised)
    assert sum(type(m) is torch.ao.nn.quantized.dynamic.Linear for m in quantised.modules()) == count
    with torch.no_grad():
        ours, exact = output(quantised, inputs), output(model, inputs)
    assert (ours - exact).norm() <= 0.2 * exact.norm()


def test_parametrised_and_pruned_layers_are_called_as_modules():
    model, inputs = network("D-EMOv2-Ti-2")
    model.eval()
    operator = model.blocks[0].operator
    parametrizations.weight_norm(operator.proj)
    prune.l1_unstructured(operator.expand.v, "weight", amount=0.5)
    with torch.no_grad():
        before = output(model, inputs)
        with kernels.plain():
            torch.testing.assert_close(before, output(model, inputs), rtol=1e-3, atol=1e-4)
        operator.proj.parametrizations.weight.original0.mul_(2)
        assert (output(model, inputs) - before).abs().max() > 1e-3
