"""A run that was stopped anyhow, and started again by the same command, ends as a run that never stopped."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d_emo.config import TrainSettings
from d_emo.errors import InputError, RunError
from d_emo.io.training_state import find_state, load_state, step_of
from d_emo.training import fit, progress
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.guard import NonFiniteGuard
from d_emo.training.stop import Stop, StopSignal

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48}, "dataset": "digits", "image_size": 8,
    "vae": "pixels", "batch_size": 4, "max_steps": 12, "state_every": 5, "snapshot_every": 12, "learning_rate": 1e-3,
    "ema_decay": 0.9, "log_every": 1,
}
ARTEFACTS = Path(__file__).parent / "data" / "artefacts"
OF_CLASSIFIER = f"emov2:{ARTEFACTS / 'classifier'}"
VARIANTS = {
    "flow": {"objective": "flow"},
    "x of the flow, shifted, contrastive": {"objective": "flow-x", "time_shift": "auto", "contrastive": 0.05},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
    "alignment": {"align": "vae", "align_block": 0},
    "alignment with its own average": {"align": "sra", "align_block": 0},
    "noise of the flow, alignment with a classifier": {
        "objective": "flow-eps", "align": OF_CLASSIFIER, "align_block": 0, "model": "D-EMOv2-Ti-8", "image_size": 32,
    },
    "one step, by muon": {
        "objective": "one-step", "init_from": str(ARTEFACTS / "flow"), "fd_features": OF_CLASSIFIER, "fd_images": 100,
        "optimizer": "muon", "model": None, "model_options": None, "image_size": None, "vae": None,
    },
    "much of it at once": {
        "objective": "flow-x", "timestep_sampling": "logit-normal", "time_shift": 2.0, "contrastive": 0.05,
        "optimizer": "muon", "align": "sra", "align_block": 0, "ema_warmup": True, "warmup_steps": 8,
        "micro_batch_size": 2, "mixed_precision": "bf16",
    },
    "alignment of a U": {
        "model": "U-D-EMOv2-Ti-1", "align": "vae",
        "model_options": {"widths": [8, 16], "depths": [1, 1], "condition_size": 16, "head_size": 4},
    },
    "images drawn on the fly": {"dataset": "shapes", "num_images": 30},
    "cached latents": {"cache_latents": True},
    "accumulation": {"micro_batch_size": 2},
    "checkpointed blocks, warm-up, cosine": {"gradient_checkpointing": True, "warmup_steps": 3, "schedule": "cosine"},
}


def train(folder, **changes):
    AcceleratorState._reset_state(True)
    settings = TrainSettings(**{**TINY, "output_dir": str(folder), **changes})
    task = DenoiserTask(settings)
    fit(task, settings)
    return task


def last_state(folder, step=12):
    """Model, average, optimizer and the rest; only the clock may differ between two runs."""
    state = load_state(Path(folder) / "states" / f"step-{step}")
    state.pop("minutes")
    return state


def logged(folder, name="loss"):
    events = EventAccumulator(str(Path(folder) / "logs"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def same(one, other):
    """Bitwise equality of nested dictionaries, lists, tensors and numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_steps_and_a_kill_and_seven_equal_twelve(tmp_path, variant):
    changes = VARIANTS[variant]
    train(tmp_path / "whole", **changes)
    child = os.fork()
    if child == 0:  # dies of SIGKILL after its seventh step, two steps after its last state
        from d_emo.training import loop

        finish = loop.Progress.step_done

        def die(self, step, figures):
            finish(self, step, figures)
            if step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Progress.step_done = die
        train(tmp_path / "parts", **changes)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [folder.name for folder in (tmp_path / "parts" / "states").iterdir()] == ["step-5"]
    train(tmp_path / "parts", **changes)
    assert same(last_state(tmp_path / "parts"), last_state(tmp_path / "whole"))
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert len(whole) == 12 and all(parts[step] == whole[step] for step in range(6, 13))


def poisoned(folder, steps, **changes):
    """Train with a loss that is not a number at some steps."""
    AcceleratorState._reset_state(True)
    settings = TrainSettings(**{**TINY, "output_dir": str(folder), **changes})
    task, asked = DenoiserTask(settings), []
    plain, draw = task.loss, task.draw

    def count(*args):
        asked.append(len(asked))
        return draw(*args)

    def loss(*args):
        losses = plain(*args)
        return {n: v * float("nan") for n, v in losses.items()} if asked[-1] in steps else losses

    task.loss, task.draw = loss, count
    fit(task, settings)


