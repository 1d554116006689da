"""Fine-tuning with another patch size: what reads and writes patches is resized, all else is kept."""

import shutil

import pytest
import torch

from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.models.embeddings import patch_resize
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask

FRAMES = {
    "D-EMOv2-Ti-2": {"depth": 2, "hidden_size": 48},
    "U-D-EMOv2-Ti-2": {"widths": [32, 64], "depths": [1, 1], "head_size": 32, "condition_size": 48},
}


def settings(folder, **changes):
    return TrainSettings(**{
        "model": "D-EMOv2-Ti-2", "model_options": {}, "dataset": "digits", "image_size": 8, "vae": "pixels",
        "batch_size": 8, "max_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.1, "output_dir": str(folder), **changes,
    })  # fmt: skip


def resized(images, old, new):
    """Every patch of images (B, C, H, W) resized by itself. Shape: (B, C, H * new / old, W * new / old)."""
    b, c, h, w = images.shape
    patches = images.view(b, c, h // old, old, w // old, old).transpose(3, 4).flatten(4)
    patches = (patches @ patch_resize(old, new).T).unflatten(4, (new, new)).transpose(3, 4)
    return patches.reshape(b, c, h * new // old, w * new // old)


def test_a_patch_is_resized_as_an_image_is():
    ramp = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    wanted = torch.tensor([0.0, 0.25, 0.75, 1.0])  # half-pixel centres, edges held
    torch.testing.assert_close((patch_resize(2, 4) @ ramp.flatten()).view(4, 4), wanted + 2 * wanted[:, None])
    torch.testing.assert_close(patch_resize(4, 2).sum(dim=1), torch.ones(4))
    torch.testing.assert_close(patch_resize(3, 3), torch.eye(9))


@pytest.mark.parametrize("model", FRAMES)
@pytest.mark.parametrize("patch_size", [4, 6])
def test_larger_patches_of_larger_images_start_as_the_resized_network(tmp_path, model, patch_size):
    first = DenoiserTask(settings(tmp_path / "first", model=model, model_options=FRAMES[model]))
    old = load_denoiser(fit(first, first.settings))
    options = {**FRAMES[model], "patch_size": patch_size}
    run = DenoiserTask(settings(
        tmp_path / "second", model=model, model_options=options, image_size=4 * patch_size, init_from=str(old.path)
    ))  # fmt: skip
    images, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([3, 400, 900]), torch.tensor([1, 7, 10])
    with torch.no_grad():
        wanted = resized(old.model.eval()(images, t, labels).sample, 2, patch_size)
        got = run.model.eval()(resized(images, 2, patch_size), t, labels).sample
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert load_denoiser(fit(run, run.settings)).model.config.patch_size == patch_size


def test_smaller_patches_keep_every_block(tmp_path):
    first = DenoiserTask(settings(tmp_path / "first", model_options=FRAMES["D-EMOv2-Ti-2"], image_size=16))
    old = load_denoiser(fit(first, first.settings))
    run = DenoiserTask(settings(
        tmp_path / "second", model="D-EMOv2-Ti-1", model_options=FRAMES["D-EMOv2-Ti-2"], image_size=8,
        init_from=str(old.path),
    ))  # fmt: skip
    theirs, mine = old.model.state_dict(), run.model.state_dict()
    assert {name for name in mine if mine[name].shape != theirs[name].shape} == {
        "x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"
    }
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if mine[name].shape == theirs[name].shape)
    flat = torch.full((1, 3, 8, 8), 0.7)  # what both patches see alike
    torch.testing.assert_close(
        run.model.x_embedder(flat), old.model.x_embedder(torch.full((1, 3, 16, 16), 0.7)), rtol=1e-4, atol=1e-5
    )


def test_the_patch_size_in_a_model_s_name_leaves_all_else_as_the_snapshot_has_it(tmp_path):
    first = DenoiserTask(settings(
        tmp_path / "first", objective="flow", timestep_sampling="logit-normal", time_shift=2,
        model_options={**FRAMES["D-EMOv2-Ti-2"], "patch_size": 4},
    ))  # fmt: skip
    old = fit(first, first.settings)
    second = TrainSettings(init_from=str(old), model="D-EMOv2-Ti-1", dataset="digits", output_dir=str(tmp_path / "2"))
    there = first.settings
    for name in ("objective", "timestep_sampling", "time_shift", "image_size", "vae"):
        assert getattr(second.resolve(), name) == getattr(there, name), name
    assert second.resolve().model_options == FRAMES["D-EMOv2-Ti-2"]
    run = DenoiserTask(second)
    assert run.model.config.patch_size == 1 and "`model` D-EMOv2-Ti-1 (there D-EMOv2-Ti-2)" in run.start[1]
    assert "(step 2), patches resized from 4 to 1, which knows 10" in run.start[0]
    with pytest.raises(InputError, match="`train` head keeps the weights that read patches.* of 4, not 1; train all"):
        DenoiserTask(TrainSettings(**{**vars(second), "train": "head"}))


def test_a_run_goes_on_when_the_snapshot_that_it_started_from_is_gone(tmp_path):
    first = DenoiserTask(settings(tmp_path / "first", model_options=FRAMES["D-EMOv2-Ti-2"]))
    old = fit(first, first.settings)
    run = DenoiserTask(settings(tmp_path / "second", model_options=FRAMES["D-EMOv2-Ti-2"], init_from=str(old)))
    shutil.rmtree(tmp_path / "first")
    assert load_denoiser(fit(run, run.settings)).meta["step"] == 2
