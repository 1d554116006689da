#!/usr/bin/env bash
# torch.onnx.export(dynamo=False) writes permute and movedim by negative axes as a permutation that ONNX does not know.
#
# x.movedim(-1, 1), channels-last to channels-first, becomes a Transpose with perm = [0, -1, 1, 2]: the source axis is
# written as it was given, and so are the axes of x.permute(0, -1, 1, 2). The export says nothing, onnx.checker finds
# nothing without full_check, and onnxruntime refuses the file when it is loaded. The same axis counted from the front
# is right, and so are a negative destination of movedim, and transpose.
#
# Seen with torch 2.13.0 (CPU), onnx 1.23.2, onnxruntime 1.32.0 on Python 3.11:
#   movedim(-1, 1), moveaxis(-1, 1), permute(0, -1, 1, 2): perm [0, -1, 1, 2], onnxruntime: Invalid attribute perm
#   movedim(3, 1), movedim(1, -1), transpose(-1, 1): right values
#   of the 64 moves of one axis of four 28 cannot be loaded, all from a negative axis; none gives wrong values
# What helps: axes counted from the front. The exporter by torch.export writes all of them right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "numpy==2.4.6" "onnx==1.23.2" "onnxscript==0.7.2" "onnxruntime==1.32.0"
cat > "$folder/try.py" <<'PY'
import io
import itertools
import warnings

warnings.simplefilter("ignore")
import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

onnxruntime.set_default_logger_severity(4)
x = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)


class Turned(nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn = turn

    def forward(self, x):
        return self.turn(x) + 0


def export(turn):
    file = io.BytesIO()
    torch.onnx.export(Turned(turn), (x,), file, input_names=["x"], dynamo=False)
    return onnx.load_from_string(file.getvalue())


def perm(model):
    return [list(a.ints) for node in model.graph.node if node.op_type == "Transpose" for a in node.attribute]


def run(model):
    """What onnxruntime gives, or why it does not."""
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString())
    except Exception as error:
        return str(error)
    return session.run(None, {"x": x.numpy()})[0]


print("torch", torch.__version__, "onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
for turn in (lambda x: x.movedim(-1, 1), lambda x: torch.moveaxis(x, -1, 1), lambda x: x.permute(0, -1, 1, 2)):
    wrong = export(turn)
    onnx.checker.check_model(wrong)
    print(perm(wrong), run(wrong)[:120])
    assert perm(wrong) == [[0, -1, 1, 2]] and "Invalid attribute perm" in run(wrong)
    try:
        onnx.checker.check_model(wrong, full_check=True)
    except onnx.shape_inference.InferenceError:
        print("full_check finds it")
    else:
        raise SystemExit("full_check passes it now")
for turn in (lambda x: x.movedim(3, 1), lambda x: x.movedim(1, -1), lambda x: x.transpose(-1, 1)):
    assert np.array_equal(run(export(turn)), turn(x).numpy())
program = torch.onnx.export(Turned(lambda x: x.movedim(-1, 1)), (x,), dynamo=True, verbose=False, input_names=["x"])
assert np.array_equal(run(program.model_proto), x.movedim(-1, 1).numpy())

refused, different = [], []
for source, to in itertools.product(range(-4, 4), repeat=2):
    found, right = run(export(lambda x: x.movedim(source, to))), x.movedim(source, to).numpy()
    if isinstance(found, str):
        refused.append((source, to))
    elif not np.array_equal(found, right):
        different.append((source, to))
print(f"of 64 moves {len(refused)} cannot be loaded, {len(different)} give other values")
assert len(refused) == 28 and all(source < 0 for source, _ in refused) and not different
PY
"$folder/venv/bin/python" "$folder/try.py"
