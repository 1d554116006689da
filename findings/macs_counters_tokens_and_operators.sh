#!/usr/bin/env bash
# Two counters of multiply-accumulates by which light backbones are chosen, and what they do not see.
#
# torchinfo counts a linear layer once for each image, however many tokens it is applied to: a layer on 196 tokens and
# the same layer on one have the same "mult-adds", where the same weights as a 1 x 1 convolution have 196 times as many.
# A transformer, or any network that is channels-last inside, comes out by a factor of its map's size too light.
# ptflops (its default backend) counts a product written torch.matmul(a, b) or a.matmul(b), and the same product
# written a @ b not at all, so attention weighs something or nothing by how it is written.
#
# Seen with torch 2.13.0 (CPU), torchinfo 1.8.0, ptflops 0.7.5 on Python 3.11:
#   torchinfo: Linear(64, 64) on 1 token 4,160, on 196 tokens 4,160; Conv2d(64, 64, 1) on 14 x 14 815,360
#   ptflops: matmul 2,458,624 MACs, @ 0
# What helps: torch.utils.flop_counter.FlopCounterMode, which sees operators (and counts two for each MAC).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "numpy==2.4.6" "torchinfo==1.8.0" "ptflops==0.7.5"
cat > "$folder/try.py" <<'PY'
import torch
from ptflops import get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary


class Product(nn.Module):
    """Every token with every other, as attention has it."""

    def __init__(self, written):
        super().__init__()
        self.written, self.last = written, nn.Identity()

    def forward(self, x):
        return self.last(x @ x.mT if self.written == "@" else torch.matmul(x, x.mT))


def mult_adds(layer, *shape):
    return int(summary(layer, input_data=torch.zeros(shape), verbose=0).total_mult_adds)


def operators(layer, *shape):
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(shape))
    return counter.get_total_flops() // 2


print("torch", torch.__version__)
linear, convolution = nn.Linear(64, 64), nn.Conv2d(64, 64, 1)
found = mult_adds(linear, 1, 1, 64), mult_adds(linear, 1, 196, 64), mult_adds(convolution, 1, 64, 14, 14)
print("torchinfo: linear on 1 token, on 196; 1 x 1 convolution on 14 x 14:", found)
assert found == (4160, 4160, 196 * 4160), found
assert operators(linear, 1, 196, 64) == operators(convolution, 1, 64, 14, 14) == 196 * 64 * 64
found = [
    get_model_complexity_info(Product(written), (196, 64), as_strings=False, print_per_layer_stat=False, verbose=False)[0]
    for written in ("matmul", "@")
]
print("ptflops: matmul, @:", found)
assert found == [196 * 196 * 64, 0], found
assert operators(Product("@"), 1, 196, 64) == 196 * 196 * 64
PY
"$folder/venv/bin/python" "$folder/try.py"
