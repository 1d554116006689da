"""A limit on the size of files, as a full disk, and a read-only folder: every verb says so, and nothing is left."""

import ctypes
import json
import os
import resource
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from fuzz_inputs import OUTPUTS, Case, line, run
from fuzz_world import BASE

from d_emo import claims, explain
from d_emo.cli import run_verb
from d_emo.cli.verbs import VERBS
from d_emo.config.base import flag_of
from d_emo.data import moving
from d_emo.lab.study import execution
from d_emo.tables import DEMOS, load

pytestmark = pytest.mark.usefixtures("one_thread")
PRINTS_ONLY = {"app", "models"}
MORE = {
    "evaluate": {"output": ["out.json"]}, "sample": {"output": ["out.png"], "steps": ["1"]},
    "fid": {"features": ["emov2:{world}/classifier"], "steps": ["1"], "num_images": ["4"], "output": ["out.json"]},
    "reference": {"features": ["emov2:{world}/classifier"], "num_images": ["4"]},
    "class-accuracy": {"steps": ["1"], "output": ["out.png"]}, "plot-loss": {"output": ["out.png"]},
    "explain": {"output": ["out"]}, "train-vae": {"output_dir": ["out"], "max_steps": ["2"], "validate_images": ["4"]},
    "benchmark": {"output": ["out"], "rounds": ["1"]}, "doctor": {"output": ["out.png"]},
}  # fmt: skip
TINY_DEMO = {
    "model": "v-emov2_1m", "model_options": {"depths": [1] * 4, "dims": [8] * 4, "head_dims": [8] * 4},
    "image_size": 32, "output_dir": "demo/video", "num_videos": 8, "batch_size": 4, "max_steps": 2, "warmup_steps": 0,
    "tracker": "none",
}  # fmt: skip


def command(verb, word, world, *, named=True):
    """A command that writes to a named path, or to its default; None where there is no default."""
    kind = load(VERBS[verb].kinds()[word])
    settings = {each.name: each for each in fields(kind)}
    given = BASE[verb, word](world) | MORE.get(verb, {})
    given = {name: [each.replace("{world}", str(world)) for each in values] for name, values in given.items()}
    if not named:
        given = {name: values for name, values in given.items() if name not in OUTPUTS}
        if verb in ("evaluate", "benchmark") or any(
            each.default is MISSING and each.default_factory is MISSING and name not in given
            for name, each in settings.items()
        ):
            return None
    return Case(verb, word, "", "", line(word, {name: flag_of(each) for name, each in settings.items()}, given))


def in_a_child(work):
    """What ``work`` gives in a forked process, as JSON."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def obey_permissions():
    """Root's right to write where it may not is dropped, from this process."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize(("verb", "word"), [
    pair for pair in BASE if pair[0] not in PRINTS_ONLY and pair[1] in ("", "denoisers")
])  # fmt: skip
def test_no_verb_leaves_half_a_file_where_it_may_not_write(fuzz_world, verb, word, monkeypatch, tmp_path):
    left, config = [], tmp_path / "tiny.yaml"
    config.write_text(json.dumps(TINY_DEMO))
    monkeypatch.setitem(DEMOS._rows, "video", replace(DEMOS["video"], runs=(("train-video", str(config)),)))
    monkeypatch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: left.extend(found(self.name)))
    monkeypatch.setattr(claims, "_write", lambda *_: None)  # else a claim is the first that has no room
    monkeypatch.setattr(execution, "run_child", lambda command, *_: run_verb(command[3], command[4:]))  # of a study
    monkeypatch.setattr(explain, "grad_cam", lambda *_, **__: torch.zeros(32, 32))
    monkeypatch.setattr(moving, "HELD_OUT", 4)

    def found(folder):
        return [str(each.relative_to(folder)) for each in Path(folder).rglob("*") if each.is_file()]

    def full(size):
        left.clear()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        became = run(command(verb, word, fuzz_world), fuzz_world, seconds=60)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return became, [each for each in left if ".tmp-" in each or each.startswith("out.") and became != "accepted"]

    def read_only():
        left.clear()
        obey_permissions()
        cases = filter(None, (command(verb, word, fuzz_world, named=named) for named in (True, False)))
        return [run(case, fuzz_world, seconds=60, mode=0o500) for case in cases], left[:]

    nothing, little, forbidden = in_a_child(lambda: (full(64), full(3000), read_only()))
    assert nothing == ["stopped", []] and little in (["stopped", []], ["accepted", []])
    assert set(forbidden[0]) == {"refused"} and not forbidden[1]
