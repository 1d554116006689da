import pytest
import reference_block as reference
import torch
from torch import nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.models.blocks import ARRANGEMENTS, AdaLNMobileBlock, DiTBlock, MetaMobileBlock, MobileOperator, mobile_block
from d_emo.models.embeddings import sincos_position_embedding
from d_emo.models.layers import LocalConv, checkpoint_block, fold_batch_norms, make_norm

NAMES = {"qk": "expand.qk", "v": "expand.v", "local": "local.conv", "norm": "local.norm.bn", "proj": "proj"}
MODES = {"near": ("near",), "far": ("far",), "spanning": ("near", "far")}


def compare(module, x, expected):
    """Module on a batch (channels-last) against a reference function of one image (channels first)."""
    for image, out in zip(x, module(x), strict=True):
        torch.testing.assert_close(out.permute(2, 0, 1), expected(image.permute(2, 0, 1)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("local_conv", [True, False])
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("mode", ["near", "far", "spanning", None])
@pytest.mark.parametrize("size", [(8, 8), (5, 6)])
def test_operator_equals_the_plain_reference(mode, order, local_conv, size):
    options = {"attention": False} if mode is None else {"attention_mode": mode, "attention_order": order}
    operator = reference.randomize(
        MobileOperator(8, 12, expand_ratio=3, num_heads=2, window_size=4, local_conv=local_conv, **options)
    )
    p, names = dict(operator.state_dict()), {**NAMES, "v": "expand.v" if mode else "expand.0"}
    compare(
        operator, torch.randn(2, *size, 8, dtype=torch.float64),
        lambda u: reference.operator(
            u, p, names=names, act=reference.gelu, heads=2, window=(4, 4), modes=MODES[mode] if mode else (),
            pre=order == "pre", conv=local_conv,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_down_sampling_block_equals_the_plain_reference(size):
    block = reference.randomize(mobile_block("i2rmb", 8, 12, stride=2, norm="batch", expand_ratio=2, kernel_size=5))
    p = dict(block.state_dict())
    names = {role: f"operator.{name}" for role, name in {**NAMES, "v": "expand.0"}.items()}
    assert p["operator.expand.0.weight"].shape == (2 * 2 * 8, 8)  # the expand ratio is doubled

    def expected(x):
        u = reference.batch_norm(x, p, "norm.bn")
        y = reference.operator(u, p, names=names, act=reference.silu, stride=2, skip=False)
        return y * p["layer_scale.gamma"][:, None, None]

    x = torch.randn(2, *size, 8, dtype=torch.float64)
    assert block(x).shape == (2, -(-size[0] // 2), -(-size[1] // 2), 12)
    compare(block, x, expected)


@pytest.mark.parametrize(
    "kind, modes, pre, scaled", [("i2rmb", ("near", "far"), False, True), ("irmb", ("far",), True, False)]
)
def test_named_blocks_equal_the_plain_reference(kind, modes, pre, scaled):
    block = reference.randomize(mobile_block(kind, 8, num_heads=2, window_size=4, kernel_size=3))
    p = dict(block.state_dict())
    names = {role: f"operator.{name}" for role, name in NAMES.items()}

    def expected(x):
        u = reference.layer_norm(x, p["norm.weight"], p["norm.bias"])
        y = reference.operator(u, p, names=names, act=reference.gelu, heads=2, window=(4, 4), modes=modes, pre=pre)
        return x + (y * p["layer_scale.gamma"][:, None, None] if scaled else y)

    compare(block, torch.randn(2, 6, 8, 8, dtype=torch.float64), expected)


def test_irb_is_the_block_with_the_attention_switched_off():
    block = mobile_block("irb", 8, norm="batch")
    assert isinstance(block, MetaMobileBlock)
    assert isinstance(block.operator.expand, nn.Sequential) and isinstance(block.operator.expand[1], nn.SiLU)
    assert block(torch.randn(1, 4, 4, 8)).shape == (1, 4, 4, 8)


def test_adaln_block_and_classifier_block_share_one_operator():
    assert type(AdaLNMobileBlock(8, num_heads=2).operator) is type(mobile_block("i2rmb", 8, num_heads=2).operator)


@pytest.mark.parametrize("dim", [8, 384])
def test_adaln_block_has_the_published_number_of_parameters(dim):
    with torch.device("meta"):
        block = AdaLNMobileBlock(dim, num_heads=2)
    assert sum(p.numel() for p in block.parameters()) == 13 * dim**2 + 119 * dim


@pytest.mark.parametrize("kind, options", [(AdaLNMobileBlock, {"window_size": 4}), (DiTBlock, {})])
def test_a_closed_gate_makes_the_block_the_identity(kind, options):
    block = kind(8, num_heads=2, **options)
    x, c = torch.randn(2, 4, 4, 8), torch.randn(2, 8)
    assert not torch.equal(block(x, c), x)
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert torch.equal(block(x, c), x)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_local_norm_is_a_choice(norm):
    conv = LocalConv(6, kernel_size=3, norm=norm)
    kinds = {type(m) for m in conv.modules()}
    assert (nn.BatchNorm2d in kinds, nn.LayerNorm in kinds) == (norm == "batch", norm == "layer")
    assert conv(torch.randn(2, 5, 5, 6)).shape == (2, 5, 5, 6)


def test_norms_use_epsilon_1e_6():
    assert make_norm("batch", 4).bn.eps == make_norm("layer", 4).eps == 1e-6


def test_folding_batch_norm_keeps_the_output():
    block = reference.randomize(AdaLNMobileBlock(8, num_heads=2, window_size=4))
    x, c = torch.randn(2, 8, 8, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    before = block(x, c)
    fold_batch_norms(block)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    torch.testing.assert_close(block(x, c), before, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="eval"):
        fold_batch_norms(block.train())


def test_checkpointing_updates_batch_statistics_once():
    plain = AdaLNMobileBlock(8, num_heads=2, window_size=4)
    nn.init.normal_(plain.adaLN_modulation[1].weight)
    recomputed = AdaLNMobileBlock(8, num_heads=2, window_size=4)
    recomputed.load_state_dict(plain.state_dict())
    x, c = torch.randn(2, 4, 4, 8), torch.randn(2, 8)
    for step in (plain, lambda *inputs: checkpoint_block(recomputed, *inputs)):
        step(x, c).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert plain.operator.local.norm.bn.num_batches_tracked == 1


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_position_embedding_equals_the_plain_reference(grid):
    expected = reference.position(8, *grid).flatten(1).T[None].float()
    torch.testing.assert_close(sincos_position_embedding(8, grid), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"kernel_size": 4}, "kernel_size must be odd.*4"),
        ({"kernel_size": -1}, "kernel_size must be a positive integer.*-1"),
        ({"expand_ratio": 0}, "expand_ratio.*0"),
        ({"local_norm": "group"}, "norm 'group'"),
        ({"stride": 2}, "inner skip"),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        MobileOperator(8, num_heads=2, **settings)


def test_unknown_block_is_named():
    with pytest.raises(InputError, match="'i3rmb'"):
        mobile_block("i3rmb", 8)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_arrangements_equal_their_formulas(arrangement):
    operator = reference.randomize(ARRANGEMENTS[arrangement](8, num_heads=2, window_size=4, expand_ratio=2, dilation=1))
    u = torch.randn(1, 8, 12, 8, dtype=torch.float64)
    p, image = operator.state_dict(), u[0].permute(2, 0, 1)
    q, k = reference.pointwise(image, p["expand.qk.weight"], p["expand.qk.bias"]).chunk(2)
    v = reference.gelu(reference.pointwise(image, p["expand.v.weight"], p["expand.v.bias"]))

    def attention(value):
        return reference.attend(q, k, value, 2, (4, 4), ["near", "far"])

    def conv(value):
        convolved = reference.depthwise(value, p["local.conv.weight"])
        return reference.silu(reference.batch_norm(convolved, p, "local.norm.bn"))

    inside = {
        "attention-conv": lambda: attention(v) + conv(attention(v)), "conv-attention": lambda: attention(v + conv(v)),
        "parallel": lambda: attention(v) + conv(v),
    }  # fmt: skip
    expected = reference.pointwise(inside[arrangement](), p["proj.weight"])
    torch.testing.assert_close(operator(u)[0].permute(2, 0, 1), expected, rtol=0, atol=1e-9)
    assert operator(u[:, :7, :9]).shape == (1, 7, 9, 8)


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"stride": 2}])
def test_local_convolution_is_the_same_with_gradients(options):
    conv = LocalConv(6, kernel_size=3, norm="none", **options).double()
    x = torch.randn(2, 9, 8, 6, dtype=torch.float64, requires_grad=True)
    own = conv.conv
    expected = nn.functional.silu(
        nn.functional.conv2d(x.permute(0, 3, 1, 2), own.weight, None, own.stride, own.padding, own.dilation, 6)
    ).permute(0, 2, 3, 1)
    got, grad = conv(x), torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(y, (x, own.weight), grad) for y in (got, expected))
    torch.testing.assert_close(ours, theirs)


def test_dilation_spreads_the_kernel():
    conv = LocalConv(1, kernel_size=3, dilation=2, norm="none").eval()
    conv.act = nn.Identity()
    nn.init.ones_(conv.conv.weight)
    image = torch.zeros(1, 7, 7, 1)
    image[0, 3, 3] = 1
    assert conv(image)[0, :, :, 0].nonzero().tolist() == [[i, j] for i in (1, 3, 5) for j in (1, 3, 5)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"arrangement": "sideways"}, "'sideways'.*'parallel'"),
        ({"arrangement": "parallel", "attention_order": "pre"}, "attention_order 'post'"),
        ({"dilation": 0}, "dilation.*0"),
    ],
)
def test_impossible_blocks_are_named(options, words):
    with pytest.raises(InputError, match=words):
        mobile_block("i2rmb", 8, num_heads=2, **options)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 2)])
def test_depthwise_convolution_equals_the_library_with_its_gradients(kernel_size, size):
    x = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(6, 6, kernel_size, padding=kernel_size // 2, groups=6, bias=False, dtype=torch.float64)
    conv.weight = nn.Parameter(weight.detach())
    weight = conv.weight
    with kernels.record() as calls:
        got = kernels.local_conv(conv, nn.Identity(), nn.Identity(), x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert [call.form for call in calls] == ["CPU's own gradients"]
    expected = torch.nn.functional.conv2d(x, weight, padding=kernel_size // 2, groups=6)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, (x, weight), grad) for y in (got, expected))
    torch.testing.assert_close(ours, theirs)
