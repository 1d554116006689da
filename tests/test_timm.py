"""What timm's own tests ask of a model, asked of every EMO in the registry: a new variant is tested by existing."""

import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import d_emo
from d_emo.errors import InputError
from d_emo.models.backbone import BACKBONES, window_for
from d_emo.models.released import released_names, released_shapes

LARGE = ("emov1_10m", "emov1_20m", "emov2_20m", "emov2_50m")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in BACKBONES]
every = pytest.mark.parametrize("name", NAMES)


def create(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, "img_size": 64, **options})


SHOWN = """
names = {name for name in dir(d_emo) if name[0] != '_'}
assert {'DEMOPipeline', 'create_model', 'sampling', 'export'} <= names and not {'sys', 'import_module'} & names
assert not [name for name in sys.modules if name.startswith('d_emo.')]
"""


@pytest.mark.parametrize(
    "imports", [f"import d_emo, sys\n{SHOWN}\nimport timm, diffusers", "import timm, diffusers, d_emo"]
)
def test_timm_and_diffusers_know_us_in_any_order_of_imports(imports):
    code = (
        f"{imports}\nassert len(timm.list_models('emov*')) == 11; timm.create_model('emov2_1m')\n"
        "assert diffusers.DEMOPipeline is d_emo.DEMOPipeline and diffusers.Denoiser is d_emo.Denoiser\n"
        "d_emo.sampling.make_scheduler"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every
def test_forward(name):
    model = create(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert logits.shape == (2, 5) and logits.isfinite().all()


@every
def test_backward_reaches_every_parameter(name):
    model = create(name, drop_rate=0.1, drop_path_rate=0.0)
    model.set_grad_checkpointing()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):
                parameter.fill_(1)
    logits = model(torch.randn(2, 3, 64, 64))
    logits.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing and logits.isfinite().all()
    assert sum(p.grad.abs().max() > 0 for p in model.parameters()) == len(list(model.parameters()))


@every
def test_default_cfg_tells_the_truth(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        cfg, state = model.default_cfg, model.state_dict()
        features = model.forward_features(torch.zeros(1, *cfg["input_size"]))
        assert tuple(features.shape[-2:]) == cfg["pool_size"] == (7, 7)
        model.reset_classifier(0)
        assert model.num_classes == 0 and model(torch.zeros(2, 3, 64, 64)).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.num_features, 2, 2)
        bare = timm.create_model(name, num_classes=0, global_pool="")
        assert bare(torch.zeros(2, 3, 64, 64)).shape == (2, model.num_features, 2, 2)
    assert state[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"] == 1000
    assert state[cfg["first_conv"] + ".weight"].shape[1] == 3
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg["crop_pct"], cfg["interpolation"], model.head_hidden_size) == (0.875, "bicubic", model.num_features)


@every
def test_feature_pyramid(name):
    dims = list(BACKBONES[name]["dims"])
    model = timm.create_model(name, features_only=True, in_chans=4, img_size=64).eval()
    assert model.feature_info.channels() == dims and model.feature_info.reduction() == [4, 8, 16, 32]
    x = torch.randn(1, 4, 64, 96)
    with torch.no_grad():
        maps = model(x)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(m.shape) for m in maps] == [(1, dim, *size) for dim, size in zip(dims, sizes, strict=True)]
    two = timm.create_model(name, features_only=True, out_indices=(1, 2))
    assert two.feature_info.channels() == dims[1:3] and len(two(x[:, :3])) == 2


