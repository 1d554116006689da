"""The U of D-EMO's blocks: its equations, its size, and that whatever works with a denoiser works with it."""

import json

import pytest
import reference_block as reference
import torch
from torch import nn

from d_emo.cli import run_verb
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.models import count_macs, count_parameters, create_model
from d_emo.models.hierarchical import HierarchicalDenoiser
from d_emo.training.alignment import Alignment

TINY = {"widths": (8, 16, 24), "depths": (2, 1, 2), "condition_size": 20, "head_size": 4, "sample_size": 8,
        "patch_size": 1, "num_classes": 3, "window_size": 2}  # fmt: skip


def tiny(**overrides):
    torch.manual_seed(0)
    return HierarchicalDenoiser(**{**TINY, **overrides})


def opened(**overrides):
    """Its gates and its output projection random instead of zero."""
    model = tiny(**overrides)
    for module in model.modules():
        if hasattr(module, "adaLN_modulation"):
            nn.init.normal_(module.adaLN_modulation[1].weight, std=0.5)
    nn.init.normal_(model.final_layer.linear.weight, std=0.5)
    return model


def batch(model, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *model.latent_shape, generator=generator, dtype=dtype)
    return x, torch.randint(0, 1000, (count,), generator=generator), torch.arange(count) % (model.null_class + 1)


@pytest.mark.parametrize("overrides", [
    {}, {"sample_size": (8, 16), "patch_size": 2}, {"widths": (8, 12), "depths": (1, 2), "sample_size": 6},
])  # fmt: skip
def test_it_equals_the_plain_reference(overrides):
    model = reference.randomize(tiny(**overrides))
    x, _, y = batch(model, dtype=torch.float64)
    options = {name: getattr(model.config, name) for name in ("widths", "depths", "head_size")}
    out = model(x, torch.tensor(0), y).sample
    for image, label, sample in zip(x, y, out, strict=True):
        expected = reference.hierarchical(
            image, 0, label, dict(model.state_dict()), **options, patch=model.config.patch_size, out_channels=8,
            window=2,
        )
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-9)


def test_blocks_are_the_identity_and_the_output_is_zero_at_the_start():
    model, tokens = tiny(), []
    blocks = [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: tokens.append(torch.equal(inputs[0], output)))
    sample = model(*batch(model)).sample
    assert tokens == [True] * (2 * 2 + 2 * 1 + 2) and torch.count_nonzero(sample) == 0
    assert torch.count_nonzero(opened()(*batch(model)).sample) == sample.numel()


@pytest.mark.parametrize("size", ["S", "B"])
@pytest.mark.parametrize("patch, cost", [(1, 1.3), (2, 0.35)])
def test_named_ones_have_the_parameters_of_the_flat_ones_of_patch_2(size, patch, cost):
    with torch.device("meta"):
        ours, flat = create_model(f"U-D-EMOv2-{size}-{patch}"), create_model(f"D-EMOv2-{size}-2")
        assert abs(count_parameters(ours) / count_parameters(flat) - 1) < 0.01
        assert count_macs(ours) < cost * count_macs(flat)


def test_gradient_checkpointing_changes_nothing():
    model = opened().train()
    inputs = batch(model)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(*inputs).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.enable_gradient_checkpointing()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(torch.isfinite(gradient).all() for gradient in gradients[0])


