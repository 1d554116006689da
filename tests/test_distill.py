"""``d-emo distill`` is ``d-emo train --init-from SNAPSHOT`` with an objective of few steps and defaults for it."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from test_resume import last_state, same

from d_emo.cli import main, run_verb
from d_emo.config import DistillSettings, TrainSettings, parse_settings
from d_emo.config.distilling import _OF_DATA
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser

ARTEFACTS = Path(__file__).parent / "data" / "artefacts"
FLOW, FEATURES = str(ARTEFACTS / "flow"), ["--fd-features", f"emov2:{ARTEFACTS / 'classifier'}"]


def settings(*arguments):
    return parse_settings(DistillSettings, "", [*FEATURES, *map(str, arguments)])


def snapshot_of(folder, **changes):
    """A folder with the settings of the flow snapshot, but for changes."""
    folder.mkdir(parents=True)
    there = yaml.safe_load((ARTEFACTS / "flow" / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**there, **changes}))
    return folder


@pytest.mark.parametrize("more", [[], ["--max-steps", "7", "--lr", "3e-5", "--output-dir", "x", "--fd-decay", "0.9"]])
def test_it_is_a_training_run_to_the_last_setting(more):
    plain = ["--init-from", FLOW, "--objective", "one-step", "--dataset", "digits", "--ema-warmup", "--lr", "1e-5",
             "--max-steps", "5000", "--snapshot-every", "1000", "--state-every", "500", "--output-dir",
             "results/flow-one-step"]  # fmt: skip
    here = settings(FLOW, *more)
    assert type(here) is TrainSettings and here == parse_settings(TrainSettings, "", [*plain, *FEATURES, *more])
    assert settings(FLOW, "--epochs", "2").max_steps is None


def test_objective_folder_and_data_are_the_snapshots(tmp_path):
    run = snapshot_of(tmp_path / "birds" / "snapshots" / "step-9", objective="flow-x", dataset="shapes", exif=False,
                      data_dir=str(ARTEFACTS / "photos"), unconditional=True)  # fmt: skip
    found = settings(run)
    assert (found.objective, found.output_dir) == ("one-step-x", "results/birds-one-step")
    assert (found.data_dir, found.exif, found.unconditional) == (str(ARTEFACTS / "photos"), False, True)
    found = settings(run, "--no-unconditional", "--exif")
    assert (found.data_dir, found.exif, found.unconditional) == (str(ARTEFACTS / "photos"), True, False)
    found = settings(run, "--dataset", "digits")
    assert (found.data_dir, found.dataset, found.exif, found.unconditional) == (None, "digits", None, False)
    found = settings(FLOW, "--data-dir", tmp_path)
    assert (found.data_dir, found.dataset) == (str(tmp_path), "shapes")
    assert settings(snapshot_of(tmp_path / "few", objective="one-step-x")).objective == "one-step-x"
    with pytest.raises(InputError, match="not of eps; first fine-tune it"):  # before anything is loaded
        settings(ARTEFACTS / "eps")
    encoded = snapshot_of(tmp_path / "encoded", latents="latents/birds", unconditional=True, flip=False)
    found = settings(encoded, "--objective", "four-step")
    assert (found.latents, found.data_dir, found.output_dir) == ("latents/birds", None, "results/encoded-four-step")
    assert (found.unconditional, found.flip) == (True, False)


def test_a_tiny_run_draws_in_one_step_and_goes_on_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--fd-images", "100", "--batch-size", "4", "--micro-batch-size", "4", "--state-every", "2", "--tracker",
             "none"]  # fmt: skip
    run_verb("distill", [FLOW, *FEATURES, *short, "--max-steps", "3"])
    assert "snapshot  results/flow-one-step/snapshots/step-3" in capsys.readouterr().out
    shutil.copytree("results/flow-one-step", "parts")
    shutil.rmtree("parts/states/step-3")
    run_verb("distill", [FLOW, *FEATURES, *short, "--max-steps", "5", "--output-dir", "parts"])
    assert "resuming at step 2 of 5" in capsys.readouterr().out
    run_verb("train", ["--init-from", FLOW, "--objective", "one-step", "--dataset", "digits", "--ema-warmup", *FEATURES,
                       *short, "--lr", "1e-5", "--max-steps", "5", "--output-dir", "whole"])  # fmt: skip
    assert same(last_state("parts", 5), last_state("whole", 5))
    assert load_denoiser("parts").objective == "one-step"


@pytest.mark.parametrize(("arguments", "words"), [
    ([str(ARTEFACTS / "eps")], "--objective one-step goes on from a snapshot of flow, not of eps; first fine-tune it "
                               "with --objective flow"),
    ([FLOW, "--objective", "one-step-x"], "from a snapshot of flow-x, not of flow; choose --objective one-step"),
    ([FLOW, "--objective", "four-step-x"], "from a snapshot of flow-x, not of flow; choose --objective four-step"),
    ([FLOW, "--objective", "flow"], "--objective must be one of one-step, one-step-x, four-step, four-step-x, not"),
    ([FLOW, "--contrastive", "0.05"], "--contrastive 0.05 belongs to --objective flow, flow-x, flow-eps"),
    ([FLOW, "--fd-features", "inception"], "--fd-features inception passes no gradients"),
    ([], "this is missing: SNAPSHOT"),
])  # fmt: skip
def test_what_cannot_be_distilled_is_refused_with_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main("distill", [*FEATURES, *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("snapshots"))


def test_a_snapshot_that_does_not_say_its_objective_is_refused_by_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silent = tmp_path / "silent"
    shutil.copytree(ARTEFACTS / "eps", silent)
    config = yaml.safe_load((silent / "config.yaml").read_text())
    (silent / "config.yaml").write_text(yaml.safe_dump({**config, "objective": None}))
    with pytest.raises(InputError, match="one-step goes on from a snapshot of flow, not of eps; first fine-tune it"):
        run_verb("distill", [str(silent), *FEATURES])
    meta = json.loads((silent / "snapshot.json").read_text())
    (silent / "snapshot.json").write_text(json.dumps({**meta, "objective": "flow-x"}))
    with pytest.raises(InputError, match="of flow, not of flow-x; choose --objective one-step-x$"):
        run_verb("distill", [str(silent), *FEATURES])


def test_settings_of_data_are_left_open_and_taken_from_the_snapshots_run(tmp_path):
    """A default of one of them would win over the snapshot's."""
    defaults = {field.name: field.default for field in fields(DistillSettings)}
    assert {name: defaults[name] for name in _OF_DATA} == dict.fromkeys(_OF_DATA)
    there = {"dataset": "digits", "exif": False, "background": "grey", "flip": False, "num_images": 40,
             "skip_corrupt": True, "unconditional": True}  # fmt: skip
    with_folder = {"data_dir": str(ARTEFACTS / "photos")}
    assert there.keys() | with_folder.keys() == set(_OF_DATA)
    for number, values in enumerate((there, {**there, **with_folder, "dataset": "shapes"})):
        found = settings(snapshot_of(tmp_path / str(number), **values))
        assert {name: getattr(found, name) for name in values} == values


@pytest.mark.parametrize("path", ["..", "../", "../../birds/.", "link"])
def test_the_run_folder_has_the_name_of_the_real_one(path, tmp_path, monkeypatch):
    (snapshot_of(tmp_path / "birds") / "samples").mkdir()
    monkeypatch.chdir(tmp_path / "birds" / "samples")
    Path("link").symlink_to(tmp_path / "birds")
    assert settings(path).output_dir == "results/birds-one-step"


def test_a_snapshot_that_does_not_say_its_data_is_not_distilled_on_others(tmp_path):
    silent = tmp_path / "silent"
    shutil.copytree(FLOW, silent)
    (silent / "config.yaml").unlink()
    with pytest.raises(InputError, match="does not say what it was trained on; name its --dataset or --data-dir"):
        run_verb("distill", [str(silent), *FEATURES])
