"""Built-in pictures of objects: shapes, and the nuclei of stardist's micrograph; how they are chosen."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.config import DetectorSettings, SegmenterSettings, parse_settings
from d_emo.data import open_dataset
from d_emo.data.nuclei import SIDE, Nuclei
from d_emo.data.scenes import DigitsOnPhotographs, LargeDigitScenes, ShapeScenes, boxes_of
from d_emo.data.shapes import SHAPES, ShapeScene, draw_scene, draw_scenes
from d_emo.errors import InputError
from d_emo.segmentation.images import LabelledScenes
from d_emo.tables import SCENES
from d_emo.training import fit
from d_emo.training.detector import DetectorTask
from d_emo.training.segmenter import SegmenterTask

BACKBONE = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}
RUN = {"image_size": 64, "batch_size": 2, "max_steps": 1, "warmup_steps": 0, "num_images": 4, "validate_images": 2,
       "tracker": "none"}  # fmt: skip


@pytest.fixture
def micrograph(tmp_path, monkeypatch):
    """A package with files of our own in the form of stardist's: 50 numbered squares of 20 px, each of its own grey."""
    numbers = np.kron(np.arange(1, 51).reshape(5, 10), np.ones((56, 30), dtype=int))
    inside = np.kron(np.ones((5, 10), dtype=int), np.pad(np.ones((20, 20), dtype=int), ((20, 16), (6, 4))))
    nuclei = (numbers * inside).astype(np.uint16)
    folder = tmp_path / "stardist" / "data" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "stardist" / "__init__.py").write_text("raise ImportError('it is not run')")
    for name, pixels in (("mask2d.tif", nuclei), ("img2d.tif", nuclei * 8)):
        Image.fromarray(pixels).save(folder / name)
    monkeypatch.syspath_prepend(tmp_path)
    return nuclei


def test_nuclei_are_cut_out_with_their_masks(micrograph):
    train, test = Nuclei(SIDE), Nuclei(2 * SIDE, split="test")
    assert (len(train), len(test), train.class_names) == (2000, 2, ["nucleus"])
    for index in range(6):
        pixels, target = train.read(index)
        again, _ = Nuclei(SIDE, num_images=9).read(index)
        assert pixels.shape == (3, SIDE, SIDE) and torch.equal(pixels, again) and len(target["masks"]) > 4
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"].bool(), strict=True):
            rows, columns = mask.nonzero().T
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            (grey,) = pixels[:, mask].unique().tolist()
            assert grey in [number * 8 * 255 // 400 for number in range(1, 51)]  # the brightest is 255
        assert (pixels[0][target["masks"].sum(dim=0) == 0] == 0).all() and target["masks"].sum(dim=0).max() == 1
    assert not torch.equal(train.read(0)[0], Nuclei(SIDE, seed=1).read(0)[0])


def test_held_out_nuclei_are_never_trained_on(micrograph):
    """The right 128 px, one square below the other, enlarged; what is trained on ends before them."""
    test = Nuclei(2 * SIDE, split="test")
    for index in range(2):
        pixels, target = test.read(index)
        strip = micrograph[index * SIDE : (index + 1) * SIDE, -SIDE:]
        assert pixels.shape == (3, 256, 256) and len(target["masks"]) == len(np.unique(strip)) - 1
        assert target["masks"].sum() == 4 * (strip > 0).sum()
    assert Nuclei(SIDE).nuclei.shape == (280, 300 - SIDE)
    assert len(Nuclei(SIDE, split="test", num_images=1)) == 1


def test_nuclei_without_stardist_name_what_to_install(monkeypatch, micrograph, tmp_path):
    (tmp_path / "stardist/data/images/mask2d.tif").write_text("none")
    with pytest.raises(InputError, match="cannot read the image .*mask2d.tif"):
        Nuclei(64)
    monkeypatch.setattr("d_emo.data.nuclei.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps stardist"):
        DetectorTask(DetectorSettings(dataset="nuclei"))


def test_an_empty_square_has_no_objects(micrograph, tmp_path):
    Image.fromarray(micrograph * 0).save(tmp_path / "stardist/data/images/mask2d.tif")
    _, target = Nuclei(64).read(0)
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 64, 64)


