#!/usr/bin/env bash
# torch.nn.SyncBatchNorm.convert_sync_batchnorm leaves many of timm's networks without their activations.
#
# timm's BatchNormAct2d is a BatchNorm2d that calls the activation at its end. PyTorch's conversion exchanges every
# instance of batch norm, subclasses too, for a layer of its own class. The activation becomes a child of that layer, so
# that it is printed with the network as before, and nobody calls it. Names and shapes of the weights are the same, a
# strict load_state_dict passes, and the network trains: an EfficientNet without one SiLU outside of its squeeze and
# excitation. Loaded into the network that timm builds, its weights belong to another function. ResNets, which call
# their activations apart, stay whole, so that a script tested with a ResNet is right.
#
# Seen with torch 2.14.1, torchvision 0.29.1, timm 1.0.31 on Python 3.11, in eval mode; calls of activations lost:
#   efficientnet_b0 33, mobilenetv3_small_100 23, regnety_002 27, densenet121 121: other outputs
#   resnet18, resnet50 0: the same outputs to the bit
# What helps: timm.layers.convert_sync_batchnorm, which keeps them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import copy
import warnings

warnings.simplefilter("ignore")
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

print("torch", torch.__version__, "timm", timm.__version__)
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def look(network):
    """The output, how many norms have an activation, and how many of those are called."""
    called = []
    found = [module.act for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
             and not isinstance(getattr(module, "act", nn.Identity()), nn.Identity)]
    hooks = [each.register_forward_hook(lambda *_: called.append(1)) for each in found]
    with torch.no_grad():
        output = network(images)
    for hook in hooks:
        hook.remove()
    return output, len(found), len(called)


for name, lost in (
    ("efficientnet_b0", 33), ("mobilenetv3_small_100", 23), ("regnety_002", 27), ("densenet121", 121),
    ("resnet18", 0), ("resnet50", 0),
):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    by_torch = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
    by_timm = convert_sync_batchnorm(copy.deepcopy(network)).eval()
    by_torch.load_state_dict(network.state_dict(), strict=True)
    (before, *counts), (torchs, *torchs_counts), (timms, *timms_counts) = map(look, (network, by_torch, by_timm))
    same = torch.equal(torchs, before)
    print(f"{name}: of {counts[0]} activations in norms {counts[1]} are called, by torch's {torchs_counts[1]} of "
          f"{torchs_counts[0]}, by timm's {timms_counts[1]}; the output by torch's is the same: {same}")
    assert torch.equal(timms, before) and counts == timms_counts == [lost, lost] and torchs_counts == [lost, 0]
    assert same == (lost == 0)
PY
"$folder/venv/bin/python" "$folder/try.py"
