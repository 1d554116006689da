"""The border: what the operating system refuses is a sentence, a bug of ours stays a traceback."""

import errno
import os
import sys
import tempfile

import pytest
import torch
from safetensors import SafetensorError

from d_emo.config import SegmenterSettings, TrainSettings, check_paths, run_cli
from d_emo.config.paths import check_output, check_source
from d_emo.errors import InputError, RunError, of_the_system, write_error
from d_emo.files import replacing, write_file


@pytest.mark.parametrize(("error", "code", "said"), [
    (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 2, "cannot use a.txt: Permission denied"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 999), 2, "nnn"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write: No space left on device"),
    (OSError(errno.ENOSPC, "No space left on device", "a.npz"), 1, "cannot write a.npz: No space left on device"),
    (MemoryError(), 1, "not enough memory"),
    (RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1, "tried 9"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "not enough memory"),
    (torch.distributed.DistBackendError("NCCL"), 1, "another process of this run ended"),
])  # fmt: skip
def test_what_the_system_refuses_is_one_sentence(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    printed = capsys.readouterr().err
    assert ended.value.code == code and said in printed and printed.count("\n") == 1 and len(printed) < 400


@pytest.mark.parametrize("error", [
    KeyError("x"), TypeError("x"), RuntimeError("x"), OSError("a message alone"), ConnectionError("x"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", os.path.join(sys.prefix, "ours.json")),
], ids=repr)  # fmt: skip
def test_a_bug_of_ours_stays_a_traceback(error):
    def main():
        raise error

    assert of_the_system(error) is None
    with pytest.raises(type(error)):
        run_cli(main)


@pytest.mark.parametrize(("error", "number", "reason"), [
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 28, "No space left"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), errno.EIO, "the disk is full"),
    (RuntimeError("[MIL FileWriter]: Unknown error occurred"), errno.EIO, "the disk is full"),  # Core ML
    (OSError("29 requested and 10 written"), errno.EIO, "29 requested and 10 written"),  # NumPy's
    (OSError(errno.EFBIG, "File too large"), errno.EFBIG, "File too large"),
])  # fmt: skip
def test_every_library_that_cannot_write_names_the_file_and_leaves_nothing(tmp_path, error, number, reason):
    with pytest.raises(OSError) as told, replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert told.value.errno == number and told.value.filename == str(tmp_path / "a.bin")
    assert reason in told.value.strerror and not list(tmp_path.iterdir())


def test_a_bug_while_a_file_is_written_stays_what_it_is(tmp_path):
    assert write_error(RuntimeError("shapes differ"), tmp_path) is None
    with pytest.raises(RuntimeError, match="^shapes differ$"), replacing(tmp_path / "a"):
        raise RuntimeError("shapes differ")


def test_a_read_only_folder_is_told_before_anything_runs(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    check_output("output", str(tmp_path / "new" / "a.png"), "picture")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="`output` .*a.png cannot be written: Read-only file system"):
        check_output("output", str(tmp_path / "new" / "a.png"), "picture")
    with pytest.raises(InputError, match="~ stands for your home folder in a shell only"):
        check_output("output", "~/a.png", "picture")


@pytest.mark.parametrize("kind", [TrainSettings, SegmenterSettings])
def test_a_link_to_itself_is_no_bug(tmp_path, kind):
    """Whose name a default run folder has."""
    (tmp_path / "loop").symlink_to("loop")
    settings = kind(data_dir=str(tmp_path / "loop")).resolve()
    assert "-loop-" in settings.output_dir
    with pytest.raises(InputError, match="`data_dir` .*loop cannot be read"):
        check_paths(settings)


def test_a_file_without_permission_is_told_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    check_source("source", str(tmp_path / "a"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(InputError, match="`source` .* cannot be read: no permission"):
        check_source("source", str(tmp_path / "a"))


def test_a_full_disk_says_what_stays(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(RunError, match="cannot write .*a.json .*No space left on device.*; what was there stays"):
        write_file(tmp_path / "a.json", "{}", "what was there stays")
