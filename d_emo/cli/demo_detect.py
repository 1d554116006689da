"""How ``d-emo demo detect`` ends: mAP beside a floor, and a picture."""

from pathlib import Path

from d_emo.data import spread
from d_emo.data.scenes import DigitScenes
from d_emo.detection.average_precision import FIGURES
from d_emo.detection.drawing import truth_beside_found
from d_emo.io.snapshot import load_classifier, load_meta
from d_emo.sampling import save_png
from d_emo.text import markdown_table
from d_emo.training.detector import HELD_OUT

RUNS = {"detector": "demo/detector", "floor: the same head on frozen random weights": "demo/detector-floor"}
SHOWN, SIDE = 8, 256


def conclude() -> None:
    """Print COCO's figures of the detector and of its floor, and draw what is there beside what it finds."""
    detector = load_classifier(RUNS["detector"], "detector")
    rows = []
    for name, folder in RUNS.items():
        measured = load_meta(folder, "detector")["average_precision"]["bbox"]
        rows.append([name, *("-" if measured[each] < 0 else f"{100 * measured[each]:.1f}" for each in FIGURES)])
    scenes = DigitScenes(detector.image_size, num_images=HELD_OUT, split="test")
    picture = Path("demo/detect.png")
    shown = spread(len(scenes), SHOWN)
    save_png(truth_beside_found(detector.model, scenes, shown, side=SIDE, masks=False), picture, {"demo": "detect"})
    print(markdown_table(["boxes of held-out scenes, %", *FIGURES], rows))
    print(f"picture   {picture}: what is there, and beside it what was found")
