"""Blocks and networks for maps of one and three axes, against loops over windows and taps in float64."""

import itertools
import math

import pytest
import reference_block as reference
import torch
import torch.nn.functional as F

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.kernels.partitions import fold, unfold
from d_emo.models import count_macs, count_parameters, create_model
from d_emo.models.backbone import EMO
from d_emo.models.blocks import MOBILE_BLOCKS, mobile_block
from d_emo.models.layers import LayerScale, SyncedBatchNorm3d, fold_batch_norms, synchronise_batch_norms
from d_emo.models.video import inflate

TINY = {"depths": (1, 1, 2, 2), "dims": (8, 8, 16, 16), "head_dims": (8,) * 4, "num_classes": 3}
WINDOWS = [
    ((4, 6, 10), (2, 3, 5)), ((2, 6, 4), (2, 3, 2)), ((6, 4, 4), (3, 4, 4)), ((2, 4, 4, 6), (2, 2, 4, 3)), ((6,), (3,)),
]  # fmt: skip


def windows_of(mode, size, window):
    """The tokens of every window, as indices along each axis: adjacent ones, or a grid that spans the map."""
    for start in itertools.product(*(range(n // w) for n, w in zip(size, window, strict=True))):
        yield list(itertools.product(*(
            range(i * w, i * w + w) if mode == "near" else range(i, n, n // w)
            for i, n, w in zip(start, size, window, strict=True)
        )))  # fmt: skip


def attend(q, k, v, heads, window, modes):
    """One image: q, k (..., C), v (..., M), one loop for each window and head."""
    out = torch.zeros_like(v)
    for mode in modes:
        for tokens in windows_of(mode, q.shape[:-1], window):
            places = tuple(torch.tensor(axis) for axis in zip(*tokens, strict=True))
            for qs, ks, vs, outs in zip(*(x.chunk(heads, -1) for x in (q, k, v, out)), strict=True):
                logits = qs[places] @ ks[places].T / math.sqrt(qs.shape[-1])
                outs[places] += logits.softmax(-1) @ vs[places]
    return out


def block(x, p, *, modes, window, heads, pre):
    """A residual block of the papers on one image (..., C), with its batch norm in eval mode after the convolution."""
    size = x.shape[:-1]
    u = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"], 1e-6)
    u = F.pad(u, [0, 0, *(n for s, w in zip(reversed(size), reversed(window), strict=True) for n in (0, -s % w))])
    q, k = (u @ p["operator.expand.qk.weight"].T + p["operator.expand.qk.bias"]).chunk(2, -1)
    value = lambda y: reference.gelu(y @ p["operator.expand.v.weight"].T + p["operator.expand.v.bias"])  # noqa: E731
    a = value(attend(q, k, u, heads, window, modes)) if pre else attend(q, k, value(u), heads, window, modes)
    a = a[tuple(map(slice, size))]
    kernel = p["operator.local.conv.weight"][:, 0]  # (M, k, ..., k)
    half, y = kernel.shape[-1] // 2, torch.zeros_like(a)
    padded = F.pad(a, [0, 0, *[half] * (2 * len(size))])
    for tap in itertools.product(range(kernel.shape[-1]), repeat=len(size)):
        y += padded[tuple(slice(i, i + n) for i, n in zip(tap, size, strict=True))] * kernel[(slice(None), *tap)]
    norm = {name: p[f"operator.local.norm.bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    y = (y - norm["running_mean"]) / torch.sqrt(norm["running_var"] + 1e-6) * norm["weight"] + norm["bias"]
    y = (a + reference.silu(y)) @ p["operator.proj.weight"].T
    return x + y * p.get("layer_scale.gamma", 1)


@pytest.mark.parametrize("mode", ["near", "far"])
@pytest.mark.parametrize(("size", "window"), [pair for pair in WINDOWS if len(pair[0]) > 1])
def test_folding_keeps_windows_together_and_is_undone(size, window, mode):
    x = torch.arange(2 * math.prod(size)).view(2, *size, 1)
    folded, shorter = fold(x, window, mode), (window[0] * window[1], *window[2:])
    assert torch.equal(unfold(folded, window, mode, 2), x)
    tokens = lambda x, window: {  # noqa: E731
        tuple(sorted(int(one[place]) for place in places))
        for one in x[..., 0] for places in windows_of(mode, one.shape, window)
    }  # fmt: skip
    assert tokens(folded, shorter) == tokens(x, window)


@pytest.mark.parametrize("kind", ["i2rmb", "irmb"])
@pytest.mark.parametrize(("size", "window"), [*WINDOWS[:3], ((3, 5, 4), (2, 3, 2)), ((5,), (3,))])
def test_blocks_equal_the_loops(size, window, kind):
    dims = len(size)
    torch.manual_seed(0)
    made = mobile_block(kind, 8, num_heads=2, window_size=window, kernel_size=3, spatial_dims=dims, expand_ratio=2)
    reference.randomize(made)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    modes = {"far": ("far",), "spanning": ("near", "far")}[MOBILE_BLOCKS[kind]["attention_mode"]]
    with torch.no_grad():
        expected = torch.stack([
            block(one, made.state_dict(), modes=modes, window=window, heads=2, pre=kind == "irmb") for one in x
        ])  # fmt: skip
        assert torch.allclose(made(x), expected, rtol=0, atol=1e-10)
        with kernels.plain():
            assert torch.allclose(made(x), expected, rtol=0, atol=1e-10)
        assert torch.allclose(fold_batch_norms(made)(x), expected, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_plain_form():
    torch.manual_seed(0)
    made = mobile_block("i2rmb", 8, num_heads=2, window_size=(2, 3, 2), kernel_size=3, spatial_dims=3).double()
    x, outer = torch.randn(2, 2, 2, 6, 4, 8, dtype=torch.float64)
    found = []
    for context in (kernels.plain(), kernels.fixed()):
        with context:
            y = x.clone().requires_grad_()
            found.append(torch.autograd.grad(made(y), [y, *made.parameters()], outer))
    assert all(torch.allclose(one, other, rtol=0, atol=1e-10) for one, other in zip(*found, strict=True))


def test_v_emo_has_the_published_size_and_macs():
    with torch.device("meta"):
        model = create_model("v-emov2_5m")
    assert count_parameters(model) == 5_983_568 and round(count_macs(model) / 1e6) == 1363
    assert count_macs(model, (8, 160, 160)) > 1.9 * count_macs(model)


def test_v_emo_takes_clips_of_any_size_and_learns_from_their_order():
    torch.manual_seed(0)
    model = EMO(**TINY, spatial_dims=3, img_size=32)
    clip = torch.randn(2, 3, 5, 40, 33)
    assert model(clip).shape == (2, 3) and model.forward_features(clip).shape == (2, 16, 3, 2, 2)
    maps = model.forward_intermediates(clip, intermediates_only=True)
    assert [tuple(each.shape[2:]) for each in maps] == [(3, 10, 9), (3, 5, 5), (3, 3, 3), (3, 2, 2)]
    for block in model.modules():  # which at the start keeps every signal down
        if isinstance(block, LayerScale):
            torch.nn.init.ones_(block.gamma)
    there = model.forward_features(clip)  # in training mode, where batch norm keeps it up
    assert not torch.allclose(there, model.forward_features(clip.flip(2)).flip(2), rtol=0, atol=0.1)
    with pytest.raises(InputError, match="spatial_dims"):
        EMO("irmb", **TINY, spatial_dims=3)
    with pytest.raises(InputError, match=r"\(frames, height, width\) triple"):
        EMO(**TINY, spatial_dims=3, window_size=(5, 5))


def test_batch_norms_of_videos_are_synchronised_and_folded():
    torch.manual_seed(0)
    model = reference.randomize(EMO(**TINY, spatial_dims=3))
    clip = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(clip)
        synchronise_batch_norms(model)
        assert torch.equal(model(clip), expected) and isinstance(model.stem.conv.norm.bn, SyncedBatchNorm3d)


def test_inflated_weights_answer_the_middle_of_a_still_clip_as_the_image_network():
    torch.manual_seed(0)
    image, video = EMO(**TINY), EMO(**TINY, spatial_dims=3)
    reference.randomize(image)
    weights = inflate(image.state_dict(), video)
    video.double().eval().load_state_dict(weights)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        still = x[:, :, None].expand(-1, -1, 40, -1, -1)
        assert torch.allclose(video.stem(still)[:, :, 10], image.stem(x), rtol=0, atol=1e-12)
        flat = torch.cat([stage[0].operator.local.conv.weight.sum(2).flatten() for stage in video.stages])
    assert torch.allclose(flat, torch.cat([stage[0].operator.local.conv.weight.flatten() for stage in image.stages]))
    repeated = inflate(image.state_dict(), video, "repeat")
    name = "stages.0.0.operator.local.conv.weight"
    assert torch.equal(repeated[name][:, :, 2], image.state_dict()[name])
    other = EMO(**TINY | {"num_classes": 5}, spatial_dims=3)
    assert torch.equal(inflate(image.state_dict(), other)["head.weight"], other.head.weight)
    with pytest.raises(InputError, match="another size"):
        inflate(image.state_dict(), EMO(**TINY | {"dims": (8, 8, 16, 32)}, spatial_dims=3))
    with pytest.raises(InputError, match="'divide' or 'repeat'"):
        inflate(image.state_dict(), video, "mean")
