"""The flow objective in the loop, fine-tuning from a snapshot, unconditional training."""

import json
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.cli import train as train_verb
from d_emo.config import ClassifierSettings, TrainSettings, VAESettings, parse_settings, write_yaml
from d_emo.data import OneClass, open_dataset
from d_emo.errors import InputError, PackageError
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import load_classifier, load_denoiser
from d_emo.io.training_state import load_state
from d_emo.training import fit
from d_emo.training.classifier import ClassifierTask
from d_emo.training.denoiser import DenoiserTask, _init_labels
from d_emo.training.finetuning import start_from
from d_emo.training.parallel import micro_batch_of

ROOT = Path(__file__).parents[1]
TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48}, "dataset": "digits", "image_size": 8,
    "vae": "pixels", "batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.9,
}
TABLE = "y_embedder.embedding_table.weight"


def task(folder, **changes):
    return DenoiserTask(TrainSettings(**{**TINY, "output_dir": str(folder), **changes}))


def train(folder, **changes):
    run = task(folder, **changes)
    return load_denoiser(fit(run, run.settings))


def image_folder(root, *names, count=4, size=(12, 9)):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return str(root)


def test_label_rows_of_classes_that_share_words_start_alike(tmp_path):
    options = {"dataset": "shapes", "num_images": 8, "label_init": "names", "label_init_std": 0.5}
    table = task(tmp_path, **options).model.get_parameter(TABLE).detach()
    assert table[:1000].std().item() == pytest.approx(0.5, abs=0.1)

    def likeness(a, b):
        return torch.cosine_similarity(table[a], table[b], dim=0).item()

    assert likeness(207, 208) > 0.5 and likeness(207, 297) > 0.5  # red triangle on sky; another ground, another colour
    assert likeness(207, 208) > likeness(207, 318) + 0.3  # nothing in common but "on"
    torch.testing.assert_close(table[207] - table[208], table[317] - table[318])  # sky - ground 8, whatever the shape
    again = task(tmp_path, **options, seed=1).model.get_parameter(TABLE)
    assert torch.cosine_similarity(table[207], again[207], dim=0) < 0.5


@pytest.mark.parametrize("model", ["D-EMOv2-Ti-2", "SiT-S-2"])
def test_flow_training_lowers_the_loss(tmp_path, model):
    losses = []
    run = task(tmp_path, model=model, objective="flow", max_steps=60, batch_size=32)
    plain = run.loss
    run.loss = lambda *args: losses.append(plain(*args)["loss"].item()) or plain(*args)
    snapshot = load_denoiser(fit(run, run.settings))
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    assert snapshot.objective == "flow"
    assert snapshot.scheduler_config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert snapshot.scheduler_config["shift"] == 1


def test_a_flow_run_resumes_as_if_it_never_stopped(tmp_path):
    whole = train(tmp_path / "whole", objective="flow", max_steps=4).model.state_dict()
    train(tmp_path / "parts", objective="flow", max_steps=2)
    parts = train(tmp_path / "parts", objective="flow", max_steps=4).model.state_dict()
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train(tmp_path_factory.mktemp("digits"))


def test_the_same_classes_and_size_start_from_every_weight(tmp_path, digits):
    run = task(tmp_path, init_from=str(digits.path))
    torch.testing.assert_close(run.model.state_dict(), digits.model.state_dict(), rtol=0, atol=0)
    assert run.start[0] in run.introduction() and "(step 2), which knows 10 of the 10 classes" in run.start[0]


def test_the_objective_may_be_another(tmp_path, digits):
    run = task(tmp_path, init_from=str(digits.path), objective="flow")
    torch.testing.assert_close(run.model.state_dict(), digits.model.state_dict(), rtol=0, atol=0)
    assert "(step 2, trained with eps), which knows 10" in run.start[0]
    assert load_denoiser(fit(run, run.settings)).objective == "flow"


