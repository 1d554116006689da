import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from d_emo.config import ClassifierSettings, TrainSettings
from d_emo.errors import InputError, RunError
from d_emo.io.snapshot import load_classifier, load_denoiser
from d_emo.io.training_state import find_state, load_state, save_state, step_of
from d_emo.training import fit, loop
from d_emo.training.classifier import Augmentation, ClassifierTask, augment
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.feed import Feed
from d_emo.training.optimizer import learning_rate
from d_emo.training.progress import Progress
from d_emo.training.same_settings import changes

ROOT = Path(__file__).parents[1]
TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48}, "dataset": "digits", "image_size": 8,
    "vae": "pixels", "batch_size": 8, "max_steps": 4, "state_every": 2, "snapshot_every": 4, "learning_rate": 1e-3,
    "ema_decay": 0.9,
}


def train(folder, **changes):
    settings = TrainSettings(**{**TINY, "output_dir": str(folder), **changes})
    snapshot = fit(DenoiserTask(settings), settings)
    return load_denoiser(snapshot).model.state_dict()


def test_a_run_folder_holds_what_it_promises(tmp_path):
    previews = []
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path), "log_every": 1, "snapshot_every": 2})

    def preview(path, model):
        previews.append((path, model))
        Image.new("RGB", (4, 4), "red").save(path)

    snapshot = fit(DenoiserTask(settings), settings, preview=preview)
    assert snapshot == tmp_path / "snapshots" / "step-4"
    assert sorted(f.name for f in (tmp_path / "snapshots").iterdir()) == ["step-2", "step-4"]
    assert sorted(f.name for f in (tmp_path / "states").iterdir()) == ["step-2", "step-4"]
    assert [path for path, _ in previews] == [tmp_path / "samples" / f"step-{step}.png" for step in (2, 4)]
    assert not any(model.training for _, model in previews)
    resolved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert resolved["vae"] == "pixels" and resolved["label_dropout"] == 0.1
    assert (snapshot / "config.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert list((tmp_path / "logs").glob("events.*"))
    meta = json.loads((snapshot / "snapshot.json").read_text())
    assert (meta["step"], meta["weights"], meta["codec"]) == (4, "ema", "pixels")
    assert (meta["encoder"], meta["scaling"], meta["shift"]) == ("pixels", 1.0, 0.0)
    assert meta["class_names"] == list("0123456789")


def test_resume_equals_a_run_that_never_stopped(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", max_steps=2)
    parts = train(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_a_step_fetched_ahead_as_on_a_gpu_is_the_same_step(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", micro_batch_size=4)
    prepare, fetched = Feed.prepare, []

    def ahead(feed, step):
        feed.ahead = True
        prepare(feed, step)
        fetched.append(step)

    monkeypatch.setattr(Feed, "prepare", ahead)
    train(tmp_path / "parts", max_steps=2, micro_batch_size=4)
    torch.testing.assert_close(train(tmp_path / "parts", micro_batch_size=4), whole, rtol=0, atol=0)
    assert fetched == [1, 3]  # the last step of a run has none after it


WAITS = {
    *(getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "unique",
                                               "__bool__", "__float__", "__int__", "__index__")),
    torch.nonzero, torch.equal, torch.unique, torch.masked_select,
}  # fmt: skip
"""What has to wait for a GPU's result, of the functions called in Python, and of the operators."""
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


def test_a_step_waits_for_its_device_once(tmp_path, monkeypatch):
    seen, counts = [], []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.extend([function.__name__] if function in WAITS else [])
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.extend([str(operator)] if operator in WAITING else [])
            return operator(*args, **(kwargs or {}))

    step, next_batch = loop._Run._train_step, Feed._next

    def watched(run, *args):
        seen.clear()
        with Functions(), Operators():
            result = step(run, *args)
        counts.append(list(seen))
        return result

    def unwatched(feed):  # the images are read on the CPU, whatever the device
        before = list(seen)
        batch = next_batch(feed)
        seen[:] = before
        return batch

    monkeypatch.setattr(loop._Run, "_train_step", watched)
    monkeypatch.setattr(Feed, "_next", unwatched)
    train(tmp_path)
    assert counts == [["tolist"]] * 4


def test_accumulation_and_cached_latents_change_nothing_but_rounding(tmp_path):
    layer_norm = {**TINY["model_options"], "local_norm": "layer"}
    whole = train(tmp_path / "a", model_options=layer_norm)
    parts = train(tmp_path / "b", model_options=layer_norm, micro_batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=2e-5)
    cached = train(tmp_path / "c", model_options=layer_norm, cache_latents=True)
    torch.testing.assert_close(cached, whole, rtol=2e-2, atol=2e-3)


def test_bf16_trains_the_same_model_roughly(tmp_path):
    whole = train(tmp_path / "a")
    AcceleratorState._reset_state(True)
    half = train(tmp_path / "b", mixed_precision="bf16")
    torch.testing.assert_close(half, whole, rtol=0.1, atol=2e-2)
    assert any(not torch.equal(half[name], whole[name]) for name in whole)


def test_snapshot_is_the_average_of_weights_and_batch_norm_statistics(tmp_path):
    averaged = train(tmp_path)
    state = load_state(tmp_path / "states" / "step-4")
    name = next(key for key in averaged if key.endswith("running_mean"))
    assert torch.equal(averaged[name], state["ema"]["model"][name]) and state["ema"]["step"] == 4
    assert not torch.allclose(averaged[name], state["model"][name], atol=1e-7)
    assert averaged[name].abs().max() > 0


def test_training_lowers_the_loss(tmp_path):
    losses = []
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path), "max_steps": 60, "snapshot_every": 60,
                                "state_every": 60, "batch_size": 32})
    task = DenoiserTask(settings)
    plain = task.loss
    task.loss = lambda *args: losses.append(plain(*args)) or losses[-1]
    fit(task, settings)
    first, last = (np.mean([step["mse"].item() for step in part]) for part in (losses[:5], losses[-10:]))
    assert first == pytest.approx(1, abs=0.15) and last < 0.7 * first


