"""Every verb, killed before its k-th file operation and started again by the same command, ends as if undisturbed.

A verb is in the table by existing: one that writes files has its cheapest arguments in `WRITES`, one that writes none
stands in `WRITES_NOTHING`. A trial is a process of its own, forked after the imports, which kills itself by SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMScheduler
from PIL import Image

from d_emo import explain
from d_emo.cli import run_verb
from d_emo.cli.verbs import VERBS
from d_emo.config import DetectorSettings, TrainSettings
from d_emo.data import Digits, moving
from d_emo.errors import InputError, RunError
from d_emo.io.snapshot import save_classifier, save_denoiser
from d_emo.lab.study import execution
from d_emo.models import create_model

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ["--dataset", "digits", "--image-size", "8"]
RUN = ["--batch-size", "4", "--learning-rate", "1e-3", "--log-every", "1"]
TRAIN = [*DATA, *RUN, "--model", "D-EMOv2-Ti-2", "--model-options", "{depth: 1, hidden_size: 48}", "--vae", "pixels"]
CLASSIFIER = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "window_size": 1}
SEGMENTER = {"width": 8, "backbone_options": {key: each for key, each in CLASSIFIER.items() if key != "window_size"}}
STUDY = {
    "title": "Tiny", "train": {"model_options": {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 2},
                               "max_steps": 1, "batch_size": 2, "snapshot_every": 1, "log_every": 1},
    "encode": {"dataset": "digits", "image_size": 8, "vae": "pixels"}, "runs": {"a": {"model": "D-EMOv2-Ti-2"}},
    "seeds": [3], "num_images": 10, "samplers": {"eps": "dpm++:2"},
}  # fmt: skip

WRITES = {
    "train": "{train} --max-steps 2 --state-every 1 --snapshot-every 2 --tracker none --output-dir OUT/run",
    "distill": "IN/flow --fd-features emov2:IN/classifier --fd-images 100 {run} --max-steps 2 --state-every 1 "
               "--tracker none --output-dir OUT/run",
    "train-classifier": "--dataset digits --image-size 32 --batch-size 2 --max-steps 1 --warmup-steps 0 --tracker none "
                        "--validate-images 4 --model emov1_1m --model-options {classifier} --output-dir OUT/run",
    "train-detector": "--image-size 32 --num-images 4 --batch-size 2 --max-steps 1 --warmup-steps 0 --tracker none "
                      "--validate-images 2 --model-options {detector} --output-dir OUT/run",
    "train-segmenter": "--image-size 32 --batch-size 2 --max-steps 1 --warmup-steps 0 --tracker none --num-images 4 "
                       "--validate-images 2 --model pspnet-emov2_1m --model-options {segmenter} --output-dir OUT/run",
    "train-video": "--image-size 32 --frames 1 --batch-size 2 --max-steps 1 --warmup-steps 0 --tracker none "
                   "--num-videos 24 --model v-emov2_1m --model-options {video} --output-dir OUT/run",
    "train-vae": "--image-size 8 --block-out-channels 8 8 8 8 --max-steps 2 --state-every 1 --batch-size 2 "
                 "--num-images 8 --validate-images 4 --tracker none --output-dir OUT/vae",
    "encode": "{data} --vae pixels --shard-size 600 --output OUT/latents",
    "doctor": "{data} --sample 20 --output OUT/sheet.png",
    "sample": "--checkpoint IN/snap --class 0 --num-images 2 --steps 2 --format png --output OUT/images",
    "fid": "--checkpoint IN/snap --reference IN/ref.npz --features emov2:IN/classifier --scheduler dpm++ --steps 1 "
           "--num-images 300 --save-npz OUT/images.npz --save-png OUT/png --output OUT/fid.json --work-dir OUT/work",
    "reference": "{data} --num-images 30 --features emov2:IN/classifier --output OUT/ref.npz",
    "class-accuracy": "--checkpoint IN/snap --classifier IN/classifier --num-images 20 --steps 1 --output OUT/j.png",
    "evaluate": "IN/classifier --dataset digits --num-images 4 --output OUT/accuracy.json",
    "convert": "IN/classifier OUT/timm",
    "export": "IN/classifier OUT/network.pt2",
    "detect": "IN/image.png --checkpoint IN/detector --output OUT/found",
    "explain": "IN/image.png --model IN/classifier --image-size 32 --output OUT/explained",
    "segment": "IN/image.png --model pspnet-emov2_1m --image-size 32 --output OUT/segmented",
    "plot-loss": "IN/logged --output OUT/loss.png",
    "compare": "--config IN/study.yaml --output-dir OUT/study --report-dir OUT/report",
    "benchmark denoisers": "--sizes Ti --pixels 64 --depth 1 --rounds 1 --batch-size 1 --work inference "
                           "--output OUT/table",
}  # fmt: skip
WRITES_NOTHING = {
    "demo": "it runs other verbs, one after the other",
    "app": "its files live in a temporary folder", "models": "it prints", "benchmark forms": "it prints",
    "benchmark kernels": "it prints", "benchmark step": "it prints",
    "benchmark classifiers": "as denoisers", "benchmark dense": "as denoisers",
}
CLOCKS = {"minutes", "training_minutes", "seconds", "images_per_second", "hardware", "command", "sha256"}
"""Keys whose values tell how long something took, or are checksums of files that do."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A denoiser, a classifier, a reference and whatever else the table names as IN."""
    folder = tmp_path_factory.mktemp("inputs")
    names = Digits(8).class_names
    meta = {"step": 5, "weights": "ema", "image_size": 8, "class_names": names, "data": "digits"}
    torch.manual_seed(0)
    denoiser = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, sample_size=8, num_classes=10, in_channels=3)
    scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    save_denoiser(folder / "snap", denoiser.eval(), scheduler=scheduler, meta={**meta, "codec": "pixels"},
                  settings=TrainSettings())  # fmt: skip
    classifier = create_model("emov1_1m", num_classes=10, **CLASSIFIER).eval()
    for name, parameter in classifier.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    options = {"name": "emov1_1m", "num_classes": 10, **CLASSIFIER}
    save_classifier(folder / "classifier", classifier, settings=TrainSettings(),
                    meta={**meta, "image_size": 32, "model": options})  # fmt: skip
    shutil.copytree(Path(__file__).parent / "data" / "artefacts" / "flow", folder / "flow")
    detector = create_model("ssdlite-emov1_1m", num_classes=10, image_size=32, backbone_options=CLASSIFIER).eval()
    save_classifier(folder / "detector", detector, settings=DetectorSettings(model="ssdlite-emov1_1m").resolve(),
                    meta={**meta, "image_size": 32}, kind="detector")  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    judge = {"model": "emov1_1m", "model_options": CLASSIFIER, "dataset": "digits", "image_size": 32, "max_steps": 1,
             "batch_size": 2, "warmup_steps": 0, "tracker": "none", "validate_images": 4}  # fmt: skip
    (folder / "judge.yaml").write_text(yaml.safe_dump({**judge, "output_dir": str(folder / "judge")}))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, "judge": str(folder / "judge.yaml")}))
    for verb, words in (
        ("reference", WRITES["reference"].replace("OUT", "IN")), ("train-classifier", f"--config {folder}/judge.yaml"),
        ("train", "{train} --max-steps 1 --output-dir IN/logged"),
    ):
        assert in_child(verb, arguments(words, folder, folder), folder)[0] == 0
    return folder


