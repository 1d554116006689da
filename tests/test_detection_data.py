import json

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.data import Reading
from d_emo.data.sampler import EpochIndex
from d_emo.data.scenes import DigitScenes, boxes_of
from d_emo.detection.augment import TrainingImages, augmentation, trainable
from d_emo.detection.average_precision import AveragePrecision
from d_emo.detection.coco import CocoImages
from d_emo.errors import InputError

SQUARE = {"segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]]}
FILE = {
    "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 16},
               {"id": 3, "file_name": "b.png", "width": 8, "height": 8}],
    "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "ant"}],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 9, "bbox": [2, 2, 8, 8], **SQUARE},
        {"id": 5, "image_id": 7, "category_id": 4, "bbox": [15, 10, 9, 9], "area": 30, "iscrowd": 0,
         "segmentation": {"size": [16, 20], "counts": [300, 20]}},
        {"id": 6, "image_id": 7, "category_id": 4, "bbox": [0, 0, 20, 16], "area": 320, "iscrowd": 1,
         "segmentation": {"size": [16, 20], "counts": "P:"}},
        {"id": 8, "image_id": 7, "category_id": 4, "bbox": [3, 3, 0, 4], "area": 0, "iscrowd": 0, **SQUARE},
    ],
}  # fmt: skip


def evaluator():
    return pytest.importorskip("faster_coco_eval.core.mask")


