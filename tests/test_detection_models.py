import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align

from d_emo.data.scenes import DigitScenes
from d_emo.detection.maskrcnn import AlignedRoIAlign
from d_emo.detection.retinanet import P6P7
from d_emo.detection.ssdlite import SIDES, sides_of
from d_emo.errors import InputError
from d_emo.models import count_macs, count_parameters, create_model, list_models
from d_emo.models.attention import WindowAttention
from d_emo.models.layers import batch_norms

TINY = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}
SMALL = {"ssdlite": {"image_size": 96}, **dict.fromkeys(("retinanet", "maskrcnn"), {"min_size": 96, "max_size": 128})}
# Parameters are the released logs' own, to the last one. MACs in G were rebuilt with fvcore's prices by somebody else;
# EMOv1's without the products of attention, and RetinaNet's at 1344 x 800.
RELEASED = {
    "ssdlite-emov1_1m": (2_311_980, 0.566), "ssdlite-emov1_2m": (3_342_716, 0.935),
    "ssdlite-emov1_5m": (6_076_540, 1.857), "ssdlite-emov2_1m": (2_409_088, 0.735),
    "ssdlite-emov2_2m": (3_349_556, 1.225), "ssdlite-emov2_5m": (6_094_132, 2.475),
    "ssdlite-emov2_20m": (21_213_780, None), "ssdlite512-emov2_1m": (2_409_088, 2.36),
    "ssdlite512-emov2_2m": (3_349_556, 4.02), "ssdlite512-emov2_5m": (6_094_132, 8.00),
    "ssdlite512-emov2_20m": (21_213_780, None), "retinanet-emov1_1m": (10_479_244, 163.6),
    "retinanet-emov1_2m": (11_555_644, 167.4), "retinanet-emov1_5m": (14_440_508, 177.5),
    "retinanet-emov2_1m": (10_597_616, 157.7), "retinanet-emov2_2m": (11_562_484, 162.6),
    "retinanet-emov2_5m": (14_458_100, 175.3), "retinanet-emov2_20m": (29_831_444, None),
    "maskrcnn-emov2_1m": (21_271_788, None), "maskrcnn-emov2_2m": (22_190_576, None),
    "maskrcnn-emov2_5m": (24_887_536, None), "maskrcnn-emov2_20m": (39_896_336, None),
}  # fmt: skip


def small(name: str, **options):
    torch.manual_seed(0)
    options = {"num_classes": 3, "backbone_options": TINY, **SMALL[name.partition("-")[0]], **options}
    return create_model(name, **options)


def batch(model):
    """Two images of different sizes, the second without an object."""
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 10:50, 10:40] = masks[1, 20:60, 30:80] = 1
    boxes = torch.tensor([[10.0, 10, 40, 50], [30, 20, 80, 60]])
    some = {"boxes": boxes, "labels": torch.tensor([0, 2]) + model.first_label, "masks": masks}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long),
            "masks": torch.zeros(0, 60, 50, dtype=torch.uint8)}
    return [torch.rand(3, 70, 90), torch.rand(3, 60, 50)], [some, none]


@pytest.mark.parametrize("name", RELEASED)
def test_counts_are_the_released_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    params, macs = RELEASED[name]
    assert count_parameters(model) == params
    if macs:
        older = "emov1" in name
        size = (800, 1344) if older and name.startswith("retinanet") else None
        assert count_macs(model, size, attention_products=not older) == pytest.approx(macs * 1e9, rel=0.004)


def test_every_detector_is_counted_here():
    patterns = ("ssdlite*", "retinanet*", "maskrcnn*")
    assert sorted(RELEASED) == sorted(name for pattern in patterns for name in list_models(pattern))


def test_mask_rcnn_is_cheaper_than_torchvisions_by_what_nothing_reads():
    """Published FLOPs are 0.90 of the image's part at 1280 x 800, and 67.3 G of 1,000 regions and 100 masks."""
    with torch.device("meta"):
        model = create_model("maskrcnn-emov2_5m")
        heads = model.roi_heads
        kept = heads.box_predictor.bbox_pred.weight.shape[0], heads.mask_predictor.mask_fcn_logits.weight.shape[0]
    assert kept == (4 * 80, 80) and 4 * (1024 + 1) + 256 + 1 == 4357
    whole = count_macs(model)
    model.counted_outputs = model.dense_outputs
    image = count_macs(model)
    assert 0.9 * image + (whole - image) == pytest.approx(181e9, rel=0.005)


