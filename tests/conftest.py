import importlib
import os

os.environ.setdefault("D_EMO_KERNELS", "fixed")  # nothing is timed, in the tests' own processes either
if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from d_emo.models import create_model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def precision_starts_anew():
    """Accelerate keeps the precision of the first run in a process, and a run allows TF32; the next test may not."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in switches]
    yield
    AcceleratorState._reset_state(True)
    for each, allowed in zip(switches, before, strict=True):
        each.allow_tf32 = allowed


@pytest.fixture
def tiny_denoiser():
    """A two-block D-EMO for 8 x 8 x 4 latents and 10 classes, its gates opened so that it does something."""
    torch.manual_seed(0)
    model = create_model("D-EMOv2-Ti-2", depth=2, hidden_size=48, sample_size=8, num_classes=10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(0, 0.02)
    return model.eval()


@pytest.fixture
def photos(tmp_path):
    """Six images of noise in two classes, as ImageNet lays them out, three to train on and three to measure on."""
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = np.random.default_rng([index, len(part)]).integers(0, 256, (50, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def colours(monkeypatch):
    """Let every measurement use ColourFeatures, whatever features it is asked for."""
    from evaluation_sets import ColourFeatures

    from d_emo.evaluation import measurement

    extractor = ColourFeatures()
    monkeypatch.setattr(measurement, "create_extractor", lambda *args, **kwargs: extractor)
    return extractor


@pytest.fixture(scope="session")
def fuzz_world(tmp_path_factory):
    """A run, a classifier, images and odd files, for tests that take every verb in turn."""
    from fuzz_world import make_world

    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """Weights file of a random Inception, He-initialised: with torch's own initialisation the features vanish."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    network.fc.weight.data.mul_(30)  # classes that differ, or every Inception Score is 1
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def pytest_collection_modifyitems(items):
    """Tests that fork come first: after a compiled backward pass autograd has threads, and refuses forks."""
    items.sort(key=lambda item: "one_thread" not in item.fixturenames)


@pytest.fixture
def one_thread():
    """Torch on one thread, for tests that fork: OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def triton_interpreter(monkeypatch):
    """Triton's kernels run on CPU tensors; afterwards Triton is what it was, which its interpreter does not see to."""
    triton = pytest.importorskip("triton")
    emulation = importlib.import_module("triton.runtime.interpreter")
    names = ("attention", "spanning", "convolution", "correlation", "skip")
    modules = [importlib.import_module(f"d_emo.kernels.gpu.{name}") for name in names]
    lang, dot = triton.language, emulation.InterpreterBuilder.create_dot
    scopes = [lang, lang.core, lang.math, *(x for x in vars(lang.core).values() if isinstance(x, type))]
    before = [dict(vars(scope)) for scope in scopes]

    def widened(x):  # numpy has no bfloat16: the interpreter keeps its bits, and would multiply those
        if x.dtype.scalar != lang.bfloat16:
            return x
        return emulation.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), lang.float32)

    monkeypatch.setattr(
        emulation.InterpreterBuilder, "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )  # fmt: skip
    for module in (*modules, lang):
        for name, function in list(vars(module).items()):
            if isinstance(function, triton.JITFunction):
                monkeypatch.setattr(module, name, emulation.InterpretedFunction(function.fn))
    yield
    for scope, members in zip(scopes, before, strict=True):
        for name in set(vars(scope)) - set(members):
            delattr(scope, name)
        for name, value in members.items():
            if vars(scope)[name] is not value:
                setattr(scope, name, value)
