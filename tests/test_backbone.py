import pytest
import timm
import torch
from torch import nn

from d_emo.errors import InputError
from d_emo.models import EMO, create_model
from d_emo.models.layers import DropPath
from d_emo.models.timm_registry import register_with_timm

TINY = {
    "depths": (1, 1, 2, 2), "dims": (8, 8, 12, 16), "expand_ratios": (2, 2, 2.5, 3), "head_dims": (4, 4, 4, 8),
    "num_classes": 5, "window_size": 2,
}  # fmt: skip
BLOCKS = ["irmb", "i2rmb"]


def tiny(block, **overrides):
    torch.manual_seed(0)
    return EMO(**{**TINY, "block": block, **overrides})


def opened(block, **overrides):
    """LayerScale starts at 1e-6, too small to see anything through."""
    model = tiny(block, **overrides)
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("name", ["emov1_1m", "emov2_1m"])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (50, 70)])
def test_any_image_size_works(name, size):
    model = create_model(name, num_classes=10).eval()
    x = torch.randn(1, 3, *size)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, -(-size[0] // 32), -(-size[1] // 32))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (1, 10) and model(x).isfinite().all()


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_receives_a_gradient(block):
    model = opened(block)
    (model(torch.randn(4, 3, 96, 96)) * torch.randn(4, 5)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("block", BLOCKS)
def test_an_image_does_not_depend_on_its_batch_mates_in_eval_mode(block):
    model = opened(block)
    x = torch.randn(3, 3, 64, 64)
    model(x)
    model.eval()
    torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_checkpointing_changes_nothing(block):
    plain, saving = opened(block), opened(block)
    saving.set_grad_checkpointing()
    calls = []
    saving.stages[2][1].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    assert len(calls) == 2
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("block", BLOCKS)
def test_drop_path_grows_linearly_to_its_rate(block):
    rates = [b.drop_path.drop_prob for stage in tiny(block, drop_path_rate=0.5).stages for b in stage]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.5, 6))
    model = opened(block, drop_path_rate=0.9).train()
    x = torch.randn(1, 3, 64, 64)
    outputs = torch.stack([model(x.expand(8, -1, -1, -1)) for _ in range(2)])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("shape", [(64, 3), (64, 2, 2, 3), (64, 2, 2, 2, 3)])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_drop_path_is_timms_to_the_bit(shape, rate):
    x, drawn = torch.randn(shape), []
    for layer in (DropPath(rate), timm.layers.DropPath(rate)):
        torch.manual_seed(3)
        drawn.append(layer.train()(x))
        assert layer.eval()(x) is x
    assert torch.equal(*drawn)


