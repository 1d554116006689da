#!/usr/bin/env bash
# accelerate: load_state and skip_first_batches, as its guide uses them, do not go on with the same images.
#
# An epoch's order is drawn when the epoch begins. The state is saved later, so its random generators are past that
# draw, and the order drawn after load_state is that of the next epoch. skip_first_batches skips the first batches of
# this other order. So some images of the interrupted epoch are trained on twice and others never, and each later epoch
# has the order of the one after it.
# With use_seedable_sampler=True an epoch's order is made from the seed and the epoch's number. The state lacks the
# number, so a new process begins with the order of epoch 0. The next epoch has the order of epoch 0 again. Here
# set_epoch helps: called before skip_first_batches and in each epoch after, it puts all orders right. With the plain
# sampler it changes nothing.
#
# Seen with accelerate 1.15.0, torch 2.13.0 (CPU) on Python 3.11; 12 images, batches of 4, stopped in epoch 2 after its
# first batch, and the same seed in the new process; epochs whose order is that of the whole run:
#   plain sampler: in epoch 2 three images twice, three never; no epoch is right
#   seedable sampler: the rest of epoch 2 is epoch 0's, then epoch 0 again, then epoch 1; with set_epoch all are right
# What helps: use_seedable_sampler=True and set_epoch, both in the first run and in all that go on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" "accelerate==1.15.0"
cat > "$folder/train.py" <<'PY'
"""train.py whole|resumed: the images of each batch of the epochs by sampler and mode, as JSON."""

import json
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

STOPPED_IN, STOPPED_AFTER = 2, 1  # epoch, batches of it


def train(sampler, mode):
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=sampler == "seedable")
    )
    torch.manual_seed(0)
    loader = accelerator.prepare(DataLoader(range(12), batch_size=4, shuffle=True))
    if mode != "whole":
        accelerator.load_state(f"state-{sampler}")
    epochs = []
    for epoch in range(0 if mode == "whole" else STOPPED_IN, 5):
        if mode == "set_epoch":
            loader.set_epoch(epoch)
        skips = mode != "whole" and epoch == STOPPED_IN
        active = accelerator.skip_first_batches(loader, STOPPED_AFTER) if skips else loader
        epochs.append([])
        for batch in active:
            epochs[-1].append(batch.tolist())
            if mode == "whole" and (epoch, len(epochs[-1])) == (STOPPED_IN, STOPPED_AFTER):
                accelerator.save_state(f"state-{sampler}")
    return epochs


modes = ["whole"] if sys.argv[1] == "whole" else ["resume", "set_epoch"]
print(json.dumps({f"{sampler}, {mode}": train(sampler, mode) for sampler in ("plain", "seedable") for mode in modes}))
PY
cat > "$folder/try.py" <<'PY'
import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

print("accelerate", version("accelerate"), "torch", version("torch"))
runs = {}
for part in ("whole", "resumed"):  # a process each
    said = subprocess.run([sys.executable, "train.py", part], check=True, capture_output=True, text=True).stdout
    runs.update(json.loads(said))
for sampler in ("plain", "seedable"):
    whole = runs[f"{sampler}, whole"]
    wanted = [whole[2][1:], *whole[3:]]
    for mode in ("resume", "set_epoch"):
        found = runs[f"{sampler}, {mode}"]
        seen = Counter(image for batch in whole[2][:1] + found[0] for image in batch)
        twice, never = [i for i in range(12) if seen[i] == 2], [i for i in range(12) if not seen[i]]
        print(f"{sampler} sampler, {mode}: rest of epoch 2 {found[0]} for {wanted[0]}: twice {twice}, never {never}; "
              f"right {[one == other for one, other in zip(found, wanted)]}")
        if (sampler, mode) == ("seedable", "set_epoch"):
            assert found == wanted
        elif sampler == "seedable":
            assert found == [whole[0][1:], whole[0], whole[1]] and twice and never
        else:
            assert found[:2] == [whole[3][1:], whole[4]] and len(twice) == len(never) == 3
PY
cd "$folder" && "$folder/venv/bin/python" try.py
