"""Detectors and segmenters trained by two processes, and by processes that are killed."""

import os
import signal

import pytest
import test_detector_training as detectors
import test_segmentation as segmenters
from test_processes import in_processes
from test_resume import last_state, logged, same

from d_emo.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {**segmenters.TINY["model_options"], "drop_rate": 0.0}
LOGGED = {"tracker": "tensorboard", "log_every": 1}
PLAIN["backbone_options"] = {**PLAIN.get("backbone_options", {}), "drop_path_rate": 0.0}


def kill_at(step, train, folder, **options):
    """Train in a process that is killed when this step is done."""

    def killed(rank):
        from d_emo.training import loop

        done = loop.Progress.step_done

        def die(self, at, figures):
            done(self, at, figures)
            if at == step:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Progress.step_done = die
        train(folder, **options)

    assert in_processes(1, killed) == [-signal.SIGKILL]


@pytest.mark.parametrize("alone", ["batch_size", "micro_batch_size"])
def test_a_single_image_whose_map_is_one_pixel_is_refused(alone, tmp_path):
    with pytest.raises(InputError, match="a batch norm sees one value .* raise `batch_size`"):
        detectors.train(tmp_path, **{alone: 1})


def test_two_processes_train_a_segmenter_as_one_does(tmp_path):
    """With synchronised norms: dropout would differ, and a mean over pixels is that of the halves' means."""
    options = {"model": "segformer-emov2_1m", "model_options": PLAIN, "sync_batchnorm": True, "max_steps": 4, **LOGGED}
    segmenters.train(tmp_path / "one", **options)
    assert in_processes(2, lambda rank: segmenters.train(tmp_path / "two", **options)) == [0, 0]
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-3)
    norms = [logged(tmp_path / name, "gradient_norm") for name in ("one", "two")]
    assert norms[1][1] == pytest.approx(norms[0][1], rel=1e-4)  # later, AdamW moves by the sign of what is rounding


@pytest.mark.parametrize("model", ["ssdlite-emov2_1m", pytest.param("retinanet-emov2_1m", marks=pytest.mark.slow)])
def test_two_processes_train_a_detector_as_one_does_in_two_parts(model, tmp_path):
    """A process divides its losses by its own objects, as torchvision's and mmdet's do: so does a part of a batch."""
    options = {"model": model, "validate_images": 1, **LOGGED}
    if model.startswith("retinanet"):
        options["model_options"] = {"backbone_options": detectors.BACKBONE}
    detectors.train(tmp_path / "parts", **options, micro_batch_size=2)
    assert in_processes(2, lambda rank: detectors.train(tmp_path / "two", **options)) == [0, 0]
    parts, two = (logged(tmp_path / name) for name in ("parts", "two"))
    assert len(parts) == 4 and two == pytest.approx(parts, rel=1e-3)
    norms = [logged(tmp_path / name, "gradient_norm") for name in ("parts", "two")]
    assert norms[1][1] == pytest.approx(norms[0][1], rel=1e-4)


@pytest.mark.parametrize("kind", [detectors, segmenters], ids=["detector", "segmenter"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(kind, tmp_path):
    options = {"max_steps": 4, "state_every": 2, "validate_images": 1, **LOGGED}
    kind.train(tmp_path / "whole", **options)
    kill_at(3, kind.train, tmp_path / "parts", **options)
    assert last_state(tmp_path / "parts", 2) and not (tmp_path / "parts" / "states" / "step-4").exists()
    kind.train(tmp_path / "parts", **options)
    assert same(last_state(tmp_path / "parts", 4), last_state(tmp_path / "whole", 4))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
