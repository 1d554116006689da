"""What torchvision's own suites ask of its detectors, asked of ours: outputs, targets, images without objects."""

import copy

import pytest
import torch
from test_detection_models import batch, small

from d_emo.errors import InputError
from d_emo.models.layers import batch_norms
from d_emo.portable import stir

NAMES = ("ssdlite-emov2_5m", "retinanet-emov2_5m", "maskrcnn-emov2_5m")
every = pytest.mark.parametrize("name", NAMES)


def quick(name, **options):
    """A detector of few regions, sure of a lot."""
    model = small(name, **options)
    if name.startswith("maskrcnn"):
        model.rpn._post_nms_top_n = {"training": 50, "testing": 20}
        model.roi_heads.score_thresh = 0.0
    else:
        model.score_thresh, model.topk_candidates, model.detections_per_img = 0.0, 30, 20
    return model


@every
def test_every_image_has_its_own_detections(name):
    model, (images, _) = quick(name).eval(), batch(quick(name))
    if name.startswith("ssdlite"):  # whose scores show next to nothing of an image at first
        stir(model, lambda: model.dense_outputs(torch.randn(2, 3, 128, 128)))
    kept = [image.clone() for image in images]
    with torch.no_grad():
        found = model(images)
        alone = model(images[1:])[0]
    assert all(torch.equal(image, one) for image, one in zip(images, kept, strict=True))
    for image, one in zip(images, found, strict=True):
        count, height, width = len(one["boxes"]), *image.shape[1:]
        types = {"boxes": (torch.float32, (count, 4)), "labels": (torch.int64, (count,)),
                 "scores": (torch.float32, (count,))}  # fmt: skip
        if name.startswith("maskrcnn"):
            types["masks"] = torch.float32, (count, 1, height, width)
        assert {key: (value.dtype, tuple(value.shape)) for key, value in one.items()} == types and count > 0
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (one["boxes"][:, 2:] >= one["boxes"][:, :2]).all()
        assert (one["scores"].diff() <= 0).all() and one["scores"].min() >= 0 and one["scores"].max() <= 1
        labels = one["labels"] - model.first_label
        assert labels.min() >= 0 and labels.max() < 3
    if name.startswith("ssdlite"):  # others fill images up to the largest of the batch
        torch.testing.assert_close(alone["scores"], found[1]["scores"], rtol=1e-3, atol=1e-5)


@every
def test_nothing_found_has_the_same_types(name):
    model, (images, _) = quick(name).eval(), batch(quick(name))
    (model.roi_heads if name.startswith("maskrcnn") else model).score_thresh = 1.1
    with torch.no_grad():
        (found,) = model(images[:1])
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == (0,) and found["labels"].shape == (0,)
    assert found["labels"].dtype == torch.int64 and found["boxes"].dtype == torch.float32
    assert "masks" not in found or found["masks"].shape == (0, 1, 70, 90)


@every
def test_an_image_without_objects_has_no_loss_of_boxes(name):
    model = quick(name).train()
    images, targets = (part[1:] * 2 for part in batch(model))  # batch norms of 1 x 1 maps need two images
    losses = model(images, targets)
    boxes = {"ssdlite": {"bbox_regression"}, "retinanet": {"bbox_regression"},
             "maskrcnn": {"loss_box_reg", "loss_rpn_box_reg", "loss_mask"}}[name.partition("-")[0]]  # fmt: skip
    assert boxes <= losses.keys() and all(losses[key] == 0 for key in boxes)
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(each).all() for each in gradients)
    if name.startswith("ssdlite"):  # whose negatives are three for every object
        assert all(loss == 0 for loss in losses.values())
    else:
        assert max(each.abs().max() for each in gradients) > 0


