"""What the fuzz stands on: inputs that work for every verb, odd files, and where each verb's heavy work begins."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from accelerate.state import AcceleratorState
from evaluation_sets import ColourFeatures, make_pixels, write_folder
from PIL import Image

from d_emo.config import ClassifierSettings, DetectorSettings, TrainSettings
from d_emo.tables import load

TINY = {"depth": 1, "hidden_size": 16, "num_heads": 2}
TINY_CLASSIFIER = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "window_size": 2}
TINY_SEGMENTER = {
    "width": 8, "backbone_options": {name: TINY_CLASSIFIER[name] for name in ("depths", "dims", "head_dims")},
}  # fmt: skip
FLOW = Path(__file__).parent / "data" / "artefacts" / "flow"
DIGITS = {"dataset": ["digits"], "image_size": ["8"], "vae": ["pixels"]}


class Reached(BaseException):
    """The heavy work of a verb was about to begin."""


def _run(kind: str, world: Path) -> list[str]:
    return [str(world / kind)]


BASE: dict[tuple[str, str], Callable[[Path], dict[str, list[str]]]] = {
    ("train", ""): lambda world: {
        **DIGITS, "model": ["D-EMOv2-Ti-2"], "model_options": [yaml.safe_dump(TINY, default_flow_style=True)],
        "output_dir": ["out"], "max_steps": ["1"], "batch_size": ["2"], "tracker": ["none"]},
    ("distill", ""): lambda world: {
        "init_from": [str(FLOW)], "fd_features": [f"emov2:{world}/classifier"], "fd_images": ["100"],
        "output_dir": ["out"], "max_steps": ["1"], "batch_size": ["2"], "tracker": ["none"]},
    ("train-classifier", ""): lambda world: {
        "data_dir": [str(world / "photos")], "image_size": ["32"], "model": ["emov1_1m"], "output_dir": ["out"],
        "model_options": [yaml.safe_dump(TINY_CLASSIFIER, default_flow_style=True)], "max_steps": ["1"],
        "batch_size": ["2"], "tracker": ["none"]},
    ("train-detector", ""): lambda world: {
        "model_options": [yaml.safe_dump({"backbone_options": TINY_CLASSIFIER}, default_flow_style=True)],
        "image_size": ["32"], "num_images": ["4"], "output_dir": ["out"], "max_steps": ["1"], "batch_size": ["2"],
        "tracker": ["none"]},
    ("train-segmenter", ""): lambda world: {
        "image_size": ["32"], "model": ["pspnet-emov2_1m"], "output_dir": ["out"], "num_images": ["4"],
        "model_options": [yaml.safe_dump(TINY_SEGMENTER, default_flow_style=True)], "max_steps": ["1"],
        "batch_size": ["2"], "validate_images": ["2"], "tracker": ["none"]},
    ("train-video", ""): lambda world: {
        "image_size": ["32"], "frames": ["1"], "model": ["v-emov2_1m"], "output_dir": ["out"], "num_videos": ["24"],
        "model_options": [yaml.safe_dump(TINY_SEGMENTER["backbone_options"], default_flow_style=True)],
        "max_steps": ["1"], "batch_size": ["2"], "tracker": ["none"]},
    ("demo", ""): lambda world: {"name": ["video"]},
    ("segment", ""): lambda world: {
        "images": [str(world / "photos/train/ant/0.png")], "model": ["pspnet-emov2_1m"], "image_size": ["32"]},
    ("train-vae", ""): lambda world: {
        "block_out_channels": ["8", "8", "8", "8"], "image_size": ["16"], "max_steps": ["1"], "batch_size": ["2"],
        "output_dir": ["out"], "num_images": ["8"], "tracker": ["none"]},
    ("encode", ""): lambda world: {**DIGITS, "output": ["out"]},
    ("doctor", ""): lambda world: {"dataset": ["digits"], "image_size": ["8"], "sample": ["4"]},
    ("sample", ""): lambda world: {"checkpoint": [str(world / "denoiser")], "classes": ["1"], "num_images": ["2"]},
    ("app", ""): lambda world: {"checkpoint": [str(world / "denoiser")], "port": ["47853"]},
    ("fid", ""): lambda world: {
        "checkpoint": [str(world / "denoiser")], "reference": [str(world / "reference")], "num_images": ["20"]},
    ("reference", ""): lambda world: {
        "dataset": ["digits"], "image_size": ["8"], "num_images": ["20"], "output": ["reference.npz"]},
    ("class-accuracy", ""): lambda world: {
        "checkpoint": [str(world / "denoiser")], "classifier": [str(world / "classifier")], "num_images": ["20"]},
    ("evaluate", ""): lambda world: {"model": [str(world / "classifier")], "num_images": ["10"]},
    ("convert", ""): lambda world: {"source": [str(world / "classifier")], "output": ["out"]},
    ("detect", ""): lambda world: {
        "images": [str(world / "photos/train/ant/0.png")], "checkpoint": [str(world / "detector")],
        "output": ["found"]},
    ("export", ""): lambda world: {"model": [str(world / "classifier")], "output": ["net.pt2"]},
    ("models", ""): lambda world: {"match": ["emov2_1m"]},
    ("explain", ""): lambda world: {
        "image": [str(world / "photos/train/ant/0.png")], "model": [str(world / "classifier")], "image_size": ["32"]},
    ("plot-loss", ""): lambda world: {"runs": [str(world / "denoiser")]},
    ("compare", ""): lambda world: {
        "title": ["Tiny"], "output_dir": ["out"], "report_dir": ["report"], "judge": [str(world / "classifier")],
        "encode": ["{dataset: digits, image_size: 8, vae: pixels}"], "seeds": ["0"],
        "train": [yaml.safe_dump({"model_options": TINY, "max_steps": 2}, default_flow_style=True)],
        "runs": ["{one: {model: D-EMOv2-Ti-2}}"]},
    ("benchmark", "denoisers"): lambda world: {
        "sizes": ["Ti"], "pixels": ["64"], "depth": ["1"], "batch_size": ["1"], "work": ["inference"]},
    ("benchmark", "classifiers"): lambda world: {
        "models": ["emov2_1m"], "peers": ["resnet10t"], "image_size": ["64"], "batch_size": ["1"]},
    ("benchmark", "forms"): lambda world: {
        "model": ["emov2_1m"], "image_size": ["64"], "batch_size": ["1"], "compile": ["false"]},
    ("benchmark", "kernels"): lambda world: {"batch_size": ["1"]},
    ("benchmark", "step"): lambda world: {
        "model": ["D-EMOv2-Ti-4"], "depth": ["1"], "image_size": ["64"], "batch_size": ["2"]},
    ("benchmark", "dense"): lambda world: {
        "models": ["segformer-emov2_1m"], "peers": ["lraspp_mobilenet_v3_large"], "image_size": ["64"]},
}  # fmt: skip
"""By verb and word: settings with which it would run, as the words after the flags."""


def make_world(world: Path) -> None:
    """Fill a folder with what `BASE` names, and with odd files in the sub-folder ``odd``."""
    from d_emo.io.snapshot import save_classifier
    from d_emo.models import create_model
    from d_emo.training import fit
    from d_emo.training.classifier import ClassifierTask
    from d_emo.training.denoiser import DenoiserTask

    for part in ("train", "val"):
        for label in ("ant", "bee"):
            folder = world / "photos" / part / label
            folder.mkdir(parents=True)
            for index in range(2):
                pixels = np.random.default_rng([index, len(part)]).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    tiny = {"max_steps": 1, "batch_size": 2, "dataset": "digits", "log_every": 1}
    settings = TrainSettings(model="D-EMOv2-Ti-2", model_options=TINY, image_size=8, vae="pixels",
                             output_dir=str(world / "denoiser"), **tiny).resolve()  # fmt: skip
    fit(DenoiserTask(settings), settings)
    AcceleratorState._reset_state(True)
    settings = ClassifierSettings(model="emov1_1m", model_options=TINY_CLASSIFIER, image_size=32, tracker="none",
                                  output_dir=str(world / "classifier"), **tiny).resolve()  # fmt: skip
    fit(ClassifierTask(settings), settings)
    AcceleratorState._reset_state(True)
    detector = create_model("ssdlite-emov1_1m", num_classes=2, image_size=32, backbone_options=TINY_CLASSIFIER).eval()
    meta = {"step": 1, "weights": "ema", "image_size": 32, "class_names": ["a", "b"]}
    save_classifier(world / "detector", detector, meta=meta, kind="detector",
                    settings=DetectorSettings(model="ssdlite-emov1_1m").resolve())  # fmt: skip
    write_folder(world / "reference", make_pixels(20))
    make_odd(world / "odd")


def make_odd(odd: Path) -> None:
    """Files that no verb can use: empty, full of garbage, of another kind, of no kind."""
    odd.mkdir()
    garbage = np.random.default_rng(0).bytes(3000)
    (odd / "a-file").write_text("x")
    (odd / "empty").write_bytes(b"")
    (odd / "garbage").write_bytes(garbage)
    (odd / "text.txt").write_bytes(b"caf\xe9\n")
    (odd / "empty-folder").mkdir()
    (odd / "folder-of-garbage" / "a").mkdir(parents=True)
    (odd / "folder-of-garbage" / "a" / "1.png").write_bytes(garbage)
    for name in ("config.json", "config.yaml", "snapshot.json", "index.json", "manifest.json", "model.safetensors"):
        (odd / "folder-of-garbage" / name).write_bytes(garbage)
    for suffix in (".png", ".npz", ".pth", ".safetensors", ".zip", ".yaml", ".json", ".tar", ".onnx"):
        (odd / f"empty{suffix}").write_bytes(b"")
        (odd / f"garbage{suffix}").write_bytes(garbage)
        (odd / f"folder{suffix}").mkdir()
        (odd / f"folder{suffix}" / "in it").write_text("x")
        os.mkfifo(odd / f"fifo{suffix}")
    os.mkfifo(odd / "fifo")
    (odd / "loop").symlink_to("loop")
    (odd / "dangling").symlink_to("nowhere")
    server, here = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(odd)  # such a path must be short
    server.bind("socket")
    os.chdir(here)
    server.close()


def _stop(*_: Any, **__: Any) -> Any:
    raise Reached


def _first_image(run: Any, *_: Any) -> None:
    run.task.dataset[0]
    raise Reached


def _first_rows(images: Any, codec: Any, origin: Any, rows: Any, loader: Any, *_: Any) -> None:
    next(loader)
    raise Reached


def _of_images(model: Any, dataset: Any, **_: Any) -> None:
    dataset[0]
    raise Reached


def _extractor(real: Callable) -> Callable:
    def create(features: str, *, inception_weights: Any = None, device: Any = None) -> Any:
        stands_in = features == "inception" and inception_weights is None  # the weights are not here
        return ColourFeatures() if stands_in else real(features, inception_weights=inception_weights, device=device)

    return create


@contextlib.contextmanager
def HEAVY() -> Iterator[None]:  # noqa: N802
    """Every verb ends with `Reached` where its heavy work begins."""
    from d_emo.cli.benchmark import TABLES
    from d_emo.config import KernelsSettings
    from d_emo.evaluation.features import create_extractor

    places = {
        "d_emo.training.loop:_Run._loop": _first_image, "d_emo.latents.encode:_encode_rows": _first_rows,
        "d_emo.sampling.request:SampleRequest.draw": _stop,
        "d_emo.app.page:launch": _stop, "d_emo.cli.doctor:describe": _stop,
        "d_emo.evaluation.feature_shards:FeatureShards.write": _stop,
        "d_emo.evaluation.measurement:Measurement._run": _stop, "d_emo.cli.reference:write_reference": _stop,
        "d_emo.cli.class_accuracy:draw_classes": _stop, "d_emo.cli.evaluate:measure_accuracy": _of_images,
        "d_emo.export:traced": _stop, "d_emo.cli.explain:explain": _stop, "d_emo.cli.plot_loss:plot_losses": _stop,
        "d_emo.lab.study:Study.work": _stop, "d_emo.lab.study:Study.plan": _stop,
        "d_emo.lab.study:Study.conclude": _stop,
        "d_emo.lab.benchmark:measure": _stop, "d_emo.lab.benchmark.dense:count_macs": _stop,
        "d_emo.lab.models_table:count_macs": _stop,
        "d_emo.kernels:explain": _stop,
        "d_emo.cli.benchmark:TABLES": {**TABLES, KernelsSettings: _stop},
        "d_emo.training.classifier:measure_accuracy": _stop,
        "d_emo.evaluation.measurement:create_extractor": _extractor(create_extractor),
        "d_emo.cli.reference:create_extractor": _extractor(create_extractor),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for place, replacement in places.items():
            owner, _, name = place.rpartition(".") if "." in place.split(":")[1] else (*place.partition(":")[:2], "")
            if name:
                stack.enter_context(mock.patch.object(load(owner), name, replacement))
            else:
                module, _, attribute = place.partition(":")
                load(place)
                stack.enter_context(mock.patch(f"{module}.{attribute}", replacement))
        stack.enter_context(mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}))
        yield


def warm_up(world: Path) -> None:
    """Run every verb as it should be run: imports are made, and each must come to its heavy work."""
    from fuzz_inputs import Case, cases, run

    seen = set()
    for case in cases(world):
        if case.flag == "--config" and case.what == "empty" and (case.verb, case.word) not in seen:
            seen.add((case.verb, case.word))
            became = run(Case(case.verb, case.word, "", "", case.argv, config=b"{}"), world, seconds=120)
            assert became == "accepted", f"{case.verb} {case.word}: {became}"
