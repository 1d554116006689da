"""Measure what int8 costs and brings: accuracy and time of a classifier of digits, such as the one of `make demo`.

    pip install -e ".[export]" torchao
    python examples/int8.py demo/classifier
"""

import argparse
import copy
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.utils.data import DataLoader
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from d_emo.data import open_dataset
from d_emo.export import portable_classifier, write_onnx
from d_emo.io.classifier import open_classifier

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("classifier", help="snapshot or run folder")
classifier = open_classifier(parser.parse_args().classifier)
warnings.simplefilter("ignore")
data = {"dataset": "digits", "data_dir": None, "image_size": classifier.image_size}
images, labels = next(iter(DataLoader(open_dataset(**data, split="test", num_images=359), batch_size=359)))
calibration, _ = next(iter(DataLoader(open_dataset(**data), batch_size=64, shuffle=True)))
exported = portable_classifier(classifier.model, classifier.image_size)
network, folder = exported.module, Path(tempfile.mkdtemp())


def by_pt2e() -> nn.Module:
    """Weights and activations of convolutions and linear layers, at scales that calibration images give; not compiled,
    so that it shows what int8 costs, not what it saves."""
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    program = torch.export.export(network, (calibration[:2],), dynamic_shapes=(batch,))
    prepared = quantize_pt2e.prepare_pt2e(program.module(), quantizer)
    prepared(calibration)
    return quantize_pt2e.convert_pt2e(prepared)


with torch.no_grad():
    forms = {
        "float32": network, "quantize_dynamic": quantize_dynamic(copy.deepcopy(network), {nn.Linear}),
        "PT2E, not compiled": by_pt2e(), "ONNX, float32": write_onnx(exported, folder / "float32.onnx"),
        "ONNX, --int8": write_onnx(exported, folder / "int8.onnx", int8=True),
    }  # fmt: skip
    print("| form | top-1 | ms for one image | for 32 |\n|---|---:|---:|---:|")
    for name, form in forms.items():
        right = torch.cat([form(part).argmax(1) for part in images.split(32)]) == labels
        times = []
        for batch in (images[:1], images[:32]):
            runs = [time.perf_counter() for _ in range(11) if form(batch) is not None]
            times.append(1000 * sorted(b - a for a, b in zip(runs, runs[1:], strict=False))[5])
        print(f"| {name} | {right.float().mean():.2%} | {times[0]:.1f} | {times[1]:.0f} |", flush=True)
