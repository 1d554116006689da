import copy
import json

import pytest
import reference_block as reference
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import nn

from d_emo.errors import InputError
from d_emo.models import Denoiser, create_model
from d_emo.models.embeddings import TimestepEmbedder
from d_emo.models.layers import fold_batch_norms

TINY = {"depth": 2, "hidden_size": 16, "num_heads": 2, "sample_size": 8, "num_classes": 3, "window_size": 2}
BLOCKS = ["i2rmb", "dit"]


def tiny(block="i2rmb", **overrides):
    torch.manual_seed(0)
    return Denoiser(**{**TINY, "block": block, **overrides})


def opened(block="i2rmb", **overrides):
    """A tiny model whose gates and output projection are random instead of zero."""
    model = tiny(block, **overrides)
    for module in (*model.blocks, model.final_layer):
        nn.init.normal_(module.adaLN_modulation[1].weight, std=0.5)
        nn.init.normal_(module.adaLN_modulation[1].bias, std=0.5)
    nn.init.normal_(model.final_layer.linear.weight, std=0.5)
    return model


def batch_for(model, batch=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.config.in_channels, *model.sample_size, generator=generator).to(dtype)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return x, t, torch.randint(0, model.null_class + 1, (batch,), generator=generator)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_the_identity_and_the_output_is_zero_at_the_start(block):
    model = tiny(block)
    x, t, y = batch_for(model)
    tokens = []
    for module in model.blocks:
        module.register_forward_hook(lambda _, inputs, output: tokens.append((inputs[0], output)))
    sample = model(x, t, y).sample
    assert sample.shape == (3, 8, 8, 8) and torch.count_nonzero(sample) == 0
    assert len(tokens) == 2 and all(torch.equal(before, after) for before, after in tokens)
    assert torch.count_nonzero(opened(block)(x, t, y).sample) == sample.numel()


@pytest.mark.parametrize("mode", ["near", "far", "spanning"])
@pytest.mark.parametrize("sample_size, window", [(8, 2), ((4, 10), 2), ((6, 10), 2), (4, 8)])
def test_demo_equals_the_plain_reference(mode, sample_size, window):
    model = reference.randomize(tiny(sample_size=sample_size, window_size=window, attention_mode=mode))
    x, _, y = batch_for(model, dtype=torch.float64)
    p, modes = dict(model.state_dict()), ("near", "far") if mode == "spanning" else (mode,)
    clamped = tuple(min(window, n // 2) for n in model.sample_size)
    out = model(x, torch.tensor(0), y).sample
    for image, label, sample in zip(x, y, out, strict=True):
        expected = reference.demo(
            image, 0, label, p, depth=2, heads=2, patch=2, out_channels=8, window=clamped, modes=modes
        )
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-9)


def test_timestep_features_equal_the_plain_reference_in_any_dtype():
    embedder = TimestepEmbedder(256)
    embedder.mlp = nn.Sequential(nn.Identity())
    embedder.mlp[0].weight = nn.Parameter(torch.empty(0, dtype=torch.float64))  # where the dtype is read
    for t in (0, 1, 37, 999):
        expected = reference.sinusoid(t)
        torch.testing.assert_close(embedder(torch.tensor([t]))[0], expected, rtol=0, atol=2e-4)
    model = tiny().to(torch.bfloat16)
    features = []
    model.t_embedder.mlp.register_forward_hook(lambda _, inputs, output: features.append(inputs[0]))
    x, _, y = batch_for(model, 2, dtype=torch.bfloat16)
    model(x, torch.tensor([998, 999]), y)
    assert features[0].dtype == torch.bfloat16 and not torch.equal(*features[0])


@pytest.mark.parametrize("block", BLOCKS)
def test_timesteps_of_every_form_mean_the_same(block):
    model = opened(block).eval()
    x, _, y = batch_for(model)
    forms = [torch.tensor(5), torch.tensor(5.0), torch.full((3,), 5), torch.full((3,), 5.0), torch.tensor([5])]
    plain = [model(x, t, y, return_dict=False) for t in forms]
    assert all(type(output) is tuple and len(output) == 1 for output in plain)
    outputs = [output[0] for output in plain]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert not torch.equal(outputs[0], model(x, torch.tensor(6), y).sample)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "overrides", [{}, {"learn_sigma": False}, {"in_channels": 3, "patch_size": 1, "sample_size": (4, 6)}]
)
def test_shapes_follow_the_settings(block, overrides):
    model = opened(block, **overrides)
    x, t, y = batch_for(model)
    channels = model.config.in_channels * (1 if overrides.get("learn_sigma") is False else 2)
    assert model.config.out_channels == channels
    assert model(x, t, y).sample.shape == (3, channels, *x.shape[2:])


