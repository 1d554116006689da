"""What torchvision's own suites ask of its segmenters, asked of ours; and starts that do not fit are refused."""

import pytest
import torch
from test_segmentation import TINY
from test_segmentation_models import KINDS, small

from d_emo.config import ClassifierSettings, DetectorSettings, SegmenterSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import save_classifier
from d_emo.models import create_model
from d_emo.training.classifier import ClassifierTask
from d_emo.training.detector import DetectorTask
from d_emo.training.segmenter import SegmenterTask

ALL = [*KINDS, "u-emo", "unet"]
every = pytest.mark.parametrize("kind", ALL)


def network(kind, **options):
    if kind not in ("u-emo", "unet"):
        return small(kind, **options)
    torch.manual_seed(0)
    return create_model(kind, num_classes=5, widths=[32] * 5, **options)


@every
def test_an_image_is_answered_alike_alone_and_among_others(kind):
    model, images = network(kind, aux=True).eval(), torch.rand(3, 3, 48, 64)
    kept = images.clone()
    with torch.no_grad():
        whole, again, alone = model(images), model(images), model(images[1:2])
    assert list(whole) == ["out"] and whole["out"].dtype == torch.float32 and whole["out"].shape == (3, 5, 48, 64)
    assert torch.equal(images, kept) and torch.equal(whole["out"], again["out"])
    torch.testing.assert_close(alone["out"], whole["out"][1:2], rtol=1e-4, atol=1e-5)


@every
def test_the_auxiliary_head_answers_in_training_only_and_images_have_gradients(kind):
    model, images = network(kind, aux=True).train(), torch.rand(2, 3, 64, 64, requires_grad=True)
    answers = model(images)
    assert list(answers) == ["out", "aux"] and all(each.shape == (2, 5, 64, 64) for each in answers.values())
    sum(each.square().mean() for each in answers.values()).backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0
    assert list(network(kind).train()(images)) == ["out"]


@every
def test_weights_go_round(kind, tmp_path):
    model, other = network(kind, aux=True).eval(), network(kind, aux=True).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
        other.load_state_dict(torch.load(tmp_path / "weights.pt"))
        images = torch.rand(1, 3, 48, 64)
        assert torch.equal(model(images)["out"], other(images)["out"])


@every
def test_autocast_moves_little(kind):
    model, images = network(kind).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)["out"]
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(images)["out"]
    assert torch.isfinite(cast).all() and (cast.float() - plain).abs().max() < 0.05 * plain.abs().max() + 0.01


@every
def test_jit_trace_gives_the_same_network(kind):
    model = network(kind).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.rand(2, 3, 48, 64), strict=False, check_trace=False)
        images = torch.rand(3, 3, 48, 64)
        torch.testing.assert_close(traced(images)["out"], model(images)["out"], rtol=1e-4, atol=1e-5)


@every
def test_torch_fx_gives_the_same_network(kind):
    model = network(kind).eval()
    graph = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        for size in ((48, 64), (33, 40)):
            images = torch.rand(2, 3, *size)
            torch.testing.assert_close(graph(images)["out"], model(images)["out"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def segmenter(tmp_path):
    """A snapshot of a U-EMO."""
    meta = {"class_names": ["a", "b"], "image_size": 32, "step": 1, "weights": "ema", "num_images": 1}
    model = create_model("u-emo", num_classes=2, widths=[32] * 5)
    save_classifier(tmp_path / "u-emo", model, meta=meta, settings=SegmenterSettings(**TINY), kind="segmenter")
    return str(tmp_path / "u-emo")


def test_nothing_starts_from_a_snapshot_of_a_segmenter(segmenter):
    small_data = {"image_size": 32, "num_images": 9, "max_steps": 1, "init_from": segmenter}
    for task, settings in (
        (SegmenterTask, SegmenterSettings(**{**TINY, "init_from": segmenter})),
        (SegmenterTask, SegmenterSettings(**{**TINY, "model": "u-emo", "model_options": None, "init_from": segmenter})),
        (DetectorTask, DetectorSettings(**small_data)),
        (ClassifierTask, ClassifierSettings(model="emov2_1m", dataset="digits", **small_data)),
    ):
        with pytest.raises(InputError, match="u-emo.* a segmenter") as refused:
            task(settings)
        assert "\n" not in str(refused.value)


def test_a_u_net_starts_from_no_classifier(tmp_path):
    classifier = create_model("emov2_1m", num_classes=2)
    meta = {"class_names": ["a", "b"], "image_size": 32, "step": 1, "weights": "ema", "num_images": 1}
    save_classifier(tmp_path / "one", classifier, meta=meta, settings=SegmenterSettings(**TINY))
    changes = {"model": "u-emo", "model_options": None, "init_from": str(tmp_path / "one")}
    with pytest.raises(InputError, match="is emov2_1m, and the backbone is none that classifies"):
        SegmenterTask(SegmenterSettings(**{**TINY, **changes}))