@every
def test_intermediates(name):
    model = create(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        assert [64 // m.shape[-1] for m in maps] == [info["reduction"] for info in model.feature_info]
        early, one = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(one[0], maps[1]) and torch.equal(early, maps[1])
        for prune_norm in (False, True):
            model.prune_intermediate_layers([2], prune_norm=prune_norm)
            final, again = model.forward_intermediates(x, indices=[2], norm=True)
            assert torch.equal(again[0], maps[2]) and torch.equal(final, maps[2])


@every
def test_weights_survive_a_file(name, tmp_path):
    model = create(name).eval()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    again = timm.create_model(name, num_classes=5, img_size=64, checkpoint_path=str(path)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def release(model, path):
    """A file with the weights of ``model`` as they would have been released."""
    names, own = released_names(model), model.state_dict()
    shapes = released_shapes(model, names)
    torch.save({"net": {names[name]: own[name].reshape(shapes[names[name]]) for name in own}, "epoch": 3}, path)


@pytest.mark.parametrize("name", ["emov1_1m", "emov2_1m"])
def test_timm_reads_released_checkpoints(name, tmp_path):
    model, path, x = create(name).eval(), tmp_path / "released.pth", torch.randn(1, 3, 64, 64)
    release(model, path)
    file = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5}}
    with torch.no_grad():
        for options in ({"checkpoint_path": str(path)}, file):
            again = timm.create_model(name, num_classes=5, img_size=64, **options).eval()
            assert torch.equal(again(x), model(x))
        other = timm.create_model(name, num_classes=7, in_chans=1, img_size=64, **file).eval()
        assert other(x[:, :1]).shape == (1, 7)
        assert torch.equal(other.stages[0][0].operator.proj.weight, model.stages[0][0].operator.proj.weight)
        maps = timm.create_model(name, features_only=True, img_size=64, **file).eval()(x)
        torch.testing.assert_close(maps, model.forward_intermediates(x, intermediates_only=True))
    with pytest.raises(RuntimeError, match="size mismatch for stages.0"):
        timm.create_model(name.replace("1m", "5m"), num_classes=5, img_size=64, checkpoint_path=str(path))


def test_device_and_dtype_are_taken_and_survive_a_new_head():
    model = create("emov2_1m", device="meta", dtype=torch.float64).eval()
    model.reset_classifier(2)
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("meta", torch.float64)}
    assert {t.device.type for t in model.buffers()} == {"meta"}
    assert not any(module.training for module in model.modules())
    with pytest.raises(TypeError, match="not_a_setting"):
        create("emov2_1m", device="meta", not_a_setting=1)


def test_scales_and_biases_do_not_decay():
    model = create("emov2_1m")
    decayed = next(g for g in param_groups_weight_decay(model, 0.05, model.no_weight_decay()) if g["weight_decay"])
    assert len(model.no_weight_decay()) == 15
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.parameters() if p.ndim > 1}


def test_layers_are_grouped_by_depth():
    model = create("emov2_1m")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["stem.conv.conv.weight"] == 0 and groups["stages.0.0.operator.proj.weight"] == 1
    assert groups["stages.3.2.operator.proj.weight"] == 15  # 15 blocks
    assert groups["norm.weight"] == 15 and groups["head.weight"] == 16
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stem.conv.conv.weight"] == 0 and coarse["stages.3.1.operator.proj.weight"] == 4
    assert coarse["norm.bias"] == coarse["head.bias"] == 5
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    assert max(scales) == 1 and min(scales) == 0.5**16


@pytest.mark.parametrize("kind", ["getter", "list", "dict", "hook", "fx"])
def test_every_way_of_timm_to_the_maps_gives_the_same_and_says_their_format(kind):
    wrapped, plain = create("emov2_1m", features_only=True, feature_cls=kind).eval(), create("emov2_1m").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, wanted = wrapped(x), plain.forward_intermediates(x, intermediates_only=True)
    assert str(wrapped.output_fmt) == "Format.NCHW" and len(found) == 4
    for maps, expected in zip(found.values() if kind == "dict" else found, wanted, strict=True):
        torch.testing.assert_close(maps, expected)  # traced, kernels take their plain form


def test_pyramids_of_torchvision_stand_on_the_stages():
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    backbone = create("emov2_1m", features_only=True, feature_cls="list").eval()
    stages, x = {f"stages_{i}": str(i) for i in range(4)}, torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        getter = IntermediateLayerGetter(backbone, stages)(x)
        torch.testing.assert_close(list(getter.values()), backbone(x))
        maps = BackboneWithFPN(backbone, stages, backbone.feature_info.channels(), 16)(x)
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]  # and a pool


