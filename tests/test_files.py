import hashlib
import os
import subprocess
import sys

import pytest
import torch

from d_emo import files
from d_emo.errors import InputError, RunError


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    files.write_file(path, "old")
    files.write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file.txt \(No space left on device\); what is there stays"):
        files.write_file(path, b"x", "what is there stays")
    assert path.read_text() == '{\n "a": 1\n}\n' and os.listdir(path.parent) == ["file.txt"]


def test_a_folder_takes_the_place_of_the_old_one_and_leftovers_go(tmp_path):
    (tmp_path / ".tmp-1-0-folder").mkdir()
    for text in "12":
        files.write_folder(tmp_path / "folder", lambda new, text=text: (new / text).write_text(text))
    with pytest.raises(ZeroDivisionError):
        files.write_folder(tmp_path / "folder", lambda new: (new / "3").write_text("3") / 0 if 1 / 0 else None)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["2"] and os.listdir(tmp_path) == ["folder"]


def test_who_may_read_other_new_files_may_read_ours(tmp_path):
    (tmp_path / "plain").touch()
    with files.replacing(tmp_path / "a") as file, files.replacing(tmp_path / "b", flush=False) as other:
        for each in (file, other):  # as safetensors' save_file leaves it
            each.touch(0o600)
    with files.replacing(tmp_path / "folder") as folder:
        folder.mkdir()
        (folder / "c").touch(0o600)
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "a", "b", "folder/c")}
    assert len(modes) == 1


def test_writers_of_one_file_do_not_meet(tmp_path):
    with files.replacing(tmp_path / "a") as one, files.replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert (tmp_path / "a").read_text() == "one" and os.listdir(tmp_path) == ["a"]


def test_digests_are_sha256_of_what_is_there(tmp_path):
    (tmp_path / "f").write_bytes(b"ab" * 5_000_000)
    assert files.digest_of_file(tmp_path / "f") == files.digest(b"ab" * 5_000_000)
    assert files.digest("a", b"b") == hashlib.sha256(b"ab").hexdigest()
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T
    wanted = hashlib.sha256(b"startname" + values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert files.digest_of_tensors([("name", values)], "start") == wanted


def test_a_large_file_is_compared_with_its_checksum_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGE", 3)
    file, read = tmp_path / "f", []
    monkeypatch.setattr(files, "digest_of_file", lambda path: read.append(path) or files.digest(path.read_bytes()))
    file.write_bytes(b"abc")
    wanted = files.digest("abc")
    assert files.matches(file, wanted) and files.matches(file, wanted) and len(read) == 1
    assert not files.matches(file, files.digest("abd")) and len(read) == 2
    file.write_bytes(b"abd")
    os.utime(file, ns=(0, 0))
    assert not files.matches(file, wanted) and not files.matches(file, wanted) and len(read) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # where nothing can be kept
    assert files.matches(file, files.digest("abd")) and files.matches(file, files.digest("abd")) and len(read) == 6


def test_a_lock_ends_with_its_process(tmp_path):
    hold = "import sys, time; from pathlib import Path; from d_emo.files import locked\n" \
           f"with locked(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with files.locked(tmp_path) as lock:
            assert lock is None
        child.kill()
        child.wait()
    with files.locked(tmp_path) as lock:
        assert lock is not None


@pytest.mark.parametrize(("content", "words"), [
    (None, "is missing"), ('{"a": 1', "is damaged .JSONDecodeError."), ('{"b": 1}', "lacks 'a'"),
    ("[1]", "is damaged .TypeError."),
    ('{"a": 1, "format": 2}', "has format 2, which a later D-EMO wrote; this one reads 1"), (b"\xff", "is damaged"),
    ('{"a": 1, "format": "x"}', "is damaged"),
])  # fmt: skip
def test_a_json_file_that_cannot_be_used_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "file.json"
    if content is not None:
        files.write_file(path, content)
    with pytest.raises(InputError, match=rf"{path} {words}.*; make it again$"):
        files.read_json(path, lambda found: found["a"], "make it again")
    files.write_file(path.with_suffix(".yaml"), "a: [1]")
    assert files.read_json(path.with_suffix(".yaml"), lambda found: found["a"]) == [1]