def test_a_snapshot_knows_how_long_its_start_had_been_trained(tmp_path, digits):
    assert train(tmp_path, init_from=str(digits.path)).meta["started_from"] == {
        "step": 2, "training_minutes": digits.meta["training_minutes"]
    }
    assert "started_from" not in digits.meta


def test_a_new_label_table_is_made_for_known_classes_where_it_is_asked_for(tmp_path, digits):
    run = task(tmp_path, init_from=str(digits.path), label_init="names", label_init_std=1.0)
    old, new = digits.model.state_dict(), run.model.state_dict()
    assert not (new[TABLE][:10] == old[TABLE][:10]).any() and torch.equal(new[TABLE][10], old[TABLE][10])
    assert all(torch.equal(new[name], old[name]) for name in new.keys() - {TABLE})
    assert "with a new label table" in run.start[0]


def test_other_classes_change_the_label_table_alone(tmp_path, digits):
    data = image_folder(tmp_path / "data", "7", "cat", "dog")
    run = task(tmp_path / "run", init_from=str(digits.path), data_dir=data)
    old, new = digits.model.state_dict(), run.model.state_dict()
    assert new.keys() == old.keys()
    for name in new.keys() - {TABLE}:
        assert torch.equal(new[name], old[name]), name
    assert new[TABLE].shape == (4, 48)
    assert torch.equal(new[TABLE][0], old[TABLE][7]) and torch.equal(new[TABLE][3], old[TABLE][10])
    assert not (new[TABLE][1:3, None] == old[TABLE]).all(dim=2).any()
    assert fit(run, run.settings) is not None


def test_classes_of_one_name_are_kept_apart_by_id(tmp_path, digits):
    shutil.copytree(digits.path, tmp_path / "old")
    meta = json.loads((tmp_path / "old" / "snapshot.json").read_text())
    meta["class_names"] = ["crane", "heron", "crane", "gull", "gull", *"56789"]
    (tmp_path / "old" / "snapshot.json").write_text(json.dumps(meta))
    old, model = digits.model.state_dict()[TABLE], task(tmp_path / "run", seed=1).model
    names = ["heron", "crane", "crane", "gull", *"abcdef"]
    said, _ = start_from(tmp_path / "old", model, class_names=names, objective="eps")
    new = model.state_dict()[TABLE]
    assert torch.equal(new[:3], old[[1, 0, 2]]) and not (new[3, None] == old).all(dim=1).any()
    assert "knows 3 of the 10 classes by name (not gull, of which there are 2 there and 1 here)" in said
    settings = TrainSettings(**TINY, label_init="names", label_init_std=1.0)
    table = torch.zeros(5, 48)
    _init_labels(table, ["crane", "heron", "Crane", "crane"], settings)
    assert len({tuple(row.tolist()) for row in table}) == 5
    assert torch.cosine_similarity(table[0], table[2], dim=0) > 0.3  # the word is still in both
    once = torch.zeros(3, 48)
    _init_labels(once, ["crane", "heron"], settings)
    assert torch.equal(table[:2], once[:2])


