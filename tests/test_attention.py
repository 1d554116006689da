import pytest
import reference_block as reference
import torch

from d_emo.errors import InputError
from d_emo.kernels import PARTITIONS, FarPartition, NearPartition
from d_emo.kernels.partitions import gather
from d_emo.models.attention import WindowAttention, pad_to_multiple

SIZES = [
    ((4, 4), (4, 4)),
    ((8, 8), (4, 4)),
    ((8, 8), (1, 1)),
    ((16, 16), (8, 8)),
    ((14, 14), (7, 7)),
    ((4, 12), (4, 4)),
    ((12, 6), (4, 2)),
    ((6, 10), (3, 5)),
]


def numbered_map(height, width, batch=2, dim=3):
    return torch.arange(batch * height * width * dim).view(batch, height, width, dim)


@pytest.mark.parametrize("partition", [NearPartition, FarPartition])
@pytest.mark.parametrize("size, window", SIZES)
def test_what_is_written_into_the_windows_is_in_the_map(partition, size, window):
    x = numbered_map(*size)
    windows = partition.split(x, window)
    assert windows.shape == (2, size[0] // window[0], size[1] // window[1], *window, 3)
    back = torch.zeros_like(x)
    partition.split(back, window).copy_(windows)
    assert torch.equal(back, x)


@pytest.mark.parametrize("size, window", SIZES)
def test_gathering_lays_far_windows_side_by_side_and_undoes_it(size, window):
    x = numbered_map(*size)
    gathered = gather(x, window)
    assert torch.equal(NearPartition.split(gathered, window), FarPartition.split(x, window))
    assert torch.equal(gather(gathered, (size[0] // window[0], size[1] // window[1])), x)


@pytest.mark.parametrize("mode, partition", [("near", NearPartition), ("far", FarPartition)])
@pytest.mark.parametrize("size, window", SIZES)
def test_windows_hold_the_tokens_of_the_definition(mode, partition, size, window):
    x = numbered_map(*size, batch=1, dim=1)
    windows = partition.split(x, window).reshape(-1, *window)
    expected = [
        torch.tensor([[int(x[0, i, j, 0]) for j in columns] for i in rows])
        for rows, columns in reference.windows_of(mode, *size, window)
    ]
    assert torch.equal(windows, torch.stack(expected))


@pytest.mark.parametrize("first, second", [(NearPartition, FarPartition), (FarPartition, NearPartition)])
def test_the_wrong_inverse_does_not_round_trip(first, second):
    x = numbered_map(8, 8)
    back = torch.zeros_like(x)
    second.split(back, (4, 4)).copy_(first.split(x, (4, 4)))
    assert not torch.equal(back, x)


@pytest.mark.parametrize("size", [(5, 9), (7, 7), (1, 3), (8, 8)])
def test_padding_adds_zeros_right_and_bottom_only(size):
    x = numbered_map(*size).float() + 1
    padded = pad_to_multiple(x, (4, 4))
    assert padded.shape[1] % 4 == 0 and padded.shape[2] % 4 == 0
    assert padded.shape[1] - size[0] < 4 and padded.shape[2] - size[1] < 4
    assert torch.equal(padded[:, : size[0], : size[1]], x)
    assert padded.sum() == x.sum()


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("mode", ["near", "far", "spanning"])
@pytest.mark.parametrize("size, window", [((8, 8), (4, 4)), ((4, 4), (4, 4)), ((5, 7), (2, 3)), ((3, 2), (4, 4))])
def test_attention_equals_the_plain_reference(mode, order, size, window):
    attention = reference.randomize(WindowAttention(8, 24, num_heads=2, window_size=window, mode=mode, order=order))
    u = torch.randn(2, *size, 8, dtype=torch.float64)
    p = dict(attention.state_dict())
    modes = ("near", "far") if mode == "spanning" else (mode,)
    names = {"qk": "qk", "v": "v", "proj": "proj"}
    p["proj.weight"] = torch.eye(24, dtype=torch.float64)
    for image, out in zip(u, attention(u), strict=True):
        expected = reference.operator(
            image.permute(2, 0, 1), p, names=names, act=reference.gelu, heads=2, window=window, modes=modes,
            pre=order == "pre", conv=False,
        )  # fmt: skip
        torch.testing.assert_close(out.permute(2, 0, 1), expected, rtol=0, atol=1e-10)


def test_pre_and_post_order_agree_when_the_value_map_is_grouped_by_head():
    """EMOv2 paper, III-B: softmax rows sum to one, so a per-head linear map (bias included) passes through them."""
    heads, dim, value_dim = 2, 8, 16
    post, pre = (
        WindowAttention(dim, value_dim, num_heads=heads, window_size=4, mode="far", order=order, act=torch.nn.Identity)
        for order in ("post", "pre")
    )
    reference.randomize(post)
    grouped = torch.block_diag(*torch.randn(heads, value_dim // heads, dim // heads, dtype=torch.float64))
    post.load_state_dict({**post.state_dict(), "v.weight": grouped})
    pre.double().load_state_dict(post.state_dict())
    u = torch.randn(2, 8, 8, dim, dtype=torch.float64)
    torch.testing.assert_close(pre(u), post(u), rtol=0, atol=1e-10)
    pre.v.weight.data += torch.randn_like(grouped) * (grouped == 0)  # no longer grouped
    post.load_state_dict(pre.state_dict())
    assert (pre(u) - post(u)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["near", "far"])
def test_information_stays_inside_the_window(mode):
    attention = reference.randomize(WindowAttention(4, 8, num_heads=1, window_size=2, mode=mode))
    u = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    moved = u.clone()
    moved[0, 0, 0] += 1
    changed = (attention(u) - attention(moved)).abs().sum(-1)[0] > 0
    rows, columns = reference.windows_of(mode, 4, 4, (2, 2))[0]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for i in rows:
        for j in columns:
            expected[i, j] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mode": "diagonal"}, "attention_mode 'diagonal'"),
        ({"mode": ["near"]}, "attention_mode"),
        ({"order": "during"}, "attention_order 'during'"),
        ({"num_heads": 3}, "8 channels.*3 heads"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"value_dim": 9}, "width 9.*2 heads"),
        ({"window_size": 0}, "window_size.*0"),
        ({"window_size": (4, -1)}, "window_size"),
        ({"window_size": 2.5}, "window_size.*2.5"),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        WindowAttention(**{"dim": 8, "value_dim": 16, "num_heads": 2, "window_size": 4, **settings})


def test_there_is_one_attention_class_for_all_modes():
    assert set(PARTITIONS) == {"near", "far", "spanning"}
    shapes = [
        {k: v.shape for k, v in WindowAttention(8, 16, num_heads=2, window_size=4, mode=m).state_dict().items()}
        for m in PARTITIONS
    ]
    assert shapes[0] == shapes[1] == shapes[2]
