"""The auxiliary loss that aligns a block's map with features of the clean image."""

import math
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_classifier, load_denoiser
from d_emo.models import create_model
from d_emo.training import fit
from d_emo.training.alignment import Alignment, ViTTarget, alignment_loss
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


def test_sra_asks_the_average_for_a_later_block_under_less_noise(monkeypatch):
    """Jiang et al., 2025: the teacher's t is less by 0.2 u, u uniform in [0, 1], and no less than 0."""
    task = DenoiserTask(TrainSettings(**TINY, align="sra", objective="flow", align_block=0))
    torch.manual_seed(1)
    task.averaged = create_model(TINY["model"], depth=3, hidden_size=48, sample_size=8, num_classes=10)
    for block in task.averaged.block_sequence():
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.2)
    task.averaged.eval()
    (values, labels), draws = batch(task)
    draws = draws._replace(timesteps=torch.tensor([50.0, 500.0, 999.0]), drop_label=torch.tensor([False, True, False]))
    shares = torch.tensor([0.9, 0.5, 0.25])
    monkeypatch.setattr(torch, "rand", lambda *args, **options: shares)
    aligned, seen = task.alignment.target, []
    plain = aligned.forward
    aligned.forward = lambda *args: seen.append(plain(*args)) or seen[-1]
    task.loss(task.model.train(), [values, labels], draws)["loss"].backward()
    latents, t = task._latents(values, draws), torch.tensor([0.0, 400.0, 949.0])
    noisy = (1 - t / 1000).view(3, 1, 1, 1) * latents + (t / 1000).view(3, 1, 1, 1) * draws.noise
    kept = []
    task.averaged.blocks[2].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        task.averaged(noisy, t, torch.tensor([0, 10, 0]))
    torch.testing.assert_close(seen[0], kept[0].permute(0, 3, 1, 2))
    assert all(p.grad is None for p in task.averaged.parameters())
    assert task.model.projector.conv.weight.grad.abs().max() > 0


def test_dinov2_sees_the_image_as_many_patches_as_there_are_tokens(tmp_path):
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=12, dynamic_img_size=True).eval()
    save_file(network.state_dict(), tmp_path / "dinov2.safetensors")
    target = ViTTarget((48, 2, 2), (4, 4, 4), str(tmp_path / "dinov2.safetensors"))
    images = torch.rand(1, 3, 28, 28) * 2 - 1
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = network.forward_features(((images + 1) / 2 - mean) / std)[:, 1:]  # (1, 4, 384)
    given = target(images, None)
    assert given.shape == (1, 384, 2, 2) and target.channels == 384
    torch.testing.assert_close(given.flatten(2).mT, tokens, rtol=1e-3, atol=1e-4)


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
    ({"align": "dino"}, "unknown `align` 'dino'.*use vae or emov2:SNAPSHOT or sra"),
    ({"align": "dinov2:nowhere"}, "`align` dinov2:nowhere: there is no such file"),
    ({"align": f"dinov2:{__file__}"}, "is no DINOv2 of timm"),
    ({"align": "emov2:nowhere"}, "`align` emov2:nowhere: there is no such snapshot or file"),
    ({"align": "emov2:x", "cache_latents": True}, "`align` emov2:x looks at images, of which `cache_latents` leaves"),
    ({"align_weight": 0.5}, "`align_weight` belongs to `align`"),
    ({"align": "vae", "align_block": 3}, "There is no block 3 in a denoiser of 3"),
    ({"align": "vae", "image_size": 16}, "needs a map of four positions or more; that of block 1 has 1 x 1"),
])
def test_wrong_combinations_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        DenoiserTask(TrainSettings(**{**TINY, **changes}))


def test_a_frame_that_shows_nothing_is_refused(monkeypatch):
    model = create_model("DiT-Ti-2", depth=1, hidden_size=48, num_heads=3, sample_size=4, num_classes=3)
    monkeypatch.setattr(type(model), "feature_shapes", ())
    with pytest.raises(InputError, match="`align` vae needs a denoiser that shows its maps"):
        Alignment(model, "vae", 0.5, None)
    with pytest.raises(InputError, match="Denoiser shows no features"):
        model.project(0, None)
