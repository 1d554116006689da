"""One writer at a time: who comes second is told who is there; what a killed writer leaves is taken over."""

import json
import os
import signal
import socket
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny_study import settings_of

from d_emo import claims
from d_emo.claims import claimed
from d_emo.cli import run_verb
from d_emo.cli.outputs import claimed_outputs
from d_emo.config import JudgeSettings
from d_emo.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
ARTEFACTS = Path(__file__).parent / "data" / "artefacts"


def held_by_a_child(path, settings="a", write=None):
    """A forked process that holds a claim until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with claimed(path, folder=write is None, settings=settings, is_written=path.exists):
                if write:
                    (path.parent / f".tmp-{os.getpid()}-0-x").write_text("half")
                    path.write_text(write)
                os.write(writer, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(reader, 4) == b"held"
    os.close(reader)
    os.close(writer)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_second_is_refused_and_told_who_is_there_until_the_first_has_ended(tmp_path):
    child = held_by_a_child(tmp_path / "run")
    host = socket.gethostname()
    words = rf"run is being written by process {child} on {host} since 20.*; to write .* remove .*\.claim"
    with pytest.raises(InputError, match=words):
        claimed(tmp_path / "run", folder=True).__enter__()
    end(child)
    with claimed(tmp_path / "run", folder=True), claimed(tmp_path / "run", folder=True):  # its own it may claim again
        assert os.listdir(tmp_path / "run") == [".claim"]
    assert os.listdir(tmp_path / "run") == []
    with claimed(tmp_path / "new" / "run", folder=True):
        assert os.listdir(tmp_path / "new" / "run") == [".claim"]
    assert os.listdir(tmp_path) == ["run"]  # what stays empty goes again


def test_what_a_killed_writer_left_is_known_by_its_settings_and_its_leftovers_go(tmp_path):
    file, seen = tmp_path / "new" / "o.json", []

    def accept(unfinished):
        seen.append(unfinished)
        if not unfinished:
            raise InputError("exists")

    end(held_by_a_child(file, write="half"))
    for settings in "bab":  # another's, its own, and once it is finished nobody's
        with pytest.raises(InputError) if settings == "b" else nullcontext():
            with claimed(file, folder=False, settings=settings, accept=accept):
                file.write_text("whole")
        assert file.read_text() == ("whole" if "a" in settings or len(seen) > 1 else "half")
    assert seen == [False, True, False] and os.listdir(file.parent) == ["o.json"]


def test_a_run_that_fails_leaves_its_unfinished_file_known_as_its_own(tmp_path):
    file, seen = tmp_path / "o", []
    with pytest.raises(ZeroDivisionError), claimed(file, folder=False, settings="a", is_written=file.exists):
        file.write_text("half")
        raise ZeroDivisionError
    with claimed(file, folder=False, settings="a", accept=seen.append):
        pass
    assert seen == [True] and os.listdir(tmp_path) == ["o"]


@pytest.mark.parametrize("alive", [True, False])
def test_another_machine_is_believed_as_long_as_it_gives_signs_of_life(tmp_path, monkeypatch, capsys, alive):
    """Where locks do not reach, only the time of change does."""
    monkeypatch.setattr(claims, "PATIENCE", 0.4)
    file = tmp_path / ".claim"
    file.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "today", "settings": "", "held": True}) + "\n")

    def renewed(seconds, sleep=time.sleep):
        sleep(seconds)
        if alive:
            os.utime(file)

    monkeypatch.setattr(claims.time, "sleep", renewed)
    if alive:
        with pytest.raises(InputError, match="is being written by process 7 on elsewhere since today"):
            claimed(tmp_path, folder=True).__enter__()
        assert file.exists()
    else:
        with claimed(tmp_path, folder=True):
            assert json.loads(file.read_text())["host"] == socket.gethostname()
    assert "process 7 on elsewhere has begun to write here; looking for" in capsys.readouterr().out


def test_a_holder_renews_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with claimed(tmp_path, folder=True):
        before, until = (tmp_path / ".claim").stat().st_mtime_ns, time.monotonic() + 10
        while (tmp_path / ".claim").stat().st_mtime_ns == before and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / ".claim").stat().st_mtime_ns > before


SECOND = {
    "train": ["--model", "D-EMOv2-Ti-2", "--dataset", "digits", "--image-size", "8", "--vae", "pixels", "--output-dir"],
    "train-classifier": ["--dataset", "digits", "--output-dir"],
    "encode": ["--dataset", "digits", "--image-size", "8", "--vae", "pixels", "--output"],
    "fid": ["--checkpoint", ".", "--metrics", "isc", "--work-dir"],
    "train-vae": ["--output-dir"],
}


@pytest.mark.parametrize("verb", SECOND)
def test_the_second_of_a_verb_is_refused_and_touches_nothing(tmp_path, verb):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "first").write_text("first")
    child = held_by_a_child(tmp_path / "out")
    try:
        with pytest.raises(InputError, match=f"out is being written by process {child}"):
            run_verb(verb, [*SECOND[verb], str(tmp_path / "out")])
        assert sorted(os.listdir(tmp_path / "out")) == [".claim", "first"]
    finally:
        end(child)


def test_processes_share_a_study(tmp_path):
    """Each takes runs that nobody works on, by locks of their own."""
    child = held_by_a_child(tmp_path / "study")
    try:
        with claimed_outputs("compare", settings_of(tmp_path)) as settings:
            assert settings.output_dir == str(tmp_path / "study")
    finally:
        end(child)


def test_ranks_of_one_launch_are_one_writer(tmp_path, monkeypatch):
    child = held_by_a_child(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert not claims.is_first_rank()
    monkeypatch.setenv("RANK", "0")
    assert claims.is_first_rank()
    end(child)


@pytest.mark.parametrize(("verb", "argv", "name"), [
    ("reference", ["--dataset", "digits", "--output"], "r.npz"), ("evaluate", ["emov2_1m", "--output"], "a.json"),
    ("export", ["emov2_1m"], "n.onnx"), ("plot-loss", [".", "--output"], "l.png"),
    ("class-accuracy", ["--checkpoint", ".", "--classifier", ".", "--output"], "j.png"),
    ("sample", ["--output"], "s.png"), ("convert", ["."], "timm"),
    ("fid", ["--samples", ".", "--metrics", "isc", "--output"], "f.json"),
    ("explain", [__file__, "--model", "x", "--output"], "e"),
    ("benchmark", ["denoisers", "--output"], "table"), ("doctor", ["--output"], "sheet.png"),
])  # fmt: skip
def test_nothing_is_overwritten_that_another_run_wrote_or_writes(tmp_path, monkeypatch, verb, argv, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    child = held_by_a_child(path, write="precious" if path.suffix else None)
    try:
        with pytest.raises(InputError, match=f"{name} is being written by process {child}"):
            run_verb(verb, [*argv, str(path)])
    finally:
        end(child)
    if not path.suffix:
        (path / "config.yaml").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"{name} exists and is not overwritten; name another, or give --overwrite"):
        run_verb(verb, [*argv, str(path)])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("verb", "argv", "name"), [
    ("sample", ["--checkpoint", f"{ARTEFACTS}/eps", "--class", "3", "--num-images", "1", "--steps", "1"],
     "class-3-seed0.png"),
    ("doctor", ["--dataset", "digits", "--image-size", "8", "--sample", "4"], "doctor-digits-8.png"),
    ("explain", [f"{ARTEFACTS}/photos/ant/0.png", "--model", f"{ARTEFACTS}/classifier"], "explain-0"),
])  # fmt: skip
def test_a_default_path_is_claimed_as_a_named_one_is(tmp_path, monkeypatch, verb, argv, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "samples" / name
    path.parent.mkdir()
    child = held_by_a_child(path, write="half" if path.suffix else None)
    before = sorted(tmp_path.rglob("*"))
    try:
        with pytest.raises(InputError, match=f"{name} is being written by process {child}"):
            run_verb(verb, argv)
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        end(child)
    if path.suffix:  # what another command was cut off at is not this one's
        run_verb(verb, argv)
        assert path.read_text() == "half" and path.with_stem(f"{path.stem}-2").stat().st_size > 100


@pytest.mark.parametrize(("samplers", "taken"), [(["euler:2"], "judged.md"), ([], "judged.json")])
def test_a_default_is_numbered_by_any_of_the_files_that_are_written_for_it(tmp_path, monkeypatch, samplers, taken):
    monkeypatch.chdir(tmp_path)
    Path("samples").mkdir()
    Path("samples", taken).write_text("of another command")
    settings = JudgeSettings(checkpoint="s", classifier="c", samplers=samplers)
    with claimed_outputs("judge", settings) as claimed_settings:
        assert claimed_settings.output == str(Path("samples", "judged-2.png"))
    assert Path("samples", taken).read_text() == "of another command"
