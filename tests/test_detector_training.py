import numpy as np
import pytest
import torch
from PIL import Image
from test_released import fake
from torchvision.transforms.v2 import functional as F

from d_emo.cli import train_detector
from d_emo.config import ClassifierSettings, DetectorSettings
from d_emo.data.scenes import DigitScenes
from d_emo.detection.augment import TrainingImages
from d_emo.detection.contents import describe_objects
from d_emo.errors import InputError
from d_emo.io.snapshot import kind_of, load_classifier
from d_emo.io.training_state import load_state
from d_emo.training import fit
from d_emo.training.classifier import ClassifierTask
from d_emo.training.detector import DetectorTask
from d_emo.training.optimizer import learning_rate

BACKBONE = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}
TINY = {
    "model": "ssdlite-emov2_1m", "model_options": {"backbone_options": BACKBONE, "anchors": "scaled"}, "image_size": 64,
    "batch_size": 4, "max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-3, "state_every": 2, "snapshot_every": 4,
    "num_images": 12, "validate_images": 3, "tracker": "none",
}  # fmt: skip


def train(folder, **changes):
    settings = DetectorSettings(**{**TINY, "output_dir": str(folder), **changes})
    return fit(DetectorTask(settings), settings)


@pytest.mark.parametrize("model", ["ssdlite-emov2_1m", "retinanet-emov2_1m", "maskrcnn-emov2_1m"])
def test_detector_training_resumes_exactly(model, tmp_path):
    kinds = {"bbox", "segm"} if model.startswith("maskrcnn") else {"bbox"}
    options = {**TINY["model_options"]}
    if not model.startswith("ssdlite"):
        del options["anchors"]
    changes = {"model": model, "model_options": options, "validate_every": 2}
    if "segm" in kinds:
        changes |= {"batch_size": 2, "max_steps": 2, "state_every": 1, "image_size": 32, "validate_images": 1}
    last = changes.get("max_steps", 4)
    snapshot = train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", **{**changes, "max_steps": last // 2})
    train(tmp_path / "parts", **changes, num_workers=1)
    one, two = (load_state(tmp_path / run / "states" / f"step-{last}")["model"] for run in ("whole", "parts"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    trained = load_classifier(snapshot, "detector")
    assert kind_of(tmp_path / "whole") == "detector" and trained.class_names == list("0123456789")
    image, _ = DigitScenes(changes.get("image_size", 64)).read(0)
    assert trained.model([image.float() / 255])[0]["boxes"].shape[1] == 4
    card = (snapshot / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "digit-scenes" in card and "train_detector.py" in card
    pytest.importorskip("faster_coco_eval")
    assert trained.meta["average_precision"].keys() == kinds and "| boxes |" in card


def test_masks_are_drawn_for_those_only_that_learn_from_them():
    task = DetectorTask(DetectorSettings(**TINY))
    assert "masks" not in task.dataset[0][1] and "masks" in task.source.read(0)[1]
    with_masks = TrainingImages(task.source, task.dataset.change, first_label=1, seed=task.settings.seed)
    for (image, target), (other, more) in ((task.dataset[i], with_masks[i]) for i in range(3)):
        assert "masks" in more and torch.equal(image, other)
        assert all(torch.equal(value, more[name]) for name, value in target.items())


def test_the_backbone_starts_from_a_classifier(tmp_path):
    settings = ClassifierSettings(
        model="emov2_1m", model_options=BACKBONE, dataset="digits", image_size=32, batch_size=4, max_steps=1,
        output_dir=str(tmp_path / "classifier"), tracker="none", validate_images=4,
    )  # fmt: skip
    classifier = load_classifier(fit(ClassifierTask(settings), settings)).model.state_dict()
    task = DetectorTask(DetectorSettings(**TINY, init_from=str(tmp_path / "classifier")))
    mine = task.model.backbone.maps.emo.state_dict()
    assert len(mine) > 50 and all(torch.equal(value, classifier[name]) for name, value in mine.items())
    assert any("backbone starts from" in line for line in task.introduction())
    with pytest.raises(InputError, match="does not fit the backbone"):
        DetectorTask(DetectorSettings(**{**TINY, "model_options": None}, init_from=str(tmp_path / "classifier")))


def test_the_backbone_starts_from_a_released_file(tmp_path):
    weights, file = fake("emov2_5m"), str(tmp_path / "emov2_5m.pth")
    torch.save({"net": weights}, file)
    changes = {"model": "retinanet-emov2_5m", "model_options": None, "init_from": file}
    task = DetectorTask(DetectorSettings(**{**TINY, **changes}))
    qk = task.model.backbone.maps.emo.stages[2][1].operator.expand.qk.weight
    assert torch.equal(qk, weights["stage3.1.eops.0.qk.conv.weight"][:, :, 0, 0])
    with pytest.raises(InputError, match="does not fit the backbone"):
        DetectorTask(DetectorSettings(**{**TINY, "model_options": None}, init_from=file))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "emov2_1m"}, "emov2_1m is a classifier; train it with `d-emo train-classifier`"),
        ({"annotations": "objects.json"}, "`annotations` objects.json needs `images`"),
        ({"images": "photos"}, "`images` photos needs `annotations`"),
        ({"model_options": {"num_classes": 3}}, "`model_options`: num_classes follows"),
        ({"init_from": "nowhere/classifier"}, "nowhere/classifier does not exist"),
        ({"model_options": {"anchors": "odd"}}, "unknown anchors 'odd'"),
    ],
)
def test_settings_that_do_not_go_together(changes, words):
    with pytest.raises(InputError, match=words):
        DetectorTask(DetectorSettings(**{**TINY, **changes}))


