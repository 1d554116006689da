"""Metrics by a classifier: on a network whose answers are known, and ``scripts/judge.py --samplers`` end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import as_batch, gather, make_pixels
from PIL import Image

from d_emo.cli import run_verb
from d_emo.config import ClassifierSettings, JudgeSettings, TrainSettings
from d_emo.data import ClassImages, spread
from d_emo.data.shapes import GROUNDS, SHAPES, Shapes1000
from d_emo.errors import InputError
from d_emo.evaluation import (
    ClassifierMetrics,
    classifier_metrics,
    compare_with_real,
    frechet_distance,
    measure_timed,
    open_real,
    precision_recall,
    sampler_table,
    words_of_parts,
)
from d_emo.io.snapshot import save_classifier, save_denoiser
from d_emo.latents import PixelCodec
from d_emo.models import create_model
from d_emo.tables import DATASETS, OBJECTIVES, DatasetRow, load, metric_values

ROOT = Path(__file__).parents[1]
NAMES = ["red", "green", "blue"]


class Brightest:
    """Its features are the mean colours; the class of an image is its brightest channel."""

    name, dim = "brightest", 3

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean(dim=(2, 3))

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": self(images)}

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled


class Coloured(ClassImages):
    """Image i is of class i % 3, a little differently bright every time."""

    name, class_names, image_size = "coloured", NAMES, 8

    def __len__(self) -> int:
        return 24

    def label(self, index: int) -> int:
        return index % 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.full((3, 8, 8), -0.9)
        image[self.label(index)] = 0.5 + index / 100
        return image, self.label(index)


def pixels(count: int, seed: int) -> torch.Tensor:
    return as_batch(make_pixels(count, seed=seed, cell=2))


class Pictures(ClassImages):
    """Images that are there; of class 0, all."""

    name, class_names, image_size = "pictures", NAMES, 8

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        return 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index] / 127.5 - 1, 0


def test_distances_are_those_of_the_classifiers_features() -> None:
    real, drawn = pixels(40, 0), pixels(30, 1)
    metrics = ClassifierMetrics(Brightest(), Pictures(real))
    labels = drawn.double().mean(dim=(2, 3)).argmax(dim=1)
    measured = metrics.measure(drawn.split(11), labels)
    ours, theirs = gather(Brightest()(drawn)), gather(Brightest()(real))
    expected = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    assert measured["fid"] == pytest.approx(expected, rel=1e-9) and expected > 1
    near = precision_recall(Brightest()(drawn).float(), Brightest()(real).float())
    assert {name: measured[name] for name in near} == near and 0 < near["recall"] < 1
    assert measured["class_accuracy"] == 100 and list(measured) == [value.name for value in metrics.values]
    assert metrics.measure_real(Pictures(real))["fid"] < 1e-9
    few = metrics.measure([drawn[:3]], labels[:3])  # precision and recall need four
    assert list(few) == ["fid", "class_accuracy"]
    for wrong in (labels[:29], torch.cat([labels, labels])):
        with pytest.raises(ValueError, match="30 images came with .* labels"):
            metrics.measure(drawn.split(11), wrong)
    with pytest.raises(InputError, match="brightest gives all real images the same features"):
        ClassifierMetrics(Brightest(), Pictures(real[:1].expand(9, -1, -1, -1)))


def test_classes_and_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_metrics, "HELD_OUT_IMAGES", 12)
    row = DatasetRow(
        name="toy", title="toy", images=Coloured, num_classes=3, label_parts={"tens": 10, "ones": 1},
        is_empty=lambda images: images.amax(dim=(1, 2, 3)) < 192,  # the first of the classes' pictures are darker
    )  # fmt: skip
    monkeypatch.setitem(DATASETS._rows, "toy", row)
    metrics = ClassifierMetrics(Brightest(), Coloured(), data="toy")
    drawn = torch.cat(list(classifier_metrics.batches_of(Coloured(), 9)))
    asked = torch.tensor([index % 3 for index in spread(24, 9)])
    asked[0], asked[1] = (asked[0] + 1) % 3, asked[1] + 10  # the last digit is wrong, and the first
    by_part: dict[str, dict[int, float]] = {}
    measured = metrics.measure(drawn.split(4), asked, by_part)
    assert by_part == {"tens": {0: 100.0, 1: 0.0}, "ones": {0: 100.0, 1: 75.0, 2: 100.0}}
    empty = 100 * np.mean([0.5 + index / 100 < 192 / 127.5 - 1 for index in spread(24, 9)])
    expected = {"class_accuracy": 700 / 9, "tens": 800 / 9, "ones": 800 / 9, "empty": empty}
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5) and 0 < empty < 100
    assert list(metric_values())[-4:] == ["ground", "empty", "tens", "ones"]


def test_parts_of_classes_have_their_words() -> None:
    assert words_of_parts(["red cup on sand", "red hat on sand", "blue cup on sand", "blue hat on sand"], 1) == {
        0: "red cup", 1: "red hat", 2: "blue cup", 3: "blue hat"
    }  # fmt: skip
    shapes = Shapes1000(32).class_names
    assert list(words_of_parts(shapes, 100).values()) == list(SHAPES)
    assert list(words_of_parts(shapes, 1).values()) == list(GROUNDS)
    assert words_of_parts([str(digit) for digit in range(10)], 1)[7] == "7"


def test_values_stand_beside_those_of_real_images_and_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_metrics, "HELD_OUT_IMAGES", 12)
    metrics = ClassifierMetrics(Brightest(), Coloured())
    drawn = metrics.measure(classifier_metrics.batches_of(Coloured(), 9), torch.zeros(9, dtype=torch.long))
    compared = compare_with_real(metrics, drawn, 9, Coloured(), (8, 8))
    assert [each.name for each in compared] == ["FID-9", "precision-9", "recall-9", "class accuracy"]
    remarks = {each.name: each.remark for each in compared}
    real, noise = metrics.measure_real(Coloured(), 12)["fid"], metrics.measure_noise(12, (8, 8))["fid"]
    assert remarks["FID-9"] == f"{real:.2f} of 12 real held-out images, {noise:.2f} of 12 images of noise"
    assert real < noise
    assert remarks["class accuracy"] == "100.00 % of 12 real held-out images"
    assert compared[-1].shown == f"{drawn['class_accuracy']:.2f} %"
    class Redder(PixelCodec):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents + torch.tensor([2.0, 0.0, 0.0])[:, None, None]

    through = compare_with_real(metrics, drawn, 9, Coloured(), (8, 8), Redder())
    assert through[-1].remark == f"{remarks['class accuracy']}, 33.33 % of 12 of them through the codec"
    same = compare_with_real(metrics, drawn, 9, Coloured(), (8, 8), PixelCodec())
    assert f"{real:.2f} of 12 of them through the codec" in same[0].remark
    alone = compare_with_real(metrics, drawn, 9, None, (8, 8), PixelCodec())
    assert alone[0].remark.endswith(" of 9 images of noise") and alone[-1].remark == ""


def test_a_limit_takes_images_from_all_over_the_set() -> None:
    (whole,) = classifier_metrics.batches_of(Coloured(), 100)
    (some,) = classifier_metrics.batches_of(Coloured(), 4)
    indices = spread(24, 4)
    assert torch.equal(some, whole[indices]) and some.dtype == torch.uint8
    assert [index // 6 for index in indices] == [0, 1, 2, 3]


def test_a_sampler_is_timed_without_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(classifier_metrics.time, "perf_counter", lambda: clock[0])

    class Slow(Brightest):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            clock[0] += 1000
            return super().__call__(images)

    def draw(images: torch.Tensor):
        for batch in images.split(10):
            clock[0] += 2
            yield batch

    images = pixels(30, 3)
    metrics, labels = ClassifierMetrics(Slow(), Pictures(pixels(40, 0))), torch.zeros(30, dtype=torch.long)
    row = measure_timed(metrics, draw(images), labels)
    assert (row.pop("seconds"), row.pop("images_per_second")) == (6, 5)
    assert row == pytest.approx(metrics.measure([images], labels)) and row["fid"] > 0


def test_table() -> None:
    row = {"scheduler": "ddpm", "steps": 250, "fid": 3.14159, "class_accuracy": 54.94, "seconds": 99.7,
           "images_per_second": 10.031}  # fmt: skip
    values = [metric_values()[name] for name in ("fid", "recall", "class_accuracy")]
    assert sampler_table(values, [row, {**row, "steps": 50}], 1000).splitlines() == [
        "| sampler | steps | FID-1000 | class accuracy | time | images/s |",
        "|---|---:|---:|---:|---:|---:|",
        "| ddpm | 250 | 3.14 | 54.94 % | 100 s | 10.03 |",
        "| ddpm | 50 | 3.14 | 54.94 % | 100 s | 10.03 |",
    ]


def folder_of(folder: Path, names: list[str], seed: int) -> str:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index, each in enumerate(make_pixels(3, seed=seed + label)):
            Image.fromarray(each).save(folder / name / f"{index}.png")
    return str(folder)


def test_real_images_of_a_folder(tmp_path: Path) -> None:
    """What is held out is said by the user: the training images themselves would make a floor of zero."""
    train, held_out = folder_of(tmp_path / "a", NAMES, 0), folder_of(tmp_path / "b", NAMES, 9)
    names = sorted(NAMES)
    images, none = open_real("folder", 8, names, data_dir=train)
    assert len(images) == 9 and none is None
    images, others = open_real("folder", 8, names, data_dir=train, validate_dir=held_out)
    assert not torch.equal(images[0][0], others[0][0])
    wrong = folder_of(tmp_path / "c", ["cyan", "red"], 9)
    with pytest.raises(InputError, match="the images of .*c have other classes than the snapshot"):
        open_real("folder", 8, names, data_dir=train, validate_dir=wrong)
    with pytest.raises(InputError, match="`validate_dir` .*b belongs to a `data_dir`"):
        open_real("digits", 8, names, validate_dir=held_out)
    with pytest.raises(InputError, match="no built-in data; name the folder of its images .`data_dir`"):
        open_real("folder", 8, names)


def test_real_images_of_built_in_data_have_all_classes() -> None:
    from d_emo.data import Shapes1000

    images, held_out = open_real("shapes", 8, Shapes1000(8).class_names)
    for each, limit in ((images, classifier_metrics.REAL_IMAGES), (held_out, classifier_metrics.HELD_OUT_IMAGES)):
        labels = [each.label(index) for index in classifier_metrics.spread(len(each), limit)]
        assert len(labels) == limit and np.ptp(np.bincount(labels, minlength=1000)) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samplers": ["ddpm"]}, r"`samplers` takes NAME:STEPS, e.g. dpm\+\+:20, not ddpm$"),
        ({"samplers": ["ddpm:"]}, "not ddpm:$"),
        ({"samplers": ["ddpm:-5"]}, "not ddpm:-5"),
        ({"samplers": ["ddpm:5"], "write_card": True}, "run the two apart"),
        ({"samplers": ["ddpm:5"], "through_codec": True}, "run `through_codec` apart"),
        ({"num_images": 1}, "`num_images` must be at least 2, not 1"),
        ({"steps": 0}, "`steps` must be at least 1 and at most 1000, not 0"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be at least 0, not -1"),
    ],
)
def test_bad_settings(options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        JudgeSettings(checkpoint="d", classifier="c", **options)
    assert JudgeSettings(checkpoint="d", classifier="c", samplers=["dpm++:20", "ddpm:250"]).sampler_steps() == [
        ("dpm++", 20), ("ddpm", 250)
    ]  # fmt: skip


# ---- scripts/judge.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """judge.py on a denoiser of 8 x 8 digits and a classifier, both fresh."""
    torch.manual_seed(0)
    meta = {"step": 3, "weights": "ema", "codec": "pixels", "image_size": 8, "class_names": list("0123456789"),
            "data": "digits"}  # fmt: skip
    options = {"depth": 1, "hidden_size": 48, "in_channels": 3, "sample_size": 8, "num_classes": 10}
    denoiser = create_model("D-EMOv2-Ti-2", **options).eval()
    torch.nn.init.normal_(denoiser.final_layer.linear.weight, std=0.05)
    schedule = load(OBJECTIVES["eps"].loss)(null_class=10).noise_schedule()
    save_denoiser(tmp_path / "d", denoiser, scheduler=schedule, meta=meta, settings=TrainSettings())
    classifier = create_model("emov2_1m", num_classes=10, window_size=1).eval()
    for name, parameter in classifier.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)  # as layer scales start, all features are the same
    meta = {**meta, "image_size": 32, "model": {"name": "emov2_1m", "num_classes": 10, "window_size": 1}}
    save_classifier(tmp_path / "c", classifier, meta=meta, settings=ClassifierSettings())
    monkeypatch.setattr(classifier_metrics, "REAL_IMAGES", 30)

    def run(*arguments: object) -> None:
        fixed = ["--checkpoint", tmp_path / "d", "--classifier", tmp_path / "c", "--num-images", 20]
        run_verb("class-accuracy", [str(each) for each in (*fixed, *arguments)])

    return run


def test_one_command_compares_samplers(script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "new" / "table.md"
    script("--samplers", "ddpm:3", "dpm++:2", "dpm++:1", "--output", output)
    printed, table = capsys.readouterr().out, output.read_text()
    assert printed.startswith(table) and len(table.splitlines()) == 5
    written = json.loads(output.with_suffix(".json").read_text())
    assert [(row["scheduler"], row["steps"]) for row in written["rows"]] == [("ddpm", 3), ("dpm++", 2), ("dpm++", 1)]
    assert written["settings"]["guidance_scale"] == 1.5 and written["step"] == 3
    assert written["features"].startswith("emov2:") and written["hardware"].endswith(("thread", "threads"))
    assert len({row["fid"] for row in written["rows"]}) == 3
    script("--samplers", "dpm++:2", "--output", tmp_path / "again.md")
    (row,) = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert row["fid"] == written["rows"][1]["fid"]  # the same noise, whatever came before


def test_bad_samplers_are_refused_before_anything_is_drawn(script, tmp_path: Path) -> None:
    for wrong, sentence in (("euler:5", "euler serves the flow"), ("dpm++:1000", "at most 999"), ("x:5", "unknown")):
        with pytest.raises(InputError, match=sentence):
            script("--samplers", "ddpm:2", wrong, "--output", tmp_path / "t.md")
    assert not (tmp_path / "t.md").exists()


def test_fewer_drawings_than_classes_meet_every_digit_of_a_class_id() -> None:
    assert classifier_metrics.even_labels(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    few = classifier_metrics.even_labels(500, 1000)
    assert len(few) == 500 and len(set(few.tolist())) == 500 and len(set((few % 10).tolist())) == 10