def test_other_settings_are_not_mixed_into_a_run(tmp_path):
    train(tmp_path, max_steps=2)
    with pytest.raises(InputError, match="learning_rate was 0.001, now 0.01"):
        train(tmp_path, learning_rate=1e-2)
    with pytest.raises(InputError, match="already holds a run"):
        train(tmp_path, resume="never")
    with pytest.raises(InputError, match="it does not exist"):
        train(tmp_path, resume=str(tmp_path / "states" / "step-77"))


def test_what_an_older_version_did_not_know_of_counts_as_its_default():
    settings = TrainSettings(objective="flow", contrastive=0.05, exif=False, output_dir="run").resolve()
    recorded = {name: value for name, value in vars(settings).items() if name not in ("contrastive", "exif")}
    assert changes(settings, recorded, {}) == ["contrastive was 0.0, now 0.05"]  # exif: it was read another way then
    assert changes(replace(settings, contrastive=0.0, log_every=7, num_workers=3), recorded, {}) == []
    assert changes(replace(settings, seed=1), vars(settings), {}) == ["seed was 0, now 1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "D-EMOv2-S-3"}, "D-EMOv2-S-2"),
        ({"model": "emov2_1m"}, "classifier"),
        ({"vae": "d-emo-f8", "image_size": 20}, "multiple of 8"),
        ({"batch_size": 8, "micro_batch_size": 3}, "does not divide"),
        ({"data_dir": "no/such/folder"}, "does not exist"),
        ({"model_options": {"heads": 3}}, "heads"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        train(tmp_path, **changes)


def test_an_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*file/run: Not a directory"):
        train(tmp_path / "file" / "run")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path)})
    task = DenoiserTask(settings)
    before = {name: value.clone() for name, value in task.model.named_parameters()}
    plain = task.loss
    task.loss = lambda *args: {name: value * float("nan") for name, value in plain(*args).items()}
    with pytest.raises(RunError, match="`nan` skip"):
        fit(task, settings)
    assert all(torch.equal(before[name], value) for name, value in task.model.named_parameters())


def test_learning_rate_follows_warm_up_and_cosine(tmp_path):
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path), "max_steps": 100, "warmup_steps": 10,
                                "schedule": "cosine"})

    def at(step):
        return learning_rate(settings, step) / settings.learning_rate

    assert at(0) == pytest.approx(0.1) and at(9) == at(10) == 1
    assert at(55) == pytest.approx(0.5) and at(100) == pytest.approx(0, abs=1e-9)


def test_the_bar_says_what_is_done_between_two_steps(tmp_path, capsys):
    settings = TrainSettings(**{**TINY, "output_dir": str(tmp_path), "max_steps": 1, "validate_every": 1})
    fit(DenoiserTask(settings), settings, preview=lambda path, model: None)
    said = capsys.readouterr().err
    assert said.index("validating: 100%") < said.index("drawing samples: 100%") < said.rindex("training: 100%")


@pytest.mark.parametrize(("steps", "times"), [(400_000, 1), (100, 0)])
def test_a_hopeless_schedule_is_forecast(steps, times, monkeypatch):
    said, progress = [], Progress(SimpleNamespace(), TrainSettings(max_steps=steps))
    progress.smaller = "Try less."
    monkeypatch.setattr(progress, "say", said.append)
    progress.bar = SimpleNamespace(set_description=lambda text: None)
    progress.micro_batch_took(1.0, 1, 8)
    assert not said
    for number in range(2, 6):
        progress.micro_batch_took(1.0, number, 8)
    assert len(said) == times
    assert all("about 37 days" in line and line.endswith("Try less.") for line in said)