@pytest.mark.parametrize("name", ["ssdlite-emov2_5m", "retinanet-emov1_5m", "maskrcnn-emov2_5m"])
def test_losses_gradients_and_detections(name):
    model = small(name)
    if name.startswith("maskrcnn"):
        model.rpn._post_nms_top_n = {"training": 50, "testing": 20}  # seconds less
    images, targets = batch(model)
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) is not name.startswith("ssdlite")
    assert all(".emo.stem" in each or ".emo.stages.0." in each for each in frozen)
    assert not [each for each, p in model.named_parameters() if p.requires_grad and p.grad is None]
    found = model.eval()(images)
    assert [each["boxes"].shape[1] for each in found] == [4, 4]
    assert all((each["labels"] >= model.first_label).all() for each in found)
    again = create_model(**model.config)
    assert count_parameters(again) == count_parameters(model)


def test_batch_norms_of_the_backbone_keep_their_statistics_and_are_trained():
    model = small("ssdlite-emov2_5m").train()
    norms = batch_norms(model.backbone.maps)
    assert norms and not any(norm.training for norm in norms) and all(norm.weight.requires_grad for norm in norms)
    assert all(norm.training for norm in batch_norms(model.backbone.extra))
    assert all(norm.training for norm in batch_norms(small("ssdlite-emov2_5m", norm_eval=False).train()))


def test_ssdlite_freezes_as_many_stages_as_are_asked_for():
    model = small("ssdlite-emov2_5m", frozen_stages=2)
    fixed = {name.partition(".emo.")[2].rpartition(".")[0][:8] for name, p in model.named_parameters()
             if not p.requires_grad}  # fmt: skip
    assert {name.removesuffix(".") for name in fixed if name.startswith("stages")} == {"stages.0", "stages.1"}
    assert any(name.startswith("stem") for name in fixed)
    assert not any(norm.training for norm in batch_norms(model.train().backbone.maps.emo.stem))


@pytest.mark.parametrize("name", ["ssdlite-emov2_5m", "retinanet-emov2_5m", "maskrcnn-emov2_5m"])
def test_images_are_normalised_as_it_is_asked_for(name):
    image = torch.rand(3, 96, 96)
    plain = small(name, image_mean=[0.5] * 3, image_std=[0.5] * 3).eval().transform([image])[0].tensors[0]
    assert torch.allclose(plain[:, :96, :96], image * 2 - 1, atol=1e-5)
    assert small(name).transform.image_mean == [0.485, 0.456, 0.406]


def test_windows_are_the_papers():
    def window(name):
        with torch.device("meta"):
            emo = create_model(name).backbone.maps.emo
        return {module.window for module in emo.modules() if isinstance(module, WindowAttention)}

    assert window("ssdlite-emov2_1m") == window("retinanet-emov1_5m") == {(10, 10)}
    assert window("ssdlite-emov1_2m") == window("retinanet-emov1_1m") == {(7, 7)}


def test_anchors_of_ssdlite_are_mmdets():
    """mmdet's centres are (i + 0.5) stride, sides min, sqrt(min max), min sqrt(r) by min / sqrt(r), not clipped."""
    anchors = anchors_of("ssdlite-emov2_5m")
    assert len(anchors) == 3234
    first = torch.tensor([[-16.0, -16, 32, 32]])
    assert torch.allclose(anchors[:1], first)
    sides = anchors[:6, 2:] - anchors[:6, :2]
    wanted = [(48, 48), ((48 * 100) ** 0.5,) * 2]
    wanted += [(48 * a, 48 / a) for r in (2, 3) for a in (r**0.5, r**-0.5)]
    assert torch.allclose(sides, torch.tensor(wanted, dtype=torch.float32), atol=1e-3)
    assert torch.allclose(anchors[-6, :2] + anchors[-6, 2:], torch.tensor([320.0, 320]))  # the only cell of 320
    assert (anchors[:, 2] - anchors[:, 0]).max() == pytest.approx(304 * 3**0.5, rel=1e-4)  # wider than the image


def anchors_of(name, **options):
    model = create_model(name, **options)
    with torch.no_grad():
        side = model.input_size[0]
        maps = list(model.eval().backbone(torch.zeros(1, 3, side, side)).values())
    return model.anchor_generator(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), maps)[0]


def test_anchors_at_512_px_are_those_of_320_unless_scaled():
    published = anchors_of("ssdlite512-emov2_1m")
    scaled = anchors_of("ssdlite512-emov2_1m", anchors="scaled")
    biggest = (published[:, 2:] - published[:, :2]).prod(dim=1).sqrt()
    assert biggest.max() == pytest.approx((304 * 320) ** 0.5, rel=1e-4)
    last = published[-4 * 6 - 6 :]  # the level of 2 x 2 and that of 1: their centres cover a part of the image
    assert (last[:, :2] + last[:, 2:]).max() / 2 == pytest.approx(240, abs=0.1)
    assert (scaled[:, 2:] - scaled[:, :2]).prod(dim=1).sqrt().max() == pytest.approx((304 * 320) ** 0.5 * 1.6, rel=1e-4)
    assert (scaled[-1, :2] + scaled[-1, 2:]).tolist() == pytest.approx([512, 512], abs=0.1)
    assert (scaled[6, 0] + scaled[6, 2] - scaled[0, 0] - scaled[0, 2]).item() == pytest.approx(32, abs=0.1)
    stretched = anchors_of("ssdlite512-emov2_1m", anchors="stretched")
    assert torch.allclose(stretched[0], published[0]) and stretched[-1].tolist() != scaled[-1].tolist()
    assert sides_of("stretched", 512) == pytest.approx([48, 136.7, 222.0, 310.7, 397.7, 484.7, 512], abs=0.1)
    assert sides_of("stretched", 320) == sides_of("scaled", 320) == sides_of("fixed", 512) == list(SIDES)
    with pytest.raises(InputError, match="unknown anchors 'big'"):
        create_model("ssdlite-emov2_1m", anchors="big")


