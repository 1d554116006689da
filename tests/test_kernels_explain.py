"""Which form every operator takes, and why not the ones above it."""

import pytest
import torch
from torch import nn

from d_emo import kernels
from d_emo.config import BENCHMARKS, parse_settings
from d_emo.kernels.dispatch import HAS_ONEDNN
from d_emo.lab.benchmark import forms_table
from d_emo.models import create_model


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_model("D-EMOv2-Ti-2", depth=2, hidden_size=24, num_heads=2, sample_size=8, num_classes=5).eval()


INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 5])


def test_the_form_of_every_operator_in_every_mode(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state, found = torch.get_rng_state(), kernels.explain(network, *INPUTS)
    forms = {mode: {call.operator: call.form for call in calls} for mode, calls in found.items()}
    fast, joined = ("products", "products, activation inside") if HAS_ONEDNN else ("the modules", "the modules")
    product = {"product": "oneDNN" if HAS_ONEDNN else "the library"}
    training = {
        "linear": fast, "modulated_norm": "one step", "window_attention": "CPU, in chunks",
        "local_branch": "CPU, one step of training", "local_steps": "in rows",
    }  # fmt: skip
    assert forms["training"] == training | product
    assert forms["training, compiled"] == {**training, **product, "modulated_norm": "norm, then modulation"}
    inference = {
        "linear": joined, "modulated_norm": "norm, then modulation", "window_attention": "CPU, in chunks",
        "local_branch": "local convolution, sum, projection", "add": "in place",
        "local_conv": "oneDNN, one pass" if HAS_ONEDNN else "the modules",
    }  # fmt: skip
    inference |= product if HAS_ONEDNN else {}
    assert forms["inference"] == inference
    assert forms["inference, compiled"] == {**inference, "add": "a new map", "local_conv": "the modules"}
    linear = "linear", "product"
    calls = {call.operator: count for call, count in found["training"].items() if call.operator not in linear}
    assert calls == {"modulated_norm": 3, "window_attention": 2, "local_branch": 2, "local_steps": 2}
    assert not network.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_reason_why_not_the_forms_above(network):
    network.blocks[0].operator.local.register_forward_hook(lambda *_: None)
    network.blocks[1].operator.proj = nn.Sequential(network.blocks[1].operator.proj)
    text = str(kernels.explain(network, *INPUTS, compiled=False))
    rows = [line for line in text.splitlines() if line.startswith("| training | local_branch | 2 x 4 x 4 x 96 | 1 |")]
    assert "something hangs on the call of LocalConv" in rows[0]
    assert "Sequential has to be called as a module" in rows[1]
    assert "not on an NVIDIA GPU" in rows[1] and "compiled" not in text
    with kernels.plain():
        found = kernels.explain(network, *INPUTS, compiled=False)
    assert {why for call in found["inference"] for _, why in call.refused} == {"the plain form was asked for"}


def test_the_benchmark_prints_the_table():
    flags = ["--model", "emov2_1m", "--image-size", "64", "--compile", "false"]
    settings = parse_settings(BENCHMARKS["forms"], "", flags)
    text = forms_table(settings)
    assert text.startswith("emov2_1m, float32, batch 2, on ")
    assert "| inference | window_attention | 2 x " in text and "compiled" not in text