def run_script(*argv, launcher=(), **options):
    command = [sys.executable, *launcher, str(ROOT / "scripts" / argv[0]), *map(str, argv[1:])]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_signal_saves_the_state_and_the_same_command_goes_on(tmp_path, number, code):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "run"), "max_steps": 100_000,
                                      "snapshot_every": 100_000, "state_every": 100_000, "log_every": 1}))
    command = [sys.executable, str(ROOT / "scripts" / "train_dit.py"), "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not list((tmp_path / "run" / "logs").glob("events.*")) and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "re-run the same command to resume" in output and "Traceback" not in output
    state = find_state(tmp_path / "run" / "states")
    assert state is not None
    step = step_of(state)
    done = run_script("train_dit.py", "--config", config, "--max-steps", step + 1)
    assert done.returncode == 0 and f"resuming at step {step}" in done.stdout, done.stderr


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    for argv, words in (
        (("train_dit.py", "--model", "D-EMOv2-S-3"), "D-EMOv2-S-2"),
        (("train_dit.py", "--data-dir", tmp_path / "none", "--vae", "pixels"), "does not exist"),
        (("sample.py", "--class", "7", "--checkpoint", tmp_path), "not a snapshot"),
    ):
        done = run_script(*argv)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_image_folders_train_with_flips_and_workers(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 256, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    train(tmp_path / "run", data_dir=str(tmp_path / "data"), num_workers=2)
    meta = load_denoiser(tmp_path / "run").meta
    assert meta["class_names"] == ["a", "b"] and meta["data"] == "folder"


def test_classifier_learns_digits(tmp_path):
    settings = ClassifierSettings(
        model="emov2_1m", model_options={"window_size": 1, "depths": [1, 1, 2, 1]}, dataset="digits", image_size=32,
        output_dir=str(tmp_path), max_steps=100, batch_size=32, learning_rate=2e-3, warmup_steps=5, ema_decay=0.9,
        snapshot_every=100, state_every=100,
    )
    snapshot = fit(ClassifierTask(settings), settings)
    loaded = load_classifier(snapshot)
    assert loaded.meta["held_out_accuracy"] > 0.5
    assert loaded.meta["accuracy"]["ema"]["top1"] == pytest.approx(loaded.meta["held_out_accuracy"], abs=1e-4)
    assert all(0.5 < each["top1"] <= each["top5"] <= 1 for each in loaded.meta["accuracy"].values())
    assert loaded.meta["accuracy"]["raw"]["images"] == 359
    assert f"{loaded.meta['held_out_accuracy']:.2%}" in (snapshot / "README.md").read_text()


def test_a_denoiser_is_no_classifier(tmp_path):
    with pytest.raises(InputError, match="DiT-S-2 is a denoiser; train it with `d-emo train`"):
        ClassifierTask(ClassifierSettings(model="DiT-S-2", output_dir=str(tmp_path)))


def test_augmentation_mirrors_and_moves():
    images = torch.arange(16.0).view(1, 1, 4, 4).repeat(2, 3, 1, 1)
    still = Augmentation(flip=torch.tensor([True, False]), shift=torch.zeros(2, 2))
    mirrored, same = augment(images, still)
    assert torch.equal(mirrored, images[0].flip(-1)) and torch.equal(same, images[1])
    moved = augment(images, Augmentation(flip=torch.zeros(2, dtype=torch.bool), shift=torch.tensor([[0.5, 0.0]] * 2)))
    torch.testing.assert_close(moved[..., :3], images[..., 1:])


def test_training_works_outside_of_the_main_thread_and_says_what_an_early_average_is(tmp_path, capsys):
    from concurrent.futures import ThreadPoolExecutor

    handler = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        weights = pool.submit(train, tmp_path, ema_decay=0.9999).result()
    assert weights and signal.getsignal(signal.SIGTERM) is handler
    said = "step 4: the averaged weights are still to 100.0 % those before training: `ema_decay` 0.9999 needs"
    assert said in capsys.readouterr().out
    train(tmp_path / "warm", ema_warmup=True)
    assert "those before training" not in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words"), [
    (lambda state: state.pop("ema"), "it lacks 'ema'"),
    (lambda state: state["model"].pop("pos_embed"), "missing: pos_embed"),
    (lambda state: state["model"].update(odd=torch.zeros(1)), "unexpected: odd"),
    (lambda state: state["ema"]["model"].pop("pos_embed"), "its moving average .*missing: pos_embed"),
    (lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "its optimizer's exp_avg has"),
])  # fmt: skip
def test_a_training_state_is_restored_whole_or_refused(tmp_path, change, words):
    train(tmp_path, max_steps=1)
    state = load_state(tmp_path / "states" / "step-1")
    change(state)
    save_state(tmp_path / "states", 1, state, own=[])
    with pytest.raises(InputError, match=f"training state .*step-1 does not fit this model: {words}"):
        train(tmp_path, max_steps=2)
