"""A study's children: stopped with it, and nobody else's while they live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_study import ROOT

from d_emo.errors import RunError
from d_emo.files import locked
from d_emo.lab.study import execution
from d_emo.lab.study.execution import run_child, run_verb


def test_a_verb_that_fails_ends_the_study_in_a_sentence(tmp_path, capfd):
    run_child([sys.executable, "-c", "print('ran')"], "it")
    assert "ran" in capfd.readouterr().out
    with pytest.raises(RunError, match="it ended with exit code 2; .* re-run the same command to resume"):
        run_child([sys.executable, "-c", "raise SystemExit(2)"], "it")
    with pytest.raises(SystemExit) as stop:
        run_child([sys.executable, "-c", "raise SystemExit(143)"], "it")
    assert stop.value.code == 143


@pytest.mark.parametrize(("launch", "launcher"), [
    ((), []), (["--cpu"], ["-m", "accelerate.commands.launch", "--quiet", "--cpu"]),
])  # fmt: skip
def test_a_verb_is_a_child_of_this_python_with_its_settings_as_yaml(tmp_path, monkeypatch, capsys, launch, launcher):
    commands = []
    monkeypatch.setattr(execution, "run_child", lambda *command: commands.append(command))
    run_verb("fid", {"steps": 3, "metrics": ["fid", "prc"]}, tmp_path / "fid.yaml", launch=launch)
    arguments = ["fid", "--config", str(tmp_path / "fid.yaml")]
    assert commands == [([sys.executable, *launcher, "-m", "d_emo", *arguments], "d-emo fid", None)]
    assert (tmp_path / "fid.yaml").read_text() == "steps: 3\nmetrics:\n- fid\n- prc\n"
    assert capsys.readouterr().out == f"$ d-emo {' '.join(arguments)}\n"


def start_parent(script: Path, folder: Path | None = None) -> subprocess.Popen:
    """A process that runs a script as a study runs a verb, with the lock of a folder; it imports no torch."""
    code = (
        f"import runpy, sys; from pathlib import Path; from d_emo.files import locked\n"
        f"own = runpy.run_path({execution.__file__!r})\n"
        f"with locked(Path({str(folder or script.parent / 'any')!r})) as lock:\n"
        f"    own['run_child']([sys.executable, {str(script)!r}], 'it', lock)"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})


def wait_for(note: Path) -> str:
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return note.read_text()


def test_sigterm_reaches_the_script_which_saves_and_ends(tmp_path):
    script, note = tmp_path / "child.py", tmp_path / "note"
    script.write_text(
        "import signal, sys, time\n"
        f"def stop(*_): open({str(note)!r}, 'a').write('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"with open({str(note)!r}, 'w') as file: file.write('began ')\n"  # closed here: a finalizer swallows exits
        "time.sleep(60)\n"
    )
    parent = start_parent(script)
    wait_for(note)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 143 and note.read_text() == "began saved"


def test_a_folder_is_claimed_once(tmp_path):
    with locked(tmp_path / "run") as first, locked(tmp_path / "run") as second, locked(tmp_path / "other") as third:
        assert first and second is None and third
    with locked(tmp_path / "run") as again, locked(tmp_path / "more", wait=True) as waited:
        assert again and waited


def test_a_script_keeps_the_claim_of_a_study_that_was_killed(tmp_path):
    script, note = tmp_path / "child.py", tmp_path / "note"
    script.write_text(f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    parent = start_parent(script, tmp_path / "run")
    child = int(wait_for(note))
    parent.kill()
    parent.wait()
    with locked(tmp_path / "run") as lock:
        assert lock is None, "the script is at work"
    os.kill(child, signal.SIGKILL)
    with locked(tmp_path / "run", wait=True) as lock:
        assert lock