def test_digits_on_photographs_are_scenes_of_one_digit_that_fills_half_or_more():
    images = open_dataset(dataset="digits-on-photographs", data_dir=None, image_size=32, num_images=40)
    again, held_out = DigitsOnPhotographs(32), DigitsOnPhotographs(32, split="test")
    assert len(images) == 40 and images.class_names == list("0123456789") and not images.flip
    for index in range(40):
        image, label = images[index]
        _, objects = images.scenes.read(index)
        assert image.shape == (3, 32, 32) and -1 <= image.min() < image.max() <= 1
        assert [label] == objects["labels"].tolist() == [images.label(index)]
        assert objects["boxes"][0, 3] - objects["boxes"][0, 1] > 32 * 0.35
        assert torch.equal(image, again[index][0]) and not torch.equal(image, held_out[index][0])
    assert len({images.label(index) for index in range(40)}) > 5
    with pytest.raises(InputError, match="a mirror image"):
        open_dataset(dataset="digits-on-photographs", data_dir=None, image_size=32, flip=True)


def test_shape_scenes_depend_on_seed_split_and_number_alone():
    one, again, other = ShapeScenes(96), ShapeScenes(96, num_images=5), ShapeScenes(96, split="test")
    counts, radii, labels = set(), [], set()
    for index in range(40):
        scenes = one.scenes(index)
        assert scenes == again.scenes(index) != other.scenes(index) and scenes != ShapeScenes(96, seed=1).scenes(index)
        counts.add(len(scenes))
        radii += [scene.radius for scene in scenes]
        labels |= {scene.shape for scene in scenes}
    assert counts >= {1, 2, 3, 4, 5} and max(counts) <= 6 and labels == set(range(10))
    assert one.radii[0] <= min(radii) < 0.1 and 0.6 < max(radii) <= one.radii[1]


def test_shapes_have_exact_boxes_and_masks_and_do_not_overlap():
    data = ShapeScenes(96)
    for index in range(6):
        pixels, target = data.read(index)
        scenes = data.scenes(index)
        assert pixels.shape == (3, 96, 96) and data.class_names == list(SHAPES)
        assert target["labels"].tolist() == [scene.shape for scene in scenes]
        assert target["masks"].sum(dim=0).max() == 1 and torch.equal(target["boxes"], boxes_of(target["masks"]))
        ground = draw_scenes([scenes[0]._replace(radius=1e-3, x=2.0)], 96)[0]  # none of its shape is in the picture
        changed = np.abs(draw_scenes(scenes, 96)[0] - ground).max(axis=2) > 1e-6
        masks = target["masks"].amax(dim=0).bool().numpy()
        assert changed[masks].all() and (changed & ~masks).sum() < 0.5 * masks.sum() + 60  # edges, to less than a half


def test_large_digits_are_one_or_two_and_a_third_of_the_side_or_more():
    data, counts = LargeDigitScenes(64, num_images=40), set()
    for index in range(40):
        _, target = data.read(index)
        counts.add(len(target["labels"]))
        heights = target["boxes"][:, 3] - target["boxes"][:, 1]
        assert heights.min() > 64 / 3.2 and heights.max() < 64 * 0.82  # ink reaches from edge to edge of a scan, nearly
    assert counts == {1, 2} and data.name in SCENES