def test_another_image_size_recomputes_the_position_embedding(tmp_path, digits):
    run = task(tmp_path, init_from=str(digits.path), image_size=20)
    old, new = digits.model.state_dict(), run.model.state_dict()
    assert [name for name in new if new[name].shape != old[name].shape] == ["pos_embed"]
    assert torch.equal(new["pos_embed"], task(tmp_path, image_size=20).model.pos_embed)
    assert digits.model.grid == (4, 4) and run.model.grid == (10, 10)
    assert fit(run, run.settings) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vae": "d-emo-f8", "image_size": 16}, "3 channels .codec pixels., but the codec of this run has 4"),
        ({"model_options": {"depth": 2, "hidden_size": 48}}, "depth is 1 there, 2 here"),
        ({"model": "DiT-S-2"}, "block is i2rmb there, dit here"),
        ({"model_options": {**TINY["model_options"], "num_heads": 4}}, "num_heads is 3 there, 4 here"),
        ({"model_options": {**TINY["model_options"], "learn_sigma": False}}, "learn_sigma is True there, False here"),
        ({"init_from": "no/such/snapshot"}, "the snapshot folder no/such/snapshot does not exist"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(tmp_path, digits, changes, words):
    with pytest.raises(InputError, match=words):
        task(tmp_path, **{"init_from": str(digits.path), **changes})


def test_unconditional_training_sees_one_class_and_samples_without_naming_it(tmp_path, monkeypatch, capsys):
    data = image_folder(tmp_path / "data", ".", "more", count=3)
    run = task(tmp_path / "run", data_dir=data, unconditional=True)
    assert (len(run.images), run.images.class_names, run.model.config.num_classes) == (6, ["data"], 1)
    assert run.settings.label_dropout == 0 and run.draw(torch.Generator(), 50).drop_label.sum() == 0
    train_verb.run(run.settings)
    snapshot, said = tmp_path / "run" / "snapshots" / f"step-{run.settings.max_steps}", capsys.readouterr().out
    assert " class" not in said and said.endswith(f"sample --checkpoint {snapshot}\n")
    command = ["sample.py", "--checkpoint", str(snapshot), "--num-images", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "a.png")])
    runpy.run_path(str(ROOT / "scripts" / "sample.py"), run_name="__main__")
    assert "guidance 1\n" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert json.loads(picture.text["d-emo"])["classes"] == [0]
    monkeypatch.setattr(sys, "argv", [*command, "--guidance-scale", "2"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "sample.py"), run_name="__main__")
    assert stop.value.code == 2 and "without label dropout" in capsys.readouterr().err


def test_built_in_data_become_one_class_too(tmp_path):
    digits = open_dataset(dataset="digits", data_dir=None, image_size=8)
    one = open_dataset(dataset="digits", data_dir=None, image_size=8, one_class=True)
    assert isinstance(one, OneClass) and len(one) == len(digits) and one.class_names == ["digits"]
    assert torch.equal(one[5][0], digits[5][0]) and one[5][1] == one.label(5) == 0 != digits.label(5)
    assert train(tmp_path, unconditional=True, cache_latents=True).class_names == ["digits"]


def test_a_single_class_and_no_class_start_from_each_other(tmp_path, digits):
    single = task(tmp_path / "a", init_from=str(digits.path), unconditional=True)
    rows, old = single.model.state_dict()[TABLE], digits.model.state_dict()[TABLE]
    assert torch.equal(rows[0], old[10]) and torch.equal(rows[1], old[10])
    snapshot = fit(single, single.settings)
    trained = load_denoiser(snapshot).model.state_dict()[TABLE]
    assert not torch.equal(trained[0], trained[1])
    assert torch.equal(task(tmp_path / "b", init_from=str(snapshot)).model.state_dict()[TABLE][10], trained[0])


def test_a_flat_folder_without_unconditional_is_told_so(tmp_path):
    data = image_folder(tmp_path / "data", ".")
    with pytest.raises(InputError, match="no sub-folders.*`unconditional`"):
        task(tmp_path / "run", data_dir=data)


def test_what_the_data_decide_is_no_option_of_the_model(tmp_path):
    with pytest.raises(InputError, match="`model_options` names num_classes, which the data and the codec decide"):
        task(tmp_path, model_options={**TINY["model_options"], "num_classes": 20})


SHIPPED = str(ROOT / "d_emo/pretrained/demo-shapes")


def read(*flags, kind=TrainSettings):
    return parse_settings(kind, "", [*map(str, flags)])


