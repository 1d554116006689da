"""Wrong values of every flag of every verb end in one sentence, before anything heavy runs."""

import json
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from fuzz_inputs import OUTPUTS, SOURCES, cases, problem, run
from fuzz_world import HEAVY, warm_up

from d_emo.cli.verbs import VERBS
from d_emo.tables import load

TESTS = Path(__file__).parent
EVERY = 79
"""Of so many cases one is in the suite; a prime number, so that all kinds of values come in."""


@pytest.fixture
def little_memory():
    """What asks for more than some gigabytes is refused, and not killed with everything else."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_sample_of_wrong_values_is_refused(fuzz_world, little_memory):
    everything = list(cases(fuzz_world))
    assert len(everything) > 2500
    first = {str(case).split()[0]: case for case in reversed(everything)}  # of few flags no other may be there
    with HEAVY():
        warm_up(fuzz_world)
        sample = {str(case): case for case in [*everything[::EVERY], *first.values()]}
        became = {words: problem(case, run(case, fuzz_world, seconds=30)) for words, case in sample.items()}
    assert not {case: what for case, what in became.items() if what}
    assert {case.split()[0] for case in became} == set(VERBS) and len(became) > 100


def test_the_table_knows_all_paths():
    """A new setting that is a path is looked at before anything runs, and is in the fuzz as one."""
    settings = [one for row in VERBS.values() for kind in row.kinds().values() for one in fields(load(kind))]
    paths = {one.name for one in settings if one.metadata["source"] or one.metadata["output"]}
    assert SOURCES | OUTPUTS <= paths | {"model"} and paths <= SOURCES | OUTPUTS | {"model"}


@pytest.mark.slow
def test_all_wrong_values_are_refused():
    done = subprocess.run([sys.executable, TESTS / "fuzz_inputs.py"], capture_output=True, text=True, timeout=1800)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["wrong"] == {} and figures["outcomes"]["cases"] > 2500, done.stdout[-3000:]
