"""Detectors, segmenters and video classifiers leave Python: sizes, objects, and what is refused."""

import pytest
import torch
from test_detector_training import BACKBONE

from d_emo.cli import run_verb
from d_emo.config import VideoSettings
from d_emo.errors import InputError
from d_emo.export import (
    SegmenterOutput,
    detections_apart,
    export,
    open_portable,
    portable_classifier,
    portable_detector,
    stir,
    write_onnx,
)
from d_emo.io.snapshot import save_classifier
from d_emo.models import create_model
from d_emo.segmentation.heads import part_means

slow = pytest.mark.slow


def detector(system):
    torch.manual_seed(0)
    size = {"image_size": 64} if system == "ssdlite" else {"min_size": 64, "max_size": 96}
    model = create_model(f"{system}-emov2_1m", num_classes=3, backbone_options=BACKBONE, **size).eval()
    stir(model, lambda: model.dense_outputs(torch.randn(2, 3, 128, 128)))
    if system == "retinanet":
        torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, -2.0)
        torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.05)
    return model


def segmenter(name):
    torch.manual_seed(0)
    own = {"widths": [32, 32, 32, 64, 64]} if name.startswith("u") else {"backbone_options": BACKBONE}
    model = create_model(name if name.startswith("u") else f"{name}-emov2_1m", num_classes=3, **own).eval()
    stir(model, lambda: model.logits(torch.randn(2, 3, 64, 64)))
    return model


def needs(ending):
    for name in ("onnxruntime", "onnxscript") if ending == "onnx" else ():
        pytest.importorskip(name)


@pytest.mark.parametrize("system", ["ssdlite", "retinanet"])
def test_boxes_and_scores_of_images_of_another_size(system):
    """Are those that torchvision's post-processing starts from: resized by SSDLite, filled up to 32 by RetinaNet."""
    model, image = detector(system), torch.rand(3, 70, 90)
    portable = portable_detector(model, dynamic_size=True)
    with torch.no_grad():
        boxes, scores = portable.module(image[None])[0].split([4, 3], dim=1)
        model.score_thresh, model.nms_thresh, model.topk_candidates, model.detections_per_img = 0.0, 1.0, 10**6, 10**6
        model.transform.min_size, model.transform.max_size = (70,), 90
        found = model([image])[0]
    order = scores.flatten().argsort(descending=True)[:50]
    torch.testing.assert_close(found["scores"][:50], scores.flatten()[order])
    torch.testing.assert_close(found["labels"][:50] - model.first_label, order % 3)
    expected = boxes[order // 3].clamp(min=0)
    expected = torch.stack([expected[:, 0].clamp(max=90), expected[:, 1].clamp(max=70),
                            expected[:, 2].clamp(max=90), expected[:, 3].clamp(max=70)], dim=1)  # fmt: skip
    torch.testing.assert_close(found["boxes"][:50], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("system", "ending"), [
    pytest.param(system, ending, marks=slow) for system in ("ssdlite", "retinanet") for ending in ("pt2", "onnx")
])  # fmt: skip
def test_boxes_and_scores_with_free_sides(system, ending, tmp_path):
    needs(ending)
    size = 64 if system == "ssdlite" else (160, 192)
    assert export(portable_detector(detector(system), size, dynamic_size=True), tmp_path / f"network.{ending}") < 1e-4


@pytest.mark.parametrize("system", ["ssdlite", pytest.param("retinanet", marks=slow),
                                    pytest.param("maskrcnn", marks=slow)])  # fmt: skip
def test_what_is_found_leaves_python(system, tmp_path):
    """In onnxruntime as torchvision finds it, in images of any size and with any number of objects."""
    needs("onnx")
    portable = portable_detector(detector(system), (64, 96), dynamic_size=True, detections=True)
    run, counts = write_onnx(portable, tmp_path / "network.onnx"), set()
    for number, size in enumerate([(64, 96), (80, 70), (33, 120), (64, 96)]):
        (image,) = portable.example(number + 1, size)
        with torch.no_grad():
            expected = portable.module(image)
        found = run(image)
        assert detections_apart(found, expected, max(size)) < 1e-4
        assert found[2].min() >= 0 and found[2].max() <= 2 and found[0].max() <= max(size)
        assert system != "maskrcnn" or found[3].shape[1:] == size
        counts.add(len(expected[0]))
    assert len(counts) > 1 or system == "maskrcnn"  # which has 100
    with torch.no_grad():
        nothing = [each[:0] for each in expected]
    assert detections_apart(found, nothing, 96) == float("inf")


def test_a_difference_of_objects_is_that_of_the_nearest_of_the_label():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores, labels, masks = torch.tensor([0.9, 0.8, 0.8]), torch.tensor([0, 0, 1]), torch.zeros(3, 4, 4)
    expected, swapped = (boxes, scores, labels, masks), [2, 0, 1]
    assert detections_apart([each[swapped] for each in expected], expected, 100) == 0
    moved = boxes + torch.tensor([0.0, 0, 0, 1])
    assert detections_apart((moved, scores, labels, masks), expected, 100) == pytest.approx(0.01)
    assert detections_apart((boxes, scores + 0.02, labels, masks), expected, 100) == pytest.approx(0.02)
    assert detections_apart((boxes, scores, labels, masks + 0.5), expected, 100) == pytest.approx(0.5)
    assert detections_apart((boxes, scores, torch.tensor([0, 2, 1]), masks), expected, 100) > 0.1
    assert detections_apart((boxes, scores, torch.tensor([0, 0, 0]), masks), expected, 100) == float("inf")
    assert detections_apart([each[:2] for each in expected], expected, 100) == float("inf")


@slow
@pytest.mark.parametrize("name", ["u-emo", "unet"])
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_u_nets_leave_python(name, ending, tmp_path):
    needs(ending)
    portable = portable_classifier(SegmenterOutput(segmenter(name)), (32, 48))
    assert export(portable, tmp_path / f"network.{ending}") < 1e-4


def test_means_over_parts_with_free_sides_are_those_of_adaptive_pooling():
    class Means(torch.nn.Module):
        def forward(self, x):
            return part_means(x, 6)

    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    free = torch.export.export(Means(), (torch.rand(1, 2, 5, 9),), dynamic_shapes=({2: height, 3: width},)).module()
    for size in ((2, 3), (6, 6), (7, 13), (12, 31)):
        x = torch.rand(1, 2, *size)
        torch.testing.assert_close(free(x), torch.nn.functional.adaptive_avg_pool2d(x, 6))


@slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("name", ["segformer", "deeplabv3", "semfpn", "pspnet", "unet"])
def test_segmenters_with_free_sides(name, ending, tmp_path):
    needs(ending)
    portable = portable_classifier(SegmenterOutput(segmenter(name)), (64, 96), dynamic_size=True)
    assert export(portable, tmp_path / f"network.{ending}") < 1e-4


def test_u_emo_with_free_sides_leaves_as_onnx_alone(tmp_path):
    portable = portable_classifier(SegmenterOutput(segmenter("u-emo")), (64, 96), dynamic_size=True)
    with pytest.raises(InputError, match="`dynamic_size` of U-EMO is for .onnx files"):
        export(portable, tmp_path / "network.pt2")
    assert not portable_classifier(SegmenterOutput(segmenter("unet")), 64, dynamic_size=True).older
    assert not list(tmp_path.iterdir())


@slow
def test_u_emo_with_free_sides(tmp_path):
    needs("onnx")
    portable = portable_classifier(SegmenterOutput(segmenter("u-emo")), (64, 96), dynamic_size=True)
    assert len(portable.sizes) == 5
    assert export(portable, tmp_path / "network.onnx") < 1e-4


@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=slow)])
def test_clips_leave_python(ending, tmp_path):
    needs(ending)
    torch.manual_seed(0)
    options = {"depths": [1, 1, 1, 2], "dims": [8, 8, 16, 16], "head_dims": [8] * 4, "num_classes": 3}
    model = create_model("v-emov2_1m", **options).eval()
    stir(model, lambda: model(torch.randn(2, 3, 4, 64, 64)))
    portable = portable_classifier(model, (4, 32, 48))
    assert portable.input_names == ("clips",) and portable.example(2)[0].shape == (2, 3, 4, 32, 48)
    assert export(portable, tmp_path / f"network.{ending}") < 1e-4


