"""Studies: their plan, the arithmetic of their report, and a tiny one from end to end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_study import ROOT, RUNS, TINY, TRAIN, open_study, settings_of

from d_emo.cli import run_verb
from d_emo.config import StudySettings, TrainSettings, parse_settings
from d_emo.errors import InputError, RunError
from d_emo.files import locked, write_json
from d_emo.io.snapshot import save_denoiser
from d_emo.lab.study import Study, cost, study
from d_emo.lab.study.cost import (
    cost_table,
    network_calls,
    processes_of,
    read_step_times,
    speed_key,
    step_times,
)
from d_emo.lab.study.execution import VerbError
from d_emo.lab.study.measuring import Meter
from d_emo.lab.study.plan import plan_runs
from d_emo.lab.study.results import RESUME, add_measurement, read_measurements
from d_emo.models import create_model
from d_emo.tables import OBJECTIVES, load

STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_a_plan_has_every_run_with_every_seed_and_what_they_share(tmp_path):
    planned = plan_runs(settings_of(tmp_path))
    assert [(run.name, run.seed) for run in planned] == [(name, seed) for seed in (3, 5) for name in RUNS]
    demo, dit, broken = planned[:3]
    assert demo.training.model_options == {**TINY, "window_size": 2} and dit.training.model_options == TINY
    assert demo.training.seed == 3 and dit.training.objective == "flow" and demo.training.objective == "eps"
    assert demo.training.latents == dit.training.latents == str(tmp_path / "study" / "latents")
    assert demo.folder == tmp_path / "study" / "runs" / "d-emo-seed3" and dit.folder.name == "dit-flow-seed3"
    other = plan_runs(settings_of(tmp_path, num_images=21))[0]
    assert other.folder == demo.folder and other.results != demo.results, "measured otherwise"
    assert broken.folder == demo.folder and broken.results != demo.results


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"judge": None}, "either .*judge.* or .*reference"),
    ({"reference": "x.npz"}, "either .*judge.* or .*reference"),
    ({"seeds": [1, 1]}, "must be different"),
    ({"runs": {}}, "at least one run"),
    ({"num_images": 1}, "at least 2"),
    ({"only": ["D-EMU"]}, "'D-EMU' that it does not have; it has 'D-EMO', 'DiT, flow', 'no buffers'"),
    ({"tables": {"Main": ["nobody"]}}, "'nobody'"),
    ({"tables": {"Main": []}}, "names no runs"),
    ({"samplers": {"eps": "dpm++"}}, "NAME:STEPS"),
    ({"encode": None, "data_dir": "photos"}, "`data_dir` photos"),
    ({"runs": {"a": {"of": "b"}, "b": {"model": "DiT-S-2"}}}, "'a' must be"),
    ({"runs": {"a": {"modle": "DiT-S-2"}}}, "the run 'a' of the study: .*modle"),
    ({"runs": {"a": {"max_steps": -1}}}, "the run 'a' of the study: .*max.steps"),
    ({"runs": {"D-EMO, x": {}, "other": {}, "D-EMO x": {}}}, "'D-EMO, x' and 'D-EMO x' would share a folder"),
])  # fmt: skip
def test_a_study_that_cannot_be_is_refused_in_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        plan_runs(settings_of(tmp_path, **changes))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_that_ships_can_be_planned(path):
    alone = dict.fromkeys(("shapes64", "imagenet256", "u64", "switches64", "pixels32"))
    under = {**alone, "u64_digits": "u64"}.get(path.stem, "shapes64")
    base = ["--config", str(path.with_name(f"{under}.yaml"))] if under else []
    settings = parse_settings(StudySettings, "", [*base, "--config", str(path)])
    runs = plan_runs(settings)
    assert len(runs) == len(settings.seeds) * len(settings.runs)
    for run in runs:
        with torch.device("meta"):
            create_model(run.training.model, sample_size=8, **run.training.model_options or {})
    assert len({run.folder for run in runs if run.norm_buffers == "trained"}) == sum(
        run.norm_buffers == "trained" for run in runs
    )


def test_the_ablations_share_the_runs_of_the_study_that_they_change():
    files = [ROOT / "configs" / "study" / name for name in ("shapes64.yaml", "ablations64.yaml")]
    study, both = (
        {run.folder: run.training for run in plan_runs(parse_settings(StudySettings, "", arguments))}
        for arguments in (["--config", str(files[0])], [part for file in files for part in ("--config", str(file))])
    )
    shared = study.keys() & both.keys()
    assert len(shared) == 6 and all(study[folder] == both[folder] for folder in shared)


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_run_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    whole, tried, measured = open_study(tmp_path), [], []

    def run(verb, settings, config, **_):
        tried.append((verb, config.stem))
        if tried[-1][1].startswith("d-emo"):
            raise VerbError("d-emo train ended with exit code 1")

    monkeypatch.setattr(study, "run_verb", run)
    monkeypatch.setattr(Study, "_measure", lambda self, run, lock: measured.append((run.name, run.seed)))
    monkeypatch.setattr(Study, "report", lambda self: Path("report.md"))
    failed = whole.work()
    names = ["latents", "judge", "d-emo-seed3", "dit-flow-seed3", "d-emo-seed5", "dit-flow-seed5"]
    assert [name for _, name in tried] == names
    assert failed == ["D-EMO, seed 3", "D-EMO, seed 5"] and measured == [("DiT, flow", 3), ("DiT, flow", 5)]
    assert "D-EMO, seed 3: d-emo train ended with exit code 1; the other runs go on" in capsys.readouterr().err

    sentence = "2 runs failed: D-EMO, seed 3; D-EMO, seed 5"
    with pytest.raises(RunError, match=sentence):
        whole.conclude(failed)
    assert "report" not in capsys.readouterr().out, "nothing is measured"
    add_measurement(whole.runs[1], 4, {"fid": 1.0})
    with pytest.raises(RunError, match=sentence):
        whole.conclude(failed)
    assert "report    report.md" in capsys.readouterr().out
    whole.conclude([])


def test_what_was_killed_after_its_last_snapshot_is_finished(tmp_path, monkeypatch):
    whole, tried = open_study(tmp_path, runs={"a": {"model": "DiT-Ti-2"}}, seeds=[3]), []
    monkeypatch.setattr(study, "run_verb", lambda verb, *_, **__: tried.append(verb))
    monkeypatch.setattr(study, "check_same_latents", lambda settings: None)
    monkeypatch.setattr(Study, "_measure", lambda *_: None)
    folders = [tmp_path / "study" / "latents", whole.classifier, whole.runs[0].folder]
    for folder, last in zip(folders, ("index.json", "snapshots/step-2", "snapshots/step-4"), strict=True):
        (folder / last).mkdir(parents=True)
    whole.work()
    assert not tried
    for folder in folders:
        (folder / ".claim").touch()
    whole.work()
    assert tried == ["encode", "train-classifier", "train"]


@pytest.mark.parametrize("name", ["encode", "train-classifier"])
def test_without_latents_or_a_classifier_nothing_is_trained(tmp_path, monkeypatch, name):
    tried = []

    def run(verb, settings, config, **_):
        tried.append(verb)
        if verb == name:
            raise VerbError("it ended")

    monkeypatch.setattr(study, "run_verb", run)
    with pytest.raises(VerbError):
        open_study(tmp_path).work()
    assert tried[-1] == name


def test_what_cannot_be_written_or_read_is_said_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/x \((Not a directory|File exists)\); nothing that was"):
        write_json(tmp_path / "file" / "x", {"a": 1}, RESUME)
    with pytest.raises(RunError, match=r"folder cannot be written \(.*file/study/latents: Not a directory\); nothing"):
        open_study(tmp_path, output_dir=str(tmp_path / "file" / "study")).work()

    whole = open_study(tmp_path)
    whole.runs[0].folder.mkdir(parents=True)

    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Study, "report", full)
        with pytest.raises(RunError, match=r"the report cannot be written \(No space left on device\); nothing"):
            whole.conclude([])
    for content in ('{"4": {"fid"', "[1]", '{"x": {}}', '{"4": 1}'):
        whole.runs[0].results.write_text(content)
        with pytest.raises(InputError, match=rf"{whole.runs[0].results} is damaged \(.*; remove it"):
            whole.report()


# ---- measuring -------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file, without what is empty."""
    return [row.dropna().to_dict() for _, row in pd.read_csv(path).iterrows()]


