"""The papers' recipes on COCO and ADE20K in configs/: they load, fit their models, and train a step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from d_emo.config import DetectorSettings, SegmenterSettings, parse_settings
from d_emo.models import create_model
from d_emo.models.registry import model_kind
from d_emo.training import fit
from d_emo.training.detector import DetectorTask
from d_emo.training.optimizer import learning_rate, make_optimizer
from d_emo.training.segmenter import SegmenterTask

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {
    file.stem: yaml.safe_load(file.read_text())
    for files in ("detection/coco_*.yaml", "segmentation/ade20k_*.yaml") for file in sorted(CONFIGS.glob(files))
}  # fmt: skip
TINY = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}
PAPERS = {
    "coco_ssdlite": (192, 2.4e-3, 0.05, 0.1, "constant-cosine"),
    "coco_retinanet": (16, 2e-4, 0.05, 0.1, "constant-cosine"),
    "coco_maskrcnn": (16, 2e-4, 0.05, 0.1, "constant-cosine"),
    "coco_ssdlite_emov1": (192, 1.2e-3, 0.05, None, "cosine"),
    "coco_retinanet_emov1": (32, 2e-4, 0.05, None, "cosine"),
    "ade20k_deeplabv3": (32, 1.2e-4, 0.05, 0.1, "constant-cosine"),
    "ade20k_pspnet": (32, 1.2e-4, 0.05, 0.1, "constant-cosine"),
    "ade20k_semfpn": (32, 1.2e-4, 0.05, None, "constant-cosine"),
    "ade20k_segformer": (32, 1.2e-4, 0.05, None, "constant-cosine"),
    "ade20k_deeplabv3_emov1": (32, 1.2e-4, 0.01, None, "poly"),
}  # fmt: skip
"""Images a step, learning rate, weight decay, largest gradient norm, schedule."""


def load(name, *arguments):
    kind = DetectorSettings if model_kind(RECIPES[name]["model"]) == "detector" else SegmenterSettings
    folder = "detection" if kind is DetectorSettings else "segmentation"
    return parse_settings(kind, "", ["--config", str(CONFIGS / folder / f"{name}.yaml"), *arguments])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_papers_and_build_their_models(name):
    settings = load(name)
    assert {key: getattr(settings, key) for key in RECIPES[name]} == RECIPES[name]
    figures = (settings.batch_size, settings.learning_rate, settings.weight_decay, settings.grad_clip)
    assert (*figures, settings.schedule) == PAPERS[name]
    if name.startswith("coco"):
        assert settings.augment == ("ssd" if "ssdlite" in name else "flip")
    with torch.device("meta"):
        model = create_model(settings.model, **(settings.model_options or {}))
    assert model.num_classes == (80 if name.startswith("coco") else 150)


def test_every_recipe_is_listed():
    assert PAPERS.keys() == RECIPES.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three pictures with two objects of two classes, as COCO has them, and as ADE20K has them."""
    root = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}]}
    for number in range(3):
        for path in (root / "train", root / "images" / "training", root / "annotations" / "training"):
            path.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))
        image.save(root / "train" / f"{number}.png")
        image.save(root / "images" / "training" / f"{number}.png")
        mask = np.ones((40, 48), dtype=np.uint8)
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 40})
        for category, left in ((1, 4), (7, 26)):
            corners = [left, 8, left + 16, 8, left + 16, 30, left, 30]
            content["annotations"].append({
                "id": len(content["annotations"]), "image_id": number, "category_id": category, "iscrowd": 0,
                "bbox": [left, 8, 16, 22], "area": 352, "segmentation": [corners],
            })  # fmt: skip
            mask[8:30, left : left + 16] = category + 1
        Image.fromarray(mask).save(root / "annotations" / "training" / f"{number}.png")
    (root / "objects.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_a_step(name, data, tmp_path, monkeypatch):
    own = {**(RECIPES[name].get("model_options") or {}), "backbone_options": TINY}
    changes = ["--output-dir", str(tmp_path / "run"), "--tracker", "none", "--max-steps", "1", "--warmup-steps", "0",
               "--batch-size", "2", "--image-size", "32", "--num-workers", "0"]  # fmt: skip
    if name.startswith("coco"):
        changes += ["--annotations", str(data / "objects.json"), "--images", str(data / "train")]
        if name == "coco_maskrcnn":  # the reading of masks needs a package that may not be here
            monkeypatch.setattr("d_emo.detection.coco.decode_mask", painted)
    else:
        own["width"] = 16
        changes += ["--data-dir", str(data)]
    settings = load(name, *changes, "--model-options", json.dumps(own))
    task = (DetectorTask if name.startswith("coco") else SegmenterTask)(settings)
    if name == "coco_maskrcnn":
        task.model.rpn._post_nms_top_n = {"training": 20, "testing": 20}  # seconds less
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    fit(task, settings)
    after = task.model.state_dict()
    changed = [key for key in before if key.endswith(".bias") and not torch.equal(after[key], before[key])]
    parts = {key.partition(".")[0] for key in changed}  # biases are not decayed: it is a gradient that moves them
    assert "backbone" in parts and len(parts) > 1


def painted(segmentation, height, width):
    """The mask of a polygon that is a box."""
    left, top, _, _, right, bottom, _, _ = segmentation[0]
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def test_heads_learn_at_ten_times_the_rate_where_the_paper_says_so(data):
    for name, scales in (("ade20k_semfpn", {1.0, 10.0}), ("ade20k_pspnet", {1.0})):
        settings = load(name, "--data-dir", str(data), "--model-options", json.dumps({"backbone_options": TINY}))
        task = SegmenterTask(settings)
        groups = make_optimizer(task.model, settings, task.lr_scales, torch.device("cpu")).param_groups
        assert {group["lr_scale"] for group in groups} == scales
        assert {task.lr_scales.get(key, 1.0) for key, _ in task.model.named_parameters() if ".neck." in key} <= {1.0}


def test_poly_falls_from_the_first_step():
    settings = SegmenterSettings(max_steps=100, warmup_steps=0, learning_rate=1.0, schedule="poly")
    rates = [learning_rate(settings, step) for step in (0, 50, 99)]
    assert rates == pytest.approx([1, 0.5**0.9, 0.01**0.9])


@pytest.mark.parametrize("name", ["retinanet-emov2_1m", "maskrcnn-emov2_1m"])
def test_training_images_draw_one_of_several_sides(name):
    model = create_model(name, num_classes=2, min_size=[32, 48, 64], max_size=200, backbone_options=TINY)
    transform, image = model.transform, [torch.rand(3, 40, 50)]
    torch.manual_seed(0)
    drawn = {min(transform.train()(image)[0].image_sizes[0]) for _ in range(30)}
    assert drawn == {32, 48, 64} and min(transform.eval()(image)[0].image_sizes[0]) == 64
