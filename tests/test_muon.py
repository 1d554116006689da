"""Muon on the matrices of the blocks."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from d_emo import kernels
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.models import create_model
from d_emo.training import muon
from d_emo.training.muon import Muon, orthogonal
from d_emo.training.optimizer import make_optimizer

CPU = torch.device("cpu")


def test_the_update_is_the_papers_equation(monkeypatch):
    """Momentum, Nesterov, five steps of Newton-Schulz by singular values, the scale and the decay, in float64."""
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    optimizer = Muon([{"params": [weight], "matrices": 2, "weight_decay": 0.1, "lr_scale": 1.0}], lr=0.02)
    expected, momentum = weight.detach().double(), torch.zeros(6, 4).double()
    for _ in range(3):
        weight.grad = torch.randn(6, 4, generator=generator)
        momentum = 0.95 * momentum + 0.05 * weight.grad.double()
        update = 0.95 * momentum + 0.05 * weight.grad.double()
        parts = []
        for part in (update[:3], update[3:]):
            u, s, vh = torch.linalg.svd(part / part.norm(), full_matrices=False)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            parts.append(u @ torch.diag(s) @ vh)
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * 0.2 * 4**0.5 * torch.cat(parts)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_a_whole_matrix_moves_as_by_pytorchs_own(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch before 2.9")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    one = Muon([{"params": [ours], "matrices": 1, "weight_decay": 0.1}], lr=0.1)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)  # theirs iterates in bfloat16


def test_what_is_orthogonal_stays_and_zeros_stay_zeros():
    values = torch.linalg.svdvals(orthogonal(torch.randn(64, 16, generator=torch.Generator().manual_seed(0))))
    assert 0.6 < values.min() and values.max() < 1.3
    assert not orthogonal(torch.zeros(4, 3)).any()


@pytest.mark.parametrize(("name", "wanted"), [
    ("D-EMOv2-Ti-2", {"operator.expand.qk": 2, "operator.expand.v": 1, "operator.proj": 1}),
    ("DiT-Ti-2", {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}),
])
def test_matrices_of_the_blocks_go_to_muon_and_the_rest_to_adamw(name, wanted):
    torch.manual_seed(0)
    model = create_model(name, depth=1, hidden_size=48, num_heads=3, sample_size=4, num_classes=3)
    settings = TrainSettings(optimizer="muon", weight_decay=0.1)
    optimizer = make_optimizer(model, settings, {model.label_parameter: 3.0}, CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["matrices"] for group in optimizer.param_groups if "matrices" in group
             for p in group["params"]}
    assert found == {f"blocks.0.{each}.weight": count for each, count in wanted.items()} == model.block_matrices()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    model(torch.randn(2, 4, 4, 4), torch.tensor(5), torch.tensor([0, 1])).sample.square().mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    kinds = {names[id(p)]: set(state) for p, state in optimizer.state.items()}
    moments = {True: {"momentum", "step"}, False: {"step", "exp_avg", "exp_avg_sq"}}
    assert all(kind == moments[name in found] for name, kind in kinds.items())


def test_the_iteration_takes_what_the_guide_says():
    """docs/training.md counts 5 (2 m^2 n + m^3) multiply-adds for a matrix of m x n, 120 C^3 for a block of width C."""
    with torch.device("meta"):
        model = create_model("D-EMOv2-S-2", depth=1)
    total = 0
    for name, parts in model.block_matrices().items():
        rows, columns = model.get_parameter(name).shape
        m, n = sorted((rows // parts, columns))
        with FlopCounterMode(display=False) as counter:
            orthogonal(torch.empty(rows // parts, columns, device="meta"))
        assert counter.get_total_flops() == 2 * 5 * (2 * m**2 * n + m**3)
        total += parts * counter.get_total_flops() // 2
    assert total == 120 * 384**3


def test_wrong_combinations_are_refused():
    with pytest.raises(InputError, match="`optimizer` muon is for whole matrices; with `train` lora:4 use adamw"):
        TrainSettings(optimizer="muon", train="lora:4", init_from="x")
    with pytest.raises(InputError, match="`optimizer` must be one of adamw, muon, not mun; did you mean muon"):
        TrainSettings(optimizer="mun")
    model = create_model("DiT-Ti-2", depth=1, hidden_size=48, num_heads=3, sample_size=4, num_classes=3)
    model.block_matrices = dict
    with pytest.raises(InputError, match="muon is for the matrices of blocks, and Denoiser names none"):
        make_optimizer(model, TrainSettings(optimizer="muon"), {}, CPU)


def test_a_run_keeps_the_precision_it_began_with(monkeypatch):
    """bfloat16 where the CPU multiplies it and bits may differ; a resumed run takes that of its state."""
    gradient = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))

    def update_of(multiplies: bool, fixed: bool, state: dict | None = None) -> tuple[torch.Tensor, dict]:
        monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: multiplies)
        monkeypatch.setattr(kernels, "asked_fixed", lambda: fixed)
        weight = torch.nn.Parameter(torch.zeros(32, 48))
        optimizer = Muon([{"params": [weight], "matrices": 1, "weight_decay": 0.0}], lr=1.0)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        weight.grad = gradient
        optimizer.step()
        return weight.detach(), optimizer.state_dict()

    exact, state = update_of(False, False)
    rounded, low_state = update_of(True, False)
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(update_of(True, True)[0], exact)
    assert torch.equal(update_of(True, False, state)[0], update_of(False, False, state)[0])
    assert torch.equal(update_of(False, True, low_state)[0], update_of(True, False, low_state)[0])
    older = {**state, "param_groups": [{k: v for k, v in group.items() if k != "precision"} for group in
                                       state["param_groups"]]}  # fmt: skip
    assert torch.equal(update_of(True, True, older)[0], update_of(False, False, older)[0])


@pytest.mark.parametrize(("device", "wanted"), [
    ("mps", torch.float32), ("xpu", torch.float32), ("cuda", torch.bfloat16),
])  # fmt: skip
def test_precision_of_other_devices_is_not_the_cpus(device, wanted, monkeypatch):
    """Their tensors are stood in for by those of a CPU that says to be of another type."""

    class There(torch.Tensor):
        device = property(lambda _: torch.device(device))

    taken = []
    monkeypatch.setattr(muon, "whole", lambda value: value.as_subclass(There))
    monkeypatch.setattr(muon, "orthogonal", lambda each, dtype: taken.append(dtype) or torch.zeros(4, 4))
    for multiplies in (True, False):
        monkeypatch.setattr(muon, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        weight.grad = torch.ones(4, 4)
        optimizer = Muon([{"params": [weight], "matrices": 1, "weight_decay": 0.0}], lr=1.0)
        optimizer.step()
        assert "precision" not in optimizer.param_groups[0]
    assert taken == [wanted] * 2