def test_gray_images_and_their_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    three = create("emov2_1m")
    safetensors.torch.save_file(three.state_dict(), path)
    gray = create("emov2_1m", in_chans=1, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert gray.in_chans == 1 and three.in_chans == 3
    summed = three.stem.conv.conv.weight.sum(dim=1, keepdim=True)  # timm's habit
    torch.testing.assert_close(gray.stem.conv.conv.weight, summed)


@pytest.mark.parametrize(
    ("img_size", "window"),
    [
        (224, 7), (256, 8), (512, 8), (448, 7), (384, 6), (288, 7), (64, 2), (32, 2), (96, 3), ((256, 512), 8),
        ((224, 256), 7), (1792, 8),
    ],
)  # fmt: skip
def test_the_window_follows_the_image_size(img_size, window):
    assert window_for(img_size) == window
    with torch.device("meta"):
        model = timm.create_model("emov2_1m", img_size=img_size)
        assert model.stages[3][1].operator.expand.window == (window, window)
        assert model(torch.zeros(1, 3, 100, 75)).shape == (1, 1000)  # any other size works


@pytest.mark.parametrize("img_size", [31, (16, 224), 0])
def test_images_below_32_px_are_refused(img_size):
    with pytest.raises(InputError, match="img_size"):
        timm.create_model("emov2_1m", img_size=img_size)


def test_no_weights_are_promised_that_do_not_exist():
    with pytest.raises(RuntimeError, match="[Nn]o pretrained weights"):
        timm.create_model("emov2_1m", pretrained=True)
    assert d_emo.list_models("emov2_1m") == ["emov2_1m"]


def test_a_stride_of_the_last_map_that_there_is_not_is_one_sentence():
    """timm's own networks without one raise a TypeError."""
    for features_only in (False, True):
        with pytest.raises(InputError, match="output_stride must be 8, 16 or 32, got 4: .*out_indices"):
            timm.create_model("emov2_1m", output_stride=4, features_only=features_only)
    model = timm.create_model("emov2_1m", output_stride=32, features_only=True, out_indices=(2,), img_size=64)
    assert [tuple(maps.shape[2:]) for maps in model(torch.randn(1, 3, 64, 64))] == [(4, 4)]


@pytest.mark.parametrize("name", ["emov1_1m", "emov2_1m"])
@pytest.mark.parametrize("stride, sizes", [(16, [16, 8, 4, 4]), (8, [16, 8, 8, 8])])
def test_an_output_stride_keeps_the_last_maps(name, stride, sizes):
    options = {"features_only": True, "output_stride": stride}
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        assert [maps.shape[-1] for maps in model(torch.randn(1, 3, 64, 64))] == sizes
    assert model.feature_info.reduction() == [64 // size for size in sizes]
    whole = timm.create_model(name).state_dict()
    assert all(value.shape == whole[key].shape for key, value in timm.create_model(name, output_stride=stride)
               .state_dict().items())  # fmt: skip


@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_network_says_between_the_positions_what_the_strided_one_says_at_them(stride):
    """Without attention, whose windows have a number of tokens; LayerScale starts too small to see anything through."""
    torch.manual_seed(0)
    options = {"attention_mode": "none", "norms": ["batch"] * 4}
    model, dilated = create("emov2_1m", **options).eval(), create("emov2_1m", output_stride=stride, **options).eval()
    state = {key: torch.full_like(value, 0.5) if key.endswith("gamma") else value
             for key, value in model.state_dict().items()}  # fmt: skip
    x = torch.randn(1, 3, 128, 128)
    for each in (model, dilated):
        each.load_state_dict(state)
    with torch.no_grad():
        coarse, fine = model.forward_features(x), dilated.forward_features(x)
    step = 32 // stride
    assert fine.shape[-1] == step * coarse.shape[-1]
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-5)
