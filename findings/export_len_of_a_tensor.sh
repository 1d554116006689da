#!/usr/bin/env bash
# len(tensor) is the batch of the example for ever, where x.shape[0] stays free: in torch.export, and then in ONNX.
#
# Python makes len() return an int, so torch.export (strict=False, its default) writes the example's batch into the
# program. How that ends depends on how the batch was said to be free: with Dim or Dim.DYNAMIC the export stops and says
# so; with Dim.AUTO it passes, and the program takes the example's batch only. torch.onnx.export(dynamo=True) is worse:
# with Dim it writes a file of a fixed batch without a word, and with Dim.AUTO one whose input is free and whose result
# always has as many rows as the example: six images in a network for classes come out as four rows, mixed together.
# With strict=True, and where the axis is named by a string, len() is traced like the shape.
#
# Seen with torch 2.13.0 (CPU), onnx 1.23.2, onnxruntime 1.32.0 on Python 3.11, for x.reshape(len(x), -1) and an example
# of (4, 3, 8):
#   torch.export: Dim, Dim.DYNAMIC refused; Dim.AUTO only takes a batch of 4; strict=True takes any
#   torch.onnx.export: Dim -> input [4, 3, 8]; Dim.AUTO -> input [free, 3, 8], 6 images give (4, 36) instead of (6, 24)
# What helps: x.shape[0].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "numpy==2.4.6" "onnx==1.23.2" "onnxscript==0.7.2" "onnxruntime==1.32.0"
cat > "$folder/try.py" <<'PY'
import logging
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.export import Dim

onnxruntime.set_default_logger_severity(4)


class ByLength(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), -1)


class ByShape(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], -1)


example = torch.zeros(4, 3, 8)
FREE = {"Dim": Dim("batch"), "Dim.DYNAMIC": Dim.DYNAMIC, "Dim.AUTO": Dim.AUTO, "a string": "batch"}


def exported(network, free, strict):
    """Batches that the exported program takes, or the name of what was raised."""
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: FREE[free]},), strict=strict)
    except Exception as error:
        return type(error).__name__
    taken = []
    for batch in (4, 6):
        try:
            assert program.module()(torch.zeros(batch, 3, 8)).shape == (batch, 24)
            taken.append(batch)
        except AssertionError:
            pass
    return taken


def in_onnx(network, free):
    """Whether the file's batch is free, and the result's shape for six images."""
    program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=({0: FREE[free]},), verbose=False)
    axis = program.model.graph.inputs[0].shape[0]
    if isinstance(axis, int):
        return axis, None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    x = np.arange(6 * 24, dtype=np.float32).reshape(6, 3, 8)
    return "free", session.run(None, {session.get_inputs()[0].name: x})[0].shape


print("torch", torch.__version__, "onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
found = {(free, strict): exported(ByLength(), free, strict) for free in ("Dim", "Dim.DYNAMIC", "Dim.AUTO")
         for strict in (False, True)}
print("torch.export, len:", found)
assert found == {
    ("Dim", False): "UserError", ("Dim", True): [4, 6], ("Dim.DYNAMIC", False): "UserError",
    ("Dim.DYNAMIC", True): [4, 6], ("Dim.AUTO", False): [4], ("Dim.AUTO", True): [4, 6],
}
assert all(exported(ByShape(), free, False) == [4, 6] for free in ("Dim", "Dim.DYNAMIC", "Dim.AUTO"))
found = {free: in_onnx(ByLength(), free) for free in ("Dim", "Dim.AUTO", "a string")}
print("torch.onnx.export, len:", found)
assert found == {"Dim": (4, None), "Dim.AUTO": ("free", (4, 36)), "a string": ("free", (6, 24))}
assert all(in_onnx(ByShape(), free) == ("free", (6, 24)) for free in ("Dim", "Dim.AUTO", "a string"))
PY
"$folder/venv/bin/python" "$folder/try.py"
