"""Classifiers of a codec's latents, which `d-emo distill` takes features of."""

import re

import pytest
import torch
import yaml
from test_classifier_training import open_up
from test_encode import SMALL
from torch.utils.data import default_collate

from d_emo.cli import train_classifier
from d_emo.config import ClassifierSettings
from d_emo.data import Shapes1000, rows_of
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import load_classifier
from d_emo.io.training_state import load_state
from d_emo.latents import LatentDataset, encode, load_codec
from d_emo.models import create_model
from d_emo.training.classifier import ClassifierTask, start_head_from_words
from d_emo.training.feed import Feed
from d_emo.training.latent_classifier import LatentClassifierTask, classifier_task, enlarged
from d_emo.training.words import WordHead, head_of_words, with_plain_head

TINY = {
    "model": "emov2_1m", "model_options": {"depths": [1, 1, 1, 1], "dims": [40, 40, 40, 40], "window_size": 2},
    "batch_size": 4, "max_steps": 4,
    "warmup_steps": 1, "learning_rate": 1e-3, "state_every": 2, "snapshot_every": 4, "image_size": 32, "noise": 0.5,
    "tracker": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Latents (4, 4, 4) of 12 images with mirror images, of 6 held out, and of 6 by another codec."""
    root, codec = tmp_path_factory.mktemp("latents"), load_codec("d-emo-f8")
    for name, count, seed, flip in (("mirrored", 12, 0, True), ("held-out", 6, 1, False)):
        images = Shapes1000(32, num_images=count, seed=seed)
        images.flip = flip
        encode(images, codec, root / name, **SMALL)
    encode(Shapes1000(8, num_images=6), load_codec("pixels"), root / "pixels", **SMALL)
    return root


def settings_of(folders, name="mirrored", **changes):
    return ClassifierSettings(**{**TINY, "latents": str(folders / name), **changes})


def test_it_trains_resumes_exactly_and_its_snapshot_says_what_it_looks_at(tmp_path, folders, capsys):
    changes = {"validate_dir": str(folders / "held-out"), "label_init": "names"}
    for run, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        train_classifier.run(settings_of(folders, **changes, output_dir=str(tmp_path / run), max_steps=steps))
    assert "of 6 images held out (ema weights)" in capsys.readouterr().out
    one, two = (load_state(tmp_path / run / "states" / "step-4")["model"] for run in ("whole", "parts"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    snapshot = load_classifier(tmp_path / "parts", latents=True)
    meta = snapshot.meta
    assert (meta["codec"], meta["latent_side"], meta["noise"], meta["image_size"]) == ("d-emo-f8", 4, 0.5, 32)
    assert meta["accuracy"]["ema"]["images"] == 6
    assert snapshot.model(torch.zeros(1, 4, 32, 32)).shape == (1, 1000)
    card = (snapshot.path / "README.md").read_text()
    facts = (
        "# emov2_1m on latents of Shapes-1000, 4 x 4", "as latents of 4 x 4, enlarged to 32 px", "latents=True",
        "latents mixed with noise up to 0.5", "the head started from the words",
    )  # fmt: skip
    for fact in facts:
        assert fact in card
    assert "(B, 3, " not in card and "image-classification" not in card
    again = yaml.safe_load((snapshot.path / "config.yaml").read_text())
    assert ClassifierSettings.from_mapping(again).latents == str(folders / "mirrored")


def test_a_head_of_words_trains_exactly_and_is_an_ordinary_one_in_its_snapshot(tmp_path, folders, capsys):
    for run, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        train_classifier.run(settings_of(folders, head="words", output_dir=str(tmp_path / run), max_steps=steps))
    one, two = (load_state(tmp_path / run / "states" / "step-4") for run in ("whole", "parts"))
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=0)
    assert one["model"]["head.words.weight"].shape == (31, 40)  # of ten shapes, colours and grounds, and "on"
    snapshot = load_classifier(tmp_path / "parts", latents=True)
    assert snapshot.model.head.weight.shape == (1000, 40)
    grid = snapshot.model.head.weight.detach().view(10, 10, 10, 40)
    torch.testing.assert_close(grid[2, 3, 4] - grid[2, 3, 5], grid[7, 8, 4] - grid[7, 8, 5], rtol=1e-3, atol=1e-6)
    assert "a head whose rows are sums of those of the words" in (snapshot.path / "README.md").read_text()
    task = classifier_task(settings_of(folders, head="words", init_from=str(tmp_path / "whole"), train="head"))
    assert "A head of 31 words for 1,000 classes." in capsys.readouterr().out
    trained = sum(each.numel() for each in task.model.parameters() if each.requires_grad)
    assert trained == 31 * 41 and f"{trained:,}" in " ".join(task.introduction())


def test_whoever_looks_at_images_is_told_in_one_sentence(tmp_path, folders):
    task = classifier_task(settings_of(folders))
    task.save_snapshot(tmp_path / "snapshot", task.model, step=1, minutes=0)
    for look in (load_classifier, lambda path: open_classifier(str(path))):
        with pytest.raises(InputError, match="is a classifier of latents of the codec d-emo-f8, .* of images$"):
            look(tmp_path / "snapshot")
    with pytest.raises(InputError, match="is a classifier of latents of the codec d-emo-f8"):
        ClassifierTask(ClassifierSettings(**{**TINY, "init_from": str(tmp_path / "snapshot")}))
    more = classifier_task(settings_of(folders, init_from=str(tmp_path / "snapshot")))
    assert "knows 1000 of the 1000 classes" in more.start[0]
    with pytest.raises(InputError, match="latents of the codec d-emo-f8, not of latents of pixels"):
        classifier_task(settings_of(folders, "pixels", init_from=str(tmp_path / "snapshot")))


def test_each_step_draws_from_the_posterior_mixes_noise_and_enlarges_last(folders):
    task = LatentClassifierTask(settings_of(folders))
    moments, labels = default_collate([task.dataset[index] for index in range(4)])
    many = task.draw(torch.Generator().manual_seed(3), 64)
    assert many.flip.any() and not many.flip.all() and 0.4 < many.level.max() <= 0.5
    draws = rows_of(many, slice(0, 4))._replace(flip=torch.tensor([True, False, False, True]))
    plain, mirrored = moments.chunk(2, dim=1)
    mean, std = torch.where(draws.flip[:, None, None, None], mirrored, plain).chunk(2, dim=1)
    noisy = (1 - draws.level) * (mean + std * draws.posterior) + draws.level * draws.noise
    seen = []
    hook = task.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    task.loss(task.model, [moments, labels], draws)
    hook.remove()
    expected = torch.nn.functional.interpolate(noisy, (32, 32), mode="bilinear", align_corners=False)
    assert std.min() > 0 and torch.equal(seen[0], expected)
    assert task.seen([moments, labels], draws).shape == (4, 3, 32, 32)
    assert rows_of(task.draw(torch.Generator(), 2), slice(0, 1)).noise.shape == (1, 4, 4, 4)
    assert LatentClassifierTask(settings_of(folders, noise=0.0)).draw(torch.Generator(), 2).noise is None


def test_the_draws_of_a_step_are_those_of_any_number_of_processes(folders):
    task = LatentClassifierTask(settings_of(folders))

    def served(rank, world_size):
        feed = Feed(task.dataset, task.draw, seed=5, batch_size=4, micro_batch_size=2, device=torch.device("cpu"),
                    rank=rank, world_size=world_size)  # fmt: skip
        return [task.views(batch[0], draws)[1] for batch, draws in feed.step(7)]

    assert torch.equal(torch.cat(served(0, 1)), torch.cat(served(0, 2) + served(1, 2)))


def test_accuracy_is_of_the_means_of_held_out_latents_by_class_name(folders):
    task = LatentClassifierTask(settings_of(folders, validate_dir=str(folders / "held-out"), validate_every=2))
    open_up(task.model)
    latents = LatentDataset(folders / "held-out")
    means = torch.stack([latents[index][0].float()[:4] for index in range(6)])
    labels = torch.tensor([latents.label(index) for index in range(6)])
    with torch.no_grad():
        right = (task.model.eval()(enlarged(means, 32)).argmax(dim=1) == labels).float().mean().item()
        loss = torch.nn.functional.cross_entropy(task.model(enlarged(means, 32)), labels, reduction="sum")
    assert task.measure(task.model).top1 == pytest.approx(right)
    assert task.validate(task.model, rank=0, world_size=1)["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    task.keep_classes(task.dataset.class_names[::-1])  # as a training state may record them
    assert [task.held_out.label(index) for index in range(6)] == (999 - labels).tolist() and task.dataset.flip


@pytest.mark.parametrize(("changes", "words"), [
    ({"shift": 0.1}, "take the place of images, which `shift` 0.1 means"),
    ({"rand_augment": "rand-m9"}, "`rand_augment` rand-m9"), ({"teacher": "resnet18"}, "`teacher` resnet18"),
    ({"data_dir": "photos"}, "`data_dir` photos"), ({"crop_scale": [0.5, 1.0]}, r"`crop_scale` \[0.5, 1.0\]"),
    ({"image_size": 16}, "`image_size` must be at least 32"),
    ({"validate_every": 2}, "needs held-out latents: give their folder as `validate_dir`"),
    ({"validate_dir": "pixels"}, "have encoder pixels, those in .*mirrored"),
])  # fmt: skip
def test_what_means_images_is_refused_in_one_sentence(folders, changes, words):
    if "validate_dir" in changes:
        changes = {"validate_dir": str(folders / changes["validate_dir"])}
    with pytest.raises(InputError, match=words):
        classifier_task(settings_of(folders, **changes))


def test_the_side_is_four_times_the_latents_and_never_less_than_theirs(tmp_path, folders, monkeypatch):
    task = classifier_task(settings_of(folders, "pixels", image_size=None, model="timm:resnet18", model_options=None))
    assert task.settings.image_size == 32 and task.model.config["in_chans"] == 3
    assert task.settings.output_dir == "results/timm:resnet18-pixels"
    encode(Shapes1000(40, num_images=4), load_codec("pixels"), tmp_path / "large", **SMALL)
    with pytest.raises(InputError, match="`image_size` 32 is less than the side of the latents in .*large, 40"):
        classifier_task(settings_of(tmp_path, "large"))


def test_a_head_of_words_is_the_nearest_to_the_one_it_replaces_and_its_softmax_a_product():
    names = [f"{colour} {shape}" for colour in ("red", "blue", "old") for shape in ("ring", "star", "box", "bus")]
    for name, head in (("emov2_1m", "head"), ("timm:resnet18", "fc")):
        model = create_model(name, num_classes=12)
        weight = model.get_submodule(head).weight.detach().clone()
        assert head_of_words(model, names) == "A head of 7 words for 12 classes."
        plain = with_plain_head(model)
        assert type(model.get_submodule(head)) is WordHead and type(plain.get_submodule(head)) is torch.nn.Linear
        grid = weight.view(3, 4, -1)
        additive = grid.mean(0, keepdim=True) + grid.mean(1, keepdim=True) - grid.mean((0, 1), keepdim=True)
        found = plain.get_submodule(head).weight
        torch.testing.assert_close(found, additive.view(12, -1), rtol=1e-3, atol=1e-5)
        features = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        logits = model.get_submodule(head)(features)
        torch.testing.assert_close(logits, plain.get_submodule(head)(features), rtol=1e-3, atol=1e-4)
        both = logits.softmax(1).view(5, 3, 4)
        torch.testing.assert_close(both, both.sum(2, keepdim=True) * both.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
    assert with_plain_head(plain) is plain
    kept, other = model.get_submodule(head), WordHead(torch.nn.Linear(weight.shape[1], 12), names[::-1])
    other.load_state_dict(kept.state_dict())  # a resumed run, whose source lists its classes in another order
    assert torch.equal(other(features), kept(features))


@pytest.mark.parametrize(("names", "words"), [
    (["red ring", "ring, red", "box"], "and 'ring, red' has the same ones as 'red ring'"),
    (["ring", "?"], "and '?' has none"),
    (["red_ring", "red ring", "red box"], "and 'red ring' has the same ones as 'red_ring'"),
    (["ring", "star"], "no word is in the names of two classes"),
])
def test_a_head_of_words_needs_names_that_differ_in_them(names, words):
    with pytest.raises(InputError, match=re.escape(words)):
        head_of_words(create_model("timm:resnet18", num_classes=len(names)), names)
    with pytest.raises(InputError, match="needs one linear layer as the last, and ResNet has another"):
        head_of_words(create_model("timm:resnet18", num_classes=0), names)


def test_classes_that_share_words_start_with_alike_rows_of_the_head():
    names = ["red heart on sky", "red ring on sky", "blue star in mud", "?"]
    for name, head in (("emov2_1m", "head"), ("timm:resnet18", "fc")):
        model = create_model(name, num_classes=4)
        weight = model.get_parameter(f"{head}.weight")
        own = weight[3].clone()
        start_head_from_words(model, names, seed=1)
        one, two, other, unnamed = weight.detach()
        alike, apart = (torch.cosine_similarity(one, row, dim=0).item() for row in (two, other))
        assert alike == pytest.approx(0.75, abs=0.1) and abs(apart) < 0.25
        assert one.norm().item() == pytest.approx(1, abs=0.2) and torch.equal(unnamed, own)
