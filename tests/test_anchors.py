"""How well anchors fit objects."""

import pytest
import torch

from d_emo.detection.anchors import fit_of_anchors
from d_emo.models import create_model

TINY = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}


class Pictures:
    """One picture of a height and a width, with one object of each given box."""

    def __init__(self, boxes, size, **more):
        self.boxes, self.size, self.more = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size, more

    def __len__(self):
        return 1

    def read(self, index):
        labels = torch.zeros(len(self.boxes), dtype=torch.long)
        return torch.zeros(3, *self.size, dtype=torch.uint8), {"boxes": self.boxes, "labels": labels, **self.more}


def model(name="ssdlite-emov2_1m", **options):
    return create_model(name, num_classes=2, backbone_options=TINY, **options)


def test_an_anchor_fits_itself_and_resizing_counts():
    """The first cell of SSDLite at 320 px has a square of 48 px around (8, 8); at 640 px an object is halved."""
    at_320 = Pictures([[152 - 24, 152 - 24, 152 + 24, 152 + 24], [136, 140, 184, 164]], (320, 320))
    _, medium, large = fit_of_anchors(model(), at_320, sides=(16, 96))
    assert medium.count == 2 and medium.best == pytest.approx((1 + best_of([136, 140, 184, 164])) / 2, abs=1e-3)
    assert (large.count, large.best != large.best) == (0, True)  # of none there is no mean
    halved = Pictures([[256, 256, 352, 352]], (640, 640))
    assert fit_of_anchors(model(), halved)[2].best == pytest.approx(1, abs=1e-3)  # sizes are the picture's own


def best_of(box):
    """The best overlap with the anchors of 48 px and their sizes beside it, every 16 px, by hand."""
    sides = [(48, 48), ((48 * 100) ** 0.5,) * 2, *((48 * a, 48 / a) for r in (2, 3) for a in (r**0.5, r**-0.5))]
    best = 0.0
    for x in range(8, 320, 16):
        for y in range(8, 320, 16):
            for width, height in sides:
                across = min(box[2], x + width / 2) - max(box[0], x - width / 2)
                down = min(box[3], y + height / 2) - max(box[1], y - height / 2)
                both = max(0, across) * max(0, down)
                union = width * height + (box[2] - box[0]) * (box[3] - box[1]) - both
                best = max(best, both / union)
    return best


def test_crowds_are_left_out_and_areas_part_the_sizes():
    boxes = [[0, 0, 100, 100], [0, 0, 100, 100], [0, 0, 100, 100], [5, 5, 5, 9]]
    more = {"iscrowd": torch.tensor([False, True, False, False]), "area": torch.tensor([31.9**2, 1e4, 32.0**2, 0])}
    rows = fit_of_anchors(model(), Pictures(boxes, (320, 320), **more))
    assert [row.count for row in rows] == [1, 1, 0]
    assert [row.count for row in fit_of_anchors(model(), Pictures([], (320, 320)))] == [0, 0, 0]


@pytest.mark.parametrize("name", ["retinanet-emov2_1m", "maskrcnn-emov2_1m"])
def test_pyramids_have_anchors_too(name):
    small = model(name, min_size=64, max_size=96).train()
    (row,) = [row for row in fit_of_anchors(small, Pictures([[0, 0, 32, 32]], (64, 80)), sides=()) if row.count]
    assert row.best > 0.3 and small.training


def test_scaled_anchors_reach_large_objects_of_512_px_and_fixed_ones_the_small():
    pictures = Pictures([[56, 56, 456, 456], [100, 100, 128, 128]], (512, 512))
    fixed, scaled = (fit_of_anchors(model(image_size=512, anchors=kind), pictures) for kind in ("fixed", "scaled"))
    assert scaled[2].best > fixed[2].best + 0.1 and fixed[0].best > scaled[0].best + 0.1
    assert [row.reached for row in (scaled[2], scaled[0])] == [1, 0]
