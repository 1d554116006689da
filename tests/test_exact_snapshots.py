"""A run folder stands for its newest snapshot when a run begins, and for the same one ever after."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from d_emo.config import (
    ClassifierSettings,
    DetectorSettings,
    DistillSettings,
    SegmenterSettings,
    TrainSettings,
    VAESettings,
    VideoSettings,
    write_yaml,
)
from d_emo.errors import InputError

EVERY = [
    (TrainSettings, ["init_from", "vae", "fd_features", "align"]), (DistillSettings, ["init_from", "fd_features"]),
    (ClassifierSettings, ["init_from", "teacher"]), (VAESettings, ["init_from", "perceptual_features"]),
    *((each, ["init_from"]) for each in (DetectorSettings, SegmenterSettings, VideoSettings)),
]  # fmt: skip
FORMS = {"fd_features": "emov2:{}", "align": "emov2:{}", "perceptual_features": "emov2:{}"}
CASES = [(kind, name) for kind, names in EVERY for name in names]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder with two snapshots, of which 9 is the newer one, not the last by name of 10 and more."""
    monkeypatch.chdir(tmp_path)
    for step in (9, 10):
        write(Path("results/a"), step)
    return Path("results/a")


def write(run: Path, step: int) -> None:
    folder = run / "snapshots" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "snapshot.json").write_text("{}")
    (folder / "config.yaml").write_text("objective: flow\ndataset: shapes\n")
    (run / "config.yaml").write_text("objective: flow\ndataset: shapes\n")


def resolved(kind, name: str, value: str, **options):
    given = {"init_from": "results/a", "fd_features": "emov2:elsewhere"} if kind is DistillSettings else {}
    given |= {"objective": "one-step"} if name == "fd_features" else {}
    return kind(**{**given, "output_dir": "results/b", name: value, **options}).resolve()


@pytest.mark.parametrize("kind, name", CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_a_run_keeps_what_a_run_folder_stood_for_when_it_began(run, kind, name):
    def called(folder) -> str:
        return FORMS.get(name, "{}").format(folder)

    settings = resolved(kind, name, called(run))
    assert getattr(settings, name) == called("results/a/snapshots/step-10")
    assert settings.resolve() == settings
    assert getattr(resolved(kind, name, called("results/a/snapshots/step-9")), name) == called(
        "results/a/snapshots/step-9"
    )
    write_yaml(settings, Path("results/b/config.yaml"))
    write(run, 11)
    newer = called("results/a/snapshots/step-11")
    assert getattr(resolved(kind, name, called(run)), name) == newer  # nothing was trained yet
    Path("results/b/states/step-1").mkdir(parents=True)
    for again in (run, "./results/a/", run.absolute()):
        assert resolved(kind, name, called(again)) == settings
    assert getattr(resolved(kind, name, newer), name) == newer  # which the loop refuses, both named
    assert getattr(resolved(kind, name, called(run), output_dir="results/c"), name) == newer


def test_what_is_no_run_folder_with_snapshots_stays_as_it_is(run):
    Path("results/empty/snapshots").mkdir(parents=True)
    Path("results/vae").mkdir()
    Path("results/vae/config.json").write_text("{}")
    Path("results/vae/snapshots/step-1").mkdir(parents=True)
    for name in ("pixels", "stabilityai/sd-vae-ft-ema", "results/empty", "results/vae", "~/a", "x" * 5000):
        assert TrainSettings(vae=name).resolve().vae == name
    for name in ("vae", "sra", "dinov2:weights.pth", "emov2:file.pth"):
        assert TrainSettings(align=name).resolve().align == name


def test_a_run_of_an_older_version_goes_on_with_the_run_folder_that_its_config_names(run):
    settings = resolved(TrainSettings, "init_from", "results/a/snapshots/step-9")
    write_yaml(settings, Path("results/b/config.yaml"))
    config = yaml.safe_load(Path("results/b/config.yaml").read_text())
    Path("results/b/config.yaml").write_text(yaml.safe_dump({**config, "init_from": "results/a"}))
    Path("results/b/snapshots/step-1").mkdir(parents=True)
    assert resolved(TrainSettings, "init_from", "results/a").init_from == "results/a"


def test_a_snapshot_that_is_gone_is_said_to_be_the_one_that_the_run_was_begun_with(run):
    settings = resolved(TrainSettings, "init_from", "results/a")
    write_yaml(settings, Path("results/b/config.yaml"))
    Path("results/b/states/step-1").mkdir(parents=True)
    shutil.rmtree("results/a/snapshots/step-10")
    gone = "^`init_from` results/a/snapshots/step-10, which this run was begun with, does not exist; put it back"
    with pytest.raises(InputError, match=gone):
        resolved(TrainSettings, "init_from", "results/a")


def test_every_setting_of_a_run_that_says_so_of_itself_is_marked():
    """Whoever adds a setting that may name a run folder has to add it above too."""
    for kind, names in EVERY:
        marked = {each.name for each in fields(kind) if each.metadata.get("snapshot")}
        own = {"DistillSettings": set(TrainSettings.marked("snapshot"))}.get(kind.__name__, set(names))
        assert marked == own