def arguments(words: str, inputs: Path, output: Path) -> list[str]:
    parts = {"{train}": TRAIN, "{run}": RUN, "{data}": DATA, "{classifier}": [json.dumps(CLASSIFIER)],
             "{detector}": [json.dumps({"backbone_options": CLASSIFIER})],
             "{segmenter}": [json.dumps(SEGMENTER)], "{video}": [json.dumps(SEGMENTER["backbone_options"])]}
    found = [part for word in words.split() for part in parts.get(word, [word])]
    return [each.replace("IN/", f"{inputs}/").replace("OUT/", f"{output}/") for each in found]


def in_child(verb: str, argv: list[str], root: Path, *, before: int | None = None) -> tuple[int, int]:
    """Run a verb in a forked process that dies before its k-th file operation under ``root``.

    Returns:
        Its exit code, and how many operations it did.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            torch.set_num_threads(1)  # OpenMP's do not survive a fork: the first use of several would wait for ever
            os.close(reader)
            with (root.parent / f"{root.name}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            execution.run_child = lambda command, *rest: run_verb(command[3], command[4:])  # of a study, here
            counted = count_operations(root, before)
            code = run(verb, argv)
            os.write(writer, str(counted[0]).encode())
        finally:
            os._exit(code)
    os.close(writer)
    count = os.read(reader, 99)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(count or 0)


def run(verb: str, argv: list[str]) -> int:
    name, *kind = verb.split()
    try:
        run_verb(name, [*kind, *argv])
    except (InputError, RunError) as error:
        print(f"error: {error}")
        return 2 if isinstance(error, InputError) else 1
    except SystemExit as ended:
        return ended.code
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def count_operations(root: Path, before: int | None) -> list[int]:
    """Count what this process does to files under a folder, and kill it before the k-th operation."""
    counted, lock, sync = [0], threading.Lock(), os.fsync

    def operation() -> None:
        with lock:
            counted[0] += 1
            if counted[0] == before:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, details: tuple) -> None:
        if event == "open":
            path, _, flags = details
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, changes = details[0] if details else "", event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if changes and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(str(root)):
            operation()

    def fsync(descriptor: int) -> None:
        operation()
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)
    return counted


def tree(folder: Path) -> dict[str, object]:
    """What a verb left, without times."""

    def timeless(value: object) -> object:
        if isinstance(value, dict):
            return {key: timeless(each) for key, each in value.items() if key not in CLOCKS}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    def content(file: Path) -> object:
        text = file.read_bytes()
        if file.suffix == ".json":
            return timeless(json.loads(text))
        return text if file.suffix in (".safetensors", ".npy", ".npz", ".png", ".yaml", ".csv") else None

    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(each.relative_to(folder)): content(each) for each in files if each.name[:5] not in (".lock", "event")}


def check(verb: str, inputs: Path, folder: Path, points) -> tuple[int, int]:
    """Kill before the operations that ``points`` chooses; how many trials there were, and how many ended alike."""
    out, log = folder / "out", folder / "out.log"  # one path for all, as some files tell where they are
    out.mkdir(parents=True)
    argv = arguments(WRITES[verb], inputs, out)
    code, operations = in_child(verb, argv, out)
    assert code == 0, log.read_text()[-2000:]
    expected, trials, alike = tree(out), 0, 0
    assert expected and not any(".tmp-" in name or ".claim" in name for name in expected), expected.keys()
    for point in points(operations):
        shutil.rmtree(out)
        out.mkdir()
        died, _ = in_child(verb, argv, out, before=point)
        if died == 0:  # fewer operations this time
            continue
        code, _ = in_child(verb, argv, out)
        ended, trials = tree(out), trials + 1
        alike += (died, code) == (-signal.SIGKILL, 0) and compared(verb, ended) == compared(verb, expected)
        if alike < trials:
            odd = [name for name in {*ended, *expected} if ended.get(name, 0) != expected.get(name, 0)]
            print(f"{verb}, before operation {point}: exits {died}, {code}; differ: {odd}\n"
                  f"{log.read_text()[-800:]}")  # fmt: skip
            break
    return trials, alike


def compared(verb: str, found: dict[str, object]) -> object:
    """Of a benchmark, which measures times, names of files; of a study, whose report tells times, these and results."""
    if verb != "compare":
        return sorted(found) if verb.startswith("benchmark") else found
    whole = (".safetensors", "results.json", ".npy")
    return {name: each if name.endswith(whole) else None for name, each in found.items()}


def test_every_verb_is_in_the_table():
    known = {f"{name} {kind}".strip() for name, verb in VERBS.items() for kind in verb.kinds()}
    assert {*WRITES, *WRITES_NOTHING} == known and not WRITES.keys() & WRITES_NOTHING


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch):
    """Few videos are measured on; a library that need not be there draws one of the pictures of explain."""
    monkeypatch.setattr(moving, "HELD_OUT", 4)
    monkeypatch.setattr(explain, "grad_cam", lambda *args, **options: torch.zeros(32, 32))


@pytest.mark.parametrize("verb", WRITES)
def test_a_killed_verb_ends_as_if_undisturbed(verb, inputs, tmp_path):
    """In short: killed once, two thirds through its file operations; fid also between the .npz and the result."""
    points = {"fid": (lambda count: [count // 3, count - 6])}.get(verb, lambda count: [2 * count // 3])
    trials, alike = check(verb, inputs, tmp_path, points)
    assert alike == trials > 0


@pytest.mark.parametrize(("verb", "words"), [
    ("train", "{train} --max-steps 100000 --tracker none --output-dir OUT/run"),
    ("encode", "--dataset shapes --image-size 64 --num-images 100000 --vae pixels --output OUT/run"),
    ("fid", "--checkpoint IN/snap --features emov2:IN/classifier --metrics isc --num-images 50000 --work-dir OUT/run"),
])  # fmt: skip
def test_the_second_of_two_processes_ends_with_exit_code_2_and_the_first_goes_on(verb, words, inputs, tmp_path):
    argv, log = arguments(words, inputs, tmp_path), tmp_path.parent / f"{tmp_path.name}.log"
    first = os.fork()
    if first == 0:
        os._exit(in_child(verb, argv, tmp_path)[0])  # whose child it is that claims the folder
    until = time.monotonic() + 60
    while not ((claim := tmp_path / "run" / ".claim").exists() and claim.read_bytes().endswith(b"\n")):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)
    holder = json.loads(claim.read_text())["pid"]
    second = in_child(verb, argv, tmp_path)
    there = claim.exists()
    os.kill(holder, signal.SIGKILL)
    assert second[0] == 2 and there
    assert f"run is being written by process {holder} on" in log.read_text()
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) not in (0, 2)  # it was at work until now


@pytest.mark.slow
@pytest.mark.parametrize("verb", WRITES)
def test_a_verb_survives_kills_before_any_file_operation(verb, inputs, tmp_path):
    """Before each of its file operations; before sixty of them, evenly spread, where it has more."""
    began = time.monotonic()
    points = lambda count: np.linspace(1, count, min(count, 60), dtype=int).tolist()  # noqa: E731
    trials, alike = check(verb, inputs, tmp_path, points)
    print(f"{verb}: {alike} of {trials} ended alike, {time.monotonic() - began:.0f} s")
    assert trials > 3 and alike == trials