def test_shapes_that_cover_no_pixel_are_left_out(monkeypatch):
    monkeypatch.setattr(ShapeScenes, "radii", (1 / 80, 1 / 16))
    data, left_out = ShapeScenes(32), 0
    for index in range(12):
        _, target = data.read(index)
        left_out += len(data.scenes(index)) - len(target["labels"])
        assert target["masks"].flatten(1).any(dim=1).all() and len(target["masks"]) == len(target["labels"])
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert left_out > 3


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_shape_alone_is_drawn_as_in_shapes_1000(shape):
    """Also that no shape reaches further than `REACH` says: what lies beyond is not computed."""
    for angle, radius in ((0.3, 0.5), (2.1, 0.2), (0.785, 0.8)):
        scene = ShapeScene(shape, 3, 4, 0.1, -0.15, radius, angle, 0.95, 1.0, 0.1)
        assert np.allclose(draw_scene(scene, 80), draw_scenes([scene], 80)[0], atol=1e-5)


def test_a_mask_is_where_a_shape_covers_half_of_a_pixel():
    """So does a disc where the pixel's centre is within 0.95 of its radius."""
    places = ((-0.4, 0.0, 0.5), (0.7, 0.5, 0.2))
    discs = [ShapeScene(0, 3, 4, x, y, radius, 0.3, 1.0, 0.0, 0.0) for x, y, radius in places]
    _, masks = draw_scenes(discs, 64)
    centres = (torch.arange(64).double() + 0.5) / 32 - 1
    for disc, mask in zip(discs, masks, strict=True):
        inside = torch.hypot(centres[None] - disc.x, centres[:, None] - disc.y) <= 0.95 * disc.radius
        assert np.array_equal(mask.astype(bool), inside.numpy())


def test_scenes_have_a_class_for_every_pixel():
    labelled = LabelledScenes(64, num_images=3, dataset="shape-scenes")
    assert labelled.class_names == ["background", *SHAPES] and labelled.flip and labelled.name == "shape-scenes"
    _, mask = labelled[1]
    _, objects = labelled.scenes.read(1)
    for drawn, label in zip(objects["masks"].bool(), objects["labels"], strict=True):
        assert (mask[drawn] == label + 1).all()
    assert (mask > 0).sum() == objects["masks"].sum()


@pytest.mark.parametrize("dataset", SCENES)
def test_detectors_and_segmenters_train_on_what_is_chosen(dataset, micrograph, tmp_path):
    detector = DetectorSettings(
        model="ssdlite-emov2_1m", model_options={"backbone_options": BACKBONE}, dataset=dataset, **RUN,
        output_dir=str(tmp_path / "detector"),
    )  # fmt: skip
    task = DetectorTask(detector)
    snapshot = fit(task, detector)
    assert task.source.name == task.held_out.name == dataset and task.settings.flip == SCENES[dataset].mirrors
    assert SCENES[dataset].licence in " ".join((snapshot / "README.md").read_text().split())
    segmenter = SegmenterSettings(
        model="semfpn-emov2_1m", model_options={"width": 8, "backbone_options": BACKBONE}, dataset=dataset, **RUN,
        output_dir=str(tmp_path / "segmenter"),
    )  # fmt: skip
    task = SegmenterTask(segmenter)
    card = (fit(task, segmenter) / "README.md").read_text()
    assert task.images.name == task.held_out.name == dataset and f"on {dataset}, 64 px" in card
    assert task.dataset.flip == SCENES[dataset].mirrors and SCENES[dataset].licence in " ".join(card.split())


def test_what_has_a_side_is_not_mirrored():
    for settings in (DetectorSettings, SegmenterSettings):
        with pytest.raises(InputError, match="scanned digits on photographs a mirror image is of no class"):
            settings(flip=True)
        assert settings(flip=True, dataset="shape-scenes").resolve().output_dir.endswith("shape-scenes-" + (
            "160" if settings is DetectorSettings else "512"))  # fmt: skip
        with pytest.raises(InputError, match="--dataset must be one of .*nuclei.*, not nucle; did you mean nuclei"):
            parse_settings(settings, "", ["--dataset", "nucle"])


def test_shared_settings_come_once():
    names = [{field.name for field in dataclasses.fields(each)} for each in (DetectorSettings, SegmenterSettings)]
    assert {"dataset", "num_images", "flip", "schedule", "weight_decay", "ema_warmup"} <= names[0] & names[1]