def test_layer_scale_starts_at_1e_6_and_only_in_emov2():
    gammas = [p for n, p in tiny("i2rmb").named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 6 and all(torch.all(g == 1e-6) for g in gammas)
    assert not any(n.endswith("gamma") for n, _ in tiny("irmb").named_parameters())


@pytest.mark.parametrize("name", ["emov1_1m", "emov2_1m"])
def test_config_rebuilds_the_model(name):
    model = create_model(name, num_classes=7, window_size=4, in_channels=1, drop_path_rate=0.3)
    assert model.config["name"] == name and model.config["num_classes"] == 7
    again = create_model(**model.config)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert again.config == model.config
    model.reset_classifier(4)
    assert create_model(**model.config).num_classes == 4


def test_the_head_can_be_replaced_and_removed():
    model = tiny("i2rmb").eval()
    x = torch.randn(2, 3, 32, 32)
    model.double().reset_classifier(3)
    x = x.double()
    assert model(x).shape == (2, 3) and model.get_classifier() is model.head
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_intermediates_are_the_maps_between_the_stages():
    model = opened("i2rmb").eval()
    x = torch.randn(1, 3, 64, 96)
    last, maps = model.forward_intermediates(x, norm=True)
    assert [m.shape[1:] for m in maps] == [(8, 16, 24), (8, 8, 12), (12, 4, 6), (16, 2, 3)]
    assert torch.equal(last, model.forward_features(x)) and torch.equal(maps[-1], last)
    only = model.forward_intermediates(x, indices=[1, -1], norm=True, intermediates_only=True)
    assert len(only) == 2 and torch.equal(only[0], maps[1]) and torch.equal(only[1], maps[3])
    with pytest.raises(InputError, match="0..3"):
        model.forward_intermediates(x, indices=[4])


def test_timm_builds_classifiers_and_feature_pyramids():
    register_with_timm()
    register_with_timm()  # twice is harmless
    assert len(timm.list_models("emov2_*")) == 5 and len(timm.list_models("emov1_*")) == 6
    classifier = timm.create_model("emov2_1m", num_classes=7, in_chans=1, drop_path_rate=0.1)
    assert isinstance(classifier, EMO) and classifier(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    pyramid = timm.create_model("emov1_1m", features_only=True, out_indices=(1, 2))
    assert pyramid.feature_info.channels() == [48, 80] and pyramid.feature_info.reduction() == [8, 16]
    assert [m.shape for m in pyramid(torch.randn(1, 3, 64, 64))] == [(1, 48, 8, 8), (1, 80, 4, 4)]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"block": "resnet"}, "'resnet'"),
        ({"num_classes": -1}, "num_classes.*-1"),
        ({"window_size": 0}, "window_size.*0"),
        ({"in_channels": 0}, "in_channels.*0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate.*1.0"),
        ({"depths": (1, 1, 1)}, "depths.*four"),
        ({"depths": (1, 1, 1.5, 1)}, "depths.*four positive integers"),
        ({"depths": "1111"}, "depths.*four positive integers"),
        ({"dims": (8, 8, "a", 16)}, "dims.*four positive integers"),
        ({"dims": (1, 8, 12, 16)}, "dims must start with 2"),
        ({"expand_ratios": (2, 2, 0, 3)}, "expand_ratios.*four positive numbers"),
        ({"expand_ratios": (2, 2, "a", 3)}, "expand_ratios.*four positive numbers"),
        ({"num_classes": True}, "num_classes.*True"),
        ({"drop_path_rate": "a"}, "drop_path_rate.*'a'"),
        ({"dims": (8, 8, 0, 16)}, "dims.*four positive"),
        ({"head_dims": (4, 4, 5, 8)}, "Width 12 of stage 3.*head width 5"),
        ({"kernel_sizes": (4, 3, 3, 3)}, "kernel_size.*odd.*4"),
        ({"img_size": 31}, "img_size.*32 px.*31"),
        ({"drop_rate": 1.0}, "drop_rate.*1.0"),
        ({"global_pool": "max"}, "'max'"),
        ({"norms": ("batch", "layer")}, "norms.*four"),
        ({"attention_stages": (0, 1)}, "attention_stages.*1 to 4"),
        ({"attention_mode": "wide"}, "'wide'"),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        EMO(**{**TINY, **settings})


@pytest.mark.parametrize("options", [{"block": "irmb"}, {}, {"norms": ["batch"] * 4, "dilations": [2] * 4}])
def test_fusing_keeps_the_output(options):
    model = opened(**{"block": "i2rmb", **options}).double()
    for _ in range(2):
        model(torch.randn(4, 3, 96, 96, dtype=torch.float64) + 1)  # statistics that are not those of the start
    x = torch.randn(2, 3, 70, 90, dtype=torch.float64)
    before = model.eval()(x)
    kinds = [type(m) for m in model.fuse().modules()]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
    attention_norms = 3 if "norms" in options else 0  # in stages 3 and 4, one down-sampling block each has none
    assert kinds.count(nn.BatchNorm2d) == (2 if attention_norms else 0)


@pytest.mark.parametrize("block", ["i2rmb", "irmb"])
def test_images_taken_a_few_at_a_time_give_the_same_maps(monkeypatch, block):
    torch.manual_seed(0)
    model = EMO(block=block, depths=(1, 1, 2, 2), num_classes=5, img_size=64)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale.gamma"):
            torch.nn.init.ones_(parameter)
    x = torch.randn(3, 3, 64, 64)

    def run(limit, train=False):
        monkeypatch.setattr("d_emo.kernels.slices.SLICE", limit)
        with torch.no_grad():
            return model.train(train).forward_intermediates(x)

    whole, maps = run(2**40)
    sliced, slices = run(1)
    torch.testing.assert_close([sliced, *slices], [whole, *maps])
    together = run(2**40, train=True)[0]
    torch.testing.assert_close(run(1, train=True)[0], together)  # batch norm sees all images


@pytest.mark.parametrize("block, default", [("i2rmb", 1e-6), ("irmb", None)])
def test_layer_scales_start_where_they_are_told_to(block, default):
    def starts(**overrides):
        model = tiny(block, **overrides)
        return sorted({value for name, p in model.named_parameters() if name.endswith("gamma") for value in p.tolist()})

    assert starts() == pytest.approx([default] if default else [])
    assert starts(layer_scale=0.5) == [0.5]
    with pytest.raises(InputError, match="layer_scale must be positive, .*got 0"):
        tiny(block, layer_scale=0)