def snapshot_of(folder: Path, **options) -> Path:
    """A snapshot of a random denoiser of digits at 8 px, its gates open."""
    torch.manual_seed(0)
    model = create_model("D-EMOv2-Ti-2", sample_size=8, in_channels=3, num_classes=10, **{**TINY, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(0, 0.2)
    meta = {"step": 4, "weights": "ema", "codec": "pixels", "image_size": 8, "data": "digits",
            "class_names": [str(i) for i in range(10)]}  # fmt: skip
    scheduler = load(OBJECTIVES["eps"].loss)(null_class=10).noise_schedule()
    save_denoiser(folder, model, scheduler=scheduler, meta=meta, settings=TrainSettings())
    return folder


def test_the_norm_gap_is_one_without_a_batch_norm_and_leaves_the_snapshot_alone(tmp_path):
    meter = Meter(settings_of(tmp_path), None)
    plain = meter.norm_gap(snapshot_of(tmp_path / "none", local_norm="none"))
    assert [level["timestep"] for level in plain] == [50 + 100 * i for i in range(10)]
    assert all(level["train"] == level["eval"] > 0 for level in plain)
    batch = meter.norm_gap(snapshot_of(tmp_path / "batch"))
    assert all(level["train"] != level["eval"] for level in batch)
    assert batch == meter.norm_gap(tmp_path / "batch")


def test_the_step_of_a_network_without_a_variance_is_timed(tmp_path):
    runs = {"D-EMO": {**RUNS["D-EMO"], "objective": "flow", "model_options": {"learn_sigma": False}}}
    settings = settings_of(tmp_path, runs=runs)
    assert all(value > 0 for value in step_times(settings, plan_runs(settings)).values())


def test_a_step_is_timed_once_for_every_network_and_anew_when_another_joins(tmp_path, monkeypatch):
    runs = {**RUNS, "other labels": {**RUNS["D-EMO"], "label_init": "normal"}}
    muon = plan_runs(settings_of(tmp_path, runs={"D-EMO": {**RUNS["D-EMO"], "optimizer": "muon"}}))[0]
    settings = settings_of(tmp_path, runs=runs)
    planned = plan_runs(settings)
    keys = [speed_key(run, settings) for run in planned]
    assert speed_key(muon, settings) not in keys
    assert len(set(keys)) == 2 and keys[0] == keys[2] == keys[3] and keys[:4] == keys[4:]
    seconds = step_times(settings, planned)
    assert seconds.keys() == set(keys) and all(0 < value < 10 for value in seconds.values())

    asked = []
    monkeypatch.setattr(cost, "step_times", lambda settings, runs: asked.append(1) or {
        speed_key(run, settings): 1.0 for run in runs
    })  # fmt: skip
    assert read_step_times(settings, planned) == read_step_times(settings, planned) and len(asked) == 1
    (kept,) = Path(settings.output_dir).glob("step_times-*.json")
    kept.write_text(kept.read_text()[:-9])
    with pytest.raises(InputError, match=f"{kept.name} is damaged.*; remove it"):
        read_step_times(settings, planned)
    wider = settings_of(tmp_path, runs={**runs, "deeper": {"model": "DiT-Ti-2", "model_options": {"depth": 2}}})
    read_step_times(wider, plan_runs(wider))
    assert len(asked) == 2


# ---- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """Verbs run in this process; their names."""
    calls = []

    def run(verb, settings, config, **_):
        calls.append(verb)
        AcceleratorState._reset_state(True)
        config.write_text(yaml.safe_dump(settings))
        run_verb(verb, ["--config", str(config)])

    monkeypatch.setattr(study, "run_verb", run)
    return calls


def test_a_study_trains_measures_and_reports_and_goes_on_where_it_stopped(tmp_path, called, capsys, monkeypatch):
    settings = settings_of(tmp_path, norm_gap=["D-EMO"], only=["D-EMO", "no buffers"])
    Study(settings).work()
    assert called == ["encode", "train-classifier", "train", "train"]
    tables = {"Both": ["D-EMO", "DiT, flow"], "EMA": ["D-EMO", "no buffers"]}
    settings = settings_of(tmp_path, norm_gap=["D-EMO"], tables=tables)
    whole = Study(settings)
    with locked(whole.runs[1].folder):
        whole.work()
        assert "DiT, flow, seed 3: another process works on it" in capsys.readouterr().out
    whole.work()
    assert called[4:] == ["train", "train"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--config", "a b.yaml", "--seeds", "3", "5", "--config", "c.yaml"])
    report = whole.report().read_text()
    whole.work()
    assert len(called) == 6, "all is there"
    monkeypatch.setattr(cost, "step_times", None)
    whole.report()  # does not time anything again
    for changes, sentence in (
        ({"train": {**TRAIN, "learning_rate": 0.1}}, "'D-EMO', seed 3, was trained with learning_rate 0.05"),
        ({"encode": {"dataset": "digits", "image_size": 16}}, "encoded with image_size 8"),
    ):
        with pytest.raises(InputError, match=sentence):
            open_study(tmp_path, **changes)

    folder = tmp_path / "report"
    rows = read_table(folder / "results.csv")
    assert [(row["run"], row["seed"], row["step"]) for row in rows] == [
        (name, seed, step) for seed in (3, 5) for name in RUNS for step in (2, 4)
    ]
    demo, broken = (next(r for r in rows if r["run"] == name and r["step"] == 4) for name in ("D-EMO", "no buffers"))
    assert demo["images"] == 16 and demo["fid"] > 0 and 0 <= demo["precision"] <= 1 and "shape" not in demo
    assert demo["fid"] != broken["fid"] and demo["parameters"] == broken["parameters"]
    losses = read_table(folder / "losses.csv")
    early = next(r for r in rows if r["run"] == "D-EMO" and r["step"] == 2)
    logged = {(row["run"], row["seed"], row["step"]): row["loss"] for row in losses}
    assert (early["loss"], demo["loss"]) == (logged["D-EMO", 3, 2], logged["D-EMO", 3, 4])
    assert demo["minutes"] == pytest.approx(4 * demo["seconds_per_step"] / 60, rel=1e-4)
    assert len(losses) == 2 * 2 * 4 and {row["run"] for row in losses} == {"D-EMO", "DiT, flow"}
    assert len(read_table(folder / "norm_gap.csv")) == 2 * 10
    assert report.startswith("# Tiny\n") and report.index("What it says") < report.index("## Both")
    assert "`d-emo compare --config 'a b.yaml' --config c.yaml`" in report
    assert "20 real held-out images measure: FID 0.0" in report and "class accuracy % 10." in report
    assert re.search(r"D-EMO against DiT, flow, step 4, 2 seeds.*losses are those of other objectives", report)
    assert "config c.yaml`: 2 seeds, 4 steps of 4" in report and "dpm++:2 (eps)" in report
    shown = re.findall(r"\]\((\w+\.png)\)", report)
    assert shown == ["curves.png", "norm_gap.png", "samples.png"]
    for name in shown:
        with Image.open(folder / name) as picture:
            assert picture.width > 300 and len(picture.convert("L").getcolors()) > 10


def test_only_the_last_snapshots_are_measured_where_no_more_is_wanted(tmp_path, called, monkeypatch):
    settings = settings_of(tmp_path, measure="last", seeds=[3], runs={"D-EMO": RUNS["D-EMO"]})
    small = Study(settings)
    small.runs[0].folder.mkdir(parents=True)
    add_measurement(small.runs[0], 2, {"fid": 1.0})  # as by a study that wants all
    with pytest.raises(InputError, match="nothing of the study"):
        small.report()
    small.work()
    assert list(read_measurements(small.runs[0])) == [2, 4]
    assert list(read_measurements(small.runs[0], last=True)) == [4]
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    report = small.report().read_text()
    assert "Step 4." in report and "FID at step" not in report
    assert [row["step"] for row in read_table(tmp_path / "report" / "results.csv")] == [4]


def test_with_a_reference_fid_measures(tmp_path, monkeypatch):
    real = tmp_path / "real.npz"
    real.touch()
    settings = settings_of(
        tmp_path, judge=None, reference=str(real), fid={"steps": 3, "metrics": ["fid", "prc"]}, launch=["--cpu"]
    )
    measured = Study(settings)
    calls = []

    def run(verb, settings, config, *, launch, lock):
        calls.append((verb, settings, launch))
        Path(settings["output"]).write_text('{"fid": 4.5, "recall": 0.25, "features": "x"}')

    monkeypatch.setattr(study, "run_verb", run)
    snapshot = tmp_path / "step-4"
    snapshot.mkdir()
    assert measured._fid(snapshot, lock=None) == {"fid": 4.5, "recall": 0.25}
    ((verb, asked, launch),) = calls
    assert verb == "fid" and launch == ["--cpu"]
    expected = {"checkpoint": str(snapshot), "reference": str(real), "num_images": 20, "guidance_scale": 1.0,
                "steps": 3, "metrics": ["fid", "prc"], "overwrite": True}  # fmt: skip
    assert asked == {**expected, "output": str(tmp_path / ".step-4-fid.json")}


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(InputError, match="nothing of the study"):
        Study(settings_of(tmp_path)).report()
    with pytest.raises(InputError, match="neither a classifier's run folder nor"):
        Study(settings_of(tmp_path, judge=str(tmp_path / "no.yaml")))


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_the_plan_prints_hours_that_are_steps_times_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost.Workload, "step", lambda self: 1.8)  # seconds
    monkeypatch.setattr(cost.Workload, "draw", lambda self: 0.9)
    settings = settings_of(tmp_path, launch=["--num_processes=2"], guidance_scale=1.5)
    assert processes_of(settings.launch) == 2 and processes_of(["--cpu"]) == 1
    runs = plan_runs(settings)
    assert network_calls(settings, runs[0].training) == 4  # two steps, guided
    wrong = settings_of(tmp_path, runs={"a": {"model": "emov2_1m"}})
    with pytest.raises(InputError, match="emov2_1m is a classifier; a study compares denoisers"):
        cost_table(wrong, plan_runs(wrong))
    by_fid = settings_of(tmp_path, judge=None, reference="x", fid={"steps": 3}, guidance_scale=1.5)
    assert network_calls(by_fid, runs[0].training) == 6
    table = cost_table(settings, runs)
    assert re.search(r"\| D-EMO \| \d\.\d\dM \| \dM \| 1,800 \| 0\.00 \| 0\.02 \| 2 \|", table)  # 20 x 4 x 2 / 2 calls
    hours = 2 * 2 * (4 * 1.8 + 20 * 4 * 2 * 0.9 / 2) / 3600
    assert f"{hours:,.1f} hours on 2 x" in table and "no buffers" not in table
    monkeypatch.undo()
    work = cost.Workload(runs[0].training, (3, 8, 8), torch.device("cpu"), 2)
    step, image = work.step(), work.draw()
    assert step > 0 and image > 0
