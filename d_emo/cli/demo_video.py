"""How ``d-emo demo video`` ends: accuracy beside that of an image network on single frames, and a picture."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from d_emo.data import to_uint8
from d_emo.data.moving import held_out_digits
from d_emo.io.snapshot import load_meta
from d_emo.io.video import KIND, open_video_classifier
from d_emo.sampling import save_png
from d_emo.text import markdown_table
from d_emo.training.accuracy import Accuracy

RUNS = {"V-EMO": "demo/video", "image network, mean of the frames": "demo/video-frames"}
ZOOM, GAP, LINE, WORDS = 2, 4, 20, 280
"""Of frames; pixels between them, of a line's height and of the words' width."""
RIGHT, WRONG = (0, 110, 0), (190, 0, 0)


def conclude() -> None:
    """Print the accuracy of both networks beside chance, and draw a video of each motion with what they take it for."""
    rows = []
    for name, folder in RUNS.items():
        measured = Accuracy(**load_meta(folder, KIND)["accuracy"]["ema"])
        rows.append([name, f"{measured.top1:.1%}", f"{measured.top5:.1%}"])
    opened = [open_video_classifier(folder) for folder in RUNS.values()]
    names = opened[0].class_names
    rows.append(["chance", f"{1 / len(names):.1%}", f"{5 / len(names):.1%}"])
    videos = held_out_digits(opened[0].image_size, opened[0].sampler.frames)
    clips = torch.stack([videos[index][0] for index in range(len(names))])  # one of each motion
    with torch.no_grad():
        found = [each.model(clips).argmax(dim=1).tolist() for each in opened]
    picture = Path("demo/video.png")
    save_png(draw(clips, names, dict(zip(RUNS, found, strict=True))), picture, {"demo": "video"})
    print(markdown_table([f"{len(videos)} held-out videos", "top-1", "top-5"], rows))
    print(f"picture   {picture}: a video in each row, its motion, and what the networks take it for")


def draw(clips: torch.Tensor, names: list[str], found: dict[str, list[int]]) -> Image.Image:
    """Frames of videos side by side, behind the words on them.

    Args:
        clips: Video i is of class i. Shape: (B, 3, T, H, W) in [-1, 1].
        names: Of the classes.
        found: The classes of the videos by each network.
    """
    frames = to_uint8(clips).permute(0, 2, 3, 4, 1).numpy()  # (B, T, H, W, 3)
    side = ZOOM * frames.shape[2]
    canvas = Image.new("RGB", (WORDS + (side + GAP) * frames.shape[1], (side + GAP) * len(frames)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for label, film in enumerate(frames):
        top = label * (side + GAP)
        for t, frame in enumerate(film):
            zoomed = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(zoomed, (WORDS + t * (side + GAP), top))
        pen.text((6, top), names[label], "black", ImageFont.load_default(16))
        for line, (network, classes) in enumerate(found.items(), 1):
            colour = RIGHT if classes[label] == label else WRONG
            pen.text((6, top + LINE * line + 2), f"{network.split(',')[0]}: {names[classes[label]]}", colour, font)
    return canvas