def test_one_flag_brings_model_codec_size_objective_and_timesteps(tmp_path):
    settings = read("--init-from", SHIPPED, "--data-dir", tmp_path)
    assert (settings.model, settings.model_options, settings.vae) == ("D-EMOv2-Ti-2", {"depth": 8}, "d-emo-f8")
    assert (settings.image_size, settings.objective, settings.timestep_sampling) == (64, "flow", "logit-normal")
    assert settings.output_dir == f"results/D-EMOv2-Ti-2-{tmp_path.name}-64"
    assert (settings.batch_size, settings.learning_rate, settings.max_steps) == (256, 1e-4, 400_000)  # not its recipe
    assert settings.as_there() == (
        "Settings as there: `image_size` 64, `model` D-EMOv2-Ti-2, `model_options` {'depth': 8}, `vae` d-emo-f8, "
        "`objective` flow, `timestep_sampling` logit-normal, `logit_mean` 0.0, `logit_std` 1.0."
    )
    write_yaml(settings, tmp_path / "config.yaml")
    assert read("--config", tmp_path / "config.yaml") == settings


def test_a_flag_and_a_config_win_over_the_snapshot(tmp_path):
    (tmp_path / "x.yaml").write_text("image_size: 32\nobjective: eps\n")
    settings = read("--config", tmp_path / "x.yaml", "--init-from", SHIPPED, "--vae", "pixels")
    assert (settings.model, settings.vae, settings.image_size) == ("D-EMOv2-Ti-2", "pixels", 32)
    assert (settings.objective, settings.timestep_sampling) == ("eps", "uniform")  # that of flow is not for eps
    assert settings.as_there().endswith(
        "; other here: `image_size` 32 (there 64), `vae` pixels (there d-emo-f8), `objective` eps (there flow)."
    )
    added = read("--init-from", SHIPPED, "--model", "d-emov2-ti/2", "--model-options", "{window_size: 4}")
    assert added.model_options == {"depth": 8, "window_size": 4}
    assert read("--init-from", SHIPPED, "--model-options", "{depth: 12}").model_options == {"depth": 12}
    other = read("--init-from", SHIPPED, "--model", "DiT-S-2")
    assert (other.model_options, other.objective, other.vae, other.image_size) == (None, "eps", "d-emo-f8", 64)
    assert read("--init-from", SHIPPED, "--latents", tmp_path).vae is None


def test_a_snapshot_of_another_kind_or_with_damaged_settings_is_refused(tmp_path, digits):
    classifier = ROOT / "tests/data/artefacts/classifier"
    with pytest.raises(InputError, match="holds a classifier, not a denoiser"):
        DenoiserTask(read("--init-from", classifier, "--dataset", "digits"))
    shutil.copytree(digits.path, tmp_path / "old")
    (tmp_path / "old" / "config.yaml").write_text("vae: [1\n")
    with pytest.raises(InputError, match="--init-from: .*config.yaml cannot be used .*not YAML"):
        read("--init-from", tmp_path / "old")
    (tmp_path / "old" / "config.yaml").unlink()
    assert read("--init-from", tmp_path / "old").model == "D-EMOv2-S-2"


@pytest.mark.parametrize("words", ["lora:0", "lora", "some"])
def test_what_is_trained_is_all_head_or_an_adapter_and_needs_a_start(words, digits):
    with pytest.raises(InputError, match="--train must be all, head or lora:RANK such as lora:16, not"):
        read("--init-from", digits.path, "--train", words)
    with pytest.raises(InputError, match="--train head needs trained weights; name a snapshot with --init-from"):
        read("--train", "head")


def changed(one, other):
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