def opened(folder, content=FILE, **options):
    for row in FILE["images"]:
        Image.new("RGB", (row["width"], row["height"]), "red").save(folder / row["file_name"])
    (folder / "objects.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoImages(folder / "objects.json", folder, reading=Reading(), **options)


def test_scenes_depend_on_their_number_and_split_alone():
    one, again, other = DigitScenes(96), DigitScenes(96, num_images=5), DigitScenes(96, split="test")
    for index in range(4):
        image, target = one.read(index)
        same, _ = again.read(index)
        assert torch.equal(image, same) and not torch.equal(image, other.read(index)[0])
        assert image.shape == (3, 96, 96) and 1 <= len(target["labels"]) <= 6
        assert target["masks"].sum(dim=0).max() == 1  # they do not overlap
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            rows, columns = mask.nonzero().T
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_boxes_are_the_smallest_around_their_masks():
    masks = torch.zeros(2, 5, 7, dtype=torch.uint8)
    masks[0, 1:3, 2:7] = masks[1, 4, 0] = 1
    assert boxes_of(masks).tolist() == [[2, 1, 7, 3], [0, 4, 1, 5]]


def test_a_file_of_coco_is_read_as_pycocotools_reads_it(tmp_path):
    evaluator()
    images = opened(tmp_path, with_masks=True)
    assert images.class_names == ["ant", "cat"] and [images.origin(i)[-5:] for i in range(2)] == ["b.png", "a.png"]
    picture, target = images.read(1)
    assert picture.shape == (3, 16, 20) and target["labels"].tolist() == [1, 0, 0, 0]
    assert target["boxes"][:2].tolist() == [[2, 2, 10, 10], [15, 10, 24, 19]]
    assert target["area"].tolist() == [64, 30, 320, 0] and target["iscrowd"].tolist() == [False, False, True, False]
    assert target["masks"][0].sum() == 64 and target["masks"][1].sum() == 20
    assert images.read(0)[1]["boxes"].shape == (0, 4) and images.read(0)[1]["masks"].shape == (0, 8, 8)
    target["boxes"][3] = torch.tensor([25.0, 2, 30, 9])  # outside of the picture
    left = trainable(target, 16, 20)  # clipped; no crowd, nothing outside
    assert left["boxes"].tolist() == [[2, 2, 10, 10], [15, 10, 20, 16]] and left["masks"].shape[0] == 2


def change(path, value):
    """The file with one thing changed; ``...`` takes it out."""
    content = json.loads(json.dumps(FILE))
    *way, last = path
    place = content
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "objects.json is damaged"),
        ("[]", "no JSON object with images, categories and annotations"),
        (change(["images"], ...), "has no list 'images'"),
        (change(["images"], []), "names no images|image 7"),
        (change(["annotations", 0, "bbox"], ...), "annotation 0 of 'annotations' has no 'bbox'"),
        (change(["annotations", 0, "bbox"], [1, 2, 3]), r"annotation 0 has the bbox \[1, 2, 3\], which is not four"),
        (change(["annotations", 0, "bbox"], [1, 2, 3, float("nan")]), "annotation 0 has the bbox"),
        (change(["annotations", 1, "area"], "big"), "annotation 5 has the area 'big', which is not a number"),
        (change(["annotations", 1, "category_id"], 11), "annotation 5 is of the category 11"),
        (change(["annotations", 1, "image_id"], 11), "annotation 5 belongs to the image 11"),
        (change(["annotations", 1, "id"], 6), "the annotation id 6 is there twice"),
        (change(["categories", 1, "name"], "cat"), "the category name cat is there twice"),
        (change(["images", 0, "file_name"], "none.png"), "names the image none.png, which .* does not hold"),
        (change(["annotations", 0, "segmentation"], [[1, 1, 5, 5]]), "annotation 0 has a polygon of 4 numbers"),
        (change(["annotations", 0, "segmentation"], ...), "annotation 0 has no mask"),
        (change(["annotations", 0, "segmentation"], [[1, 1, 5, 1, 5, float("nan")]]), "annotation 0 .* coordinate nan"),
        (change(["annotations", 0, "segmentation"], [[1, 1, 5, 1, 5, 1e9]]), "annotation 0 has .* in no picture"),
        (change(["annotations", 0, "segmentation"], ["P:"]), "annotation 0 has a polygon that is no list of numbers"),
        (change(["annotations", 1, "id"], None), "annotation None of 'annotations' has no 'id'"),
        (change(["annotations", 1, "image_id"], [7]), r"annotation 5 of 'annotations' has the image_id \[7\]"),
        (change(["images", 0, "id"], "7"), "some ids of 'images' are numbers and some are text"),
        (change(["images", 0, "file_name"], 7), "entry 0 of 'images' has the file_name 7"),
        (change(["images", 0, "width"], "20"), "entry 0 of 'images' has the width '20'"),
        (change(["annotations", 1, "segmentation", "size"], [20, 16]), "annotation 5 has a mask of the size"),
        (change(["annotations", 1, "segmentation", "counts"], [1, 2]), "annotation 5 has a mask of 3 pixels"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_with_its_file_and_number(content, words, tmp_path):
    with pytest.raises(InputError, match=words):
        opened(tmp_path, content, with_masks=True)


def test_what_is_wrong_inside_is_named_when_it_is_read(tmp_path):
    evaluator()
    images = opened(tmp_path, change(["annotations", 2, "segmentation", "counts"], "!!"), with_masks=True)
    with pytest.raises(InputError, match="objects.json: annotation 6 has a damaged mask"):
        images.read(1)
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b.png has 9 x 8 px, and .*objects.json says 8 x 8"):
        images.read(0)


@pytest.mark.parametrize("augment", ["ssd", "flip", "none"])
def test_augmented_objects_stay_where_their_masks_are(augment):
    scenes = DigitScenes(96)
    images = TrainingImages(scenes, augmentation(augment, flip=True, side=64), first_label=1, seed=3)
    shapes = set()
    for number in range(12):
        image, target = images[EpochIndex(number, epoch=number)]
        again, _ = images[EpochIndex(number, epoch=number)]
        assert torch.equal(image, again) and 0 <= image.min() and image.max() <= 1
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
        assert (target["labels"] >= 1).all() and (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        seen = target["masks"].flatten(1).any(dim=1)  # a box may have been cut off from its ink
        off = (boxes_of(target["masks"][seen]) - target["boxes"][seen]).abs()
        assert len(off) == 0 or off.median() <= 2
        shapes.add(tuple(image.shape))
    assert shapes == {(3, 64, 64) if augment == "ssd" else (3, 96, 96)}
    first, second = (images[EpochIndex(0, epoch=epoch)][0] for epoch in (1, 2))
    assert augment == "none" or any(
        not torch.equal(images[EpochIndex(n, epoch=1)][0], images[EpochIndex(n, epoch=2)][0]) for n in range(4)
    )
    assert first.shape == second.shape


def test_a_picture_without_objects_can_be_augmented(tmp_path):
    images = TrainingImages(opened(tmp_path), augmentation("ssd", flip=True, side=32), first_label=0, seed=0)
    image, target = images[0]
    assert image.shape == (3, 32, 32) and target["boxes"].shape == (0, 4) and len(target["labels"]) == 0


def scattered(number):
    """Boxes of a picture, and what a bad detector makes of them."""
    draw = torch.Generator().manual_seed(number)
    count, extra = torch.randint(0, 5, (2,), generator=draw).tolist()
    boxes = torch.rand(count, 4, generator=draw) * 100
    boxes[:, 2:] += boxes[:, :2] + 5
    labels = torch.randint(0, 2, (count,), generator=draw)
    more = torch.rand(extra, 4, generator=draw) * 100 + torch.tensor([0.0, 0, 100, 100])
    found = torch.cat([boxes + 4 * torch.randn(count, 4, generator=draw), more])
    said = torch.cat([labels, torch.randint(0, 2, (extra,), generator=draw)])
    crowd = torch.rand(count, generator=draw) < 0.2
    return {"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)}, {
        "boxes": found, "labels": said, "scores": torch.rand(count + extra, generator=draw)
    }  # fmt: skip


def test_average_precision_is_that_of_pycocotools(capsys):
    evaluator()
    tools, coco = pytest.importorskip("pycocotools.cocoeval"), pytest.importorskip("pycocotools.coco")
    ours = AveragePrecision(["a", "b"])
    for number in range(30):
        ours.add((250, 250), *scattered(number))
    truth = coco.COCO()
    truth.dataset = {"images": ours.images, "annotations": ours.objects, "categories": ours.categories}
    truth.createIndex()
    theirs = tools.COCOeval(truth, truth.loadRes(ours.found), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    figures = list(ours.figures()["bbox"].values())
    assert 0 < figures[0] < 1 and figures == pytest.approx(theirs.stats[:6].tolist(), abs=1e-6)


def test_average_precision_at_its_ends():
    evaluator()
    perfect, blind, idle = (AveragePrecision(["a", "b"], masks=masks) for masks in (True, True, False))
    for number in range(4):
        image, target = DigitScenes(64).read(number)
        target = {**target, "labels": target["labels"] % 2}
        found = {**target, "scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
        perfect.add((64, 64), target, found)
        blind.add((64, 64), target, {name: value[:0] for name, value in found.items()})
    for kind in ("bbox", "segm"):
        assert perfect.figures()[kind]["mAP"] == pytest.approx(1)  # 0.25 and the like with ids from 0
        assert blind.figures()[kind]["mAP"] == 0
    idle.add((8, 8), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)})  # fmt: skip
    assert idle.figures()["bbox"]["mAP"] == -1 and np.isfinite(idle.figures()["bbox"]["small"])
