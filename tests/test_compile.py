"""torch.compile takes each network as one graph, in training and in inference."""

import copy

import pytest
import torch

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


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_compiled_for_a_cpu_is_made_of_what_its_compiler_does_well(autocast):
    """In float32 products as convolutions, and no fused attention; see `d_emo.kernels.choice.compiles_for_cpu`."""
    torch._dynamo.reset()
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    network, x, options = networks()["demo"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output(torch.compile(network, backend=note), x, options)
    convolutions = sum("conv2d" in target for target in seen)
    fused = any("scaled_dot_product_attention" in target for target in seen)
    assert (convolutions, fused) == ((2, True) if autocast else (6, False))  # patches, depthwise; q and k, v, Wo, head


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
