#!/usr/bin/env bash
# LoRA of PEFT on a depthwise convolution trains, is larger than what it adapts, and cannot be merged.
#
# PEFT takes a convolution with groups where the rank is a multiple of their number, so for a depthwise convolution of
# 64 channels the smallest rank is 64. Those adapters have 64 times as many parameters as the convolution itself,
# and merge_and_unload(), which one meets at the end, when the network is to be deployed, raises NotImplementedError for
# any convolution with groups. A convolution without groups merges to the last digits of float32.
#
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU) on Python 3.11, for 64 channels and 3 x 3 kernels:
#   groups 64, rank 16: ValueError when the adapter is made
#   groups 64, rank 64: 36,928 parameters for 576, trains; merge_and_unload: NotImplementedError
#   groups 1, rank 16: trains, merges
# What helps: adapt the linear layers and 1 x 1 convolutions of light networks, and leave depthwise ones frozen, or
# train them whole (modules_to_save): they are small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "numpy==2.4.6" "peft==0.21.2" "transformers==5.24.0"
cat > "$folder/try.py" <<'PY'
import warnings

warnings.simplefilter("ignore")
import peft
import torch
import transformers
from torch import nn

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
CHANNELS = 64


class Network(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False)

    def forward(self, x):
        return self.convolution(x)


def adapted(groups, rank):
    config = peft.LoraConfig(r=rank, target_modules=["convolution"], init_lora_weights=False)
    return peft.get_peft_model(Network(groups), config)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


x = torch.randn(2, CHANNELS, 6, 6)
try:
    adapted(CHANNELS, 16)
except ValueError as error:
    print("groups 64, rank 16: ValueError:", str(error)[:120])
else:
    raise SystemExit("a rank that is no multiple of the groups is taken now")

depthwise = adapted(CHANNELS, CHANNELS)
whole, adapters = count(Network(CHANNELS)), depthwise.get_nb_trainable_parameters()[0]
depthwise(x).sum().backward()
assert all(parameter.grad is not None for parameter in depthwise.parameters() if parameter.requires_grad)
print(f"groups 64, rank 64: {adapters:,} parameters for {whole:,}, trains")
assert (adapters, whole) == (36928, 576)
try:
    depthwise.merge_and_unload()
except NotImplementedError as error:
    print("merge_and_unload: NotImplementedError:", error)
else:
    raise SystemExit("a convolution with groups can be merged now")

plain = adapted(1, 16)
with torch.no_grad():
    before = plain(x)
    after = plain.merge_and_unload()(x)
print(f"groups 1, rank 16: merged, differs by {(before - after).abs().max():.1e}")
assert torch.allclose(before, after, atol=1e-4)
PY
"$folder/venv/bin/python" "$folder/try.py"
