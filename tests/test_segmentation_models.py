import pytest
import torch

from d_emo.errors import InputError
from d_emo.models import count_macs, count_parameters, create_model, list_models
from d_emo.models.attention import WindowAttention
from d_emo.tables import SYSTEMS

TINY = {"depths": [1, 1, 2, 2], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}
KINDS = [name for name, row in SYSTEMS.items() if row.task == "segmentation" and row.backbones]
# Totals of the released logs without and with the auxiliary head, and MACs in G that were rebuilt with fvcore's prices
# by somebody else; EMOv1's without the products of attention.
RELEASED = {
    "deeplabv3-emov2_1m": (5_606_546, 5_829_928, 3.34), "deeplabv3-emov2_2m": (6_658_454, 6_973_996, 5.02),
    "deeplabv3-emov2_5m": (9_965_718, 10_373_420, 9.12), "deeplabv3-emov2_20m": (26_062_006, 26_838_348, 31.6),
    "pspnet-emov2_1m": (4_278_930, 4_502_312, 2.97), "pspnet-emov2_2m": (5_248_918, 5_564_460, 4.62),
    "pspnet-emov2_5m": (8_195_734, 8_603_436, 8.61), "pspnet-emov2_20m": (23_636_662, 24_413_004, 30.9),
    "semfpn-emov2_1m": (5_371_026, None, 23.46), "semfpn-emov2_2m": (6_289_814, None, 25.11),
    "semfpn-emov2_5m": (8_986_774, None, 29.15), "semfpn-emov2_20m": (23_995_574, None, 51.5),
    "segformer-emov2_1m": (1_499_234, None, 5.03), "segformer-emov2_2m": (2_676_118, None, 10.38),
    "segformer-emov2_5m": (5_378_454, None, 14.44), "segformer-emov2_20m": (20_399_798, None, 36.8),
    "deeplabv3-emov1_1m": (None, 5_653_188, 2.41), "deeplabv3-emov1_2m": (None, 6_967_156, 3.40),
    "deeplabv3-emov1_5m": (None, 10_355_828, 5.87), "pspnet-emov1_1m": (None, 4_374_724, 2.05),
    "pspnet-emov1_2m": (None, 5_557_620, 3.00), "pspnet-emov1_5m": (None, 8_585_844, 5.36),
    "semfpn-emov1_1m": (5_280_302, None, None), "semfpn-emov1_2m": (6_282_974, None, None),
    "semfpn-emov1_5m": (8_969_182, None, None),
}  # fmt: skip


def small(kind, **options):
    torch.manual_seed(0)
    options = {"num_classes": 5, "width": 16, "backbone_options": TINY, "window_size": 2, **options}
    return create_model(f"{kind}-emov2_1m", **options)


@pytest.mark.parametrize("name", RELEASED)
def test_counts_equal_the_released_ones(name):
    plain, with_aux, macs = RELEASED[name]
    with torch.device("meta"):
        model, aux = create_model(name), create_model(name, aux=True)
    assert plain in (None, count_parameters(model)) and with_aux in (None, count_parameters(aux))
    if macs is not None:
        assert count_macs(model, attention_products="emov2" in name) == pytest.approx(macs * 1e9, rel=0.01)


def test_the_papers_rows_are_all_there():
    assert {name for name in list_models() if name.partition("-")[0] in KINDS} == set(RELEASED)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_the_size_of_the_image_whatever_it_is(kind):
    model = small(kind, aux=True).eval()
    with torch.no_grad():
        for size in ((64, 64), (50, 97), (33, 32)):
            assert {name: tuple(each.shape) for name, each in model(torch.randn(2, 3, *size)).items()} == {
                "out": (2, 5, *size)
            }


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_receives_a_gradient(kind):
    model = small(kind, aux=True, drop_rate=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1)
    losses = model(torch.randn(2, 3, 96, 96))
    assert losses.keys() == {"out", "aux"}
    sum((each * torch.randn_like(each)).sum() for each in losses.values()).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert not unused and not still


def test_windows_are_the_papers():
    for name, window in {"emov1_2m": 7, "emov1_5m": 16, "emov2_5m": 10}.items():
        with torch.device("meta"):
            model = create_model(f"deeplabv3-{name}")
        assert {m.window for m in model.modules() if isinstance(m, WindowAttention)} == {(window, window)}


def test_a_model_is_made_again_by_its_config():
    model = small("segformer", aux=True, in_channels=4, backbone_options={**TINY, "output_stride": 16})
    again = create_model(**model.config)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert again.eval()(torch.zeros(1, 4, 64, 64))["out"].shape == (1, 5, 64, 64)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_classes": 0}, "num_classes must be a positive integer"), ({"width": 0}, "width must be"),
        ({"backbone_options": {"output_stride": 4}}, "output_stride must be 8, 16 or 32"),
        ({"dim": 3}, "no setting 'dim'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(InputError, match=words), torch.device("meta"):
        create_model("pspnet-emov2_1m", **options)


SMP = "FPN PSPNet Segformer Unet UnetPlusPlus UPerNet Linknet MAnet DeepLabV3 DeepLabV3Plus PAN".split()


@pytest.mark.parametrize("network", SMP)
def test_the_backbone_works_inside_segmentation_models_pytorch(network):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, network)("tu-emov2_1m", encoder_weights=None, classes=5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 128, 128)).shape == (1, 5, 128, 128)


@pytest.mark.parametrize("network, strides", [("DeepLabV3", (8, 16)), ("DeepLabV3Plus", (8, 16)), ("PAN", (16, 32))])
def test_strides_of_segmentation_models_pytorch_are_those_of_the_maps(network, strides):
    smp = pytest.importorskip("segmentation_models_pytorch")
    for stride in strides:
        model = getattr(smp, network)("tu-emov2_1m", encoder_weights=None, encoder_output_stride=stride, classes=5)
        with torch.no_grad():
            assert model.eval().encoder(torch.zeros(1, 3, 256, 256))[-1].shape[-1] == 256 // stride
            assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 5, 256, 256)