def test_a_step_that_is_not_finite_can_be_skipped_and_leaves_no_trace(tmp_path):
    poisoned(tmp_path, {3, 4}, nan="skip", max_steps=8)
    state = last_state(tmp_path, 8)
    assert state["guard"] == {"skipped": 2, "in_a_row": 0} and state["ema"]["step"] == 6
    assert all(value.isfinite().all() for value in state["model"].values())
    norms = [value for name, value in state["model"].items() if name.endswith("num_batches_tracked")]
    assert norms and all(value == 6 for value in norms)
    assert sorted(file.name for file in (tmp_path / "nonfinite").iterdir()) == ["step-3.json", "step-4.json"]


def test_a_refused_step_puts_back_what_a_state_holds():
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("positions", torch.zeros(1).expand(4), persistent=False)  # which cannot be copied into
    guard = NonFiniteGuard(model, "skip")
    guard.remember()
    model(torch.full((3, 2), float("nan")))
    guard.undo()
    assert not model.running_mean.any() and model.num_batches_tracked == 0


def test_the_evidence_names_step_rate_and_images_and_the_run_can_go_on(tmp_path, capsys):
    with pytest.raises(RunError, match="`nan` skip"):
        poisoned(tmp_path, {3})
    evidence = json.loads((tmp_path / "nonfinite" / "step-3.json").read_text())
    assert evidence["step"] == 3 and evidence["learning_rate"] == 1e-3 and len(evidence["indices"]) == 4
    assert evidence["figures"]["loss"] == "nan"
    assert "step 3: loss nan" in capsys.readouterr().out
    assert find_state(tmp_path / "states").name == "step-3"
    train(tmp_path / "whole", max_steps=3)
    stopped, whole = last_state(tmp_path, 3), last_state(tmp_path / "whole", 3)
    assert same({**stopped, "guard": None}, {**whole, "guard": None})
    poisoned(tmp_path, {0}, nan="skip")  # the same step, now passed over
    assert last_state(tmp_path)["guard"]["skipped"] == 2


def test_ten_skipped_steps_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(RunError, match="10 steps in a row"):
        poisoned(tmp_path, set(range(100)), nan="skip", max_steps=100)


def test_a_gradient_that_is_not_finite_counts_too(tmp_path):
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path)})
    task = DenoiserTask(settings)
    weight = task.model.final_layer.linear.weight
    weight.register_hook(lambda grad: grad / 0)
    with pytest.raises(RunError, match="not finite"):
        fit(task, settings)
    assert torch.equal(weight, torch.zeros_like(weight))


def test_the_time_limit_saves_and_the_same_command_goes_on(tmp_path, capsys):
    train(tmp_path / "whole", state_every=100)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", state_every=100, max_minutes=1e-6)
    assert stopped.value.code == 0 and "stopped by the time limit at step 1" in capsys.readouterr().out
    train(tmp_path / "parts", state_every=100)
    assert same(last_state(tmp_path / "parts"), last_state(tmp_path / "whole"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143), (None, 0)])
def test_a_step_is_broken_off_between_micro_batches_and_leaves_no_trace(tmp_path, monkeypatch, capsys, number, code):
    """The wish comes in the third micro-batch of the fourth step; the time limit without a signal."""
    options = {"micro_batch_size": 1, "max_steps": 5, "state_every": 100}
    train(tmp_path / "whole", **options)
    seen, plain = [], DenoiserTask.loss

    def loss(self, *args):
        seen.append(len(seen))
        if len(seen) == 15:
            signal.raise_signal(number) if number else monkeypatch.setattr(StopSignal, "wish", Stop.TIME_UP)
        return plain(self, *args)

    capsys.readouterr()
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(DenoiserTask, "loss", loss)
        train(tmp_path / "parts", **options)
    reason = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}.get(number, "the time limit")
    said = capsys.readouterr().out
    assert stopped.value.code == code and len(seen) == 15 and f"stopped by {reason} at step 3" in said
    assert number is None or f"{reason}: stopping after the images at work" in said
    monkeypatch.undo()
    train(tmp_path / "parts", **options)
    assert same(last_state(tmp_path / "parts", 5), last_state(tmp_path / "whole", 5))


def test_a_long_step_shows_its_micro_batches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LONG_STEP", 0)
    train(tmp_path, micro_batch_size=2, max_steps=1)
    bar = capsys.readouterr().err
    assert "micro-batch 1/2:   0%" in bar and "micro-batch 2/2" not in bar and "training: 100%" in bar


