"""Do EMOv2's blocks segment better than MobileNetV2's of as many parameters? Trains both; docs/segmentation.md says.

    python examples/blocks.py results/blocks
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import yaml

from d_emo.cli import run_verb
from d_emo.io.segmenter import open_segmenter
from d_emo.lab.study.results import Estimate
from d_emo.models import create_model
from d_emo.segmentation.images import LabelledScenes
from d_emo.segmentation.measures import Quality, measure
from d_emo.tables.demos import CONFIGS

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
args = parser.parse_args()
blocks = {"i2RMB": {}, "IRB": {"attention_mode": "none", "expand_ratios": [2, 2.5, 3.75, 4.2]}}  # as much wider
shared = yaml.safe_load((CONFIGS / "segmenter.yaml").read_text())
shared |= {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in args.set)}
shared["init_from"] = None  # weights are random, and layer scales open from the start
options = {block: {**shared["model_options"], "backbone_options": {"layer_scale": 1.0, **changes}}
           for block, changes in blocks.items()}  # fmt: skip
scenes = LabelledScenes(shared["image_size"], num_images=shared.get("validate_images") or 200, split="test")
found: dict[str, list[tuple[float, float]]] = {block: [] for block in blocks}  # cross-entropy and mIoU, by seed
for seed in args.seeds:
    for block in blocks:
        run = args.folder / f"{block}-seed{seed}"
        settings = {**shared, "model_options": options[block], "seed": seed, "output_dir": str(run)}
        args.folder.mkdir(parents=True, exist_ok=True)
        run.with_suffix(".yaml").write_text(yaml.safe_dump(settings))
        run_verb("train-segmenter", ["--config", str(run.with_suffix(".yaml"))])  # or goes on, or is done
        areas, loss = measure(open_segmenter(str(run)).model, scenes, shared["image_size"])
        found[block].append((loss / len(scenes), 100 * Quality.of(areas.sums).mean_iou))

models = {block: create_model(shared["model"], num_classes=11, **options[block]) for block in blocks}
images = torch.randn(shared["batch_size"], 3, shared["image_size"], shared["image_size"])
times: dict[str, list[float]] = {block: [] for block in blocks}
for _ in range(12):
    for block, model in models.items():  # in turns
        start = perf_counter()
        model(images)["out"].square().mean().backward()
        times[block].append(perf_counter() - start)
for block, model in models.items():
    size = sum(p.numel() for p in model.parameters())
    print(f"{block}: {size:,} parameters, {1e3 * median(times[block][2:]):.0f} ms forward and back")
for number, (name, digits) in enumerate((("cross-entropy", 4), ("mIoU, %", 1))):
    values = {block: [each[number] for each in runs] for block, runs in found.items()}
    gain = Estimate.of([a - b for a, b in zip(*values.values(), strict=True)])
    print(f"{name}:", *(f"{block} {Estimate.of(each).show(digits)}," for block, each in values.items()), "difference",
          f"{gain.show(digits, sign=True)}, {'' if gain.decided else 'not '}decided (t, 95 %)")  # fmt: skip
