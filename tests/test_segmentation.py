import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from d_emo.cli import run_verb, train_segmenter
from d_emo.config import SegmenterSettings, parse_settings
from d_emo.data.sampler import EpochIndex
from d_emo.errors import InputError
from d_emo.export import SegmenterOutput, export, portable_classifier, stir
from d_emo.io.snapshot import load_classifier, save_classifier
from d_emo.io.training_state import load_state
from d_emo.models import create_model
from d_emo.segmentation.augment import TrainingCrops
from d_emo.segmentation.contents import describe_masks
from d_emo.segmentation.images import IGNORED, LabelledScenes, MaskFolder
from d_emo.segmentation.measures import Areas, Quality, segment
from d_emo.segmentation.pictures import palette, with_legend
from d_emo.training import fit
from d_emo.training.optimizer import learning_rate
from d_emo.training.segmenter import SegmenterTask, start_backbone

BACKBONE = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32], "head_dims": [16] * 4}
TINY = {
    "model": "pspnet-emov2_1m", "model_options": {"aux": True, "width": 16, "backbone_options": BACKBONE},
    "image_size": 32, "batch_size": 4, "max_steps": 4, "warmup_steps": 1, "num_images": 9, "validate_images": 3,
    "validate_every": 2, "state_every": 2, "snapshot_every": 4, "tracker": "none",
}  # fmt: skip


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def make_folder(root, *, images="images", masks="masks", train="train", val="val", image="{}.png", mask="{}.png"):
    """Two images to train on and one held out, of 20 x 30 px; the masks have classes 0 and 1, and 255."""
    for split, names in ((train, "ab"), (val, "c")):
        for number, name in enumerate(names):
            values = np.zeros((20, 30))
            values[:, number + 5 :], values[0] = 1, IGNORED
            save(root / images / split / image.format(name), np.repeat(values[..., None], 3, axis=2))
            save(root / masks / split / mask.format(name), values)
    (root / "classes.txt").write_text("ground\nthing\n")
    return root


def test_a_simple_folder_is_read_with_its_masks(tmp_path):
    root = make_folder(tmp_path / "mine")
    images, held_out = MaskFolder(root), MaskFolder(root, held_out=True)
    assert (len(images), len(held_out), images.splits, images.class_names) == (2, 1, True, ["ground", "thing"])
    pixels, mask = images[1]
    assert pixels.shape == (3, 20, 30) and mask.shape == (20, 30) and mask.dtype == torch.uint8
    assert torch.equal(pixels[0], mask) and set(mask.unique().tolist()) == {0, 1, IGNORED}


def test_ade20k_counts_from_one(tmp_path):
    root = make_folder(tmp_path, masks="annotations", train="training", val="validation", image="{}.jpg")
    (root / "classes.txt").unlink()
    images = MaskFolder(root)
    assert len(images.class_names) == 150 and len(MaskFolder(root, held_out=True)) == 1
    assert set(images[0][1].unique().tolist()) == {0, IGNORED}  # 1 and 0 of the file
    save(root / "annotations/training/a.png", np.full((20, 30), 151))
    with pytest.raises(InputError, match="annotations/training/a.png has the value 151, beyond the 150 classes"):
        images[0]


@pytest.mark.parametrize("ending, there", [("labelTrainIds", {0, 1, IGNORED}), ("labelIds", {IGNORED})])
def test_cityscapes_is_read_by_either_kind_of_ids(tmp_path, ending, there):
    names = {"image": "x_{}_leftImg8bit.png", "mask": f"x_{{}}_gtFine_{ending}.png"}
    root = make_folder(tmp_path, images="leftImg8bit", masks="gtFine", train="train/ulm", val="val/bonn", **names)
    images = MaskFolder(root)
    assert len(images.class_names) == 19 and set(images[0][1].unique().tolist()) == there
    save(images.pairs[0][1], np.full((20, 30), 33))
    if ending == "labelIds":
        assert images[0][1].unique().tolist() == [18]
    else:
        with pytest.raises(InputError, match="the value 33, beyond the 19 classes"):
            images[0]


def test_what_does_not_belong_together_is_refused_by_name(tmp_path):
    root = make_folder(tmp_path)
    mask = root / "masks/train/a.png"
    save(mask, np.zeros((20, 31)))
    with pytest.raises(InputError, match="masks/train/a.png has 31 x 20 px, and its image .*a.png 30 x 20 px"):
        MaskFolder(root)[0]
    save(mask, np.full((20, 30), 2))
    with pytest.raises(InputError, match="masks/train/a.png has the value 2, beyond the 2 classes"):
        MaskFolder(root)[0]
    save(mask, np.zeros((20, 30, 3)))
    with pytest.raises(InputError, match="a.png.*one value a pixel, its class, and this is RGB"):
        MaskFolder(root)[0]
    mask.write_text("no picture")
    with pytest.raises(InputError, match="cannot read the image .*masks/train/a.png"):
        MaskFolder(root)[0]
    mask.unlink()
    with pytest.raises(InputError, match="the image .*images/train/a.png has no mask .*masks/train/a.png$"):
        MaskFolder(root)
    (root / "classes.txt").unlink()
    save(mask, np.zeros((20, 30)))
    with pytest.raises(InputError, match="classes.txt is missing"):
        MaskFolder(root)
    with pytest.raises(InputError, match="holds no images with masks: .*ADE20K .*or Cityscapes"):
        MaskFolder(root / "images")


def test_scenes_have_exact_masks_of_other_images_than_are_held_out():
    scenes = LabelledScenes(48, num_images=5)
    image, mask = scenes[3]
    assert image.shape == (3, 48, 48) and torch.equal(scenes[3][1], mask) and not scenes.flip
    _, objects = scenes.scenes.read(3)
    for drawn, label in zip(objects["masks"], objects["labels"], strict=True):
        assert (mask[drawn.bool()] == label + 1).all()
    assert (mask > 0).sum() == objects["masks"].sum()
    assert not torch.equal(LabelledScenes(48, num_images=5, split="test")[3][0], image)


def test_crops_move_image_and_mask_together_and_depend_on_seed_epoch_and_index_alone(tmp_path):
    images = MaskFolder(make_folder(tmp_path))  # whose red is the mask
    crops = TrainingCrops(images, 32, colours=False, scale_range=(1.0, 1.0))
    seen = []
    for epoch in range(6):
        image, mask = crops[EpochIndex(0, epoch)]
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and mask.dtype == torch.int64
        inside = mask != IGNORED
        sharp = (image[0] * 127.5 + 127.5 - mask).abs()[inside] < 0.6  # but where the resize mixed two classes
        assert sharp.float().mean() > 0.8 and inside.any()
        seen.append(image)
    torch.manual_seed(1)
    assert torch.equal(crops[EpochIndex(0, 5)][0], seen[5]) and not torch.equal(seen[0], seen[1])
    state = torch.random.get_rng_state()
    crops[EpochIndex(1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    small = TrainingCrops(images, 32, scale_range=(0.5, 0.5))[0][1]
    assert (small[16:] == IGNORED).all()  # padded


class Stripe(LabelledScenes):
    """32 x 256 px of class 0, 16 columns of them of class 1; what is right of ``known`` is ignored."""

    def __init__(self, known=256):
        self.known, self.class_names = known, ["ground", "stripe"]

    def __len__(self):
        return 60

    def __getitem__(self, index):
        mask = torch.zeros(32, 256, dtype=torch.uint8)
        mask[:, 96:112] = 1
        mask[:, self.known :] = IGNORED
        return torch.zeros(3, 32, 256, dtype=torch.uint8), mask


def test_another_crop_is_tried_while_one_class_covers_too_much():
    """One crop in seven has the stripe in a quarter or more of it, and four of five times so has one of ten crops."""

    def stripes(share, **options):
        crops = TrainingCrops(Stripe(**options), 32, scale_range=(1.0, 1.0), largest_share=share, colours=False)
        return [(crops[index][1] == 1).float().mean().item() for index in range(60)]

    any_share, at_most = stripes(1.0), stripes(0.75)
    assert sum(share >= 0.25 for share in any_share) < 20 < 40 < sum(share >= 0.25 for share in at_most) < 60
    assert 0.0 in any_share and 0.5 in any_share + at_most
    assert (TrainingCrops(Stripe(0), 32)[0][1] == IGNORED).all()  # nothing is known: the tenth is taken
    some = TrainingCrops(Stripe(64), 32, scale_range=(1.0, 1.0), largest_share=1.0, colours=False)
    assert sum(bool((some[index][1] != IGNORED).any()) for index in range(60)) > 50  # one in three crops by chance


def test_measures_equal_a_plain_computation():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 6, (4, 20, 30), generator=generator).to(torch.uint8)
    truth[truth == 5] = IGNORED
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth.long() % 5, 3)
    areas = Areas(7)  # of class 5 and 6 nothing is there
    for one, other in zip(predicted, truth, strict=True):
        areas.add(one, other)
    quality = Quality.of(areas.sums)
    p, t = predicted[truth != IGNORED].numpy(), truth[truth != IGNORED].numpy()
    iou = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(5)]
    accuracy = [(p == c)[t == c].mean() for c in range(5)]
    assert quality.mean_iou == pytest.approx(np.mean(iou), abs=1e-6)
    assert quality.mean_accuracy == pytest.approx(np.mean(accuracy), abs=1e-6)
    assert quality.pixel_accuracy == pytest.approx((p == t).mean(), abs=1e-6)
    dice = [2 * ((p == c) & (t == c)).sum() / ((p == c).sum() + (t == c).sum()) for c in range(5)]
    assert quality.mean_dice == pytest.approx(np.mean(dice), abs=1e-6) and quality.dice[5:] == (None, None)
    assert quality.dice[:5] == pytest.approx(dice, abs=1e-6)
    assert quality.iou[:5] == pytest.approx(iou, abs=1e-6) and quality.iou[5:] == (None, None)


