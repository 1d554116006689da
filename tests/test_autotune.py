"""Which of several equal forms is the fastest here is found by timing them, once, and kept."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMScheduler
from test_training import train
from torch.utils.checkpoint import checkpoint

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.io.training_state import load_state, save_state
from d_emo.kernels import autotune, dispatch
from d_emo.kernels.autotune import Autotuner, Choice, read_preferences
from d_emo.kernels.dispatch import HAS_ONEDNN, Form
from d_emo.sampling import Guidance, sample
from d_emo.sampling.schedulers import make_scheduler
from d_emo.training import loop
from d_emo.training.denoiser import DenoiserTask


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    tuner = Autotuner(tmp_path)
    monkeypatch.setattr(dispatch, "tuner", tuner)
    return tuner


@pytest.fixture
def took(monkeypatch):
    """The seconds that each form takes, by a clock that only forms move."""
    times, clock = {}, [0.0]

    def move(form):
        clock[0] += times[form]
        times.setdefault("tried", []).append(form)

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    return times, move


def test_the_fastest_form_is_taken_and_the_file_says_why(took, tmp_path):
    times, trial = took
    times |= {"a": 0.2, "b": 0.1}
    first = Autotuner(tmp_path)
    assert first.choose("product, 3x4", ["a", "b"], trial) == ("b", pytest.approx({"a": 200, "b": 100}))
    content = json.loads(first.path.read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["machine"]["cpu"]
    assert content["choices"]["product, 3x4"] == {"form": "b", "ms": pytest.approx({"a": 200, "b": 100})}
    times |= {"a": 0.1, "b": 0.9, "tried": []}
    assert Autotuner(tmp_path).choose("product, 3x4", ["a", "b"], trial).form == "b" and not times["tried"]
    assert Autotuner(tmp_path).choose("product, 5x4", ["a", "b"], trial).form == "a" and times["tried"]


@pytest.mark.parametrize("times, best", [((0.1, 0.095), "a"), ((0.1, 0.08), "b"), ((0.08, 0.1), "a")])
def test_the_first_form_stays_unless_another_is_clearly_faster(took, tmp_path, times, best):
    took[0].update(zip("ab", times, strict=True))
    assert Autotuner(tmp_path).choose("key", ["a", "b"], took[1]).form == best


def test_small_forms_are_timed_more_often(took, tmp_path):
    times, trial = took
    times |= {"a": 0.001, "b": 0.001}
    Autotuner(tmp_path).choose("key", ["a", "b"], trial)
    assert len(times["tried"]) == 2 * (1 + 10)  # 20 ms


def test_nothing_is_timed_where_choices_cannot_be_kept(took, tmp_path):
    (tmp_path / "file").write_text("")
    took[0].update(a=0.2, b=0.1)
    tuner = Autotuner(tmp_path / "file")
    assert tuner.choose("key", ["a", "b"], took[1]) == ("a", {}) and tuner.fixed and tuner.choices == {}
    took[0]["tried"].clear()
    assert tuner.choose("another", ["a", "b"], took[1]).form == "a" and not took[0]["tried"]


@pytest.mark.parametrize("content", [
    "", "[]", '{"choices": {"key": 3}}', '{"choices": {"key": {"form": "gone", "ms": {}}}}',
])  # fmt: skip
def test_a_file_that_says_nothing_of_use_is_replaced(took, tmp_path, content):
    took[0].update(a=0.2, b=0.1)
    tuner = Autotuner(tmp_path)
    tuner.path.write_text(content)
    assert tuner.choose("key", ["a", "b"], took[1]).form == "b"
    assert json.loads(tuner.path.read_text())["choices"]["key"]["form"] == "b"


def test_a_training_state_keeps_the_choices_and_an_older_one_the_first_forms(took, tmp_path):
    took[0].update(a=0.2, b=0.1)
    tuner = Autotuner(tmp_path / "one")
    tuner.choose("key", ["a", "b"], took[1])
    elsewhere = Autotuner(tmp_path / "two")
    elsewhere.keep(tuner.used)
    took[0].update(a=0.1, b=0.2, tried=[])
    assert elsewhere.choose("key", ["a", "b"], took[1]) == Choice("b", {}) and not took[0]["tried"]
    assert elsewhere.choose("new", ["a", "b"], took[1]).form == "a" and took[0]["tried"]
    assert set(json.loads(elsewhere.path.read_text())["choices"]) == {"new"}  # the other says nothing of this machine
    elsewhere.keep(None)
    took[0].update(a=0.2, b=0.1)
    assert elsewhere.choose("newer", ["a", "b"], took[1]).form == "a"


def test_all_processes_go_by_the_choices_of_the_first(took, tmp_path):
    took[0].update(a=0.2, b=0.1)
    first, second = Autotuner(tmp_path / "one"), Autotuner(tmp_path / "two")
    first.choose("key", ["a", "b"], took[1])
    sent = []
    first.agree(lambda values: sent.extend(values) or values)
    second.agree(lambda values: sent)
    for tuner in (first, second):
        assert tuner.choose("key", ["a", "b"], took[1]).form == "b"
        assert tuner.choose("another", ["a", "b"], took[1]).form == "a"


def forms(slow):
    """Two rivals that note when they run; one is slow."""
    ran = []

    def form(name):
        def run(x):
            ran.append(name)
            for _ in range(20 if name == slow else 1):
                y = (x @ x).tanh()
            return y

        return Form(name, run, lambda x: None, rival=True)

    return (form("a"), form("b"), Form("plain", lambda x: (x @ x).tanh())), ran


@pytest.mark.parametrize("slow, fast", ["ab", "ba"])
def test_an_operator_runs_its_fastest_rival_and_explains_it(tuner, slow, fast):
    table, ran = forms(slow)
    x = torch.randn(64, 64, requires_grad=True)
    with kernels.record() as calls:
        dispatch.run("toy", table, x).sum().backward()
    assert ran[-1] == fast and len(calls) == 1 and calls[0].form == fast
    assert set(ran[:-1]) == {"a", "b"}  # timed with gradients
    if fast == "b":
        assert " ms here, where b takes " in dict(calls[0].refused)["a"]
    ran.clear()
    dispatch.run("toy", table, x)
    assert ran == [fast]
    with torch.no_grad():
        dispatch.run("toy", table, x)
    assert len(ran) > 2 and len(tuner.choices) == 2  # another question


def test_a_rival_that_no_longer_takes_the_inputs_is_passed_over(tuner):
    (a, b, plain), ran = forms("a")
    x, refusals = torch.randn(64, 64), []
    table = a, b._replace(refuses=lambda x: "closed" if refusals else None), plain
    dispatch.run("toy", table, x)
    refusals.append(1)
    ran.clear()
    dispatch.run("toy", table, x)
    assert ran == ["a"]


def test_trials_are_seen_by_nobody(tuner):
    table, _ = forms("a")
    x = torch.randn(32, 32, requires_grad=True)
    checkpoint(lambda x: dispatch.run("toy", table, x), x, use_reentrant=False).sum().backward()
    grad, x.grad = x.grad, None
    (x @ x).tanh().sum().backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.skipif(not HAS_ONEDNN, reason="one form only")
def test_products_and_attention_of_a_network_are_timed_and_equal(tuner, tiny_denoiser):
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    tiny_denoiser.train()
    with kernels.plain():
        expected = tiny_denoiser(*inputs).sample
    torch.testing.assert_close(tiny_denoiser(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    tiny_denoiser(*inputs).sample.square().sum().backward()
    asked = {key.partition(",")[0] for key in tuner.choices}
    assert asked == {"product", "window_attention", "local_steps", "local_gradients"}
    known = len(tuner.choices)
    tiny_denoiser(*inputs).sample.square().sum().backward()
    assert len(tuner.choices) == known


def test_within_fixed_nothing_is_timed_and_the_first_form_runs(tuner):
    table, ran = forms("a")
    with kernels.fixed():
        dispatch.run("toy", table, torch.randn(4, 4))
    assert ran == ["a"] and not tuner.choices


@pytest.mark.skipif(not HAS_ONEDNN, reason="one form only")
def test_the_bits_of_a_seed_and_of_features_do_not_depend_on_what_was_timed(new_process, tiny_denoiser, tmp_path):
    new_process(-1)
    scheduler = make_scheduler("ddim", DDPMScheduler().config, "eps")
    steps = sample(tiny_denoiser, scheduler, [1, 2], [0, 1], steps=2, guidance=Guidance(2.0))
    latents = [step.latents for step in steps][-1]
    tuner = new_process(0)
    steps = sample(tiny_denoiser, scheduler, [1, 2], [0, 1], steps=2, guidance=Guidance(2.0))
    assert torch.equal([step.latents for step in steps][-1], latents) and not tuner.choices
    with torch.no_grad():  # which the network by itself does ask for
        tiny_denoiser(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]))
    assert tuner.choices


def test_the_environment_variable_is_read():
    assert read_preferences("") == (False, False, {}) and read_preferences("plain").plain
    assert read_preferences("fixed").fixed
    asked = {"product": "the library", "add": "a new map"}
    assert read_preferences("product=the library; add=a new map").forms == asked
    with pytest.raises(InputError, match="D_EMO_KERNELS is 'plain', 'fixed' or 'OPERATOR=FORM', not 'fast'"):
        read_preferences("fast")


def test_a_form_can_be_forced_by_its_name(monkeypatch, tuner):
    table, ran = forms("a")
    monkeypatch.setattr(dispatch, "preferences", read_preferences("toy=a"))
    with kernels.record() as calls:
        dispatch.run("toy", table, torch.randn(4, 4))
    assert ran == ["a"] and not tuner.choices and calls[0].form == "a" and calls[0].refused == ()
    monkeypatch.setattr(dispatch, "preferences", read_preferences("toy=c"))
    with pytest.raises(InputError, match="asks for 'c'; the forms of toy are 'a', 'b', 'plain'"):
        dispatch.run("toy", table, torch.randn(4, 4))


def test_a_wrong_value_is_one_sentence_of_the_command_line(tmp_path):
    environment = {**os.environ, "D_EMO_KERNELS": "fast"}
    command = [sys.executable, "-m", "d_emo", "sample", "--class", "1", "--output", tmp_path / "x.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "D_EMO_KERNELS is 'plain'" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def new_process(monkeypatch, tmp_path):
    """As if a process began on another machine, where the form of that index is the fastest."""

    def begin(fastest):
        tuner = Autotuner(tmp_path / f"machine-{fastest}")
        for module in (dispatch, loop):
            monkeypatch.setattr(module, "tuner", tuner)
        monkeypatch.setattr(autotune, "timed", lambda forms, trial: {f: 1.0 + (f != forms[fastest]) for f in forms})
        return tuner

    return begin


@pytest.mark.skipif(not HAS_ONEDNN, reason="one form only")
def test_a_resumed_run_keeps_the_forms_that_it_began_with(new_process, tmp_path):
    new_process(-1)
    whole = train(tmp_path / "whole")
    new_process(0)
    assert any(not torch.equal(value, whole[name]) for name, value in train(tmp_path / "other").items())
    new_process(-1)
    train(tmp_path / "run", max_steps=2)
    tuner = new_process(0)
    resumed = train(tmp_path / "run")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    state = load_state(tmp_path / "run" / "states" / "step-4")
    assert "the library" in state["kernels"].values() and state["kernels"] == tuner.used


@pytest.mark.skipif(not HAS_ONEDNN, reason="one form only")
def test_a_state_from_before_there_were_choices_goes_on_with_the_first_forms(new_process, tmp_path):
    new_process(0)
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", max_steps=2)
    state = load_state(tmp_path / "run" / "states" / "step-2")
    del state["kernels"]
    save_state(tmp_path / "run" / "states", 2, state, own=[])
    new_process(-1)
    train(tmp_path / "run", max_steps=3)  # the state that this saves knows them
    new_process(-1)
    assert all(torch.equal(value, whole[name]) for name, value in train(tmp_path / "run").items())


def test_a_user_is_told_once_of_a_slower_form_than_his_machine_has(monkeypatch, tmp_path, capsys):
    train(tmp_path / "quiet")
    assert "slower than this machine could" not in capsys.readouterr().out
    build = DenoiserTask.prepare

    def hooked(task, *rest):
        build(task, *rest)
        task.model.blocks[0].operator.local.register_forward_hook(lambda *_: None)

    monkeypatch.setattr(DenoiserTask, "prepare", hooked)
    train(tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "slower than this machine could" in line]
    assert len(lines) == len(set(lines)) and any(
        "local_branch: not by 'CPU, one step of training', because something hangs on the call of LocalConv" in line
        for line in lines
    )
