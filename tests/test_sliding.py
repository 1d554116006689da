import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from d_emo.cli import run_verb
from d_emo.config import SegmenterSettings
from d_emo.errors import InputError
from d_emo.io.segmenter import open_segmenter
from d_emo.models import create_model
from d_emo.segmentation.augment import to_input
from d_emo.segmentation.images import LabelledScenes
from d_emo.segmentation.measures import Quality, measure, segment
from d_emo.segmentation.sliding import Windows
from d_emo.training import fit
from d_emo.training.segmenter import SegmenterTask

TINY = {
    "model": "u-emo", "model_options": {"aux": True, "widths": [32] * 5, "window_size": 2, "layer_scale": 1.0},
    "image_size": 32, "batch_size": 2, "max_steps": 2, "warmup_steps": 1, "num_images": 4, "validate_images": 2,
    "validate_every": 2, "state_every": 1, "snapshot_every": 2, "tracker": "none", "stride": 20, "blend": "gaussian",
}  # fmt: skip


class Seeing(nn.Module):
    """Logits that depend on the place in the window and on all of its pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        place = torch.linspace(0, 1, images.shape[-1])
        return {"out": self.conv(images) + images.mean(dim=(1, 2, 3))[:, None, None, None] + place + place[:, None]}


def plainly(network, image, size, stride, blend):
    """Each window by itself, each pixel's logits and weights listed and averaged, in float64."""
    height, width = image.shape[1:]
    padded = np.zeros((3, max(height, size), max(width, size)), dtype=np.uint8)
    padded[:, :height, :width] = image.numpy()
    seen = [[[] for _ in range(padded.shape[2])] for _ in range(padded.shape[1])]
    tops, lefts = (list(range(0, side - size, stride)) + [side - size] for side in padded.shape[1:])
    for top in tops:
        for left in lefts:
            part = torch.from_numpy(padded[:, top : top + size, left : left + size])
            logits = network(to_input(part)[None])["out"][0].double()
            for y in range(size):
                for x in range(size):
                    away = ((y - (size - 1) / 2) ** 2 + (x - (size - 1) / 2) ** 2) / (size / 8) ** 2
                    weight = np.exp(-away / 2) if blend == "gaussian" else 1.0
                    seen[top + y][left + x].append((weight, logits[:, y, x]))
    means = [[sum(w * z for w, z in each) / sum(w for w, _ in each) for each in row[:width]] for row in seen[:height]]
    return torch.stack([torch.stack(row, dim=1) for row in means], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("blend", ["mean", "gaussian"])
@pytest.mark.parametrize("height, width", [(19, 26), (16, 8), (5, 9), (8, 8), (7, 20)])
def test_windows_equal_a_plain_loop(height, width, blend):
    torch.manual_seed(0)
    network, image = Seeing(), torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    found = segment(network, image, windows=Windows(8, 5, blend))
    expected = plainly(network, image, 8, 5, blend)
    assert found.shape == (4, height, width) and torch.allclose(found.double(), expected, rtol=0, atol=1e-5)
    assert Windows(8, 5).starts(19) == [0, 5, 10, 11] and Windows(8, 5).starts(8) == Windows(8, 5).starts(3) == [0]


@torch.no_grad()
def test_one_window_is_the_whole_image_and_a_small_image_is_padded_as_in_training():
    torch.manual_seed(0)
    model = create_model("u-emo", **TINY["model_options"], num_classes=3)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    whole = segment(model, image)
    assert torch.equal(segment(model, image, windows=Windows(32, 20)), whole) and model.training
    small, padded = image[:, :20, :30], torch.zeros_like(image)
    padded[:, :20, :30] = small
    assert torch.equal(segment(model, small, windows=Windows(32, 32)), segment(model, padded)[:, :20, :30])
    assert segment(model, image, 48, windows=Windows(32, 16)).shape == (3, 32, 32)  # resized before, and back


@pytest.mark.parametrize("stride", [0, 9])
def test_windows_that_leave_pixels_out_are_refused(stride):
    with pytest.raises(InputError, match=f"`stride` must be 1 to 8, the windows' side, not {stride}"):
        Windows(8, stride)


def test_training_measures_by_windows_and_segment_goes_on_so(tmp_path, capsys):
    settings = SegmenterSettings(**TINY, output_dir=str(tmp_path / "run"))
    task = SegmenterTask(settings)
    task.held_out = LabelledScenes(50, num_images=2, split="test")  # of another size than the crops
    snapshot = fit(task, settings, preview=task.preview)
    with Image.open(tmp_path / "run" / "samples" / "step-2.png") as picture:
        assert picture.width == 3 * 54 + 4 and picture.height > 2 * 54
    opened, windows = open_segmenter(str(snapshot)), Windows(32, 20, "gaussian")
    assert opened.windows == windows
    quality, meta = Quality.of(measure(opened.model, task.held_out, None, windows=windows)[0].sums), json.loads(
        (snapshot / "snapshot.json").read_text()
    )  # fmt: skip
    assert meta["quality"] == json.loads(json.dumps(asdict(quality))) | {"images": 2}
    assert meta["quality"] != asdict(Quality.of(measure(opened.model, task.held_out, 32)[0].sums)) | {"images": 2}
    assert f"mDice {quality.mean_dice:.2%}" in (snapshot / "README.md").read_text()
    assert "in windows of 32 px, 20 px apart" in (snapshot / "README.md").read_text()

    image = task.held_out[0][0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    for number, (flags, size, used) in enumerate((
        ([], None, windows), (["--blend", "mean"], None, Windows(32, 20)),
        (["--crop", "48"], None, Windows(48, 32, "gaussian")),
        (["--image-size", "40"], 40, None), (["--image-size", "64", "--stride", "32"], 64, Windows(32, 32)),
    )):  # fmt: skip
        out = tmp_path / str(number)
        run_verb("segment", [str(tmp_path / "a.png"), "--model", str(snapshot), "--output", str(out), *flags])
        with Image.open(out / "a_classes.png") as mask:
            expected = segment(opened.model, image, size, windows=used).argmax(dim=0)
            assert np.array_equal(np.asarray(mask), expected.numpy()), flags


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(InputError, match="`stride` 33 leaves pixels out between windows of 32"):
        SegmenterSettings(**{**TINY, "stride": 33})
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for flags, words in ((["--stride", "600"], "--stride must be 1 to 512"), (["--blend", "mean"], "--blend is of")):
        with pytest.raises(InputError, match=words):
            run_verb("segment", [str(tmp_path / "a.png"), "--model", "pspnet-emov2_1m", *flags])