def test_video_classifiers_are_found_by_name():
    name, portable = open_portable("v-emov2_1m", (64, 96))
    assert name == "v-emov2_1m with random weights" and portable.example(1)[0].shape == (1, 3, 4, 64, 96)
    with pytest.raises(InputError, match="`dynamic_size` is for images"):
        open_portable("v-emov2_1m", dynamic_size=True)


def test_a_trained_video_classifier_takes_clips_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    options = {"depths": [1] * 4, "dims": [8, 8, 16, 16], "head_dims": [8] * 4, "num_classes": 2}
    model = create_model("v-emov2_1m", **options).eval()
    meta = {"step": 1, "weights": "ema", "image_size": 32, "class_names": ["a", "b"], "frames": 6, "sampling": "dense",
            "frame_interval": 2, "normalisation": {"mean": [0.4] * 3, "std": [0.2] * 3}}  # fmt: skip
    save_classifier(tmp_path / "run", model, meta=meta, kind="video classifier", settings=VideoSettings())
    clips = open_portable(str(tmp_path / "run"))[1].example(2)
    assert clips[0].shape == (2, 3, 6, 32, 32)
    with torch.no_grad():
        found = open_portable(str(tmp_path / "run"))[1].module(*clips)
        expected = model((clips[0] / 2 + 0.5 - 0.4) / 0.2).log_softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_random_weights_show_the_image():
    for name, tried in (("ssdlite-emov2_1m", 64), ("segformer-emov2_1m", 64)):
        network = open_portable(name, tried)[1]
        with torch.no_grad():
            outputs = network.module(network.example(2)[0])
        assert (outputs[0] - outputs[1]).abs().max() > 1e-2 * outputs.abs().max()


def test_what_cannot_leave_is_refused(tmp_path):
    with pytest.raises(InputError, match="`detections` is for detectors"):
        open_portable("emov2_1m", detections=True)
    with pytest.raises(InputError, match="`image_size` of SSDLite must be one side, not 64 and 96"):
        portable_detector(detector("ssdlite"), (64, 96))
    portable = portable_detector(detector("ssdlite"), 64, detections=True)
    with pytest.raises(InputError, match="`detections` is for .onnx files: non-maximum suppression"):
        export(portable, tmp_path / "network.pt2")
    with pytest.raises(InputError, match="use it without `detections`"):
        needs("onnx")
        export(portable, tmp_path / "network.onnx", int8=True)
    with torch.device("meta"), pytest.raises(InputError, match="export it with `detections`"):
        portable_detector(create_model("maskrcnn-emov2_1m"))
    assert not list(tmp_path.iterdir())


@slow
def test_the_command_counts_objects(tmp_path, capsys):
    needs("onnx")
    run_verb("export", ["ssdlite-emov2_1m", str(tmp_path / "a.onnx"), "--detections", "--dynamic-size"])
    printed = capsys.readouterr().out
    assert "inputs   image (3, 320, 320), with free height and width" in printed and "objects  " in printed
    assert "differs from PyTorch by at most" in printed
