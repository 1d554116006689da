import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_kills import in_child

from d_emo.config import SegmenterSettings, parse_settings
from d_emo.data import fundus
from d_emo.data.fundus import FundusDrawings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_classifier
from d_emo.io.training_state import load_state
from d_emo.segmentation.fundus import FundusFolder
from d_emo.segmentation.images import IGNORED, MaskFolder
from d_emo.training import fit
from d_emo.training.segmenter import SegmenterTask

CONFIG = Path(__file__).parents[1] / "configs" / "segmentation" / "hrf_u-emo.yaml"
TINY = {
    "model_options": {"aux": True, "widths": [32] * 5, "window_size": 2}, "image_size": 32, "stride": 20,
    "scale_range": [1.0, 2.0], "batch_size": 2, "warmup_steps": 1, "state_every": 1, "snapshot_every": 2,
    "validate_every": 2, "validate_images": 2, "tracker": "none",
}  # fmt: skip
SIZE = (40, 52)  # height and width


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def photograph(number):
    """A ground with one vessel, whose column is the number; where it is; the field of view, which leaves out a row."""
    vessel = np.zeros(SIZE, dtype=np.uint8)
    vessel[:, number] = 255
    field = np.full(SIZE, 255, dtype=np.uint8)
    field[0] = 0
    image = np.repeat(200 - vessel[..., None] // 2, 3, axis=2).astype(np.uint8)
    return image, vessel, field


def hrf(root):
    """Three of each kind, as they come out of the archive: JPEGs with endings in both spellings, masks in TIFF."""
    for number, (kind, ending) in enumerate((("h", "jpg"), ("g", "jpg"), ("dr", "JPG")) * 3):
        name = f"{number // 3 + 1:02}_{kind}"
        image, vessel, field = photograph(number)
        vessel[vessel == 0] = 3  # not quite black
        save(root / "images" / f"{name}.{ending}", image)
        save(root / "manual1" / f"{name}.tif", vessel)
        save(root / "mask" / f"{name}_mask.tif", np.repeat(field[..., None], 3, axis=2))
    return root


def drive(root, test=True):
    parts = ("training", 21, "21_training"), ("training", 22, "22_training"), ("test", 1, "01_test")
    for split, number, name in parts:
        image, vessel, field = photograph(number)
        save(root / split / "images" / f"{name}.tif", image)
        if test or split == "training":
            save(root / split / "1st_manual" / f"{name[:2]}_manual1.gif", vessel)
        save(root / split / "mask" / f"{name}_mask.gif", field)
    return root


def converted(root, names, ending=""):
    """As mmsegmentation's converters write them: masks of 0 and 1."""
    for number, name in enumerate(names):
        split = "training" if number == 0 else "validation"
        image, vessel, _ = photograph(number)
        save(root / "images" / split / f"{name}.png", image)
        save(root / "annotations" / split / f"{name}{ending}.png", vessel // 255)
    return root


def columns(images):
    """Where the vessels are, by the names of the photographs."""
    found = {}
    for (file, *_), (pixels, mask) in zip(images.photographs, images, strict=True):
        assert pixels.shape == (3, *SIZE) and mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 1}
        found[file.stem] = (mask == 1).all(dim=0).nonzero().flatten().tolist()
    return found


def test_hrf_is_read_as_it_is_published_and_split_as_in_mmsegmentation(tmp_path):
    root = hrf(tmp_path / "HRF")
    images, held_out = FundusFolder(root), FundusFolder(root, held_out=True)
    assert images.splits and images.class_names == ["background", "vessel"] and images.name == "HRF"
    assert columns(images) == {"01_dr": [2], "01_g": [1], "01_h": [0]}
    assert columns(held_out) == {"02_dr": [5], "02_g": [4], "02_h": [3], "03_dr": [8], "03_g": [7], "03_h": [6]}
    inside = FundusFolder(root, field_of_view=True)[0][1]
    assert (inside[0] == IGNORED).all() and torch.equal(inside[1:], images[0][1][1:])


def test_drive_is_read_as_it_is_published(tmp_path):
    root = drive(tmp_path / "DRIVE")
    assert columns(FundusFolder(root)) == {"21_training": [21], "22_training": [22]}
    assert columns(FundusFolder(root, held_out=True)) == {"01_test": [1]}
    assert (FundusFolder(root, field_of_view=True)[1][1][0] == IGNORED).all()
    private = drive(tmp_path / "new", test=False)  # the vessels of the test part are not given out
    assert not FundusFolder(private).splits
    with pytest.raises(InputError, match="new holds no photographs to measure on"):
        FundusFolder(private, held_out=True)


@pytest.mark.parametrize("names, ending", [(["01_h", "02_dr"], ""), (["21", "01"], "_manual1")])
def test_what_mmsegmentation_converts_is_no_ade20k(tmp_path, names, ending):
    root = converted(tmp_path, names, ending)
    assert columns(FundusFolder(root)) == {names[0]: [0]}
    assert columns(FundusFolder(root, held_out=True)) == {names[1]: [1]}
    with pytest.raises(InputError, match="has no field of view in this layout"):
        FundusFolder(root, field_of_view=True)
    assert not FundusFolder.fits(converted(tmp_path / "ade", ["ADE_train_1", "ADE_val_1"]))
    assert len(MaskFolder(tmp_path / "ade").class_names) == 150


def test_what_does_not_belong_together_is_refused_by_name(tmp_path):
    root = hrf(tmp_path)
    save(root / "manual1" / "01_dr.tif", np.zeros((40, 51), dtype=np.uint8))
    with pytest.raises(InputError, match="manual1/01_dr.tif has 51 x 40 px, and its image .*01_dr.JPG 52 x 40 px"):
        FundusFolder(root)[0]
    (root / "mask" / "01_g_mask.tif").unlink()
    with pytest.raises(InputError, match="01_g.jpg has no field of view .*mask/01_g_mask"):
        FundusFolder(root, field_of_view=True)
    (root / "manual1" / "01_h.tif").write_text("no picture")
    with pytest.raises(InputError, match="cannot read the image .*manual1/01_h.tif"):
        FundusFolder(root)[2]
    (root / "manual1" / "01_g.tif").unlink()
    with pytest.raises(InputError, match="01_g.jpg has no vessels .*manual1/01_g"):
        FundusFolder(root)
    with pytest.raises(InputError, match="not laid out as HRF"):
        FundusFolder(root / "images")
    settings = SegmenterSettings(data_dir=str(root / "images"), field_of_view=True)
    with pytest.raises(InputError, match="`field_of_view` is for the layouts of HRF and DRIVE"):
        SegmenterTask(settings)


def test_the_papers_recipe_loads_as_it_is_written():
    written = yaml.safe_load(CONFIG.read_text())
    settings = parse_settings(SegmenterSettings, "", ["--config", str(CONFIG)])
    assert {key: getattr(settings, key) for key in written} == written
    assert settings.scale_range == [0.5 * 2336 / 256, 2 * 2336 / 256]


def test_u_emo_trains_by_the_recipe_measures_by_windows_and_resumes_exactly(tmp_path):
    recipe, data = yaml.safe_load(CONFIG.read_text()), str(hrf(tmp_path / "HRF"))

    def run(name, steps):
        settings = SegmenterSettings.from_mapping(
            recipe | TINY | {"data_dir": data, "output_dir": str(tmp_path / name), "max_steps": steps}
        )
        task = SegmenterTask(settings)
        return fit(task, settings, preview=task.preview)

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    one, two = (load_state(tmp_path / name / "states" / "step-4") for name in ("whole", "parts"))
    for key in ("model", "ema", "optimizer"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    metas = [load_classifier(each, "segmenter").meta for each in (whole, parts)]
    assert metas[0]["quality"] == metas[1]["quality"] and metas[0]["quality"]["images"] == 2
    assert metas[0]["windows"] == {"size": 32, "stride": 20, "blend": "mean"}
    with Image.open(tmp_path / "whole" / "samples" / "step-4.png") as picture:
        assert picture.width == 3 * 56 + 4 and picture.height > 6 * 44


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_of_u_emo_ends_as_if_undisturbed(tmp_path):
    """SIGKILL after the first state, before a file operation that is late; then the same command again."""
    settings = TINY | {"model": "u-emo", "dataset": "fundus", "num_images": 4, "max_steps": 2, "validate_every": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def run(name, **kill):
        words = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / name / "run")]
        (tmp_path / name).mkdir(exist_ok=True)
        return in_child("train-segmenter", words, tmp_path / name, **kill)

    code, operations = run("whole")
    assert code == 0 and operations > 10
    assert run("parts", before=operations * 2 // 3)[0] == -signal.SIGKILL
    states = tmp_path / "parts" / "run" / "states"
    assert (states / "step-1").is_dir() and not (states / "step-2").is_dir()
    assert run("parts")[0] == 0 and "resuming at step 1 of 2" in (tmp_path / "parts.log").read_text()
    one, two = (load_state(tmp_path / name / "run" / "states" / "step-2") for name in ("whole", "parts"))
    for key in ("model", "ema", "optimizer"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    one, two = (load_classifier(tmp_path / name / "run", "segmenter") for name in ("whole", "parts"))
    assert one.meta["quality"] == two.meta["quality"] and one.meta["sha256"] == two.meta["sha256"]


def test_pictures_of_large_photographs_are_small():
    from d_emo.segmentation.pictures import side_by_side

    large, small = np.zeros((100, 400, 3), dtype=np.uint8), np.zeros((20, 30, 3), dtype=np.uint8)
    assert side_by_side([[large, small]], 200).size == (200 + 30 + 3 * 4, 50 + 2 * 4)


def test_drawn_fundus_depends_on_seed_split_and_index_alone_and_its_vessels_are_dark():
    drawings = FundusDrawings(96, num_images=6)
    for index in (4, 0):
        image, objects = drawings.read(index)
        again, same = FundusDrawings(96, num_images=3).read(index)
        assert torch.equal(image, again) and torch.equal(objects["masks"], same["masks"])
        mask = objects["masks"][0].bool()
        assert image.shape == (3, 96, 96) and 0.03 < mask.float().mean() < 0.2
        around = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0].bool() & ~mask
        green = image[1].float()
        inside = green > 30
        assert green[mask].mean() < 0.85 * green[around & inside].mean()
        assert not mask[:3, :3].any() and green[:3, :3].max() < 25  # outside the field of view
        left, top, right, bottom = objects["boxes"][0].int().tolist()
        assert mask[top:bottom, left:right].sum() == mask.sum() and drawings.class_names == ["vessel"]
    others = FundusDrawings(96, split="test"), FundusDrawings(96, seed=1)
    assert not any(torch.equal(each.read(0)[0], drawings.read(0)[0]) for each in others)
    assert not torch.equal(drawings.read(1)[0], drawings.read(0)[0])


def test_bleedings_have_the_colour_of_vessels_and_are_none(monkeypatch):
    """What a threshold cannot know: the ground itself, in which no vessel is drawn, has dark spots."""
    def ground():
        return fundus.Eye(np.random.default_rng(0), 96).ground()[..., 1]

    with_blood = ground()
    monkeypatch.setattr(fundus, "ABSORBED", np.zeros(3))
    share = with_blood / ground()
    assert share.max() == 1 and share.min() < 0.75 and 0.001 < (share < 0.9).mean() < 0.1


def test_a_spot_may_be_longer_along_the_way_from_the_disc():
    eye = fundus.Eye(np.random.default_rng(0), 256)
    for stretch in (1, 2.5):
        for _ in range(5):
            part, spot = eye.spot(3.0, stretch)
            points, weights = eye.grid[part].reshape(-1, 2), spot.flatten()
            place = weights @ points / weights.sum()
            along = (place - eye.disc) / np.hypot(*(place - eye.disc))
            spread = [((points - place) @ way) ** 2 @ weights for way in (along, (-along[1], along[0]))]
            assert (spread[0] / spread[1]) ** 0.5 == pytest.approx(stretch, rel=0.1) and spot.max() > 0.9


def test_the_middle_of_wide_vessels_alone_shines():
    eye = fundus.Eye(np.random.default_rng(0), 256)
    wide, thin = ([fundus.Vessel(False, [(10.0, row), (200.0, row)], [width] * 2)] for row, width in ((50, 6), (90, 2)))
    whole, middle = eye.covered(wide), eye.covered(wide + thin, share=1 / 3, thinnest=3)
    assert middle.sum() == pytest.approx(whole.sum() / 3, rel=0.2) and not middle[80:100].any()
    assert (middle <= whole).all() and eye.covered(thin)[80:100].any()


def test_crops_are_taken_of_larger_drawings(tmp_path):
    settings = TINY | {"model": "u-emo", "dataset": "fundus", "num_images": 3, "max_steps": 1}
    task = SegmenterTask(SegmenterSettings(**settings, picture_size=48))
    assert task.images[0][0].shape == task.held_out[0][0].shape == (3, 48, 48) and task.settings.flip
    assert task.dataset[0][0].shape == (3, 32, 32) and task.images.class_names == ["background", "vessel"]
    with pytest.raises(InputError, match="`picture_size` 48 is of built-in pictures"):
        SegmenterSettings(data_dir=str(tmp_path), picture_size=48)


def test_drawings_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr("d_emo.data.fundus.KEPT", 2)
    drawings, drawn = FundusDrawings(32), []
    monkeypatch.setattr(drawings, "_draw", lambda index: drawn.append(index) or (None, torch.ones(1, 2, 2)))
    for index in (0, 1, 0, 2, 1, 0):
        drawings.read(index)
    assert drawn == [0, 1, 2, 0] and len(drawings._drawn) == 2


def test_the_photograph_of_scikit_image_is_there_where_that_is(monkeypatch):
    monkeypatch.setattr(fundus, "find_spec", lambda name: None)
    assert fundus.photograph() is None
    monkeypatch.undo()
    pytest.importorskip("skimage")
    picture = fundus.photograph()
    assert picture.shape == (448, 448, 3) and picture.std() > 30