@pytest.mark.parametrize("overrides, message", [
    ({"widths": (8,), "depths": (2,)}, "widths must be 2 to 8 numbers, one for each level, got .8,."),
    ({"depths": (2, 1)}, "widths are of 3 levels and depths of 2"),
    ({"depths": (2, 0, 2)}, "depth must be a positive integer.*got 0"),
    ({"widths": (8, 16, 25)}, "head_size 4 does not divide the width 25"),
    ({"widths": "abc"}, "widths must be 2 to 8 numbers"),
    ({"sample_size": 6}, "3 levels halve a map of 6x6 tokens 2 times, which does not go"),
    ({"widths": (6, 16, 24), "head_size": 2}, "multiple of 4 for the position embedding, got 6"),
    ({"expand_ratio": 0}, "expand_ratio must be positive"),
    ({"condition_size": -1}, "condition_size must be a positive integer"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_words(overrides, message):
    with pytest.raises(InputError, match=message):
        tiny(**overrides)


def test_a_block_of_dit_may_stand_in_it():
    model = opened(block="dit")
    assert model(*batch(model)).sample.shape == (3, 8, 8, 8)
    with pytest.raises(InputError, match="has dit blocks, which know no kernel_size"):
        create_model("U-D-EMOv2-S-1", block="dit", kernel_size=3)


def test_it_is_trained_resumed_sampled_and_exported_as_any_denoiser(tmp_path):
    words = ["--model", "U-D-EMOv2-Ti-1", "--dataset", "digits", "--image-size", "8", "--vae", "pixels",
             "--model-options", "{widths: [8, 16], depths: [1, 1], condition_size: 16, head_size: 4}",
             "--batch-size", "4", "--num-workers", "0", "--tracker", "none"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_verb("train", [*words, "--max-steps", "3", "--output-dir", str(whole)])
    for steps in ("1", "3"):
        run_verb("train", [*words, "--max-steps", steps, "--output-dir", str(parts)])
    weights = "snapshots/step-3/transformer/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    assert json.loads((whole / "snapshots" / "step-3" / "snapshot.json").read_text())["objective"] == "flow"
    picture = tmp_path / "drawn.png"
    run_verb("sample", ["--checkpoint", str(whole), "--class", "7", "--steps", "2", "--output", str(picture)])
    assert picture.exists()
    run_verb("export", [str(whole), str(tmp_path / "network.pt2")])
    assert (tmp_path / "network.pt2").exists()


def test_it_may_be_trained_with_either_objective():
    for objective in ("eps", "flow"):
        TrainSettings(model="U-D-EMOv2-Ti-1", objective=objective).check()
    with pytest.raises(InputError, match="SiT-S-2 is DiT with `objective` flow"):
        TrainSettings(model="SiT-S-2", objective="eps").check()


def test_muon_takes_the_matrices_between_its_hidden_features():
    model = tiny()
    names = model.block_matrices()
    assert names["mid_blocks.0.operator.expand.qk.weight"] == 2 and names["upsamplers.0.fuse.weight"] == 1
    assert len(names) == 3 * len(model.block_sequence()) + 3 * (len(TINY["widths"]) - 1)
    assert not [name for name in names if "adaLN" in name or name.startswith(("x_", "t_", "y_", "final"))]


def test_it_says_the_shape_of_the_map_after_each_block():
    model = opened(sample_size=(8, 16))
    x, t, y = batch(model)
    shown = [model.eval().features(block, x, t, y).shape for block in range(len(model.block_sequence()))]
    assert [tuple(shape[1:]) for shape in shown] == list(model.feature_shapes)
    assert shown[0][1:] == (8, 8, 16) and shown[2][1:] == (16, 4, 8) and shown[4][1:] == (24, 2, 4)
    with pytest.raises(InputError, match="There is no block 8 in a denoiser of 8"):
        model.project(8, None)


@pytest.mark.parametrize("flat", [False, True])
def test_the_map_after_a_block_is_had_without_the_blocks_behind_it(flat):
    model = create_model("D-EMOv2-Ti-2", sample_size=8, depth=3) if flat else tiny()
    reference.randomize(model.eval())
    given, ran = batch(model, dtype=model.dtype), []
    for number, block in enumerate(model.block_sequence()):
        block.register_forward_hook(lambda *call, number=number: ran.append((number, call[-1])))
    with torch.no_grad():
        model(*given)
    whole, head = dict(ran), []
    model.final_layer.register_forward_hook(lambda *_: head.append(1))
    for block, expected in whole.items():
        ran.clear()
        assert torch.equal(model.features(block, *given), expected.permute(0, 3, 1, 2))
        assert [number for number, _ in ran] == list(range(block + 1)) and not head


@pytest.mark.parametrize("block, aligned, later, channels", [(None, 3, 4, 4 * 16), (1, 1, 6, 4), (2, 2, 5, 4 * 4)])
def test_its_maps_are_aligned_and_the_blocks_up_to_them_learn_of_it(block, aligned, later, channels):
    """By default on the smallest map, where a token stands for 4 x 4 latents; its own average is asked on that too."""
    model = opened().train()
    alignment = Alignment(model, "vae", 0.5, block)
    assert (alignment.block, alignment.later_block) == (aligned, later)
    assert model.feature_shape(later) == model.feature_shape(aligned)
    x, t, y = batch(model)
    features = model(x, t, y).features
    assert features.shape == (3, channels, *model.feature_shape(aligned)[1:])
    alignment.loss(features, None, x, y, None).backward()
    reached = [
        any(p.grad is not None and p.grad.abs().max() > 0 for p in each.parameters()) for each in model.block_sequence()
    ]
    assert reached == [number <= aligned for number in range(8)]
    assert Alignment(opened(), "sra", 0.5, block).target.channels == model.feature_shape(later)[0]


def test_a_saved_one_is_opened_again_whole(tmp_path):
    model = opened(learn_sigma=False).eval()
    model.save_pretrained(tmp_path)
    again = HierarchicalDenoiser.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(*batch(model)).sample, model(*batch(model)).sample)
