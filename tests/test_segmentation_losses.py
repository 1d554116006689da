"""The Dice loss, pictures of classes, and what `train-segmenter` makes of them."""

import math

import numpy as np
import pytest
import torch
from test_segmentation import BACKBONE, TINY
from torch.nn import functional as F

from d_emo.config import SegmenterSettings
from d_emo.errors import InputError
from d_emo.segmentation.images import IGNORED
from d_emo.segmentation.losses import dice_loss
from d_emo.segmentation.pictures import gallery, lit
from d_emo.training.segmenter import SegmenterTask


def test_dice_equals_a_plain_computation():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 4, 5, 6, generator=generator), torch.randint(0, 3, (2, 5, 6), generator=generator)
    truth[0, :2] = IGNORED  # and nothing is of class 3
    shares = []
    for label in range(3):
        p = [logits[b, :, i, j].softmax(0)[label].item() for b, i, j in (truth != IGNORED).nonzero().tolist()]
        t = [float(truth[b, i, j] == label) for b, i, j in (truth != IGNORED).nonzero().tolist()]
        shares.append(2 * sum(map(math.prod, zip(p, t, strict=True))) / (sum(p) + sum(t)))
    assert dice_loss(logits, truth).item() == pytest.approx(1 - np.mean(shares), abs=1e-6)


def test_dice_is_zero_where_all_is_right_and_finite_where_nothing_counts():
    truth = torch.tensor([[[0, 0, 0, 0, 0, 0, 0, 2]]])
    right = F.one_hot(truth, 4).permute(0, 3, 1, 2) * 50.0
    assert dice_loss(right, truth).item() == pytest.approx(0, abs=1e-5)
    only_ground = torch.zeros(1, 4, 1, 8)
    only_ground[:, 0] = 50
    assert dice_loss(only_ground, truth).item() == pytest.approx((1 / 15 + 1) / 2, abs=1e-5)  # of two classes, one
    logits = torch.randn(1, 4, 1, 8, requires_grad=True)
    dice_loss(logits, torch.full_like(truth, IGNORED)).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def make_task(**changes):
    """A task whose network does the same in every call."""
    backbone = {**BACKBONE, "drop_path_rate": 0.0}
    options = {"aux": True, "width": 16, "drop_rate": 0.0, "backbone_options": backbone}
    return SegmenterTask(SegmenterSettings(**{**TINY, "model_options": options, **changes}))


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_dice_loss_is_added_by_its_weight(weight):
    task = make_task(dice_weight=weight)
    batch = [torch.stack(each) for each in zip(*(task.dataset[index] for index in range(4)), strict=True)]
    losses = task.loss(task.model, batch, task.draw(torch.Generator(), 4))
    out = task.model(task.input(batch[0]))["out"]
    plain = F.cross_entropy(out, batch[1], ignore_index=IGNORED, reduction="none").mean() + 0.4 * losses["aux_loss"]
    if weight:
        plain = plain + weight * losses["dice_loss"]
        torch.testing.assert_close(losses["dice_loss"], dice_loss(out, batch[1]))
    else:
        assert "dice_loss" not in losses
    torch.testing.assert_close(losses["loss"], plain)


def test_pixels_of_a_class_count_as_much_as_its_weight():
    task, weighted = make_task(), make_task(class_weights=[0.5, *range(10)])
    batch = [torch.stack(each) for each in zip(*(task.dataset[index] for index in range(4)), strict=True)]
    weighted.model.load_state_dict(task.model.state_dict())
    losses = weighted.loss(weighted.model, batch, weighted.draw(torch.Generator(), 4))
    outputs, factors = task.model(task.input(batch[0])), torch.tensor([0.5, *range(10), *[0] * 245])[batch[1]]
    plain = [(F.cross_entropy(outputs[name], batch[1], ignore_index=IGNORED, reduction="none") * factors).mean()
             for name in ("out", "aux")]  # fmt: skip
    torch.testing.assert_close(losses["loss"], plain[0] + 0.4 * plain[1])
    with pytest.raises(InputError, match="`class_weights` has 2 factors, and the data have 11 classes"):
        make_task(class_weights=[1.0, 2.0])


def test_a_gallery_shows_classes_in_their_colours_and_names_them():
    image, classes = torch.full((3, 40, 40), 200, dtype=torch.uint8), torch.zeros(40, 40, dtype=torch.long)
    classes[:20] = 1
    colours = np.array([(0, 0, 0), (255, 0, 0)], dtype=np.uint8)
    shown = lit(image, classes, colours)
    assert shown[0, 0].tolist() == [255, 0, 0] and shown[39, 0].tolist() == [70, 70, 70]
    rows = [[shown] * 3] * 4
    plain, told = (gallery(rows, ["a", "b", "c"], {"one": colours[1]}, remark, text_size=10) for remark in ("", "mIoU"))
    pixels = np.asarray(plain)
    red = (pixels == (255, 0, 0)).all(axis=-1)
    assert told.height > plain.height and told.width == plain.width
    assert red[:-35].sum() == 4 * 3 * 20 * 40 and red[-30:].any()  # the pictures, and the legend below
