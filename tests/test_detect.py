import json

import pytest
import torch
from PIL import Image, ImageColor
from test_detector_training import BACKBONE
from torchvision.transforms.v2.functional import to_pil_image

from d_emo.cli import run_verb
from d_emo.cli.detect import run_lengths
from d_emo.config import DetectorSettings
from d_emo.data.scenes import DigitScenes
from d_emo.detection.drawing import COLOURS, draw_objects, truth_beside_found
from d_emo.errors import InputError
from d_emo.export import export, portable_detector, stir
from d_emo.io.snapshot import save_classifier
from d_emo.models import create_model

META = {"step": 1, "weights": "ema", "image_size": 64, "class_names": list("0123456789"), "data": "digit-scenes"}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Snapshots of random detectors that are sure of a lot, and two pictures."""
    folder = tmp_path_factory.mktemp("detectors")
    for system, size in (("ssdlite", {"image_size": 64}), ("maskrcnn", {"min_size": 64, "max_size": 64})):
        torch.manual_seed(0)
        model = create_model(f"{system}-emov2_1m", num_classes=10, backbone_options=BACKBONE, **size).eval()
        model.score_thresh = 0.0
        save_classifier(folder / system, model, meta=META, kind="detector",
                        settings=DetectorSettings(model=f"{system}-emov2_1m").resolve())  # fmt: skip
    (folder / "pictures").mkdir()
    for number in range(2):
        to_pil_image(DigitScenes(64).read(number)[0]).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.parametrize("system", ["ssdlite", "maskrcnn"])
def test_detect_writes_pictures_and_json(system, detectors, tmp_path, capsys):
    run_verb("detect", [str(detectors / "pictures"), "--checkpoint", str(detectors / system), "--score", "0.01",
                        "--output", str(tmp_path / "out")])  # fmt: skip
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["picture"] for entry in content["images"]] == ["0000-0.png", "0001-1.png"]
    for entry in content["images"]:
        assert Image.open(tmp_path / "out" / entry["picture"]).size == (64, 64) == (entry["width"], entry["height"])
        for each in entry["objects"]:
            assert each["class"] == META["class_names"][each["label"]] and len(each["box"]) == 4
            assert sum(each["mask"]["counts"]) == 64 * 64 if system == "maskrcnn" else "mask" not in each
    assert any(entry["objects"] for entry in content["images"])
    assert "detections.json" in capsys.readouterr().out


def test_detect_refuses_other_snapshots_and_empty_folders(detectors, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        run_verb("detect", [str(tmp_path / "none"), "--checkpoint", str(detectors / "ssdlite")])
    with pytest.raises(InputError, match="is not a snapshot"):
        run_verb("detect", [str(detectors / "pictures"), "--checkpoint", str(detectors)])


def test_run_lengths_are_cocos():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    assert run_lengths(mask) == [12]
    mask[1:, 1] = mask[0, 2] = True
    assert run_lengths(mask) == [4, 3, 5]  # column by column
    assert run_lengths(~mask) == [0, 4, 3, 5] and run_lengths(torch.ones(1, 2, dtype=torch.bool)) == [0, 2]


def test_truth_stands_beside_what_was_found(detectors):
    model = create_model("ssdlite-emov2_1m", num_classes=10, image_size=64, backbone_options=BACKBONE).eval()
    picture = truth_beside_found(model, DigitScenes(64), [0, 1, 2], side=100)
    assert picture.size == (4 * 104 + 4, 2 * 104 + 4 + 20)


def test_tags_are_legible_and_stay_within_the_picture():
    boxes = torch.tensor([[0.0, 0, 20, 30], [150, 100, 160, 120]])  # no room above; none to the right
    drawn = draw_objects(torch.zeros(3, 160, 160, dtype=torch.uint8),
                         {"boxes": boxes, "labels": torch.tensor([0, 9]), "scores": torch.tensor([0.5, 1.0])},
                         list("0123456789"))  # fmt: skip
    for label, (rows, columns), white in ((0, ((1, 11), (1, 31)), True), (9, ((89, 99), (125, 159)), False)):
        tag = drawn[:, slice(*rows), slice(*columns)]
        ground = torch.tensor(ImageColor.getrgb(COLOURS[label]))[:, None, None]
        assert (tag == ground).all(dim=0).float().mean() > 0.3, "a ground of the class's colour"
        inked = (tag.amin(dim=0) > 150) if white else (tag.amax(dim=0) < 110)
        assert inked.sum() > 8, "white on dark grounds, black on light ones"


def test_a_single_class_is_not_named():
    ground, place = torch.zeros(3, 160, 160, dtype=torch.uint8), (slice(None), slice(24, 49), slice(20, 120))
    objects = {"boxes": torch.tensor([[20.0, 50, 100, 140]]), "labels": torch.tensor([0])}
    assert not draw_objects(ground, objects, ["nucleus"])[place].any()
    widths = []
    for names in (["nucleus"], ["nucleus", "other"]):
        sure = draw_objects(ground, {**objects, "scores": torch.tensor([0.5])}, names)[place]
        widths.append(int(sure.amax(dim=(0, 1)).count_nonzero()))
    assert 10 < widths[0] < widths[1] / 2


def test_the_surest_of_two_names_for_one_thing_is_on_top():
    box = torch.tensor([[20.0, 60, 100, 140]])
    both = {"boxes": box.repeat(2, 1), "labels": torch.tensor([3, 9]), "scores": torch.tensor([0.8, 0.8 / 2])}
    alone = {name: value[:1] for name, value in both.items()}
    ground, names = torch.zeros(3, 160, 160, dtype=torch.uint8), list("0123456789")
    assert torch.equal(draw_objects(ground, both, names), draw_objects(ground, alone, names))


@pytest.mark.parametrize("system", ["ssdlite", "retinanet"])
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_boxes_and_scores_leave_python(system, ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    size = {"image_size": 64} if system == "ssdlite" else {"min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    model = create_model(f"{system}-emov2_1m", num_classes=3, backbone_options=BACKBONE, **size).eval()
    stir(model)
    portable = portable_detector(model, 64)
    images = DigitScenes(64).read(0)[0].float() / 255
    with torch.no_grad():
        boxes, scores = portable.module(images[None])[0].split([4, 3], dim=1)
        model.score_thresh, model.nms_thresh = 0.0, 1.0  # nothing is suppressed
        model.topk_candidates = model.detections_per_img = 10**6
        found = model([images])[0]
    best = found["scores"].argmax()
    label = int(found["labels"][best]) - model.first_label
    assert found["scores"][best] == pytest.approx(scores.max().item(), rel=1e-4)
    box = boxes[scores[:, label].argmax()].clamp(0, 64)
    assert torch.allclose(found["boxes"][best], box, atol=1e-2)
    assert export(portable, tmp_path / f"detector{ending}") < 1e-4


def test_mask_rcnn_is_refused_in_words():
    with torch.device("meta"), pytest.raises(InputError, match="looks at the regions that it found"):
        portable_detector(create_model("maskrcnn-emov2_1m"))
