import pytest
import torch
from test_detection_models import small as detector
from test_segmentation_models import small as segmenter
from torchvision.models import get_model
from torchvision.ops import boxes as box_ops

from d_emo.cli import run_verb
from d_emo.config import DenseBenchmarkSettings
from d_emo.errors import InputError
from d_emo.lab.benchmark import dense
from d_emo.lab.benchmark.dense import CANDIDATES, Answers, RawOutputs, dense_table, fuse, ours, theirs


def test_what_is_timed_are_the_heads_outputs():
    images = torch.rand(2, 3, 96, 96)
    one, other = detector("retinanet-emov2_5m").eval(), segmenter("segformer").eval()
    with torch.no_grad():
        outputs = one.dense_outputs(images)
        found = RawOutputs(one)(images)
        assert torch.equal(found, torch.cat([outputs["cls_logits"], outputs["bbox_regression"]], dim=2))
        assert torch.equal(RawOutputs(other)(images), other(images)["out"])


@pytest.mark.parametrize(("kind", "name"), [
    (ours, "ssdlite-emov2_1m"), (theirs, "ssdlite320_mobilenet_v3_large"),
])  # fmt: skip
def test_everybody_suppresses_as_many_boxes(kind, name, monkeypatch):
    torch.manual_seed(0)
    picture, given = torch.rand(3, 320, 320), []
    whole = Answers(kind(name)[1].network, picture)
    suppress = box_ops.batched_nms
    monkeypatch.setattr(box_ops, "batched_nms", lambda *all: given.append(len(all[0])) or suppress(*all))
    with torch.no_grad():
        (found,) = whole(picture[None])
    assert given == [CANDIDATES] and 0 < len(found["boxes"]) <= 100


def test_an_answer_of_a_segmenter_is_the_class_of_each_pixel():
    network, images = segmenter("segformer").eval(), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        classes = Answers(network, images[0])(images)
        assert torch.equal(classes, network(images)["out"].argmax(dim=1)) and classes.shape == (2, 64, 96)


def test_fused_networks_are_the_same_functions():
    torch.manual_seed(0)
    network = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3).eval()
    for norm in (each for each in network.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.normal_(norm.running_mean, std=0.1)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = network(images)["out"]
        after = fuse(network)(images)["out"]
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in network.modules())
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_a_line_for_each_network_and_a_column_for_each_number_of_threads(monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: None)  # onnxruntime takes seconds
    ticks = []
    monkeypatch.setattr(dense, "measure", lambda cases, **_: [each.seconds.extend([0.001, 0.002, 0.003]) or
                                                             ticks.append(each.name) for each in cases])  # fmt: skip
    before = torch.get_num_threads()
    table = dense_table(DenseBenchmarkSettings(
        models=["segformer-emov2_1m"], peers=["ssdlite320_mobilenet_v3_large"], image_size=64, threads=[1, 2]
    ))  # fmt: skip
    assert torch.get_num_threads() == before and len(ticks) == 8
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[:4]]
    whole = "PyTorch, to boxes or classes"
    assert rows[0][4:] == [f"{runtime}, {number}, ms" for number in ("1 thread", "2 threads")
                           for runtime in ("PyTorch", whole)]  # fmt: skip
    assert [row[:3] for row in rows[2:]] == [  # 3,440,060 is torchvision's own number
        ["detection", "ssdlite320_mobilenet_v3_large", "3,440,060"], ["segmentation", "segformer-emov2_1m", "1,475,885"]
    ]  # fmt: skip
    assert rows[2][4:] == ["2.0 (1.5 to 2.5)"] * 4


def test_both_have_as_many_outputs():
    images = torch.zeros(1, 3, 320, 320)
    with torch.no_grad():
        shapes = {name: tuple(kind(name)[1](images).shape) for kind, name in (
            (ours, "ssdlite-emov2_1m"), (theirs, "ssdlite320_mobilenet_v3_large"), (ours, "deeplabv3-emov2_1m"),
            (theirs, "lraspp_mobilenet_v3_large"),
        )}  # fmt: skip
    assert shapes["ssdlite-emov2_1m"] == shapes["ssdlite320_mobilenet_v3_large"] == (1, 3234, 95)
    assert shapes["deeplabv3-emov2_1m"] == shapes["lraspp_mobilenet_v3_large"] == (1, 21, 320, 320)


@pytest.mark.parametrize(("kind", "name"), [
    ("models", "emov2_1m"), ("models", "maskrcnn-emov2_1m"), ("peers", "resnet18"),
    ("peers", "maskrcnn_resnet50_fpn"), ("peers", "nothing"),
])  # fmt: skip
def test_other_networks_are_refused(kind, name):
    with torch.device("meta"), pytest.raises(InputError, match=f"`{kind}` '{name}' is no segmenter"):
        (ours if kind == "models" else theirs)(name)


@pytest.mark.slow
def test_the_command_measures_in_onnxruntime_too(capsys):
    pytest.importorskip("onnxruntime")
    run_verb("benchmark", ["dense", "--models", "segformer-emov2_1m", "--image-size", "64", "--rounds", "1",
                           "--threads", "1"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "onnxruntime, 1 thread, ms" in printed and printed.count("| segmentation |") == 2
