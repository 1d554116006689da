import argparse
import json
from pathlib import Path

import pytest
import reference_block as reference
import safetensors.torch
import torch

from d_emo.errors import InputError
from d_emo.models import create_model
from d_emo.models.released import load_released

DATA = Path(__file__).parent / "data"
FILES = {"emov2_5m": "emov2_5m", "emov1_5m": "emov1_5m", "DiT-S-2": "dit_s2"}


def shapes_of(name):
    return json.loads((DATA / f"{FILES[name]}_released_state_dict.json").read_text())


def fake(name, seed=0):
    """Random values under the names and shapes of the released file."""
    return reference.random_weights(shapes_of(name), seed)


WRAPPINGS = {
    "bare": lambda w: w,
    "net": lambda w: {"net": w, "epoch": 3},
    "net_E before net": lambda w: {"net": {k: torch.zeros_like(v) for k, v in w.items()}, "net_E": w, "lr": 0.1},
    "ema before model": lambda w: {
        "model": {k: torch.zeros_like(v) for k, v in w.items()},
        "ema": w,
        "opt": {"state": {}},
        "args": argparse.Namespace(model="DiT-S/2", lr=1e-4),
    },
    "nested": lambda w: {"state_dict": {"model": w}, "step": 1},
    "prefixed": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "empty ema": lambda w: {"ema": {}, "net_E": None, "model": w},
}


@pytest.fixture(scope="module", params=FILES)
def name_and_weights(request):
    return request.param, fake(request.param)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_reads_every_wrapping(tmp_path, wrapping):
    weights = fake("emov2_5m")
    path = tmp_path / "released.pth"
    torch.save(WRAPPINGS[wrapping](weights), path)
    model = load_released(create_model("emov2_5m"), path)
    assert torch.equal(model.head.weight, weights["head.weight"])
    qk = model.stages[2][1].operator.expand.qk.weight
    assert torch.equal(qk, weights["stage3.1.eops.0.qk.conv.weight"][:, :, 0, 0])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", None])
def test_every_tensor_of_every_release_finds_its_place(tmp_path, name_and_weights, suffix):
    name, weights = name_and_weights
    source = weights
    if suffix:
        source = tmp_path / f"released{suffix}"
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(weights, source)
    model = load_released(create_model(name), source)
    state = model.state_dict()
    assert len(state) == len(weights)
    ours, theirs = (sorted(float(v.double().sum()) for v in d.values()) for d in (state, weights))
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name, version", [("emov2_5m", 2), ("emov1_5m", 1)])
def test_classifier_output_equals_the_plain_reference(name, version):
    weights = fake(name)
    head_dims = (16, 24, 32, 32)
    model = load_released(create_model(name, window_size=3), weights).double().eval()
    x = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reference.emo(
        x[0], {k: v.double() for k, v in weights.items()}, version=version, depths=(3, 3, 9, 3),
        head_dims=head_dims, window=(3, 3),
    )  # fmt: skip
    assert expected.abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-9)


def test_dit_output_equals_the_plain_reference():
    weights = fake("DiT-S-2")
    weights["pos_embed"] = reference.position(384, 16, 16).flatten(1).T[None].float()
    model = load_released(create_model("DiT-S-2"), weights).double().eval()
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = {k: v.double() for k, v in weights.items()}
    model.pos_embed = reference.position(384, 16, 16).flatten(1).T[None]  # float64, as the reference has it
    # Timestep 0 has exact sinusoids in float32; test_denoiser.py covers the others.
    expected = reference.dit(x[0], 0, 7, p, depth=12, heads=6, patch=2, out_channels=8)
    assert expected.abs().max() > 0.1
    with torch.no_grad():
        sample = model(x, torch.tensor([0]), torch.tensor([7])).sample[0]
    torch.testing.assert_close(sample, expected, rtol=0, atol=1e-9)


def test_many_differences_are_named_in_part_and_counted():
    model = create_model("emov2_1m", num_classes=2)
    with pytest.raises(InputError) as refused:
        load_released(model, {"surprise": torch.zeros(1)})
    message = str(refused.value)
    assert f"and {len(model.state_dict()) - 4} more; unexpected: surprise." in message and len(message) < 400


def test_a_file_that_does_not_fit_names_every_key_and_changes_nothing():
    weights = fake("emov2_5m")
    weights.pop("stage1.1.ls.gamma")
    weights.pop("norm.norm.bias")
    weights["surprise"] = weights["another.surprise"] = torch.zeros(1)
    weights["stage3.1.eops.0.v.conv.weight"] = torch.zeros(3, 4, 1, 1)
    weights["stage2.0.proj.conv.weight"] = weights["stage2.0.proj.conv.weight"][:, :, 0, 0]
    model = create_model("emov2_5m")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_released(model, weights)
    message = str(error.value)
    assert "missing: stage1.1.ls.gamma, norm.norm.bias;" in message
    assert "unexpected: surprise, another.surprise;" in message
    assert "stage3.1.eops.0.v.conv.weight (3, 4, 1, 1) instead of (640, 160, 1, 1)" in message
    assert "stage2.0.proj.conv.weight (72, 288) instead of (72, 288, 1, 1)" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name, file, overrides, words",
    [
        ("emov2_2m", "emov2_5m", {}, "holds the weights of emov2_5m"),
        ("emov2_5m", "emov1_5m", {}, "holds the weights of emov1_5m"),
        ("DiT-S-4", "DiT-S-2", {}, "holds the weights of DiT-S-2"),
        ("emov1_5m", "emov1_5m", {"num_classes": 10}, "another number of classes"),
        ("DiT-S-2", "DiT-S-2", {"num_classes": 10}, "another number of classes"),
        ("DiT-S-2", "DiT-S-2", {"sample_size": 64}, "another sample_size"),
    ],
)
def test_a_file_of_another_variant_is_recognised(name, file, overrides, words):
    with torch.device("meta"):
        model = create_model(name, **overrides)
    weights = {k: torch.empty(shape, device="meta") for k, shape in shapes_of(file).items()}
    with pytest.raises(InputError, match=words):
        load_released(model, weights)


class Stranger:
    """An object that no checkpoint should hold."""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_unreadable_files_get_one_sentence(tmp_path, damage, suffix):
    path = tmp_path / f"weights{suffix}"
    if damage == "truncated":
        whole = tmp_path / f"whole{suffix}"
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)({"a": torch.zeros(1000)}, whole)
        path.write_bytes(whole.read_bytes()[:1500])
    elif damage != "missing":
        path.write_text("these are not weights" if damage == "text" else "")
    with pytest.raises(InputError) as error:
        load_released(create_model("emov2_1m"), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{"net": {"optimizer": 3}}, {}, [1, 2], torch.zeros(3), {"args": argparse.Namespace()}]
)
def test_files_without_weights_get_one_sentence(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match="holds no model weights"):
        load_released(create_model("emov2_1m"), path)


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"net": {"a": torch.zeros(1)}, "extra": Stranger()}, path)
    with pytest.raises(InputError, match="objects other than"):
        load_released(create_model("emov2_1m"), path)


def test_demo_has_no_release():
    with pytest.raises(InputError, match="from_pretrained"):
        load_released(create_model("D-EMOv2-Ti-2", depth=1, sample_size=8, num_classes=1), {"a": torch.zeros(1)})
