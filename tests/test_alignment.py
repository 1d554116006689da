"""The auxiliary loss that aligns a block's map with features of the clean image."""

import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_classifier, load_denoiser
from d_emo.models import create_model
from d_emo.training import fit
from d_emo.training.alignment import Alignment, alignment_loss
from d_emo.training.denoiser import DenoiserTask

CLASSIFIER = Path(__file__).parent / "data" / "artefacts" / "classifier"
TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 3, "hidden_size": 48}, "dataset": "digits", "image_size": 64,
    "vae": "d-emo-f8", "batch_size": 4, "max_steps": 2, "tracker": "none",
}


def batch(task, count=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 64, 64, generator=generator) * 2 - 1
    draws = task.draw(generator, count)
    return [images, torch.zeros(count, dtype=torch.long)], draws._replace(flip=torch.tensor([True, False, True]))


def test_the_loss_is_repas_over_irepas_target():
    """REPA, eq. 8: -1/N sum over n of cos(y[n], h[n]); iREPA: y over positions has mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    h, target = torch.randn(2, 2, 5, 3, 2, generator=generator).unbind(0)
    total = 0.0
    for h_i, y_i in zip(h.flatten(2).double(), target.flatten(2).double(), strict=True):
        y_i = torch.stack([(c - sum(c) / 6) / math.sqrt(sum((v - sum(c) / 6) ** 2 for v in c) / 5) for c in y_i])
        for n in range(6):
            a, b = h_i[:, n], y_i[:, n]
            total += (a @ b / (a.norm() * b.norm())).item() / 6 / 2
    assert alignment_loss(h, target).item() == pytest.approx(-total, rel=1e-4)


def test_a_run_adds_the_weighed_loss_and_trains_the_blocks_before():
    plain = DenoiserTask(TrainSettings(**TINY))
    task = DenoiserTask(TrainSettings(**TINY, align="vae", align_weight=0.25))
    assert task.alignment.block == 1 and task.model.projector.conv.weight.shape == (16, 48, 3, 3)
    names = dict(plain.model.named_parameters())
    assert all(torch.equal(p, names[n]) for n, p in task.model.named_parameters() if not n.startswith("projector."))
    (values, labels), draws = batch(task)
    losses = task.loss(task.model.train(), [values, labels], draws)
    without = plain.loss(plain.model.train(), [values, labels], draws)
    assert losses["loss"].item() == pytest.approx(without["loss"].item() + 0.25 * losses["align"].item(), rel=1e-5)
    (losses["loss"] - losses["mse"] - losses.get("vb", 0)).backward()  # of the rest, mse and vb have no gradient here
    latents = task._latents(values, draws)
    assert torch.equal(task.alignment.target(None, latents)[0, :4, 2, 3], latents[0, 0, 4:6, 6:8].flatten())
    assert task.model.projector.conv.weight.grad.abs().max() > 0
    assert task.loss(task.model, [values, labels], draws)["align"] != 0
    with torch.no_grad():
        assert not hasattr(task.model.eval()(latents, torch.tensor(3), labels), "features")


def test_a_classifier_looks_at_the_images_as_they_are_seen():
    task = DenoiserTask(TrainSettings(**TINY, align=f"emov2:{CLASSIFIER}", align_block=2))
    (values, labels), draws = batch(task)
    task.images.flip, seen = True, []
    plain = task.alignment.target._map
    task.alignment.target._map = lambda images: seen.append(images) or plain(images)
    losses = task.loss(task.model.train(), [values, labels], draws)
    assert torch.equal(seen[0], torch.stack([values[0].flip(-1), values[1], values[2].flip(-1)]))
    network = load_classifier(CLASSIFIER).model
    with torch.no_grad():
        wanted = network.stages[:3](network.stem(seen[0]))
        torch.testing.assert_close(task.alignment.target(seen[0], None), wanted)  # 4 x 4, as the denoiser's map
    losses["loss"].backward()
    assert task.model.projector.conv.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in task.alignment.target.parameters())


def test_snapshots_do_not_have_the_projector_and_states_do(tmp_path):
    AcceleratorState._reset_state(True)
    settings = TrainSettings(**TINY, align="vae", output_dir=str(tmp_path))
    task = DenoiserTask(settings)
    snapshot = fit(task, settings)
    assert not any("projector" in name for name in load_file(next(snapshot.glob("transformer/*.safetensors"))))
    assert load_denoiser(snapshot).model.projector is None and task.model.projector is not None
    state = torch.load(tmp_path / "states" / "step-2" / "state.pt", weights_only=True)
    for weights in (state["model"], state["ema"]["model"]):
        assert "projector.conv.weight" in weights
    assert snapshot.joinpath("config.yaml").read_text().count("align: vae") == 1


@pytest.mark.parametrize(("changes", "words"), [
    ({"align": "dino"}, "unknown `align` 'dino'.*use vae or emov2:SNAPSHOT"),
    ({"align": "emov2:nowhere"}, "`align` emov2:nowhere: there is no such snapshot or file"),
    ({"align": "emov2:x", "cache_latents": True}, "`align` emov2:x looks at images, of which `cache_latents` leaves"),
    ({"align_weight": 0.5}, "`align_weight` belongs to `align`"),
    ({"align": "vae", "align_block": 3}, "There is no block 3 in a denoiser of 3"),
    ({"align": "vae", "image_size": 16}, "needs a denoiser that shows a map of four positions"),
])
def test_wrong_combinations_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        DenoiserTask(TrainSettings(**{**TINY, **changes}))


def test_a_frame_that_shows_nothing_is_refused():
    model = create_model("DiT-Ti-2", depth=1, hidden_size=48, num_heads=3, sample_size=4, num_classes=3)
    type(model).feature_shape, kept = None, type(model).feature_shape
    try:
        with pytest.raises(InputError, match="`align` vae needs a denoiser that shows a map"):
            Alignment(model, "vae", 0.5, None)
    finally:
        type(model).feature_shape = kept