PARTS = ["head", pytest.param("lora:2", marks=pytest.mark.skipif(not find_spec("peft"), reason="needs PEFT"))]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_trained_saved_whole_and_resumed_exactly(tmp_path, digits, part, capsys):
    """What is frozen stays, the snapshot has the names of any other, and 2 + 2 steps are 4."""
    options = {"init_from": str(digits.path), "train": part, "max_steps": 4}
    run = task(tmp_path / "whole", **options)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert f"`train` {part}: {sum(run.model.get_parameter(n).numel() for n in trained):,} trainable" in run.start[2]
    whole = load_denoiser(fit(run, run.settings))
    old, new = digits.model.state_dict(), whole.model.state_dict()
    head = {TABLE, *(name for name in old if name.startswith("final_layer."))}
    weights = changed(dict(digits.model.named_parameters()), dict(whole.model.named_parameters()))
    linear = {f"{n}.weight" for n, m in digits.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert head <= trained and head <= weights
    assert weights == (head if part == "head" else head | linear)
    assert whole.meta["parameters"] == digits.meta["parameters"]
    train(tmp_path / "parts", **{**options, "max_steps": 2})
    parts = train(tmp_path / "parts", **options)
    torch.testing.assert_close(parts.model.state_dict(), new, rtol=0, atol=0)
    state = load_state(tmp_path / "parts/states/step-4")["model"]
    assert any("lora_A" in name for name in state) == (part != "head")
    train(tmp_path / "parts", **options)
    assert "nothing to do at step 4 of 4" in capsys.readouterr().out
    plain = task(tmp_path / "next", init_from=str(parts.path), model=None, model_options=None)  # as any other snapshot
    torch.testing.assert_close(plain.model.state_dict(), new, rtol=0, atol=0)


@pytest.mark.parametrize("part", PARTS)
def test_a_classifier_is_fine_tuned_too(tmp_path, part, capsys):
    options = {"init_from": str(ROOT / "tests/data/artefacts/classifier"), "dataset": "digits", "batch_size": 8,
               "max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "num_images": 8}
    run = ClassifierTask(ClassifierSettings(**options, train=part, output_dir=str(tmp_path / "run")))
    old = load_classifier(options["init_from"])
    assert run.settings.model == old.meta["model"]["name"] and "which knows" in run.start[0]
    snapshot = load_classifier(fit(run, run.settings))
    assert "slower than this machine could" not in capsys.readouterr().out  # adapters are no oversight
    moved = changed(old.model.state_dict(), snapshot.model.state_dict())
    assert {"head.weight", "head.bias"} <= moved
    assert ("stages.2.1.operator.proj.weight" in moved) == (part != "head")
    convolutions = {f"{n}.weight" for n, m in old.model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert convolutions and not convolutions & moved
    raw = open_classifier(str(snapshot.path), "raw").model.state_dict()
    assert raw.keys() == snapshot.model.state_dict().keys()


def test_a_package_that_a_snapshot_will_take_is_missed_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.hooks", None)
    with pytest.raises(PackageError, match="the installed libraries need another package .*diffusers.hooks"):
        DenoiserTask(TrainSettings())


def test_adapters_without_peft_are_refused_in_words(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"`train` lora:2 needs PEFT: pip install 'd-emo\[lora\]'"):
        task(tmp_path, init_from=str(digits.path), train="lora:2")


def test_adapters_larger_than_what_they_adapt_are_refused(digits, tmp_path):
    with pytest.raises(InputError, match="`train` lora:999: adapters of a rank above [1-9][0-9]* are larger than the"):
        task(tmp_path, init_from=str(digits.path), train="lora:999")


def test_epochs_are_passes_over_the_data(tmp_path):
    run = task(tmp_path, epochs=0.5, max_steps=None)
    assert run.settings.max_steps == round(0.5 * len(run.images) / 8) == 90
    assert TrainSettings(**{**TINY, "epochs": 0.5, "max_steps": 90}).resolve(images=1438).max_steps == 90
    with pytest.raises(InputError, match="`epochs` 0.5 over 1,438 images are 90 steps, but `max_steps` is 2; give one"):
        task(tmp_path, epochs=0.5)
    assert read("--epochs", "3").max_steps is None and read().max_steps == 400_000


@pytest.mark.parametrize("kind", [TrainSettings, ClassifierSettings, VAESettings])
def test_lr_is_the_learning_rate(kind):
    assert read("--lr", "0.25", kind=kind).learning_rate == 0.25


def test_a_batch_of_any_size_has_micro_batches_that_divide_it():
    sizes = {batch: micro_batch_of(TrainSettings(), batch, torch.device("cpu")) for batch in (3, 8, 11, 12, 256)}
    assert sizes == {3: 3, 8: 8, 11: 1, 12: 6, 256: 8}
    assert micro_batch_of(TrainSettings(), 12, torch.device("cuda")) == 12
