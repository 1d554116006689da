import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from d_emo.explain import diagonal_similarity, effective_receptive_field, grad_cam, half_side, symmetries, without
from d_emo.models import EMO
from d_emo.models.attention import WindowAttention
from d_emo.models.layers import LocalConv

ROOT = Path(__file__).parents[1]


def opened(**options):
    """A small EMOv2 whose LayerScales let something through."""
    torch.manual_seed(0)
    tiny = {"depths": (1, 1, 2, 2), "dims": (8, 8, 12, 16), "expand_ratios": (2, 2, 2.5, 3), "head_dims": (4, 4, 4, 8),
            "num_classes": 5, "window_size": 2, "kernel_sizes": (3, 3, 3, 3)}  # fmt: skip
    model = EMO(**{**tiny, **options}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 1)
    return model


IMAGE = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_attention_widens_the_receptive_field():
    near, wide = (
        effective_receptive_field(model, model, IMAGE[None], stage=3)
        for model in (opened(attention_mode="none"), opened(attention_mode="spanning"))
    )
    assert near.shape == wide.shape == (128, 128) and near.max() == wide.max() == 1
    assert near[64, 64] > 0 and near[:8].max() == 0  # convolutions reach no farther than their kernels
    assert (wide > 0).float().mean() > 1.2 * (near > 0).float().mean()


def test_the_field_leans_to_no_side_and_half_of_it_is_measured():
    images = symmetries(IMAGE)
    assert images.shape == (8, 3, 128, 128) and torch.equal(images[0], IMAGE)
    assert len({image[0].flatten()[:50].sum().item() for image in images}) == 8
    torch.testing.assert_close(images.sum(0), images.sum(0).rot90(1, (1, 2)))
    torch.testing.assert_close(images.sum(0), images.sum(0).flip(2))
    field = torch.zeros(64, 64)
    field[30:34, 30:34], field[0, 0] = 1, 15
    assert half_side(field) == 4
    field[0, 0] = 17
    assert half_side(field) == 64


def test_similarity_of_the_diagonal():
    model = opened()
    both = diagonal_similarity(model, model, IMAGE)
    assert both.shape == (8, 8)
    torch.testing.assert_close(both, both.T)
    torch.testing.assert_close(both.diagonal(), torch.ones(8))
    seen = [both]
    for part in (WindowAttention, LocalConv):
        with without(model, part):
            seen.append(diagonal_similarity(model, model, IMAGE))
            tokens = model.forward_intermediates(IMAGE[None], indices=[2], intermediates_only=True)[0]
        assert tokens.std(dim=(2, 3)).max() > 0.01  # the down-sampling block keeps its convolution
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(diagonal_similarity(model, model, IMAGE), both)  # nothing is left behind
    model.stages[2][-1].register_forward_hook(lambda module, inputs, output: output + 3)
    shifted = diagonal_similarity(model, model, IMAGE)  # what all tokens share does not count
    torch.testing.assert_close(shifted, both, rtol=1e-3, atol=1e-3)


def test_without_attention_a_block_only_convolves():
    model, one = opened(), IMAGE.clone()
    one[:, 100:, 100:] = 0
    with without(model, WindowAttention):
        block = model.stages[2][1]
        x = torch.randn(1, 8, 8, 12)
        y = x.clone()
        y[0, 7, 7] = torch.randn(12)
        changed = (block(x) - block(y)).abs().amax(dim=-1)[0] > 1e-5
    assert changed[6:, 6:].all() and changed.sum() == 4  # a 3 x 3 kernel at the corner


def test_grad_cam_is_the_gradient_weighed_map():
    pytest.importorskip("pytorch_grad_cam")
    model = opened()
    label = int(model(IMAGE[None]).topk(2).indices[0, 1])  # not the one that the network would choose
    heat = grad_cam(model, model, IMAGE, label)
    assert heat.shape == (128, 128) and 0 <= heat.min() and heat.max() <= 1
    features = model.forward_features(IMAGE[None]).detach().requires_grad_()
    model.forward_head(features)[0, label].backward()
    expected = (features.grad.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1, keepdim=True).clamp(min=0)
    expected = F.interpolate(expected.detach(), (128, 128), mode="bilinear")[0, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert np.corrcoef(heat.flatten(), expected.flatten())[0, 1] > 0.99
    finer = grad_cam(model, model, IMAGE, label, stage=3)
    assert finer.shape == (128, 128) and not torch.allclose(finer, heat, atol=0.1)


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, argv)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / "explain.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_the_script_writes_three_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pytorch_grad_cam")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    options = (tmp_path / "noise.png", "--model", "emov2_1m", "--image-size", 64, "--output", tmp_path / "out")
    code, printed = run(monkeypatch, capsys, *options, "--class", 7)
    assert code == 0 and "class 7" in printed.out and "random weights" in printed.out
    for name in ("grad_cam", "receptive_field", "diagonal_similarity"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert np.array(picture.convert("L")).std() > 10
    for argv, words in (
        ((*options, "--class", 1000), "--class must be from 0 to 999"),
        ((*options, "--class", -1), "--class must be from 0 to 999"),
        ((*options, "--stage", 5), "--stage must be at least 1 and at most 4"),
        ((*options, "--image-size", 31), "--image-size must be at least 32"),
        ((tmp_path / "none.png", "--model", "emov2_1m"), "cannot read the image"),
        ((tmp_path / "noise.png", "--model", "DiT-S-2"), "is a denoiser"),
        ((tmp_path / "noise.png", "--model", "emov2_5"), "did you mean"),
    ):
        code, printed = run(monkeypatch, capsys, *argv)
        assert code == 2 and words in printed.err and len(printed.err.splitlines()) == 1