def test_strides_of_a_pyramid_are_powers_of_two_whatever_the_padding():
    """A 96 x 800 image has a 7 px wide map at stride 128; torchvision takes 800 // 7 = 114."""
    anchors = small("retinanet-emov2_5m").anchor_generator
    sizes = [(96 // s + (96 % s > 0), 800 // s + (800 % s > 0)) for s in anchors.strides]
    boxes = anchors(ImageList(torch.zeros(1, 3, 96, 800), [(96, 800)]), [torch.zeros(1, 1, *size) for size in sizes])[0]
    last = boxes[-9 * 7 :].unflatten(0, (7, 9))
    assert torch.allclose(last[1:] - last[:-1], torch.tensor([128.0, 0, 128, 0]).expand(6, 9, 4), atol=1e-3)
    root = 2**0.5  # heights over widths of 0.5: not rounded
    assert torch.allclose(boxes[0], torch.tensor([-16 * root, -16 / root, 16 * root, 16 / root]))


def test_there_is_no_relu_before_p7():
    extra = P6P7(4, 4)
    c5 = torch.randn(1, 4, 8, 8)
    (_, p6, p7), names = extra([c5], [c5], ["p5"])
    assert torch.equal(p7, extra.p7(extra.p6(c5))) and (p6 < 0).any() and names == ["p5", "p6", "p7"]


def test_losses_of_retinanet_are_normalised_by_the_batch():
    model = small("retinanet-emov2_5m").train()
    head = model.head
    outputs = {"cls_logits": torch.randn(2, 6, 3), "bbox_regression": torch.randn(2, 6, 4)}
    targets = [{"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1])} for _ in range(2)]
    anchors = [torch.tensor([[0.0, 0, 8, 8]]).repeat(6, 1)] * 2
    matched = [torch.tensor([0, 0, 0, -1, -1, -1]), torch.tensor([0, -1, -1, -1, -1, -1])]
    together = head.compute_loss(targets, outputs, anchors, matched)
    parts = [
        super(type(head), head).compute_loss(
            targets[i : i + 1], {k: v[i : i + 1] for k, v in outputs.items()}, anchors[i : i + 1], matched[i : i + 1]
        )
        for i in range(2)
    ]
    for name, value in together.items():
        assert value == pytest.approx(((parts[0][name] * 3 + parts[1][name]) / 4).item(), rel=1e-6)


def test_the_small_pyramid_fits_small_pictures_of_digits():
    model = small("retinanet-emov2_1m", pyramid="small", num_classes=10, frozen_stages=0).train()
    assert count_parameters(model.head) + count_parameters(model.backbone.fpn) < 350_000
    scenes = DigitScenes(128)
    boxes = torch.cat([scenes.read(index)[1]["boxes"] for index in range(40)])
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    best = box_iou(boxes, model.anchor_generator(images, list(model.backbone(images.tensors).values()))[0]).amax(dim=1)
    assert (best > 0.5).float().mean() > 0.85 and best.min() > 0.25
    image, target = scenes.read(0)
    losses = model([image.float() / 255], [target])
    sum(losses.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    with pytest.raises(InputError, match="unknown pyramid 'big'; choose 'published' or 'small'"):
        small("retinanet-emov2_1m", pyramid="big")


def test_regions_are_read_aligned():
    """A region of 56 to 112 px belongs to the first level but one; torchvision's pooler reads it half a pixel away."""
    maps = {str(i): torch.randn(1, 2, 64 // 2 ** (i - 1), 64 // 2 ** (i - 1)) for i in (1, 2, 3, 4)}
    boxes = torch.tensor([[10.0, 20, 40, 60], [0, 0, 120, 130]])
    pooled = AlignedRoIAlign(7)(maps, [boxes], [(256, 256)])
    for box, level, got in zip(boxes, ("1", "2"), pooled, strict=True):
        stride = 256 / maps[level].shape[-1]
        assert torch.allclose(got, roi_align(maps[level], [box[None]], 7, 1 / stride, aligned=True)[0], atol=1e-6)
        assert not torch.allclose(got, roi_align(maps[level], [box[None]], 7, 1 / stride)[0], atol=1e-2)