@pytest.mark.parametrize(
    "block, overrides",
    [("i2rmb", {"attention_mode": m}) for m in ("near", "far", "spanning")]
    + [("i2rmb", {"local_norm": n}) for n in ("layer", "none")]
    + [("dit", {})],
)
def test_every_parameter_receives_a_gradient(block, overrides):
    model = opened(block, **overrides)
    x, t, _ = batch_for(model, 8)
    y = torch.arange(8) % (model.null_class + 1)
    (model(x, t, y).sample * torch.randn(8, 8, 8, 8)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("block", BLOCKS)
def test_an_image_does_not_depend_on_its_batch_mates_in_eval_mode(block):
    model = opened(block)
    x, t, y = batch_for(model, 4)
    model(x, t, y)  # moves the running statistics off their start
    model.eval()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample for i in range(4)])
    torch.testing.assert_close(model(x, t, y).sample, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_checkpointing_changes_nothing(block):
    plain, saving = opened(block), opened(block)
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing
    x, t, y = batch_for(plain)
    calls = []
    saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = [model(x, t, y).sample for model in (plain, saving)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert len(calls) == 2  # once forward, once recomputed
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), name
    saving.disable_gradient_checkpointing()
    saving(x, t, y).sample.sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sample_size", [8, (4, 8)])
def test_save_and_load_round_trip(tmp_path, block, sample_size):
    model = opened(block, sample_size=sample_size)
    x, t, y = batch_for(model)
    model(x, t, y)
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["out_channels"] == 8
    loaded = Denoiser.from_pretrained(tmp_path, use_safetensors=True)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(loaded(x, t, y).sample, model(x, t, y).sample)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_runs_in_the_dit_pipeline(block, guidance_scale):
    model = opened(block, num_classes=1000).eval()
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4, sample_size=8)
    pipeline = DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    labels = []
    model.y_embedder.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[0].tolist()))
    images = pipeline([1, 2], guidance_scale=guidance_scale, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and torch.from_numpy(images).isfinite().all()
    assert labels == [[1, 2, 1000, 1000] if guidance_scale > 1 else [1, 2]] * 2
    assert model.null_class == 1000


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_finite_and_keep_their_dtype(block, dtype):
    model = opened(block).to(dtype).eval()
    sample = model(*batch_for(model, dtype=dtype)).sample
    assert sample.dtype == dtype and sample.isfinite().all()


@pytest.mark.parametrize("block", BLOCKS)
def test_autocast_stays_close(block):
    model = opened(block).eval()
    inputs = batch_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(*inputs).sample
    exact = model(*inputs).sample
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_folded_batch_norm_denoises_the_same():
    model = opened()
    inputs = batch_for(model)
    model(*inputs)
    model.eval()
    folded = fold_batch_norms(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(*inputs).sample, model(*inputs).sample, rtol=1e-4, atol=1e-4)


def test_the_window_is_clamped_to_the_grid_per_axis():
    model = tiny(sample_size=(4, 32), window_size=8)
    assert model.blocks[0].operator.expand.window == (2, 8)


def test_only_the_fixed_position_embedding_is_no_parameter():
    names = dict(tiny("dit").named_buffers()).keys()
    assert names == {"pos_embed"} and not tiny().pos_embed.requires_grad


def test_dit_checkpoint_names():
    names = set(tiny("dit").state_dict())
    for expected in (
        "pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight",
        "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "blocks.0.adaLN_modulation.1.weight",
        "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias",
    ):  # fmt: skip
        assert expected in names


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_heads": 3}, "16 channels.*3 heads"),
        ({"sample_size": 9}, "9x9.*patch_size 2"),
        ({"sample_size": (8, 7)}, "8x7.*patch_size 2"),
        ({"sample_size": 0}, "sample_size.*0"),
        ({"sample_size": (8, 8, 8)}, "sample_size"),
        ({"patch_size": 0}, "patch_size.*0"),
        ({"kernel_size": 4}, "kernel_size.*odd.*4"),
        ({"num_classes": 0}, "num_classes.*0"),
        ({"window_size": 0}, "window_size.*0"),
        ({"hidden_size": 18, "num_heads": 2}, "multiple of 4.*18"),
        ({"attention_mode": "sideways"}, "'sideways'"),
        ({"local_norm": "group"}, "'group'"),
        ({"block": "unet"}, "'unet'"),
        ({"depth": 0}, "depth.*0"),
        ({"out_channels": 5}, "out_channels=5"),
        ({"in_channels": 0}, "in_channels.*0"),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        Denoiser(**{**TINY, **settings})


@pytest.mark.parametrize("shape", [(1, 4, 8, 16), (1, 3, 8, 8), (4, 8, 8)])
def test_an_input_of_another_size_is_refused_naming_both(shape):
    with pytest.raises(InputError) as error:
        tiny()(torch.zeros(shape), torch.tensor(0), torch.zeros(1, dtype=torch.long))
    assert str(shape) in str(error.value) and "4, 8, 8" in str(error.value)


def test_transformer_blocks_refuse_window_settings():
    with pytest.raises(InputError, match="DiT-S-2.*window_size"):
        create_model("DiT-S-2", window_size=4)


def test_autocast_leaves_the_timestep_embedding_in_float32(tiny_denoiser):
    t = torch.arange(1000)
    expected = tiny_denoiser.t_embedder(t)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = tiny_denoiser.t_embedder(t)
    assert embedded.dtype == torch.float32 and torch.equal(embedded, expected)
    assert len(embedded.unique(dim=0)) == 1000


def test_rows_of_labels_can_be_appended_and_are_obeyed():
    model = tiny()
    assert model.latent_shape == (model.config.in_channels, *model.sample_size)
    assert model.tokens == len(model.pos_embed[0])
    rows, null = model.label_rows().detach().clone(), model.null_class
    assert len(rows) == null + 1 and torch.equal(rows, model.get_parameter(model.label_parameter))
    assert model.append_label_rows(rows[:1]) == [null + 1]
    assert model.append_label_rows(rows[1:3]) == [null + 2, null + 3]
    assert torch.equal(model.y_embedder(torch.tensor([null, null + 1, null + 3])), rows[[null, 0, 2]])
