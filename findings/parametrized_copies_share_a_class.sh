#!/usr/bin/env bash
# Folding weight norm in a copy of a network (the moving average, to be saved) breaks the network that it was copied from.
#
# torch.nn.utils.parametrize gives a layer a class of its own, with a property for each parametrized tensor. copy.deepcopy
# of the layer, so AveragedModel too, makes a new layer of that same class. remove_parametrizations deletes the property
# from the class: from the copy, as was meant, and from the original, whose tensor is then nowhere. The copy is right.
# The original still answers True to is_parametrized, its state_dict is complete, and it fails at its next forward pass:
# in training, after the first snapshot.
# Two layers that were each parametrized have classes of their own, so a test without a copy is right.
#
# Seen with torch 2.14.1 on Python 3.11, weight_norm and spectral_norm: AttributeError, 'ParametrizedLinear' object has no
# attribute 'weight', from the original, after the copy was folded.
# What helps: copy first and parametrize each, load the state by load_state_dict, and fold that one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

print("torch", torch.__version__)
x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
for norm in (weight_norm, spectral_norm):
    torch.manual_seed(0)
    network = nn.Sequential(norm(nn.Linear(3, 5)), nn.ReLU(), norm(nn.Linear(5, 2))).eval()
    average = AveragedModel(network).eval()
    wanted = network(x)
    assert torch.equal(average(x), wanted)
    parametrize.remove_parametrizations(average.module[0], "weight")
    torch.testing.assert_close(average(x), wanted)
    assert type(average.module[0]) is nn.Linear and parametrize.is_parametrized(network[0], "weight")
    assert any(key.startswith("0.parametrizations.weight") for key in network.state_dict())
    try:
        network(x)
    except AttributeError as error:
        print(f"{norm.__name__}: the copy is folded and right; the original: {error}")
        assert "'ParametrizedLinear' object has no attribute 'weight'" in str(error)
    else:
        raise SystemExit(f"{norm.__name__}: the original still works")
    alone, other = (norm(nn.Linear(3, 5)) for _ in range(2))
    other.load_state_dict(alone.state_dict())
    parametrize.remove_parametrizations(other, "weight")
    assert alone(x).shape == other(x).shape == (4, 5)
PY
"$folder/venv/bin/python" "$folder/try.py"
