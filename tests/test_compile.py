"""torch.compile takes each network as one graph, in training and in inference."""

import copy
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from d_emo import kernels
from d_emo.kernels.dispatch import HAS_ONEDNN
from d_emo.models import create_model


def networks():
    demo = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=24, num_heads=2, sample_size=8, window_size=2)
    dit = create_model("DiT-S-2", depth=1, hidden_size=24, num_heads=2, sample_size=8)
    labels = {"timestep": torch.tensor([1, 7]), "class_labels": torch.tensor([0, 3])}
    emo = create_model("emov2_1m", depths=(1, 1, 2, 1), num_classes=5, drop_path_rate=0.0)
    return {
        "demo": (demo, torch.randn(2, 4, 8, 8), labels), "dit": (dit, torch.randn(2, 4, 8, 8), labels),
        "emo": (emo, torch.randn(2, 3, 64, 64), {}),
    }  # fmt: skip


def output(network, x, options):
    out = network(x, **options)
    return out if isinstance(out, torch.Tensor) else out.sample


def operators_of(graph):
    """The operators of ours that a graph calls."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return {name.split(".")[1] for name in names if name.startswith("d_emo.")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", ["demo", "emo"])
def test_the_form_that_ran_eager_compiled_and_exported(which, training):
    """Compiled networks keep our operators, exported ones are made of the library's, on every PyTorch."""
    torch._dynamo.reset()
    graphs, (network, x, options) = [], networks()[which]
    network.train(training)
    compiled = torch.compile(network, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.set_grad_enabled(training):
        with kernels.record() as calls:
            output(network, x, options)
        output(compiled, x, options)
        exported = torch.export.export(network, (x,), options)
    forms = {(call.operator, call.form) for call in calls}
    assert ("window_attention", "CPU, in chunks") in forms
    assert (("local_branch", "CPU, one step of training") in forms) == training
    wanted = {"window_attention_on_cpu"} | ({"local_projection_on_cpu"} if training else set())
    assert len(graphs) == 1 and operators_of(graphs[0]) - {"product"} == wanted
    assert not operators_of(exported.graph_module)


def compare(which, training, backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    network, x, options = networks()[which]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.train(training)
    eager, compiled = copy.deepcopy(network), torch.compile(network, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        ours, theirs = output(compiled, x, options), output(eager, x, options)
    torch.testing.assert_close(ours, theirs)
    if training:
        for out in (ours, theirs):
            out.square().mean().backward()
        for (name, p), q in zip(network.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", ["demo", "dit", "emo"])
def test_a_network_is_one_graph(which, training):
    compare(which, training, "aot_eager")


@pytest.mark.parametrize("name", ["D-EMOv2-Ti-2", "DiT-S-2"])
def test_with_gradient_checkpointing_blocks_are_compiled_once_for_all(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    graphs, options = [], dict(depth=9, hidden_size=24, num_heads=2, sample_size=8)  # more than may be compiled anew
    network = create_model(name, **options).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.enable_gradient_checkpointing()
    eager = copy.deepcopy(network)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward))(graph, inputs)

    network.compile(backend=backend)
    for batch in (2, 3):
        x, options = torch.randn(batch, 4, 8, 8), {"timestep": torch.arange(batch), "class_labels": torch.arange(batch)}
        for model in (network, eager):
            model.zero_grad()
            output(model, x, options).square().mean().backward()
    assert 1 <= len(graphs) <= 2  # another for other sizes of batch
    for (key, ours), theirs in zip(network.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)  # batch norm's statistics, updated once a step
    for (key, ours), theirs in zip(network.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_compiled_for_a_cpu_keeps_the_kernels_that_its_compiler_has_no_equal_for(autocast):
    """The attention, the local branch with the projection and, in float32, oneDNN's products."""
    torch._dynamo.reset()
    seen = Counter()

    def note(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    network, x, options = networks()["demo"]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def backend(graph, inputs):
        note(graph, inputs)  # before the library takes its operators apart
        return aot_autograd(fw_compiler=note, bw_compiler=note)(graph, inputs)

    eager, compiled = copy.deepcopy(network), torch.compile(network, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = output(compiled, x, options), output(eager, x, options)
    for out in outputs:
        out.square().mean().backward()
    for name in ("window_attention_on_cpu", "local_projection_on_cpu"):
        assert seen[f"d_emo.{name}.default"] == 2  # before the library takes its operators apart, and after
        assert seen[f"d_emo.{name}_backward.default"] == 1
    products = 5 if autocast else 20  # forward one, backward two for each; the timestep's are always in float32
    assert seen["d_emo.product.default"] == (products if HAS_ONEDNN else 0)
    assert seen["aten.convolution.default"] == 1  # that of the patches
    assert not any("scaled_dot_product" in name for name in seen)
    pairs = {"output": outputs}
    for (name, ours), theirs in zip(network.named_buffers(), eager.buffers(), strict=True):
        pairs[name] = ours.double(), theirs.double()  # batch norm's running statistics
    for (name, ours), theirs in zip(network.named_parameters(), eager.parameters(), strict=True):
        pairs[f"gradient of {name}"] = ours.grad, theirs.grad
    for name, (ours, theirs) in pairs.items():
        error, size = (ours - theirs).norm().item(), theirs.norm().item()
        assert error <= (3e-2 if autocast else 1e-5) * size + 1e-6, f"{name}: {error} of {size}"


def test_the_operators_that_the_compiler_calls_keep_its_rules():
    x, grad = (torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last) for _ in range(2))
    operators, kernel = torch.ops.d_emo, torch.randn(6, 1, 3, 3)
    torch.library.opcheck(operators.depthwise_gradients, (x, grad, kernel))
    qk, z, options = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 10), ("gelu", 2, [2, 3], "spanning", 2)
    for keep in (True, False):
        for needed in {False, keep}:
            inputs = qk.requires_grad_(needed), z.requires_grad_(needed)
            torch.library.opcheck(operators.window_attention_on_cpu, (*inputs, *options, keep))
    maps = operators.window_attention_on_cpu(qk, z, *options, True)[1]
    torch.library.opcheck(operators.window_attention_on_cpu_backward, (z.detach(), qk, z, maps, *options))
    a, vectors, projection = torch.randn(2, 5, 4, 6), (torch.randn(6), torch.randn(6)), torch.randn(3, 6)
    inputs = [one.requires_grad_() for one in (a, kernel, *vectors, projection)]
    torch.library.opcheck(operators.local_projection_on_cpu, (*inputs, 1e-6))
    inputs = [one.detach() for one in inputs]
    out, *kept = operators.local_projection_on_cpu(*inputs, 1e-6)
    torch.library.opcheck(operators.local_projection_on_cpu_backward, (out, *inputs, *kept, 1e-6, True, False))
    if HAS_ONEDNN:
        rows, weight = torch.randn(7, 3).t(), torch.randn(7, 5).t()
        for bias, act in ((None, "none"), (torch.randn(5), "gelu")):
            torch.library.opcheck(torch.ops.d_emo.product, (rows, weight, bias, act))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", ["demo", "dit", "emo"])
def test_a_compiled_network_is_the_same_function(which, training):
    compare(which, training, "inductor")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", ["demo", "dit", "emo"])
def test_a_network_on_a_gpu_is_the_same_function(which, training):
    torch.manual_seed(0)
    network, x, options = networks()[which]
    network.train(training)
    moved = copy.deepcopy(network).cuda()
    there = output(moved, x.cuda(), {name: value.cuda() for name, value in options.items()}).cpu()
    torch.testing.assert_close(there, output(network, x, options), rtol=1e-3, atol=1e-4)
