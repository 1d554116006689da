import itertools

import pytest
import reference_block as reference
import timm
import torch
import torch.nn.functional as F

import d_emo  # noqa: F401  (makes the names known to timm)
from d_emo.config import ClassifierSettings
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.models import create_model, list_models
from d_emo.models.counting import count_macs
from d_emo.models.hybrids import HYBRIDS, PVT, ReducedBlock, TokenBlock
from d_emo.models.registry import model_kind
from d_emo.training import fit
from d_emo.training.classifier import ClassifierTask

# Parameters and MACs in M that somebody else rebuilt from the two printed numbers of each row (EMOv2 paper, table IV).
REBUILT = {
    "deit_tiny_irmb": (4_922_536, 1101.7), "deit_tiny_i2rmb": (5_069_992, 1301), "pvt_tiny_irmb": (11_785_960, 1843.8),
    "pvt_tiny_i2rmb": (11_941_608, 1932),
}  # fmt: skip
TINY = {"dims": (8, 8, 16, 16), "heads": (1, 1, 2, 2), "ratios": (2,) * 4, "depths": (1,) * 4, "img_size": 64}


@pytest.mark.parametrize("name", REBUILT)
def test_counts_are_the_printed_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    params, macs = REBUILT[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert count_macs(model) == pytest.approx(macs * 1e6, rel=0.01)
    assert set(REBUILT) == set(HYBRIDS)


def attend(q, k, x, heads):
    """One image, a loop over heads: q (N, C), k and x (N', C)."""
    return torch.cat([
        (qs @ ks.T / qs.shape[1] ** 0.5).softmax(-1) @ xs
        for qs, ks, xs in zip(*(each.chunk(heads, 1) for each in (q, k, x)), strict=True)
    ], 1)  # fmt: skip


def branch(mixed, p, value, grid, tokens):
    """Expansion, depthwise convolution of the map beside its skip, projection."""
    a = reference.gelu(mixed @ p[f"{value}.weight"].T + p[f"{value}.bias"])
    lying = a[tokens:].T.unflatten(1, grid)
    local = reference.silu(reference.batch_norm(reference.depthwise(lying, p["local.conv.weight"]), p, "local.norm.bn"))
    return (a + F.pad(local.flatten(1).T, (0, 0, tokens, 0))) @ p["proj.weight"].T


@pytest.mark.parametrize("kind, times", [("irmb", 1), ("i2rmb", 2)])
def test_deits_block_equals_its_transcription(kind, times):
    made = reference.randomize(TokenBlock(8, 2, 2.0, kind=kind, grid=(3, 4)))
    p, x = made.state_dict(), torch.randn(2, 13, 8, dtype=torch.float64)
    expected = []
    for one in x:
        u = F.layer_norm(one, (8,), p["norm.weight"], p["norm.bias"], 1e-6)
        q, k = (u @ p["expand.qk.weight"].T + p["expand.qk.bias"]).chunk(2, 1)
        expected.append(one + branch(times * attend(q, k, u, 2), p, "expand.v", (3, 4), 1))
    with torch.no_grad():
        assert torch.allclose(made(x), torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduction, tokens", [(1, 1), (2, 0)])
def test_pvts_block_equals_its_transcription(reduction, tokens):
    made = reference.randomize(ReducedBlock(8, 2, 2, reduction, 0.0, kind="irmb"))
    p, x = made.state_dict(), torch.randn(2, 24 + tokens, 8, dtype=torch.float64)
    expected = []
    for one in x:
        u = seen = F.layer_norm(one, (8,), p["norm.weight"], p["norm.bias"], 1e-6)
        if reduction > 1:
            lying = u.T.unflatten(1, (4, 6))
            seen = torch.zeros(6, 8, dtype=torch.float64)
            for i, j, n, m in itertools.product(range(2), range(3), range(2), range(2)):
                seen[i * 3 + j] += p["reduce.weight"][:, :, n, m] @ lying[:, 2 * i + n, 2 * j + m]
            seen = F.layer_norm(seen + p["reduce.bias"], (8,), p["reduced_norm.weight"], p["reduced_norm.bias"], 1e-6)
        q, k = u @ p["q.weight"].T + p["q.bias"], seen @ p["k.weight"].T + p["k.bias"]
        expected.append(one + branch(attend(q, k, seen, 2), p, "v", (4, 6), tokens))
    with torch.no_grad():
        assert torch.allclose(made(x, (4, 6)), torch.stack(expected), rtol=0, atol=1e-10)


def test_every_parameter_learns_and_timm_changes_the_head():
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_i2rmb", img_size=32, depth=2, num_classes=3, drop_path_rate=0.1)
    pvt = PVT("i2rmb", num_classes=3, **TINY)
    for model, side in ((deit, 32), (pvt, 64)):
        (model(torch.randn(4, 3, side, side)) * torch.randn(4, 3)).sum().backward()
        still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
        still = [name for name in still if not name.endswith(".k.bias")]  # softmax does not see it
        assert not [name for name in still if not name.startswith(("blocks.1.local", "stages.3.0.local"))]  # the last
        model.reset_classifier(5)
        assert model(torch.randn(2, 3, side, side)).shape == (2, 5)
        assert model.forward_head(model.forward_features(torch.randn(2, 3, side, side)), pre_logits=True).ndim == 2
    smaller = timm.create_model("deit_tiny_i2rmb", img_size=32, depth=1, patch_size=8)
    assert smaller.blocks[0].grid == (4, 4) and smaller(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_positions_of_other_sizes_are_interpolated():
    torch.manual_seed(0)
    model = PVT("irmb", num_classes=3, **TINY).eval()
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 3)
    assert torch.equal(model.positions(0, (16, 16)), model.pos_embed[0])
    assert torch.equal(model.positions(3, (3, 2))[:, :1], model.pos_embed[3][:, :1])
    with pytest.raises(InputError, match="multiple of 32"):
        timm.create_model("pvt_tiny_irmb", img_size=100)


def test_the_registry_has_them_and_a_snapshot_is_opened_again(tmp_path):
    """Trained by the command line's task, then its head alone."""
    tiny = {
        "model": "deit_tiny_i2rmb", "model_options": {"embed_dim": 32, "num_heads": 1, "depth": 2}, "image_size": 32,
        "batch_size": 4, "max_steps": 2, "warmup_steps": 1, "validate_images": 4, "tracker": "none",
    }  # fmt: skip
    assert sorted(list_models("*_tiny_*")) == sorted(HYBRIDS) and model_kind("pvt_tiny_irmb") == "classifier"
    settings = ClassifierSettings(**tiny, dataset="digits", output_dir=str(tmp_path / "first"))
    first = fit(ClassifierTask(settings), settings.resolve())
    opened = open_classifier(str(first))
    assert opened.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    settings = ClassifierSettings(
        **tiny, dataset="digits", init_from=str(first), output_dir=str(tmp_path / "second"), train="head"
    )
    task = ClassifierTask(settings)
    theirs, mine = opened.model.state_dict(), task.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items() if not name.startswith("head."))
    assert {name for name, each in task.model.named_parameters() if each.requires_grad} == {"head.weight", "head.bias"}
    assert open_classifier(str(fit(task, task.settings))).num_classes == 10
    with pytest.raises(InputError, match="holds a VisionTransformer; this works with EMOv1 and EMOv2 only"):
        opened.emo  # noqa: B018
    with pytest.raises(InputError, match="deit_tiny_irmb has no setting 'window'"):
        create_model("deit_tiny_irmb", window=3)
    for name in HYBRIDS:
        with torch.device("meta"):
            made = create_model(name, img_size=64, num_classes=3)
            again = create_model(**made.config)
        assert again.num_classes == 3 and again.state_dict().keys() == made.state_dict().keys()
