#!/usr/bin/env bash
# torch.ao.quantization.quantize_dynamic converts layers by their exact type.
#
# A subclass of nn.Linear that adds nothing stays float32 without a word: even where the set of types to convert names
# the subclass itself. A layer under weight_norm, whose class PyTorch makes on the fly, is found but refused with an
# assertion. So a network built of subclasses reports a quantised model of unchanged size and speed.
#
# Seen with torch 2.13.0 (CPU) on Python 3.11:
#   subclass, {nn.Linear}:           ['Same', 'Linear', ...] -> Same stays, Linear is converted
#   subclass, {nn.Linear, Same}:     the same
#   weight_norm(nn.Linear):          AssertionError
# What helps: let layers be plain nn.Linear and call faster code from their owner.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
from torch import nn
from torch.ao.nn.quantized import dynamic
from torch.ao.quantization import quantize_dynamic


class Same(nn.Linear):
    pass


network = nn.Sequential(Same(16, 16), nn.Linear(16, 16))
print("torch", torch.__version__)
for types in ({nn.Linear}, {nn.Linear, Same}):
    quantised = quantize_dynamic(network, types)
    kinds = [type(layer) for layer in quantised]
    print(sorted(kind.__name__ for kind in types), "->", [f"{kind.__module__}.{kind.__name__}" for kind in kinds])
    assert kinds == [Same, dynamic.Linear], kinds
normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
try:
    quantize_dynamic(normed, {nn.Linear})
except AssertionError as error:
    print("weight_norm -> AssertionError:", str(error)[:60], "...")
else:
    raise SystemExit("a parametrised layer is converted now")
PY
"$folder/venv/bin/python" "$folder/try.py"