def test_the_schedule_is_constant_for_half_of_the_run():
    settings = DetectorSettings(max_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(settings, step) for step in (4, 10, 49, 75, 99)]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0.0], abs=2e-3)


class Objects:
    """Three classes, one of them of nothing; a picture each with objects, with none that can be trained on, broken."""

    name, class_names = "objects", ["cat", "dog", "owl"]

    def __len__(self):
        return 3

    def read(self, index):
        if index == 2:
            raise InputError("cannot read the image 2.png (broken); repair or replace it")
        boxes = torch.tensor([[0.0, 0, 10, 4], [2, 2, 8, 30], [5, 5, 5, 9]])
        labels, crowd = torch.tensor([1, 0, 1]), torch.tensor([index == 1, index == 1, False])
        return torch.zeros(3, 20, 40, dtype=torch.uint8), {"boxes": boxes, "labels": labels, "iscrowd": crowd}


def test_objects_are_counted_as_training_takes_them():
    said = describe_objects(Objects(), 1000)
    assert said == [
        ("data", "objects: 3 images of 3 classes; 2 looked at"),
        ("LOOK", "1 unreadable, training stops at them: cannot read the image 2.png (broken); repair or replace it"),
        ("sizes", "all are 40 x 20 px"),
        ("objects", "0 to 2 an image, median 1; shorter side 4 to 6 px, median 5"),
        ("by class", "dog 1, cat 1"),
        ("beside", "4 objects not to be trained on: crowds, or without an area"),
        ("LOOK", "1 image without an object to train on"),
        ("LOOK", "1 class without an object: owl"),
    ]


@pytest.mark.parametrize("model", ["ssdlite-emov2_1m", "maskrcnn-emov2_1m"])
def test_a_dry_run_says_what_there_is_and_writes_one_picture_only(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"model_options": {"backbone_options": BACKBONE}, "batch_size": 2, "image_size": 32}
    options = {} if model.startswith("ssd") else options
    train_detector.run(DetectorSettings(**{**TINY, "model": model, "output_dir": "run", "dry_run": True, **options}))
    said = {line[:10].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert said["data"] == "digit-scenes: 12 images of 10 classes; 12 looked at" and "all 4 steps" in said["time"]
    assert said["training"].startswith(f"{3 if model.startswith('ssd') else 6} steps of") and "GiB" in said["memory"]
    (picture,) = (path for path in tmp_path.rglob("*") if path.is_file())
    columns = 4 if model.startswith("ssd") else 2
    assert picture == tmp_path / "samples" / "dry-run-run.png" and said["batch"].startswith("samples/dry-run-run.png")
    assert Image.open(picture).size == (columns * 324 + 4, 328)


def test_a_dry_run_draws_the_boxes_that_the_network_is_given():
    task = DetectorTask(DetectorSettings(**TINY))
    batch = TrainingImages.collate([task.dataset[0], task.dataset[1]])
    drawn, count = task.picture(batch)
    nothing = [{name: value[:0] for name, value in each.items()} for each in batch[1]]
    plain, _ = task.picture([batch[0], nothing])
    changed = np.any(np.asarray(drawn) != np.asarray(plain), axis=2)[4:324, 4:324]
    left, top, right, bottom = (batch[1][0]["boxes"][0] * 320 / 64).tolist()
    assert count == 2 and changed[round((top + bottom) / 2), max(0, round(left))] and changed.mean() < 0.9
    seen = F.resize(batch[0][0], [320, 320], antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(plain)[4:324, 4:324] / 255 - seen).max() < 0.02
