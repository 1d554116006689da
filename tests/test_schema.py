"""What lies in a run folder is data: whatever its files hold, a sentence names the file and what is wrong in it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_resume import train

from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser, load_meta
from d_emo.lab.loss_curves import read_run

ARTEFACTS = Path(__file__).parent / "data" / "artefacts"
DEEP = "[" * 100_000


def damaged(folder, file, change):
    copy = folder / "copy"
    shutil.copytree(ARTEFACTS / "eps", copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(change if isinstance(change, str) else json.dumps({**content, **change}))
    return copy


@pytest.mark.parametrize(("file", "change", "said"), [
    ("snapshot.json", {"step": -1}, "`step` must be at least 0, not -1"),
    ("snapshot.json", {"step": "7"}, "`step` must be a whole number"),
    ("snapshot.json", {"image_size": 10**9}, "`image_size` must be at least 8 and at most 65536"),
    ("snapshot.json", {"class_names": "abc"}, "`class_names` must be a list"),
    ("snapshot.json", {"class_names": [1, 2]}, "`class_names` must be text, not 1"),
    ("snapshot.json", {"label_dropout": float("nan")}, "`label_dropout` must be"),
    ("snapshot.json", {"codec": None}, "`codec` must be text"),
    ("snapshot.json", {"kind": "teapot"}, "`kind` must be one of denoiser, classifier"),
    ("snapshot.json", "[]", "no mapping"), ("snapshot.json", "\0\1", "is damaged"),
    ("snapshot.json", DEEP, "is damaged"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**15}, "`num_train_timesteps` must be"),
    ("scheduler/scheduler_config.json", {"beta_end": "high"}, "`beta_end` must be a number"),
    ("scheduler/scheduler_config.json", {"trained_betas": {"a": 1}}, "`trained_betas` must be a list"),
    ("scheduler/scheduler_config.json", {"clip_sample": "perhaps"}, "`clip_sample` must be true or false"),
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
    ("- 1\n", "no mapping"), ("seed: many\n", "`seed` must be a whole number, not 'many'"), ("{", "is damaged"),
    ("learning_rate: -1\n", "`learning_rate` must be above 0"), ("model_options: 5\n", "`model_options` must be a map"),
    ("flip: [a]\n", "`flip` must be true or false"), ("1: 2\n", "no mapping of names"),
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
