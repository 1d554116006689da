"""Packages that only some of d-emo needs: a broken one is not called missing, and ends in no traceback."""

import json
import re
import sys
from importlib import import_module, invalidate_caches
from types import SimpleNamespace

import diffusers
import pytest
import torch
from test_detector_training import TINY

from d_emo.cli import run_verb
from d_emo.config import DetectorSettings, VAESettings
from d_emo.data.fundus import photograph
from d_emo.data.reading import describe_left_out
from d_emo.detection.masks import rle
from d_emo.errors import PackageError
from d_emo.explain import draw_maps
from d_emo.export import export
from d_emo.lab.benchmark.cases import BASELINE, contenders
from d_emo.lab.benchmark.dense import opened_file
from d_emo.latents.codec import autoencoder_in, shipped_vae
from d_emo.portable import Portable
from d_emo.training.detector import DetectorTask
from d_emo.training.progress import Progress
from d_emo.training.vae import VAETask

NETWORK = Portable(torch.nn.Identity(), ("images",), lambda batch: (torch.zeros(batch, 1),), "")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Breaks a package: found where packages are, it lacks another one."""

    def break_package(name: str) -> str:
        for module in [each for each in sys.modules if f"{each}.".startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        (tmp_path / f"{name}.py").write_text("import what_it_needs")
        monkeypatch.syspath_prepend(tmp_path)
        invalidate_caches()
        return (rf"\({name} is there, but its import fails: No module named 'what_it_needs'\): "
                "pip install what_it_needs$")  # fmt: skip

    return break_package


def rae(folder):
    depths = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE", **depths}))
    autoencoder_in(folder)


def study(folder):
    sys.modules.pop("d_emo.lab.study", None)
    import_module("d_emo.lab.study")


def detector(folder):
    DetectorTask(DetectorSettings(**TINY, output_dir=str(folder)))


@pytest.mark.parametrize(("name", "use"), [
    ("onnxruntime", lambda folder: export(NETWORK, folder / "a.onnx")),
    ("onnxruntime", lambda folder: opened_file(b"", torch.zeros(1), 1)),
    ("coremltools", lambda folder: export(NETWORK, folder / "a.mlpackage")),
    ("faster_coco_eval", lambda folder: rle()),
    ("faster_coco_eval", detector),
    ("faster_coco_eval", lambda folder: run_verb("demo", ["detect"])),
    ("pandas", study),
    ("matplotlib", study),
    ("matplotlib", lambda folder: draw_maps(folder / "a.png", {})),
    ("wandb", lambda folder: Progress(None, SimpleNamespace(tracker="wandb"))),
    ("transformers", rae),
    ("skimage", lambda folder: photograph()),
])  # fmt: skip
def test_a_broken_package_is_told_from_a_missing_one(name, use, broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("d_emo.cli.demo.train", None)
    monkeypatch.setitem(sys.modules, "d_emo.lab.study", None)  # put back after it was imported anew
    words = broken(name)
    with pytest.raises(PackageError, match=words):
        use(tmp_path)


def test_a_broken_reader_of_heif_is_told_where_files_are_left_out(broken):
    words = broken("pillow_heif")
    assert re.search(words, describe_left_out(["a.heic"]))
    assert describe_left_out(["a.psd"]) == "1 file of other kinds left out: .psd 1"


@pytest.mark.parametrize(("kind", "use"), [
    ("AutoencoderDC", lambda config: autoencoder_in(config.parent)), ("AutoencoderKL", lambda _: shipped_vae()),
    ("AutoencoderKL", lambda config: VAETask(VAESettings(output_dir=str(config.parent)))),
    ("DiTTransformer2DModel", lambda _: contenders("S", 8, 1)[BASELINE][0]()),
])  # fmt: skip
def test_a_class_of_diffusers_that_cannot_be_imported_is_one_sentence(kind, use, tmp_path, monkeypatch):
    def lack(*_):
        raise RuntimeError("Failed to import") from ModuleNotFoundError("No module named 'a'", name="a")

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": kind, "encoder_layers_per_block": 1, "decoder_layers_per_block": 1}))
    monkeypatch.delattr(diffusers, kind, raising=False)
    monkeypatch.setattr(type(diffusers), "_get_module", lack)
    with pytest.raises(PackageError, match=r"^the installed libraries need another package .*: pip install a$"):
        use(config)
