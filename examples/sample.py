"""Draw images of classes with a trained denoiser, each as a PNG; with a snapshot or without, then with the newest.

    python examples/sample.py samples/shapes "red circle on sky" 207
"""

import argparse
from pathlib import Path

from PIL import Image

from d_emo.sampling import Sampler, find_classes

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("output", type=Path)
parser.add_argument("classes", nargs="+", help="ids or names")
parser.add_argument("--snapshot", help="folder of a snapshot or of a run")
parser.add_argument("--each", type=int, default=4, help="images of each class")
parser.add_argument("--steps", type=int, help="default: what the snapshot was trained for, else 30")
parser.add_argument("--guidance", type=float, help="default: 4, or 1 where the snapshot cannot be guided")
args = parser.parse_args()

sampler = Sampler.open(args.snapshot, steps=args.steps, guidance=args.guidance)
labels = [label for label in find_classes(args.classes, sampler.class_names) for _ in range(args.each)]
seeds = list(range(len(labels)))  # an image depends on its label and seed, not on the others

args.output.mkdir(parents=True, exist_ok=True)
index = 0
for batch in sampler.images(labels, seeds, batch_size=16):
    for image in batch:
        name = sampler.class_names[labels[index]].replace(" ", "-")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(args.output / f"{index:03}-{name}.png")
        index += 1
print(f"{index} images of {sampler.image_size} px in {args.output}")
