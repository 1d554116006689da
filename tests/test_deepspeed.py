"""DeepSpeed's ZeRO stage 2 on CPU processes: the updates, states and refusals of a run without it."""

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from test_processes import LAYER_NORM, close, in_processes
from test_resume import TINY, last_state, logged, poisoned, same, train

from d_emo import checkpoint
from d_emo.config import InputError, TrainSettings
from d_emo.training import fit, loop, sharding
from d_emo.training.denoiser import DenoiserTask

pytestmark = [
    pytest.mark.usefixtures("one_thread", "engine"),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install '.[deepspeed]'"
    ),
]
ROOT = Path(__file__).parents[1]
# Clipping bites, the label table has its own rate, some parameters decay: all that an update depends on.
RECIPE = {"model_options": LAYER_NORM, "max_steps": 6, "grad_clip": 0.3, "weight_decay": 0.1, "label_lr_scale": 3.0,
          "warmup_steps": 3, "schedule": "cosine"}


@pytest.fixture(scope="module")
def engine():
    """DeepSpeed imported once for all forks, without its shared-memory all-reduce, which would first be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # slow, and every engine asks for it
        patch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        yield


def in_deepspeed(count, work):
    """Run ``work(rank)`` in processes that the launcher, as it were, has told to use DeepSpeed."""

    def told(rank):
        del os.environ["ACCELERATE_USE_CPU"]
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", CUDA_VISIBLE_DEVICES="")
        work(rank)

    return in_processes(count, told)


@pytest.mark.parametrize(("count", "changes"), [
    (1, {}), (2, {}), (2, {"micro_batch_size": 1, "gradient_checkpointing": True}),
])
def test_deepspeed_trains_as_one_process_without_it(tmp_path, count, changes):
    train(tmp_path / "plain", **RECIPE)
    assert in_deepspeed(count, lambda rank: train(tmp_path / "zero", **RECIPE, **changes)) == [0] * count
    for name, tolerance in (("loss", 1e-4), ("gradient_norm", 1e-3), ("learning_rate", 1e-12)):
        plain, zero = (logged(tmp_path / run, name) for run in ("plain", "zero"))
        assert len(zero) == 6 and zero == pytest.approx(plain, rel=tolerance)
    assert max(logged(tmp_path / "plain", "gradient_norm").values()) > 2 * RECIPE["grad_clip"]
    plain, zero = (last_state(tmp_path / run, 6) for run in ("plain", "zero"))
    close(zero, plain)
    assert zero.keys() == plain.keys() and zero["model"].keys() == plain["model"].keys()
    assert zero["optimizer"]["param_groups"] == plain["optimizer"]["param_groups"]
    torch.testing.assert_close(zero["optimizer"]["state"], plain["optimizer"]["state"], rtol=1e-2, atol=1e-5)


@pytest.mark.slow
def test_synchronised_batch_norm_under_deepspeed(tmp_path):
    options = {"learning_rate": 1e-2}
    train(tmp_path / "one", **options)
    assert in_deepspeed(2, lambda rank: train(tmp_path / "two", sync_batchnorm=True, **options)) == [0, 0]
    assert in_deepspeed(2, lambda rank: train(tmp_path / "apart", **options)) == [0, 0]
    one, two, apart = (logged(tmp_path / name)[12] for name in ("one", "two", "apart"))
    assert abs(two - one) < 1e-4 * one < 1e-3 * one < abs(apart - one)


@pytest.mark.parametrize("changes", [
    {"micro_batch_size": 1}, pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
])
def test_five_steps_and_a_kill_and_seven_equal_twelve_bitwise(tmp_path, changes):
    assert in_deepspeed(2, lambda rank: train(tmp_path / "whole", **changes)) == [0, 0]

    def killed(rank):
        done = loop.Watch.step_done

        def die(self, step, figures):
            done(self, step, figures)
            if step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Watch.step_done = die
        train(tmp_path / "parts", **changes)

    assert in_deepspeed(2, killed) == [-signal.SIGKILL] * 2
    assert [folder.name for folder in (tmp_path / "parts" / "states").iterdir()] == ["step-5"]
    assert in_deepspeed(2, lambda rank: train(tmp_path / "parts", **changes)) == [0, 0]
    assert same(last_state(tmp_path / "parts"), last_state(tmp_path / "whole"))
    assert all(value.dtype != torch.bfloat16 for value in last_state(tmp_path / "whole")["model"].values())


def test_states_pass_between_runs_with_and_without_deepspeed_unchanged(tmp_path):
    train(tmp_path / "plain", max_steps=5)
    state = last_state(tmp_path / "plain", 5)

    def pass_on(rank):
        AcceleratorState._reset_state(True)
        settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path / "other")})
        run = loop._Run(DenoiserTask(settings), settings, None)
        model, device = run.task.model, run.accelerator.device
        optimizer = loop.make_optimizer(model, settings, run.task.lr_scales, device)
        updates = sharding.make_updates(run.accelerator, model, optimizer, settings, "no")
        assert updates.gather()["optimizer"]["state"] == {}  # before the first step
        pieces = [group["params"][0].numel() for group in updates.zero.optimizer.param_groups]
        assert sum(pieces) < 0.51 * sum(value.numel() for value in model.parameters())
        updates.restore(state)
        back = updates.gather()
        assert same(back, {name: state[name] for name in back})
        steps = [moments["step"] for moments in back["optimizer"]["state"].values()]
        assert len({step.data_ptr() for step in steps}) == len(steps)  # a plain optimizer counts in each of them

    assert in_deepspeed(2, pass_on) == [0, 0]


def test_a_run_goes_on_with_and_without_deepspeed(tmp_path):
    options = {"model_options": LAYER_NORM}
    train(tmp_path / "plain", **options)
    train(tmp_path / "there", **options, max_steps=5)
    assert in_deepspeed(2, lambda rank: train(tmp_path / "there", **options)) == [0, 0]
    assert in_deepspeed(2, lambda rank: train(tmp_path / "back", **options, max_steps=5)) == [0, 0]
    train(tmp_path / "back", **options)
    for run in ("there", "back"):
        close(last_state(tmp_path / run), last_state(tmp_path / "plain"))


def poisoned_by(rank, folder, steps, **changes):
    """Every process trains, the loss of ``rank`` is not a number at some steps."""
    poisoned(folder, steps if int(os.environ.get("RANK", 0)) == rank else set(), **changes)


def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path):
    options = {**RECIPE, "nan": "skip", "max_steps": 8}
    poisoned_by(0, tmp_path / "plain", {0, 3, 4}, **options)
    two = {**options, "micro_batch_size": 1}
    assert in_deepspeed(2, lambda rank: poisoned_by(1, tmp_path / "zero", {0, 3, 4}, **two)) == [0, 0]
    plain, zero = (last_state(tmp_path / run, 8) for run in ("plain", "zero"))
    assert zero["guard"] == {"skipped": 3, "in_a_row": 0} and zero["ema"]["step"] == 5
    close(zero, plain)
    torch.testing.assert_close(zero["optimizer"]["state"], plain["optimizer"]["state"], rtol=1e-2, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "zero" / "nonfinite").iterdir()) == [
        "step-0.json", "step-3.json", "step-4.json"
    ]


def test_a_refused_step_stops_with_the_state_before_it(tmp_path):
    assert in_deepspeed(2, lambda rank: train(tmp_path / "whole", max_steps=3)) == [0, 0]
    assert in_deepspeed(2, lambda rank: poisoned_by(1, tmp_path / "parts", {3})) == [1, 1]
    stopped, whole = last_state(tmp_path / "parts", 3), last_state(tmp_path / "whole", 3)
    assert same({**stopped, "guard": None}, {**whole, "guard": None})


def test_a_gradient_that_is_not_finite_is_refused_too(tmp_path):
    def work(rank):
        AcceleratorState._reset_state(True)
        settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path), "nan": "skip", "max_steps": 2})
        task = DenoiserTask(settings)
        weight = task.model.final_layer.linear.weight
        if rank == 1:
            weight.register_hook(lambda grad: grad / 0)
        fit(task, settings)
        assert torch.equal(weight, torch.zeros_like(weight))

    assert in_deepspeed(2, work) == [0, 0]
    assert last_state(tmp_path, 2)["guard"] == {"skipped": 2, "in_a_row": 2}


def test_snapshot_and_preview_come_from_the_main_process_and_bear_plain_names(tmp_path):
    def work(rank):
        AcceleratorState._reset_state(True)
        settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path / "run"), "max_steps": 2, "snapshot_every": 2})
        fit(DenoiserTask(settings), settings, preview=lambda path, model: preview(rank, path, model))

    def preview(rank, path, model):
        (tmp_path / f"preview-{rank}").write_text(type(model).__name__)
        Image.new("RGB", (4, 4)).save(path)

    assert in_deepspeed(2, work) == [0, 0]
    assert (tmp_path / "preview-0").read_text() == "Denoiser" and not (tmp_path / "preview-1").exists()
    model = checkpoint.load_denoiser(tmp_path / "run").model
    assert same(dict(model.state_dict()), dict(last_state(tmp_path / "run", 2)["ema"]["model"]))


@pytest.mark.slow
def test_bf16_is_autocast_as_without_deepspeed(tmp_path):
    options = {**RECIPE, "mixed_precision": "bf16"}
    train(tmp_path / "plain", **options)
    AcceleratorState._reset_state(True)
    assert in_deepspeed(2, lambda rank: train(tmp_path / "zero", **options)) == [0, 0]
    assert in_deepspeed(2, lambda rank: train(tmp_path / "full", **RECIPE)) == [0, 0]
    plain, zero, full = (logged(tmp_path / run)[6] for run in ("plain", "zero", "full"))
    assert zero == pytest.approx(plain, rel=2e-3) and zero != full


@pytest.mark.parametrize(("name", "value"), [
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"), ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu"),
])
def test_other_kinds_of_deepspeed_are_refused(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="only ZeRO stage 2"):
        train(tmp_path)


def test_fp16_and_a_missing_deepspeed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="fp16 does not go with DeepSpeed"):
        train(tmp_path, mixed_precision="fp16")
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: False)
    with pytest.raises(InputError, match="DeepSpeed is not installed"):
        train(tmp_path)


@pytest.mark.slow
def test_accelerate_launches_two_processes_by_the_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**TINY, **RECIPE, "mixed_precision": "no", "output_dir": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "configs" / "accelerate" / "deepspeed.yaml"), "--num_processes", "2",
               str(ROOT / "scripts" / "train_dit.py"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained parameters") == 1
    train(tmp_path / "one", **RECIPE)
    close(last_state(tmp_path / "two", 6), last_state(tmp_path / "one", 6))