def test_a_step_that_takes_far_longer_than_others_says_once_what_to_try(capsys):
    run = progress.Progress(mock.Mock(is_main_process=True, device=torch.device("cpu")), TrainSettings(batch_size=8))
    run.bar = mock.Mock()
    for step, seconds in enumerate((30, 2, 2.5, 9, 40), 1):
        run.step_done(step, {"loss": 0.5, "images_per_second": 8 / seconds})
    said = capsys.readouterr().out
    assert said.startswith("step 4 took 9.0 s, 4 times as long as others") and said.count("OMP_WAIT_POLICY") == 1


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
])
def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch, error):
    save, asked = torch.save, []

    def full(content, path):
        asked.append(path)
        if len(asked) == 2:
            Path(path).write_bytes(b"half a state")
            raise error
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    words = "training state of step 10 in .*(No space left|the disk is full).*last good state is .*step-5"
    with pytest.raises(RunError, match=words):
        train(tmp_path)
    assert [folder.name for folder in (tmp_path / "states").iterdir()] == ["step-5"]
    train(tmp_path)  # there is space again
    assert last_state(tmp_path)["step"] == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_run_folder_that_vanishes_is_named(tmp_path, tracker):
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path / "run"), "tracker": tracker})
    task = DenoiserTask(settings)
    plain = task.loss

    def loss(*args):
        if (tmp_path / "run").is_dir():
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("no folder any more")
        return plain(*args)

    task.loss = loss
    with pytest.raises(RunError, match=f"cannot save the .* of step . in {tmp_path / 'run'}: .*no state was saved"):
        fit(task, settings)


def test_ctrl_c_that_breaks_a_step_off_ends_in_one_sentence(tmp_path):
    """As it does while the compiler's processes are at work."""
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path / "run")})
    task = DenoiserTask(settings)

    def loss(*args):
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the compiler was killed")

    task.loss = loss
    with pytest.raises(RunError, match=r"^stopped by .* within step 1, which is lost$"):
        fit(task, settings)


# ---- faults ----------------------------------------------------------------------------------------------------------


def train_in_a_child(folder, changes):
    with folder.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    train(folder, **changes)


def killed(server, folder, delay, **changes):
    """Train in a child that is killed after ``delay`` seconds; returns whether it was done before.

    The child comes from a server that never trained: a lock that is shared with this process (tqdm's) would stay locked
    for all that come later if the child is killed while it holds it.
    """
    child = server.Process(target=train_in_a_child, args=(folder, changes))
    child.start()
    child.join(delay)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
    return child.exitcode == 0


def check_kills(folder, kills):
    """Kill a run at random moments, also while it writes states, until it is done; then compare."""
    folder.mkdir(exist_ok=True)
    changes = {"max_steps": 60, "state_every": 1, "snapshot_every": 20, "log_every": 100}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):  # Python 3.11's server needs it
        assert killed(server, folder / "first", 100, max_steps=1)  # which starts the server
    began = time.monotonic()
    assert killed(server, folder / "whole", 100, **changes)
    takes, chance, done, reached = time.monotonic() - began, random.Random(0), 0, []
    while done < kills:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        while not killed(server, folder / "parts", takes * chance.uniform(0.02, 0.8), **changes):
            assert (done := done + 1) < 20 * kills, f"no progress: {reached}"
            state = find_state(folder / "parts" / "states") if (folder / "parts").exists() else None
            reached.append(step_of(state) if state else 0)
        assert same(last_state(folder / "parts", 60), last_state(folder / "whole", 60))
    assert any(reached), "no run lived long enough to save a state"
    return reached


def damage(file, chance):
    """Truncate, flip a byte of, or remove a file."""
    content, kind = file.read_bytes(), chance.choice(["truncate", "flip", "remove"])
    place = chance.randrange(len(content))
    if kind == "truncate":
        file.write_bytes(content[:place])
    elif kind == "flip":
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
    else:
        file.unlink()


def check_damages(folder, ways, capsys):
    """Damage the newest state, or both; the run ends the same, or refuses in one sentence."""
    train(folder / "whole")
    train(folder / "parts", max_steps=10)
    chance, passed_over, refused = random.Random(1), 0, 0
    for _ in range(ways):
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.copytree(folder / "parts", folder / "damaged")
        states = sorted((folder / "damaged" / "states").iterdir(), key=step_of)
        for state in states[-chance.choice([1, 1, 2]):]:
            damage(chance.choice(sorted(state.iterdir())), chance)
        explicit = chance.random() < 0.3
        try:
            train(folder / "damaged", resume=str(states[-1]) if explicit else "auto")
        except InputError as error:
            assert explicit and "cannot resume from" in str(error) and len(str(error).splitlines()) == 1
            refused += 1
            continue
        passed_over += capsys.readouterr().out.count("passing over the training state")
        assert same(last_state(folder / "damaged"), last_state(folder / "whole"))
    return passed_over, refused


def test_damages_in_short(tmp_path, capsys):
    """Kills in short are tests/test_kills.py's."""
    passed_over, refused = check_damages(tmp_path, 4, capsys)
    assert passed_over + refused >= 2


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    assert len(check_kills(tmp_path, 50)) >= 50


@pytest.mark.slow
def test_fifty_damages(tmp_path, capsys):
    passed_over, refused = check_damages(tmp_path, 50, capsys)
    assert passed_over >= 25 and refused >= 5
