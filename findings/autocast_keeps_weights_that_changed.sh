#!/usr/bin/env bash
# Within one torch.autocast block a network computes with the weights that it had at its first call.
#
# Autocast casts each float32 weight once and keeps the copy until the outermost block ends. It notices neither in-place
# writes nor load_state_dict, with and without torch.no_grad(). So a validation that opens a block, measures the
# network, puts the moving average in (store and copy_to of diffusers' EMAModel) and measures again prints the raw
# network's loss twice. A loop with one block around all of its updates computes every loss and gradient from the first
# weights. An own block for each forward does not help while an outer one is open, even one with enabled=False. In
# torch.inference_mode() nothing is kept, so there the numbers are right.
#
# Seen with torch 2.13.0 (CPU, bfloat16), diffusers 0.42.1 on Python 3.11; the loss of a linear layer:
#   a block for each: raw 1, average 0.25;  one block: raw 1, average 1;  one, inference_mode: raw 1, average 0.25
#   20 updates by SGD: a block for each forward 1 -> 0.006; one around the loop 1 -> 1, weights move on from 1 to -1.5
# What helps: no block open where weights change; or torch.clear_autocast_cache() after, or cache_enabled=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1"
cat > "$folder/try.py" <<'PY'
import warnings
from contextlib import nullcontext

warnings.simplefilter("ignore")
import diffusers
import torch
from diffusers.training_utils import EMAModel
from torch import nn

print("torch", torch.__version__, "diffusers", diffusers.__version__)
INPUT = torch.eye(4)


def block(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


def network(weight):
    layer = nn.Linear(4, 4, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def loss(layer):
    """The mean squared error for the target 0, so that of a weight w everywhere it is w squared."""
    return layer(INPUT).float().square().mean()


def validation(mode, one, each, forget=False):
    """Losses of the network, whose weights are 1, and of its moving average, whose weights are 0.5."""
    layer, average = network(1.0), EMAModel(network(0.5).parameters())
    with mode(), one:
        with each():
            raw = loss(layer).item()
        average.store(layer.parameters())
        average.copy_to(layer.parameters())
        if forget:
            torch.clear_autocast_cache()
        with each():
            averaged = loss(layer).item()
        assert torch.equal(layer.weight, torch.full((4, 4), 0.5))  # it is there
        average.restore(layer.parameters())
    return raw, averaged


cases = [
    ("float32", torch.no_grad, nullcontext(), nullcontext, False, (1, 0.25)),
    ("a block for each", torch.no_grad, nullcontext(), block, False, (1, 0.25)),
    ("one block, no_grad", torch.no_grad, block(), nullcontext, False, (1, 1)),
    ("one block, gradients on", torch.enable_grad, block(), nullcontext, False, (1, 1)),
    ("one block, inference_mode", torch.inference_mode, block(), nullcontext, False, (1, 0.25)),
    ("a block for each in one that is off", torch.no_grad, block(enabled=False), block, False, (1, 1)),
    ("one block, clear_autocast_cache", torch.no_grad, block(), nullcontext, True, (1, 0.25)),
    ("one block, cache_enabled=False", torch.no_grad, block(cache_enabled=False), nullcontext, False, (1, 0.25)),
]
for name, mode, one, each, forget, expected in cases:
    found = validation(mode, one, each, forget)
    print(f"{name}: raw {found[0]}, average {found[1]}")
    assert found == expected

loops = [("a block for each forward", nullcontext(), block), ("one around the loop", block(), nullcontext)]
for name, one, each in loops:
    layer, losses = network(1.0), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with one:
        for _ in range(20):
            with each():
                now = loss(layer)
            optimizer.zero_grad()
            now.backward()
            optimizer.step()
            losses.append(now.item())
    weight = layer.weight[0, 0].item()
    print(f"{name}: losses {losses[0]:.4f}, {losses[1]:.4f}, ..., {losses[-1]:.4f}; weight {weight:.3f}")
    if each is block:
        assert losses[-1] < 0.01
    else:
        assert set(losses) == {1.0} and weight == -1.5
PY
"$folder/venv/bin/python" "$folder/try.py"
