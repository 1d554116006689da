"""`d-emo demo medical` and `d-emo demo deit`, with tiny settings from end to end."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_demo import here, make_tiny  # noqa: F401

from d_emo.cli import demo_deit, demo_medical, run_verb
from d_emo.cli.sheets import Cell, sheet
from d_emo.data import spread
from d_emo.data.digits import Digits
from d_emo.segmentation.images import LabelledScenes

SEGMENTER = {
    "dataset": "fundus", "picture_size": 64, "image_size": 32, "stride": 20, "scale_range": [1.0, 2.0], "batch_size": 2,
    "max_steps": 1, "warmup_steps": 0, "num_images": 2, "validate_images": 2, "tracker": "none",
}  # fmt: skip
CLASSIFIER = {
    "model": "deit_tiny_i2rmb", "model_options": {"embed_dim": 32, "num_heads": 1, "depth": 1}, "image_size": 32,
    "batch_size": 4, "max_steps": 1, "warmup_steps": 0, "validate_images": 4, "tracker": "none",
}  # fmt: skip


def table_of(text):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_medical_demo_ends_with_dice_beside_a_floor_and_a_picture(here, monkeypatch, capsys):  # noqa: F811
    runs = [
        SEGMENTER | {"model": model, "model_options": {"widths": [32] * 5, **window}, "output_dir": folder}
        for model, window, folder in zip(
            ("u-emo", "unet"), ({"window_size": 2}, {}), demo_medical.RUNS.values(), strict=True
        )
    ]
    make_tiny("medical", monkeypatch, here, *runs)
    eye = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    sizes, seen, plain = [], [], demo_medical.threshold_quality
    monkeypatch.setattr(
        demo_medical, "threshold_quality", lambda data, those, given: seen.append([*those]) or plain(data, those, given)
    )
    for photograph in (None, eye):
        monkeypatch.setattr(demo_medical, "photograph", lambda photograph=photograph: photograph)
        run_verb("demo", ["medical"])
        with Image.open(here / "demo" / "medical.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][0] == sizes[0][0] > 4 * demo_medical.SIDE and sizes[1][1] - sizes[0][1] > demo_medical.SIDE
    assert seen[1] == spread(200, 2)  # the drawings that a segmenter is measured on
    out = capsys.readouterr().out
    assert "with a photograph too after pip install 'd-emo[medical]'" in out and "and what in a photograph" in out
    rows = table_of(out)
    assert len(rows["2 held-out drawings"]) == len(rows["U-EMO"]) == len(rows["U-Net"]) == 5
    assert float(rows["floor: darker than around"][1]) > 30  # whatever untrained networks find


def test_what_is_found_missed_and_wrong_has_its_colour():
    found, truth = torch.tensor([[1, 1], [0, 0]]).numpy(), torch.tensor([[1, 0], [1, 0]]).numpy()
    colours = demo_medical.compared(found, truth).tolist()
    named = (demo_medical.FOUND, demo_medical.FALSE, demo_medical.MISSED, (0, 0, 0))
    assert [tuple(each) for row in colours for each in row] == list(named)


def test_the_medical_floor_is_the_best_threshold():
    drawings = LabelledScenes(96, num_images=8, dataset="fundus")
    best = demo_medical.fitted_threshold(drawings)
    around = demo_medical.threshold_quality(drawings, range(8), [best, best - 1, best + 1])
    dice = [quality.dice[1] for quality in around]
    assert dice[0] == max(dice) > 0.3


def test_the_deit_demo_ends_with_accuracy_beside_floors_and_a_picture(here, monkeypatch, capsys):  # noqa: F811
    first, second = demo_deit.RUNS.values()
    make_tiny("deit", monkeypatch, here, CLASSIFIER | {"dataset": "digits", "output_dir": first},
              CLASSIFIER | {"dataset": "digits", "init_from": first, "output_dir": second})  # fmt: skip
    run_verb("demo", ["deit"])
    rows = table_of(capsys.readouterr().out)
    assert rows["floor: the nearest mean of a class"] == ["91.9%"]
    shares = [float(row[0].rstrip("%")) for name, row in rows.items() if name.startswith(("DeiT", "floor"))]
    assert len(shares) == 3 and all(0 <= share <= 100 for share in shares)
    with Image.open(here / "demo" / "deit.png") as picture:
        assert picture.size == (10 * 104 + 8, 3 * 104 + 2 * 22 + 22 + 8)


def test_saliency_is_where_the_class_looks():
    """A network whose class 1 sees the left half only."""
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            left = images[..., : images.shape[-1] // 2].mean(dim=(1, 2, 3)) * self.weight
            return torch.stack([left * 0, left], dim=1)

    heat = demo_deit.saliency(Half(), torch.zeros(2, 3, 16, 16), torch.tensor([1, 1]))
    assert heat.shape == (2, 16, 16) and heat.amax() == 1 and heat[..., 11:].max() == 0 and heat[..., :5].min() > 0


def test_the_floor_of_digits_is_a_nearest_mean():
    images, labels = demo_deit.stacked(Digits(8))
    means = [images[labels == label].mean(dim=0) for label in range(10)]
    expected = [min(range(10), key=lambda label: (image - means[label]).square().sum().item()) for image in images[:20]]
    assert demo_deit.nearest_mean(images, labels, images[:20]).tolist() == expected


@pytest.mark.parametrize("titles, note", [((), ""), (("a", "b"), "words")])
def test_a_sheet_has_room_for_what_is_written(titles, note):
    picture = torch.zeros(5, 7, 3, dtype=torch.uint8).numpy()
    made = sheet([[Cell(picture, "x"), Cell(picture)], [Cell(picture)]], 40, titles=titles, note=note)
    assert made.size == (2 * 48 + 8, 2 * 48 + 22 + 8 + (44 if note else 0))
