import pytest
import torch
from test_released import fake

from d_emo.config import ClassifierSettings, DetectorSettings
from d_emo.data.scenes import DigitScenes
from d_emo.detection.augment import TrainingImages
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
        ({"model": "emov2_1m"}, "emov2_1m is a classifier; train it with scripts/train_classifier.py"),
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
