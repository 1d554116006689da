"""Train a denoiser on a folder of images (one sub-folder per class), in a plain loop; save a snapshot to sample from.

    python examples/train.py FOLDER results/plain
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from d_emo import create_model
from d_emo.config import TrainSettings
from d_emo.data import ImageFolder
from d_emo.device import best_device
from d_emo.ema import EMA
from d_emo.io.snapshot import save_denoiser
from d_emo.latents import load_codec, sample_moments
from d_emo.tables import OBJECTIVES, load

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder")
parser.add_argument("output", type=Path)
parser.add_argument("--model", default="D-EMOv2-Ti-2")
parser.add_argument("--image-size", type=int, default=64)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=32)
args = parser.parse_args()

device, codec = best_device(), load_codec("d-emo-f8")
codec.to(device)
images = ImageFolder(args.folder, args.image_size)
side = args.image_size // codec.downsample
model = create_model(args.model, sample_size=side, in_channels=codec.channels, num_classes=len(images.class_names))
model.to(device).train()
objective = load(OBJECTIVES["flow"].loss)(null_class=model.null_class, learn_sigma=model.predicts_variance)
objective.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
average = EMA(model, 0.999, warmup=True)
noise = torch.Generator(device).manual_seed(0)

batches, step = DataLoader(images, args.batch_size, shuffle=True, drop_last=True), 0
while step < args.steps:
    for pixels, labels in batches:
        with torch.no_grad():
            draw = objective.draw(noise, len(pixels), model.latent_shape)
            latents = sample_moments(codec.moments(pixels.to(device)), draw.posterior_noise)
        loss = objective(model, latents, labels.to(device), draw)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        print(f"step {(step := step + 1)}  loss {loss.item():.3f}")
        if step == args.steps:
            break

about = {"codec": codec.name, "class_names": images.class_names, "image_size": args.image_size}
meta = {"step": step, "weights": "ema", **about}
settings = TrainSettings(model=args.model, max_steps=args.steps, batch_size=args.batch_size, data_dir=args.folder)
save_denoiser(args.output, average.model, scheduler=objective.noise_schedule(), meta=meta, settings=settings)
