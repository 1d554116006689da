"""What lies in a run folder is data: whatever its files hold, a sentence names the file and what is wrong in it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_resume import train

from d_emo.errors import InputError
from d_emo.files import digest_of_file
from d_emo.io.snapshot import load_classifier, load_denoiser, load_meta
from d_emo.lab.loss_curves import read_run
from d_emo.latents import load_codec
from d_emo.latents.codec import SHIPPED, SHIPPED_VAE
from d_emo.latents.shards import read_index

ARTEFACTS = Path(__file__).parent / "data" / "artefacts"
DEEP = "[" * 100_000


def damaged(folder, file, change):
    copy = folder / "copy"
    shutil.copytree(ARTEFACTS / "eps", copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(change if isinstance(change, str) else json.dumps({**content, **change}))
    return copy


@pytest.mark.parametrize(("file", "change", "said"), [
    ("snapshot.json", {"step": -1}, "step must be at least 0, not -1"),
    ("snapshot.json", {"step": "7"}, "step must be a whole number"),
    ("snapshot.json", {"image_size": 10**9}, "image_size must be at least 8 and at most 65536"),
    ("snapshot.json", {"class_names": "abc"}, "class_names must be a list"),
    ("snapshot.json", {"class_names": [1, 2]}, "class_names must be text, not 1"),
    ("snapshot.json", {"label_dropout": float("nan")}, "label_dropout must be"),
    ("snapshot.json", {"codec": None}, "codec must be text"),
    ("snapshot.json", {"kind": "teapot"}, "kind must be one of denoiser, classifier"),
    ("snapshot.json", "[]", "no mapping"), ("snapshot.json", "\0\1", "is damaged"),
    ("snapshot.json", DEEP, "is damaged"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**15}, "num_train_timesteps must be"),
    ("scheduler/scheduler_config.json", {"beta_end": "high"}, "beta_end must be a number"),
    ("scheduler/scheduler_config.json", {"trained_betas": {"a": 1}}, "trained_betas must be a list"),
    ("scheduler/scheduler_config.json", {"clip_sample": "perhaps"}, "clip_sample must be true or false"),
    ("scheduler/scheduler_config.json", "{}", "lacks 'num_train_timesteps'"),
])  # fmt: skip
def test_a_snapshot_is_read_by_a_schema(tmp_path, file, change, said):
    with pytest.raises(InputError) as error:
        load_denoiser(damaged(tmp_path, file, change))
    assert said in str(error.value) and Path(file).name in str(error.value) and "\n" not in str(error.value)


def test_every_artefact_passes_its_schema():
    for folder in ("eps", "flow", "dit"):
        assert load_meta(ARTEFACTS / folder)["kind"] == "denoiser"


@pytest.mark.parametrize(("config", "said"), [
    ("- 1\n", "no mapping"), ("seed: many\n", "seed must be a whole number, not 'many'"), ("{", "is damaged"),
    ("learning_rate: -1\n", "learning_rate must be above 0"), ("model_options: 5\n", "model_options must be a map"),
    ("flip: [a]\n", "flip must be true or false"), ("1: 2\n", "no mapping of names"),
])  # fmt: skip
def test_the_settings_of_a_run_are_read_by_a_schema(tmp_path, config, said):
    shutil.copytree(ARTEFACTS / "dit_run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(config)
    with pytest.raises(InputError) as error:
        train(tmp_path / "run")
    assert said in str(error.value) and "config.yaml" in str(error.value)


def test_the_settings_of_a_run_that_is_plotted_are_read_by_a_schema(fuzz_world, tmp_path):
    shutil.copytree(fuzz_world / "denoiser", tmp_path / "run")
    for config in (["a"], {"model": 5}, {}):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(InputError, match="config.yaml"):
            read_run(tmp_path / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "run"
    train(folder, max_steps=1)
    return folder


@pytest.mark.parametrize(("change", "said"), [
    ([1], "no mapping"), ({"step": "x"}, "step must be a whole number"), ({"step": -3}, "step must be at least 0"),
    ({"step": 7}, "it is of step 7"), ({"minutes": float("nan")}, "minutes must be"),
    ({"model": [1]}, "model must be a mapping"),
    ({"model": {"a": 1}}, "does not fit this model"), ({"optimizer": 5}, "optimizer must be a mapping"),
    ({"optimizer": {"state": {0: 5}, "param_groups": [5]}}, "does not fit this model"), ({"ema": []}, "ema must be"),
    ({"ema": {"step": "x"}}, "step must be a whole number"), ({"guard": {"skipped": "a"}}, "skipped must be"),
    ({"guard": {}}, "it lacks 'skipped'"), ({"kernels": {1: 2}}, "kernels must be text"),
    ({"class_names": 5}, "class_names must be a list"),
], ids=str)  # fmt: skip
def test_a_state_is_read_by_a_schema(tmp_path, run, change, said):
    """Whatever its checksum says."""
    shutil.copytree(run, tmp_path / "run")
    state = tmp_path / "run" / "states" / "step-1"
    content = torch.load(state / "state.pt", weights_only=True)
    torch.save(change if isinstance(change, list) else {**content, **change}, state / "state.pt")
    (state / "manifest.json").write_text(json.dumps({"step": 1, "sha256": digest_of_file(state / "state.pt")}))
    with pytest.raises(InputError) as error:
        train(tmp_path / "run", max_steps=2)
    assert said in str(error.value) and str(state) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("drop", "said"), [
    (lambda moments: moments[0].pop("exp_avg"), "its optimizer lacks exp_avg of some parameters"),
    (lambda moments: moments.pop(0), r"its optimizer has moments of \d+ of \d+ parameters"),
])  # fmt: skip
def test_a_state_without_a_moment_of_one_parameter_is_refused(tmp_path, run, drop, said):
    shutil.copytree(run, tmp_path / "run")
    state = tmp_path / "run" / "states" / "step-1"
    content = torch.load(state / "state.pt", weights_only=True)
    drop(content["optimizer"]["state"])
    torch.save(content, state / "state.pt")
    (state / "manifest.json").write_text(json.dumps({"step": 1, "sha256": digest_of_file(state / "state.pt")}))
    with pytest.raises(InputError, match=said):
        train(tmp_path / "run", max_steps=2)


@pytest.mark.parametrize(("model", "said"), [("emov1_1m", "no mapping"), ({"name": 3}, "name must be text"), ({}, "")])
def test_the_model_of_a_classifier_is_read_by_a_schema(tmp_path, fuzz_world, model, said):
    folder = next((fuzz_world / "classifier" / "snapshots").glob("step-*"))
    shutil.copytree(folder, tmp_path / "snapshot")
    meta = json.loads((folder / "snapshot.json").read_text())
    (tmp_path / "snapshot" / "snapshot.json").write_text(json.dumps({**meta, "model": model}))
    with pytest.raises(InputError) as error:
        load_classifier(tmp_path / "snapshot")
    assert said in str(error.value) and "snapshot.json" in str(error.value) and "TypeError" not in str(error.value)


@pytest.mark.parametrize(("change", "said"), [
    ({"codec": 5}, "codec must be text"), ({"class_names": 5}, "class_names must be a list"),
    ({"shard_size": 0}, "shard_size must be at least 1"), ({"shard_size": "a"}, "shard_size must be a whole"),
    ({"dtype": "float7"}, "dtype must be one of"), ({"mirrored": 7}, "mirrored must be true or false"),
    ({"shards": [5]}, "shards must be a mapping"), ({"moments_shape": ["a"]}, "moments_shape must be a whole"),
], ids=str)  # fmt: skip
def test_the_index_of_latents_is_read_by_a_schema(tmp_path, change, said):
    index = json.loads((ARTEFACTS / "latents" / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(InputError) as error:
        read_index(tmp_path)
    assert said in str(error.value) and "index.json" in str(error.value)


def test_the_config_of_a_codec_is_read_by_a_schema(tmp_path):
    shutil.copytree(SHIPPED / SHIPPED_VAE, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "layers_per_block": 10**9}))
    with pytest.raises(InputError, match="config.json cannot be used: layers_per_block must be at least 0"):
        load_codec(str(tmp_path / "vae"))
