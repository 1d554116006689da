"""A limit on the size of files, as a full disk: every verb says so in one sentence and leaves nothing half-written."""

import os
import resource
from pathlib import Path

import pytest
from fuzz_inputs import Case, run
from fuzz_world import BASE

from d_emo.cli.verbs import VERBS
from d_emo.config.base import flag_of
from d_emo.tables import load

pytestmark = pytest.mark.usefixtures("one_thread")
NO_OUTPUT = {"app", "models", "compare"}  # a study's verbs write, each in a process of its own
MORE = {
    "evaluate": {"output": ["out.json"]}, "sample": {"output": ["out.png"], "steps": ["1"]},
    "fid": {"features": ["emov2:{world}/classifier"], "steps": ["1"], "num_images": ["4"], "output": ["out.json"]},
    "reference": {"features": ["emov2:{world}/classifier"], "num_images": ["4"]},
    "class-accuracy": {"steps": ["1"], "output": ["out.png"]}, "plot-loss": {"output": ["out.png"]},
    "explain": {"output": ["out"]}, "train-vae": {"output_dir": ["out"], "max_steps": ["2"]},
    "benchmark": {"output": ["out"], "rounds": ["1"]}, "doctor": {"output": ["out.png"]},
}  # fmt: skip


def command(verb, word, world):
    kind = load(VERBS[verb].kinds()[word])
    given = BASE[verb, word](world) | MORE.get(verb, {})
    words, places = [word] if word else [], []
    for name, values in given.items():
        values, flag = [each.format(world=world) if "{world}" in each else each for each in values], flag_of(
            kind.__dataclass_fields__[name])
        words, places = ([*words, flag, *values], places) if flag.startswith("--") else (words, [*places, *values])
    return Case(verb, word, "", "", (*words, *places))


def in_a_child(work):
    """What ``work`` gives in a forked process, as text."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, work().encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize(("verb", "word"), [
    pair for pair in BASE if pair[0] not in NO_OUTPUT and pair[1] in ("", "denoisers")
])  # fmt: skip
def test_no_verb_leaves_half_a_file_where_files_may_not_grow(fuzz_world, verb, word, monkeypatch):
    def limited():
        left = []
        monkeypatch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: left.extend(found(self.name)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        became = run(command(verb, word, fuzz_world), fuzz_world, seconds=60)
        return f"{became} {left}"

    def found(folder):
        return [str(each) for each in Path(folder).rglob("*") if each.is_file() and each.stat().st_size]

    said = in_a_child(limited)
    assert said.startswith(("stopped", "refused")), said
    assert not [each for each in eval(said.partition(" ")[2]) if Path(each).name != ".claim"], said
