"""SSDLite of 512 px with three kinds of anchors, trained alike: the same pictures in the same order, the same start.

    python sample_outputs/study/anchors512/train.py CLASSIFIER --seed 0 --output results.csv

CLASSIFIER is the small EMOv2 that the backbone starts from. Its stem and first two stages stay as they are, so that
their maps are computed once; the rest is trained. There is one class, a shape: what is compared is which objects are
found, and how well, by their size.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from d_emo import create_model
from d_emo.data.scenes import ShapeScenes
from d_emo.detection.average_precision import FIGURES, AveragePrecision
from d_emo.training.detector import start_backbone

SIDE = 512
SMALL = {"depths": [1, 1, 2, 1], "dims": [16, 24, 48, 64], "head_dims": [8, 8, 16, 16], "drop_path_rate": 0.0}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("classifier")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--images", type=int, default=300)
parser.add_argument("--held-out", type=int, default=100)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--output", type=Path, required=True)
args = parser.parse_args()

models, anchors = {}, {}
for kind in ("fixed", "scaled", "stretched"):
    torch.manual_seed(args.seed)
    model = create_model(
        "ssdlite512-emov2_1m", num_classes=1, anchors=kind, head_std=None, frozen_stages=2, norm_eval=False,
        backbone_options=SMALL, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    start_backbone(model, args.classifier)
    model.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(width, eps=1e-8) for width in SMALL["dims"][2:])
    models[kind] = model
    with torch.no_grad():
        anchors[kind] = model.eval().anchors(ImageList(torch.zeros(1, 3, SIDE, SIDE), [(SIDE, SIDE)]))
emo = models["fixed"].backbone.maps.emo
frozen = torch.nn.Sequential(emo.stem, *emo.stages[:2]).eval()


@torch.no_grad()
def seen(split, count):
    """Maps of the second stage of every picture, and what is in it."""
    scenes, maps, targets = ShapeScenes(SIDE, num_images=count, split=split, seed=args.seed), [], []
    for index in range(count):
        image, target = scenes.read(index)
        maps.append(frozen(image[None] / 127.5 - 1))
        targets.append({"boxes": target["boxes"], "labels": torch.ones_like(target["labels"])})
        if index % 100 == 99:
            print(f"{split}: {index + 1} pictures", flush=True)
    return torch.cat(maps), targets


def outputs(model, x):
    """What the heads say. Shape: (B, C, 64, 64) -> cls_logits (B, anchors, 2), bbox_regression."""
    levels = []
    for stage, norm in zip(model.backbone.maps.emo.stages[2:], model.norms, strict=True):
        x = stage(x)
        levels.append(norm(x))
    for block in model.backbone.extra:
        levels.append(block(levels[-1]))
    return model.head(levels)


maps, targets = seen("train", args.images)
optimizers = {
    kind: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3, weight_decay=0.05)
    for kind, model in models.items()
}
order = torch.Generator().manual_seed(args.seed)
for step in range(args.steps):
    chosen = torch.randint(args.images, (args.batch_size,), generator=order)
    batch, wanted = maps[chosen], [targets[i] for i in chosen]
    losses = {}
    for kind, model in models.items():
        model.train()
        matched = [model.proposal_matcher(box_iou(each["boxes"], anchors[kind])) for each in wanted]
        parts = model.compute_loss(wanted, outputs(model, batch), [anchors[kind]] * len(wanted), matched)
        loss = losses[kind] = sum(parts.values())
        for group in optimizers[kind].param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 40, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        optimizers[kind].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizers[kind].step()
    if step % 20 == 19:
        print(step + 1, {kind: round(loss.item(), 3) for kind, loss in losses.items()}, flush=True)

maps, targets = seen("test", args.held_out)
rows = []
for kind, model in models.items():
    gathered = AveragePrecision(["shape"])
    model.eval()
    for index, target in enumerate(targets):
        with torch.no_grad():
            said = outputs(model, maps[index : index + 1])
            (found,) = model.postprocess_detections(said, [anchors[kind]], [(SIDE, SIDE)])
        labels = {"labels": target["labels"] - 1}
        gathered.add((SIDE, SIDE), target | labels, found | {"labels": found["labels"] - 1})
    figures = gathered.figures()["bbox"]
    rows.append([kind, args.seed, *(f"{figures[name]:.4f}" for name in FIGURES)])
    print(rows[-1], flush=True)
with args.output.open("w", newline="") as file:
    csv.writer(file, lineterminator="\n").writerows([["anchors", "seed", *FIGURES], *rows])
