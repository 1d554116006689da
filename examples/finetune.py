"""Fine-tune an EMOv2, as a backbone of timm, to the classes of a folder (one sub-folder per class).

    python examples/finetune.py FOLDER emov2_1m.pth      # a released file
    python examples/finetune.py FOLDER                   # from nothing
"""

import argparse

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import d_emo  # noqa: F401  (timm knows emov1_* and emov2_* from here on)
from d_emo.data import ImageFolder
from d_emo.device import best_device

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder")
parser.add_argument("weights", nargs="?", help="released EMOv2 file")
parser.add_argument("--model", default="emov2_1m")
parser.add_argument("--image-size", type=int, default=224)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=32)
args = parser.parse_args()

device = best_device()
images = ImageFolder(args.folder, args.image_size)  # in [-1, 1]
weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": args.weights}} if args.weights else {}
model = timm.create_model(args.model, num_classes=len(images.class_names), img_size=args.image_size, **weights)
model.to(device).train()

backbone = [value for name, value in model.named_parameters() if not name.startswith("head")]
groups = [{"params": backbone, "lr": 1e-4}, {"params": model.get_classifier().parameters(), "lr": 1e-3}]
optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
batches = DataLoader(images, args.batch_size, shuffle=True)
for epoch in range(args.epochs):
    right = 0
    for pixels, labels in batches:
        logits = model(pixels.to(device))
        loss = cross_entropy(logits, labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right += (logits.argmax(1).cpu() == labels).sum().item()
    print(f"epoch {epoch + 1}  loss {loss.item():.3f}  training accuracy {right / len(images):.1%}")
