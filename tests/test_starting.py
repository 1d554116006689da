"""From the command to the first word and the first step: what has to be imported, and what has not."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from d_emo.cli.verbs import defer, importing
from d_emo.kernels.dispatch import constant

HEAVY = {
    "deepspeed", "gradio", "matplotlib", "onnx", "onnxscript", "pandas", "scipy.integrate._ivp",
    "scipy.stats._stats_py", "sklearn", "tensorboard", "timm", "torch_fidelity", "torchvision",
}  # fmt: skip
DENOISERS = {"diffusers", "timm", "torch._dynamo", "torchvision"}
LATER = {"jinja2", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.flop_counter"}
"""What a card, processes that share a network, or a count of operations need, and nothing before them."""
START = f"""
import sys
from d_emo.cli import main
from d_emo.cli.verbs import importing
heavy = {HEAVY!r}
with importing():
    import d_emo.cli.fid, d_emo.cli.encode, d_emo.cli.sample
main("train", sys.argv[1:])  # with a picture by a solver of diffusers
print(sorted(heavy & set(sys.modules)))
import scipy.stats
print(scipy.stats.norm.cdf(0))
"""


def test_training_and_sampling_import_nothing_heavy_that_they_do_not_need(tmp_path):
    options = json.dumps({"depth": 1, "hidden_size": 48})
    flags = ["--model", "D-EMOv2-Ti-2", "--model-options", options, "--image-size", "8", "--vae", "pixels",
             "--batch-size", "2", "--max-steps", "1", "--tracker", "none", "--output-dir", str(tmp_path)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", START, *flags], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "0.5"], done.stderr
    assert (tmp_path / "samples" / "step-1.png").exists() and "loading" not in done.stderr


def test_verbs_on_classifiers_and_files_import_nothing_of_denoisers_timm_or_scikit_learn():
    code = f"""
import sys, torch
from d_emo.cli.verbs import importing
others, before = {DENOISERS!r}, set(sys.modules)
with importing():
    import d_emo.cli.evaluate, d_emo.cli.explain
print(sorted((others | {LATER!r} | {{"accelerate"}}) & set(sys.modules) - before))
import accelerate
before = set(sys.modules)
with importing():
    import d_emo.cli.encode, d_emo.cli.fid, d_emo.cli.train_classifier, d_emo.cli.train_video
from d_emo.data import Digits
from d_emo.models import create_model
Digits(8), create_model("emov2_1m", drop_path_rate=0.1)
print(sorted((others | {LATER!r} | {{"pandas", "sklearn"}}) & set(sys.modules) - before))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


def test_a_terminal_is_told_that_something_is_being_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with importing():
        assert "PyTorch" in capsys.readouterr().err and not gc.isenabled()
    assert not capsys.readouterr().err.strip() and gc.isenabled() and not gc.get_freeze_count()


def test_a_deferred_module_is_itself_once_it_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "slow_one.py").write_text("loaded = True\nraised = __file__\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("slow_one", "there_is.no_such"):
        defer(name)
    module = sys.modules.pop("slow_one")
    assert module.__file__ and "loaded" not in vars(module)
    assert module.raised == module.__file__ and "loaded" in vars(module)
    assert not hasattr(module, "nothing") and "there_is.no_such" not in sys.modules


def test_a_constant_of_the_compiler_is_marked_as_the_compiler_marks_it():
    def first():
        pass

    def second():
        pass

    assert vars(torch.compiler.assume_constant_result(first)) == vars(constant(second)) != {}


def test_our_names_are_known_to_timm_where_ours_is_what_imports_it():
    code = "import d_emo.models.timm_registry, timm; print(timm.is_model('emov2_1m'), timm.is_model('pvt_tiny_irmb'))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr
