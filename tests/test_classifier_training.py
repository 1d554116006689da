import copy
import json
import runpy
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import reference_block as reference
import timm
import torch
import yaml

from d_emo.cli import train_classifier
from d_emo.config import ClassifierSettings, parse_settings
from d_emo.data import CentreCroppedFolder, Digits, TarShards, rows_of, spread
from d_emo.errors import InputError
from d_emo.io.classifier import Normalized, open_classifier
from d_emo.io.snapshot import load_classifier, load_meta
from d_emo.io.training_state import load_state
from d_emo.models import create_model
from d_emo.models.convert import write_timm_folder
from d_emo.training import fit
from d_emo.training.accuracy import Accuracy, measure_accuracy
from d_emo.training.classifier import Augmentation, ClassifierTask, augment, mixed
from d_emo.training.teacher import distillation_loss, load_teacher

ROOT = Path(__file__).parents[1]
POLICY = "rand-m9-mstd0.5-inc1"
TINY = {
    "model": "emov2_1m", "model_options": {"depths": [1, 1, 1, 1]}, "image_size": 32, "batch_size": 4, "max_steps": 4,
    "warmup_steps": 1, "learning_rate": 1e-3, "state_every": 2, "snapshot_every": 4,
}  # fmt: skip


def train(folder, photos, **changes):
    settings = ClassifierSettings(**{**TINY, "output_dir": str(folder), "data_dir": str(photos), **changes})
    return fit(ClassifierTask(settings), settings)


def open_up(model):
    """A new network's LayerScales let next to nothing through, and every image would look the same to it."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    torch.nn.init.normal_(model.head.weight)


def test_classifier_training_resumes_exactly_and_reports_both_weights(tmp_path, photos):
    whole = train(tmp_path / "whole", photos)
    train(tmp_path / "parts", photos, max_steps=2)
    parts = train(tmp_path / "parts", photos, num_workers=1)
    one, two = (load_state(tmp_path / run / "states" / "step-4")["model"] for run in ("whole", "parts"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    meta = load_classifier(whole).meta
    assert meta["accuracy"].keys() == {"ema", "raw"} and meta["accuracy"]["ema"]["images"] == 6
    card = (parts / "README.md").read_text()
    ema, raw = (f"{meta['accuracy'][kind]['top1']:.2%} | 100.00% | 6 |" for kind in ("ema", "raw"))
    assert f"| moving average (EMA), these here | {ema}" in card and f"| raw | {raw}" in card


def test_a_snapshot_tells_raw_from_averaged_weights(tmp_path, photos):
    task = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos)}))
    task.measure = lambda model: Accuracy(0.25 if model is task.model else 0.75, 1.0, 6)
    task.save_snapshot(tmp_path / "snapshot", copy.deepcopy(task.model), step=1, minutes=0)
    meta = load_classifier(tmp_path / "snapshot").meta
    assert {weights: each["top1"] for weights, each in meta["accuracy"].items()} == {"ema": 0.75, "raw": 0.25}
    assert meta["held_out_accuracy"] == 0.75


def test_the_held_out_images_are_named_or_found_and_both_measures_use_them(tmp_path, photos):
    changes = {"validate_every": 2, "validate_images": 5, "output_dir": str(tmp_path / "run")}
    found = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos), **changes}))
    apart = {"data_dir": str(photos / "train"), "validate_dir": str(photos / "val")}
    named = ClassifierTask(ClassifierSettings(**{**TINY, **apart, **changes}))
    for task in (found, named):
        assert type(task.held_out) is CentreCroppedFolder and task.held_out.files == found.held_out.files
    torch.nn.init.normal_(found.model.head.weight)
    shares = [found.validate(found.model, rank=rank, world_size=2) for rank in (0, 1)]
    sums = {name: sum(share[name].item() for share in shares) for name in shares[0]}
    expected = measure_accuracy(found.model, found.held_out, limit=5)
    assert (sums["accuracy"] / 5, sums["top5"] / 5, sums["count"]) == (expected.top1, expected.top5, 5)
    images = torch.stack([found.held_out[index][0] for index in spread(6, 5)])
    labels = torch.tensor([found.held_out.label(index) for index in spread(6, 5)])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(found.model.eval()(images), labels, reduction="sum")
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-4)
    alone = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos / "train")}))
    assert alone.held_out is None
    with pytest.raises(InputError, match="give their folder as `validate_dir`"):
        ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos / "train"), "validate_every": 2}))


def test_shards_are_trained_and_measured_on_without_random_crops(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for label, name in enumerate(("ant", "bee")):
            for file in sorted((photos / "train" / name).iterdir()):
                archive.add(file, f"{name}{file.stem}.png")
                (tmp_path / "cls").write_text(str(label))
                archive.add(tmp_path / "cls", f"{name}{file.stem}.cls")
    shards = f"wds:{tmp_path / 'shard.tar'}"
    settings = ClassifierSettings(
        **{**TINY, "data_dir": shards, "validate_dir": shards, "max_steps": 1, "output_dir": str(tmp_path / "run")}
    )
    task = ClassifierTask(settings)
    assert type(task.dataset) is type(task.held_out) is TarShards and task.settings.rand_augment == "none"
    assert load_classifier(fit(task, settings)).meta["accuracy"]["raw"]["images"] == 6
    with pytest.raises(InputError, match="`rand_augment` .* needs a folder"):
        ClassifierSettings(**{**TINY, "data_dir": shards, "rand_augment": POLICY})


def test_accuracy_counts_the_first_and_the_first_five():
    class Oracle(torch.nn.Module):
        """Puts the true digit, told by its place in the list, first or fifth or sixth."""

        def __init__(self):
            super().__init__()
            self.seen, self.weight = 0, torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            logits = torch.zeros(len(images), 10)
            for row in range(len(images)):
                label, rank = digits.label(self.seen), (0, 4, 5)[self.seen % 3]
                order = [c for c in range(10) if c != label]
                order.insert(rank, label)
                logits[row, order] = torch.arange(10.0, 0, -1)
                self.seen += 1
            return logits

    digits = Digits(8, split="test")
    accuracy = measure_accuracy(Oracle(), digits, batch_size=7)
    assert (accuracy.top1, accuracy.top5, accuracy.images) == (pytest.approx(120 / 359), pytest.approx(240 / 359), 359)
    assert str(accuracy) == "top-1 33.43%, top-5 66.85% of 359 images"


@pytest.mark.parametrize("length", [1_000_000, 2000, 50_000])
def test_a_part_of_the_images_is_of_many_classes_whatever_their_order(length):
    chosen = spread(length, 1000)
    assert len(set(chosen)) == 1000 and chosen == spread(length, 1000) == sorted(chosen)
    assert len({index % 1000 for index in chosen}) > 500  # labels that go round, as those of Shapes-1000
    assert {index * 1000 // length for index in chosen} == set(range(1000))  # sorted by class
    assert spread(7, 7) == spread(7, 9) == list(range(7))


def test_built_in_images_are_measured_on_two_of_each_class():
    task = ClassifierTask(ClassifierSettings(**{**TINY, "dataset": "shapes", "validate_every": 2}))
    assert len(task.held_out) == 2000 and {task.held_out.label(index) for index in range(1000)} == set(range(1000))
    asked = []
    task.held_out.label, label = lambda index: asked.append(label(index)) or asked[-1], task.held_out.label
    task.settings = replace(task.settings, validate_images=40)
    assert task.validate(task.model, rank=0, world_size=1)["count"] == 40
    assert len(set(asked)) > 30


def test_distillation_loss_is_the_divergence():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    assert distillation_loss(teacher, teacher, 2.0).abs() < 1e-6
    p, q = (torch.softmax(logits.double() / 2, dim=1) for logits in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(dim=1).mean()
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_of_any_kind_teaches(tmp_path, photos):
    model = create_model("emov2_1m", num_classes=2, depths=[1, 1, 1, 1]).eval()
    torch.nn.init.normal_(model.head.weight)
    write_timm_folder(model, tmp_path / "folder", input_size=32)
    shapes = json.loads((ROOT / "tests" / "data" / "emov2_5m_released_state_dict.json").read_text())
    shapes |= {"head.weight": [2, shapes["head.weight"][1]], "head.bias": [2]}
    torch.save({"net": reference.random_weights(shapes, 0)}, tmp_path / "released.pth")
    torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "resnet.pth")
    snapshot = train(tmp_path / "snapshot", photos, max_steps=1)
    images, seen = torch.rand(2, 3, 32, 32) * 2 - 1, []
    images[1] = -1
    for options in (
        {"teacher": str(tmp_path / "folder")}, {"teacher": str(snapshot)}, {"teacher": str(tmp_path / "released.pth")},
        {"teacher": "resnet18", "teacher_weights": str(tmp_path / "resnet.pth")},
    ):  # fmt: skip
        settings = ClassifierSettings(**{**TINY, "output_dir": "x", "data_dir": str(photos), **options})
        task = ClassifierTask(settings)
        open_up(task.model)
        draws = task.draw(torch.Generator(), 2)
        losses = task.loss(task.model.eval(), [images, torch.tensor([0, 1])], draws)
        task.settings = replace(settings, distill_weight=0.0)
        alone = task.loss(task.model, [images, torch.tensor([0, 1])], draws)["loss"]
        torch.testing.assert_close(losses["loss"], alone + 5 * losses["distillation"])
        inputs = augment(images, draws)
        expected = distillation_loss(task.model(inputs), task.teacher(inputs), 1.0)
        torch.testing.assert_close(losses["distillation"], expected)
        assert not any(p.requires_grad for p in task.teacher.parameters())
        seen.append(losses["distillation"].item())
    assert len(set(seen)) == 4
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (images * 0.5 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(Normalized(torch.nn.Identity(), mean, std)(images), expected)
    assert Normalized(torch.nn.Identity(), mean, std, 16)(images).shape == (2, 3, 16, 16)  # a fixed input size
    train(tmp_path / "run", photos, teacher=str(snapshot), max_steps=1)


def test_the_loss_is_smoothed_cross_entropy(photos):
    task = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos), "label_smoothing": 0.3}))
    open_up(task.model)
    images, labels = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([0, 0, 0, 1])
    draws = task.draw(torch.Generator(), 4)
    losses = task.loss(task.model.eval(), [images, labels], draws)
    logits = task.model(augment(images, draws))
    shares = torch.nn.functional.one_hot(labels, 2) * 0.7 + 0.15
    torch.testing.assert_close(losses["loss"], -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean())
    assert losses["accuracy"] == (logits.argmax(dim=1) == labels).float().mean()


def test_images_are_mirrored_where_the_data_allow_it_and_shifted_as_far_as_asked(photos):
    folder = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos), "shift": 0.1, "seed": 5}))
    digits = ClassifierTask(ClassifierSettings(**{**TINY, "dataset": "digits"}))
    draws, plain = (task.draw(torch.Generator().manual_seed(0), 200) for task in (folder, digits))
    assert 60 < draws.flip.sum() < 140 and not plain.flip.any() and not plain.shift.any()
    assert 0.18 < draws.shift.abs().max() <= 0.2 and draws.shift.mean().abs() < 0.04  # of half the side
    assert folder.dataset.seed == 5
    image = torch.zeros(2, 3, 32, 32)
    image[:, :, :, 0] = 1  # a bright left border
    moved = augment(image, Augmentation(torch.tensor([False, True]), torch.tensor([[-0.2, 0.0], [0.0, 0.0]])))
    assert moved[0, :, :, :3].min() > 0.99 and moved[0, :, :, 5:].max() < 0.01  # the border is repeated
    assert torch.equal(moved[1], image[1].flip(-1))


def test_images_are_mixed_with_noise_up_to_the_share_asked_for_and_the_snapshot_says_so(tmp_path, photos):
    task = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos), "noise": 0.6, "shift": 0.1}))
    plain = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos), "shift": 0.1}))
    draws, same = (each.draw(torch.Generator().manual_seed(0), 200) for each in (task, plain))
    assert torch.equal(draws.flip, same.flip) and torch.equal(draws.shift, same.shift) and same.noise is None
    assert draws.level.min() < 0.05 and 0.55 < draws.level.max() <= 0.6 and draws.noise.std().sub(1).abs() < 0.02
    images = torch.rand(3, 3, 32, 32)
    part = rows_of(draws, slice(4, 7))
    t, noise = part.level, part.noise
    assert torch.equal(t, draws.level[4:7]) and torch.equal(noise, draws.noise[4:7])
    torch.testing.assert_close(mixed(images, part), (1 - t) * images + t * noise)
    assert torch.equal(task.seen([images], part), mixed(augment(images, part), part))
    assert torch.equal(mixed(images, rows_of(same, slice(4, 7))), images)
    assert load_meta(train(tmp_path / "run", photos, noise=0.6, max_steps=1), "classifier")["noise"] == 0.6
    assert "noise" not in load_meta(train(tmp_path / "other", photos, max_steps=1), "classifier")


def test_a_folder_named_for_validation_is_preferred_to_val(tmp_path, photos):
    (photos / "val").rename(tmp_path / "other")
    (photos / "val" / "ant").mkdir(parents=True)
    named = {"data_dir": str(photos), "validate_dir": str(tmp_path / "other")}
    task = ClassifierTask(ClassifierSettings(**{**TINY, **named, "crop_share": 0.5}))
    assert len(task.held_out) == 6 and task.held_out.shorter == 64


def test_measuring_leaves_the_model_in_its_mode_and_its_statistics():
    model = create_model("emov2_1m", num_classes=10, depths=[1, 1, 1, 1])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    measure_accuracy(model.train(), Digits(32, split="test"), limit=4)
    assert model.training and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    measure_accuracy(model.eval(), Digits(32, split="test"), limit=4)
    assert not model.training


def test_epochs_become_steps(photos):
    task = ClassifierTask(ClassifierSettings(**{**TINY, "data_dir": str(photos), "epochs": 30, "max_steps": None}))
    assert (task.settings.max_steps, task.settings.warmup_steps) == (45, 4)  # 6 images in batches of 4


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "classifier").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_the_papers_recipe(config):
    settings = parse_settings(ClassifierSettings, "", ["--config", str(config), "--data-dir", "IMAGENET"])
    assert (settings.batch_size, settings.learning_rate, settings.weight_decay) == (2048, 6e-3, 0.05)
    assert (settings.label_smoothing, settings.rand_augment, settings.grad_clip) == (0.1, POLICY, 5.0)
    epoch = 1_281_167 / 2048
    assert settings.warmup_steps == pytest.approx(20 * epoch, rel=1e-4)
    assert settings.max_steps == pytest.approx((1000 if "1000" in config.stem else 300) * epoch, rel=1e-4)
    with torch.device("meta"):
        model = create_model(settings.model, img_size=settings.image_size, **(settings.model_options or {}))
    window = model.stages[2][1].operator.expand.window
    assert window == ((7, 7) if settings.image_size == 224 else (8, 8))
    assert settings.teacher is None or timm.is_model_pretrained(settings.teacher)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 31}, "`image_size` must be at least 32"),
        ({"model_options": {"num_classes": 5}}, "num_classes follows from the data"),
        ({"model_options": {"in_channels": 1}}, "in_channels follows from the data"),
        ({"model_options": {"depths": [1.5, 1, 1, 1]}}, "depths must hold four positive integers"),
        ({"weight_decay": -1}, "`weight_decay` must be at least 0, not -1"),
        ({"warmup_steps": -1}, "`warmup_steps` must be at least 0, not -1"),
        ({"distill_weight": -1}, "`distill_weight` must be at least 0, not -1"),
        ({"label_smoothing": 1.1}, "`label_smoothing` must be at least 0 and at most 1, not 1.1"),
        ({"rand_augment": "randm9"}, "no RandAugment policy 'randm9'"),
        ({"teacher": "no_such_net"}, "cannot load the teacher no_such_net"),
        ({"teacher": "resnet18", "teacher_weights": "none.pth"}, "none.pth.* does not exist"),
        ({"crop_scale": [0.5, 0.1]}, "`crop_scale` must be two rising"),
        ({"distill_tau": 0}, "`distill_tau` must be above 0, not 0"),
        ({"crop_share": 1.5}, "`crop_share` must be above 0 and at most 1, not 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, photos, changes, words):
    with pytest.raises(InputError, match=words):
        train(tmp_path / "run", photos, **changes)


def test_folders_that_cannot_work_are_refused(tmp_path, photos):
    teacher = str(train(tmp_path / "teacher", photos, max_steps=1))
    with pytest.raises(InputError, match="knows 2 classes, but the data have 10"):
        load_teacher(teacher, None, [*"0123456789"])
    with pytest.raises(InputError, match="knows other classes: ant where the data have asp"):
        load_teacher(teacher, None, ["asp", "bee"])
    with pytest.raises(InputError, match="brings its weights along"):
        load_teacher(teacher, "weights.pth", ["ant", "bee"])
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "five.pth")
    with pytest.raises(InputError, match="resnet18 knows 5 classes, but the data have 2"):
        load_teacher("resnet18", str(tmp_path / "five.pth"), ["ant", "bee"])
    (photos / "val" / "bee").rename(photos / "val" / "wasp")
    with pytest.raises(InputError, match="are not the 2 that are trained.*bee, wasp"):
        train(tmp_path / "run", photos)
    (photos / "val" / "wasp").rename(photos / "ant")
    with pytest.raises(InputError, match="only the class ant"):
        train(tmp_path / "run", photos / "val")
    with pytest.raises(InputError, match="no sub-folders"):
        train(tmp_path / "run", photos / "ant")


def evaluate(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate_classifier.py", *map(str, argv)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / "evaluate_classifier.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_evaluation_of_snapshots_and_released_files(tmp_path, photos, monkeypatch, capsys):
    snapshot = train(tmp_path / "run", photos, max_steps=1)
    output = ("--output", tmp_path / "a.json")
    code, printed = evaluate(monkeypatch, capsys, snapshot, *output)  # on the images that the run was validated on
    assert code == 0 and f"step-1 on {photos / 'val'}, 32 px: top-1" in printed.out and "of 6 images" in printed.out
    written, meta = json.loads((tmp_path / "a.json").read_text()), load_classifier(snapshot).meta
    assert written["top1"] == meta["accuracy"]["ema"]["top1"] and written["weights"] == "ema"
    shapes = json.loads((ROOT / "tests" / "data" / "emov2_5m_released_state_dict.json").read_text())
    shapes |= {"head.weight": [2, shapes["head.weight"][1]], "head.bias": [2]}
    released = {name: torch.zeros(shape) for name, shape in shapes.items()}
    released["head.bias"] = torch.tensor([0.0, 1.0])  # always the second class
    torch.save({"net": released}, tmp_path / "released.pth")
    options = ("--data-dir", photos / "val", "--image-size", 32)
    code, printed = evaluate(monkeypatch, capsys, tmp_path / "released.pth", *options)
    assert code == 0 and "top-1 50.00%, top-5 100.00% of 6 images" in printed.out
    (photos / "train" / "bee").rename(photos / "train" / "wasp")
    for argv, words in (
        ((snapshot, "--data-dir", photos / "train"), "or the same under other names"),
        ((snapshot, *output, "--num-images", 0), "--num-images must be at least 1"),
        ((snapshot, *output, "--batch-size", 0), "--batch-size must be at least 1"),
        ((snapshot, *output, "--crop-share", 0), "--crop-share must be above 0"),
        ((snapshot, *output, "--image-size", 31), "--image-size must be at least 32"),
        ((snapshot, "--output", tmp_path / "none" / "a.json"), "a.json cannot be written: the folder"),
        ((tmp_path / "released.pth", *options, "--weights", "raw"), "holds one set of weights"),
        ((snapshot, "--dataset", "digits"), "knows 2 classes, but the images have 10"),
        ((tmp_path / "none.pth", *options), "does not exist"),
    ):
        code, printed = evaluate(monkeypatch, capsys, *argv)
        assert code == 2 and words in printed.err and len(printed.err.splitlines()) == 1
    (photos / "val").rename(photos / "gone")
    code, printed = evaluate(monkeypatch, capsys, snapshot)
    assert code == 2 and f"{photos / 'val'} does not exist" in printed.err


def test_without_held_out_images_there_is_no_accuracy_which_is_said(tmp_path, photos, monkeypatch, capsys):
    values = {**TINY, "max_steps": 1, "data_dir": str(photos / "train"), "output_dir": str(tmp_path / "run")}
    train_classifier.run(ClassifierSettings(**values))
    said = capsys.readouterr().out
    assert "accuracy  not measured: there are no held-out images; name some with `validate_dir`" in said
    code, printed = evaluate(monkeypatch, capsys, tmp_path / "run")
    assert code == 2 and "without held-out ones; name some with --data-dir" in printed.err


def test_raw_weights_are_those_of_the_training_state(tmp_path, photos, monkeypatch, capsys):
    snapshot = train(tmp_path / "run", photos, max_steps=2, ema_decay=0.5)
    state = tmp_path / "run" / "states" / "step-2"
    raw, averaged = (open_classifier(str(tmp_path / "run"), weights).model.head.weight for weights in ("raw", "ema"))
    assert torch.equal(raw, load_state(state)["model"]["head.weight"])
    assert torch.equal(averaged, load_classifier(snapshot).model.head.weight)
    assert not torch.equal(raw, averaged)
    code, printed = evaluate(monkeypatch, capsys, snapshot, "--data-dir", photos / "val", "--weights", "raw")
    assert code == 0 and "step-2, raw weights on" in printed.out
    state.rename(tmp_path / "elsewhere")
    code, printed = evaluate(monkeypatch, capsys, snapshot, "--data-dir", photos / "val", "--weights", "raw")
    assert code == 2 and "there is no training state" in printed.err


def test_shipped_demo_recipe_stays_light():
    settings = parse_settings(ClassifierSettings, "", ["--config", str(ROOT / "configs" / "demo_classifier.yaml")])
    assert settings.rand_augment == "none" and settings.teacher is None and settings.max_steps == 250
    assert yaml.safe_load((ROOT / "configs" / "demo_classifier.yaml").read_text())["batch_size"] == 32