@every
def test_targets_stay_as_they_are_and_images_have_gradients(name):
    model = quick(name).train()
    images, targets = batch(model)
    before = copy.deepcopy(targets)
    images = [image.requires_grad_() for image in images]
    sum(model(images, targets).values()).backward()
    for one, other in zip(targets, before, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert images[0].grad.abs().max() > 0 and torch.isfinite(images[0].grad).all()


BOXES = torch.tensor([[10.0, 10, 40, 50]])
LABELS = torch.tensor([1])


@every
@pytest.mark.parametrize(("target", "words"), [
    (None, "a detector in training needs targets"),
    ([], "0 targets for 1 image"),
    ({"boxes": 0.0, "labels": LABELS}, "the boxes of image 0 must be a tensor of shape \\(n, 4\\), not 0.0"),
    ({"boxes": torch.rand(4), "labels": LABELS}, "must be a tensor of shape \\(n, 4\\), not of \\(4,\\)"),
    ({"boxes": torch.rand(1, 5), "labels": LABELS}, "not of \\(1, 5\\)"),
    ({"labels": LABELS}, "the target of image 0 has no boxes"),
    ({"boxes": BOXES}, "the target of image 0 has no labels"),
    ({"boxes": BOXES, "labels": LABELS.repeat(2)}, "2 labels for 1 box"),
    ({"boxes": torch.tensor([[1.0, 2, 5, 9], [1, 3, 1, 4]]), "labels": LABELS.repeat(2)},
     "box 1 of image 0 is \\[1.0, 3.0, 1.0, 4.0\\]: its right and bottom must be beyond its left and top"),
    ({"boxes": BOXES, "labels": LABELS + 3}, "image 0 has the label 4, and labels are from"),
    ({"boxes": BOXES, "labels": LABELS - 2}, "image 0 has the label -1"),
])  # fmt: skip
def test_targets_that_cannot_be_are_refused_in_a_sentence(name, target, words):
    model = quick(name).train()
    if isinstance(target, dict):
        target = [target | {"masks": torch.zeros(1, 70, 90, dtype=torch.uint8)}]
    with pytest.raises(InputError, match=words):
        model([torch.rand(3, 70, 90)], target)


def test_masks_are_asked_for_where_they_are_trained():
    model, target = quick("maskrcnn-emov2_5m").train(), {"boxes": BOXES, "labels": LABELS}
    with pytest.raises(InputError, match="the target of image 0 has no masks"):
        model([torch.rand(3, 70, 90)], [target])
    with pytest.raises(InputError, match="the masks of image 0 must be of shape \\(1, 70, 90\\), not \\(1, 60, 90\\)"):
        model([torch.rand(3, 70, 90)], [target | {"masks": torch.zeros(1, 60, 90, dtype=torch.uint8)}])


@every
def test_images_of_bytes_are_refused(name):
    with pytest.raises(TypeError, match="floating"):
        quick(name).eval()([torch.randint(0, 255, (3, 70, 90), dtype=torch.uint8)])


@every
def test_each_frozen_stage_leaves_fewer_parameters_to_train(name):
    def trained(stages):
        with torch.device("meta"):
            parameters = dict(small(name, frozen_stages=stages).named_parameters())
        free = [key for key, parameter in parameters.items() if parameter.requires_grad]
        return len(free), sum(".emo." not in key for key in free)

    counts = [trained(stages) for stages in range(5)]
    assert all(one > other for (one, _), (other, _) in zip(counts, counts[1:], strict=False))
    assert len({heads for _, heads in counts}) == 1 and counts[4][0] == counts[4][1]


@every
def test_maps_have_the_channels_that_the_backbone_says(name):
    model = small(name).eval()
    with torch.no_grad():
        maps = model.backbone(torch.rand(2, 3, 96, 128))
    said = model.backbone.out_channels
    assert [each.shape[1] for each in maps.values()] == (said if isinstance(said, list) else [said] * len(maps))
    assert all(each.shape[0] == 2 for each in maps.values())
    sides = [each.shape[2] for each in maps.values()]
    assert sides == sorted(sides, reverse=True)


@every
def test_weights_go_round(name, tmp_path):
    model = quick(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    other = quick(name).eval()
    for parameter in other.parameters():
        parameter.data.add_(0.1)
    for norm in batch_norms(other):
        norm.running_var.fill_(3)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    image = torch.rand(3, 70, 90)
    with torch.no_grad():
        one, two = model([image])[0], other([image])[0]
    assert all(torch.equal(one[key], two[key]) for key in one)


@every
def test_autocast_gives_finite_losses_and_boxes_in_pixels(name):
    model = quick(name).train()
    images, targets = batch(model)
    plain = {key: loss.item() for key, loss in model(images, targets).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        found = model.eval()(images)
    assert losses.keys() == plain.keys() and all(torch.isfinite(loss) for loss in losses.values())
    assert float(sum(losses.values())) == pytest.approx(sum(plain.values()), rel=0.1)
    assert all(torch.isfinite(one["boxes"]).all() and torch.isfinite(one["scores"].float()).all() for one in found)