def test_a_small_pyramid_sees_neither_contrast_nor_the_scale_of_the_maps():
    model = create_model("semfpn-emov2_1m", num_classes=3, pyramid="small", width=16, backbone_options=BACKBONE).eval()
    maps = [torch.randn(2, dim, 32 // 2**i, 32 // 2**i) for i, dim in enumerate(BACKBONE["dims"])]
    logits = model.decoder(maps)
    assert logits.shape == (2, 3, 32, 32)
    assert torch.allclose(model.decoder([100 * each for each in maps]), logits, atol=1e-3)
    for name, options in (("semfpn", {"pyramid": "large"}), ("pspnet", {"pyramid": "small"})):
        with pytest.raises(InputError, match=f"pyramid must be one of published.* here, not '{options['pyramid']}'"):
            create_model(f"{name}-emov2_1m", **options)
    with pytest.raises(InputError, match="width must be a multiple of 8, the groups of its norms, got 12"):
        create_model("semfpn-emov2_1m", pyramid="small", width=12)


def test_an_image_of_any_size_is_measured_at_its_own():
    model = create_model("semfpn-emov2_1m", num_classes=3, width=8, backbone_options=BACKBONE)
    model.train()
    assert segment(model, torch.zeros(3, 50, 80, dtype=torch.uint8), 32).shape == (3, 50, 80) and model.training


def train(folder, **changes):
    settings = SegmenterSettings(**{**TINY, "output_dir": str(folder), **changes})
    task = SegmenterTask(settings)
    return fit(task, settings, preview=task.preview)


def test_training_resumes_exactly_measures_and_draws(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", max_steps=2)
    parts = train(tmp_path / "parts", num_workers=1)
    one, two = (load_state(tmp_path / run / "states" / "step-4")["model"] for run in ("whole", "parts"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    snapshot = load_classifier(whole, "segmenter")
    assert snapshot.meta["quality"] == load_classifier(parts, "segmenter").meta["quality"]
    assert snapshot.meta["quality"]["images"] == 3 and len(snapshot.meta["quality"]["iou"]) == 11
    assert "On 3 held-out images, at the end of training: mIoU" in (whole / "README.md").read_text()
    with Image.open(tmp_path / "whole" / "samples" / "step-4.png") as picture:
        assert picture.width == 3 * 36 + 4 and picture.height > 22 + 6 * 36  # and the colours' names


def test_a_dry_run_says_what_there_is_and_writes_one_picture_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "set")
    before = set(tmp_path.rglob("*"))
    values = {**TINY, "data_dir": str(folder), "batch_size": 2, "output_dir": "run", "dry_run": True}
    train_segmenter.run(SegmenterSettings(**values))
    said = {line[:10].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert said["data"] == "set: 2 images of 2 classes; 2 looked at" and said["sizes"] == "all are 30 x 20 px"
    assert said["by images"] == "ground 2, thing 2" and said["by pixels"] == "thing 81.7%, ground 18.3%"
    assert said["ignored"] == "5.0% of the pixels are of no class" and said["training"].startswith("1 step of 2 images")
    (picture,) = (path for path in set(tmp_path.rglob("*")) - before if path.is_file())
    assert picture == tmp_path / "samples" / "dry-run-run.png" and "(2 images as" in said["batch"]
    assert Image.open(picture).size == (4 * 36 + 4, 22 + 36 + 22)
    (folder / "masks" / "train" / "b.png").write_text("hello")
    images = MaskFolder(folder)
    images.class_names.append("nothing")
    lines = describe_masks(images, 1000)
    assert lines[1][0] == "LOOK" and lines[1][1].startswith("1 unreadable, training stops at them: cannot read")
    assert lines[-1] == ("LOOK", "1 class in no mask: nothing")


def test_a_legend_takes_as_many_lines_as_it_needs():
    picture, colours = Image.new("RGB", (100, 50)), palette(3)
    one, three = (with_legend(picture, ["background"] * 3, colours, range(count)) for count in (1, 3))
    assert one.size == (100, 72) and three.size == (100, 50 + 3 * 22)
    assert one.getpixel((10, 55)) == tuple(colours[0]) and three.getpixel((10, 99)) == tuple(colours[2])


def test_validation_over_two_processes_is_that_of_one():
    task = SegmenterTask(SegmenterSettings(**TINY))
    shares = [task.validate(task.model, rank=rank, world_size=2) for rank in (0, 1)]
    whole = task.validate(task.model, rank=0, world_size=1)
    summed = task.figures({name: sum(share[name].item() for share in shares) for name in whole})
    alone = task.figures({name: value.item() for name, value in whole.items()})
    assert summed == pytest.approx(alone) and alone.keys() == {"loss", "mIoU", "mDice", "aAcc", "mAcc"}


def test_the_backbone_starts_from_a_classifier_and_heads_learn_faster(tmp_path):
    classifier = create_model("emov2_1m", num_classes=2, **BACKBONE)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1)
    meta = {"class_names": ["a", "b"], "image_size": 32, "step": 1, "weights": "ema", "num_images": 1}
    settings = SegmenterSettings(**TINY)
    save_classifier(tmp_path / "one", classifier, meta=meta, settings=settings)
    task = SegmenterTask(SegmenterSettings(**{**TINY, "init_from": str(tmp_path / "one")}))
    theirs = classifier.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in task.model.backbone.state_dict().items())
    assert task.lr_scales.keys() == {n for n, _ in task.model.named_parameters() if n.startswith(("decoder", "aux"))}
    other = create_model("pspnet-emov2_2m", num_classes=2, width=8)
    with pytest.raises(InputError, match="is emov2_1m, and the backbone is emov2_2m"):
        start_backbone(other, str(tmp_path / "one"))


def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    task = SegmenterTask(SegmenterSettings(**{**TINY, "freeze_backbone": True, "output_dir": str(tmp_path)}))
    before = {name: value.clone() for name, value in task.model.backbone.state_dict().items()}
    fit(task, task.settings)
    after = load_state(tmp_path / "states" / "step-4")["model"]
    assert all(torch.equal(value, after[f"backbone.{name}"]) for name, value in before.items())


@pytest.mark.parametrize("name", ["ade20k_segformer", "ade20k_deeplabv3"])
def test_the_papers_recipes_load_as_they_are_written(name):
    file = Path(__file__).parents[1] / "configs" / "segmentation" / f"{name}.yaml"
    settings = parse_settings(SegmenterSettings, "", ["--config", str(file)])
    assert {key: getattr(settings, key) for key in yaml.safe_load(file.read_text())} == yaml.safe_load(file.read_text())
    half = settings.max_steps // 2
    assert [learning_rate(settings, step) / settings.learning_rate for step in (settings.warmup_steps, half)] == [1, 1]
    assert learning_rate(settings, settings.max_steps * 3 // 4) == pytest.approx(settings.learning_rate / 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "emov2_1m"}, "emov2_1m is a classifier; train it with `d-emo train-classifier`"),
        ({"flip": True}, "a mirror image is of no class"), ({"scale_range": [2.0, 1.0]}, "two rising factors"),
        ({"validate_dir": "x"}, "belongs to a `data_dir`"),
        ({"model_options": {"num_classes": 3}}, "num_classes follows from the data"),
        ({"micro_batch_size": 1}, "`micro_batch_size` must be 2 or more"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        train(tmp_path, **changes)


def write_photos(folder):
    for name, size in (("a.png", (40, 50)), ("b/a.jpg", (60, 33))):
        save(folder / name, np.random.default_rng(0).integers(0, 255, (*size, 3)))
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("source, names", [("", ["a-1", "a-2"]), ("a.png", ["a"]), ("b/a.jpg", ["a"])])
def test_segment_writes_a_picture_a_mask_and_json_for_each_image(tmp_path, source, names, capsys):
    photos, run = write_photos(tmp_path / "photos"), tmp_path / "run"
    train(run, max_steps=1)
    image = str(photos / source) if source else str(photos)
    run_verb("segment", [image, "--model", str(run), "--output", str(tmp_path / "out")])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"{name}{ending}" for name in names for ending in (".png", "_classes.png", ".json")
    }
    told = json.loads((tmp_path / "out" / f"{names[0]}.json").read_text())
    with Image.open(tmp_path / "out" / told["mask"]) as mask:
        assert mask.size == (told["width"], told["height"]) and mask.mode == "L"
        counts = np.bincount(np.asarray(mask).ravel(), minlength=11)
    assert {each["class"]: each["pixels"] for each in told["classes"]} == {
        label: count for label, count in enumerate(counts) if count
    }
    assert sum(each["share"] for each in told["classes"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "image, model, words",
    [
        ("nowhere.png", "pspnet-emov2_1m", "IMAGES nowhere.png does not exist"),
        ("photos", "emov2_1m", "emov2_1m is a classifier; name a segmenter"),
        ("photos/notes.txt", "pspnet-emov2_1m", "cannot read the image .*notes.txt"),
        ("empty", "pspnet-emov2_1m", "empty holds no images"),
    ],
)
def test_segment_refuses_what_it_cannot_use(tmp_path, monkeypatch, image, model, words):
    write_photos(tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        run_verb("segment", [image, "--model", model, "--output", "out", "--image-size", "32"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    "kind", ["segformer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deeplabv3", "pspnet", "semfpn"))]
)
def test_segmenters_leave_python(kind, ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model = create_model(f"{kind}-emov2_1m", num_classes=3, width=8, window_size=2, backbone_options=BACKBONE).eval()
    stir(model)
    network = portable_classifier(SegmenterOutput(model), 64)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.module.modules())
    images = network.example(2)
    with torch.no_grad():
        torch.testing.assert_close(network.module(*images), model(*images)["out"], rtol=1e-4, atol=1e-4)
    assert export(network, tmp_path / f"network{ending}") < 1e-4
