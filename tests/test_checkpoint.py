import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import d_emo
from d_emo.config import TrainSettings
from d_emo.errors import InputError, PackageError, unmet
from d_emo.files import write_folder
from d_emo.io.snapshot import (
    SHIPPED_SNAPSHOT,
    load_classifier,
    load_denoiser,
    newest_denoiser,
    save_classifier,
    save_denoiser,
)
from d_emo.io.training_state import find_state, load_state, save_state, states_until
from d_emo.models import Denoiser, create_model
from d_emo.tables import FRAMES, FrameRow

META = {"step": 5, "weights": "ema", "codec": "pixels", "image_size": 8, "class_names": list("0123456789")}


@pytest.fixture
def snapshot(tmp_path, tiny_denoiser):
    folder = tmp_path / "run" / "snapshots" / "step-5"
    save_denoiser(
        folder, tiny_denoiser, scheduler=DDPMScheduler(), meta=META, settings=TrainSettings()
    )
    return folder


def test_denoiser_snapshot_round_trip(snapshot, tiny_denoiser):
    loaded = load_denoiser(snapshot)
    torch.testing.assert_close(loaded.model.state_dict(), tiny_denoiser.state_dict(), rtol=0, atol=0)
    assert not loaded.model.training
    assert (loaded.codec, loaded.image_size, loaded.class_names) == ("pixels", 8, META["class_names"])
    assert (snapshot / "README.md").read_text().startswith("---\nlibrary_name: d-emo")


def test_classifier_snapshot_round_trip(tmp_path):
    model = create_model("emov2_1m", num_classes=3).eval()
    meta = {"step": 1, "weights": "ema", "image_size": 32, "class_names": ["a", "b", "c"]}
    save_classifier(tmp_path / "c", model, meta=meta, settings=TrainSettings())
    loaded = load_classifier(tmp_path / "c")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    with pytest.raises(InputError, match="holds a classifier, not a denoiser"):
        load_denoiser(tmp_path / "c")


def test_a_run_folder_stands_for_its_newest_snapshot(snapshot, tiny_denoiser):
    later = snapshot.with_name("step-40")
    meta = {**META, "step": 40}
    save_denoiser(
        later, tiny_denoiser, scheduler=DDPMScheduler(), meta=meta, settings=TrainSettings()
    )
    assert load_denoiser(snapshot.parents[1]).meta["step"] == 40
    assert newest_denoiser(snapshot.parents[2]) == later


def test_a_run_without_a_snapshot_says_when_there_will_be_one(tmp_path):
    (tmp_path / "run" / "states").mkdir(parents=True)
    with pytest.raises(InputError, match=r"the run .*run has no snapshot yet; training writes one every `snapshot_eve"):
        load_denoiser(tmp_path / "run")


def test_without_snapshots_the_shipped_one_is_taken(tmp_path):
    assert newest_denoiser(tmp_path) == SHIPPED_SNAPSHOT


@pytest.mark.parametrize("key", ["class_names", "image_size", "step", "weights", "codec", "kind"])
def test_a_snapshot_that_says_too_little_of_itself_is_refused_by_key(snapshot, key):
    meta = json.loads((snapshot / "snapshot.json").read_text())
    del meta[key]
    (snapshot / "snapshot.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=f"snapshot.json lacks '{key}'"):
        load_denoiser(snapshot)


@pytest.mark.parametrize("names", [[], ["a"]])
def test_names_of_another_number_of_classes_are_refused(snapshot, names):
    meta = json.loads((snapshot / "snapshot.json").read_text())
    (snapshot / "snapshot.json").write_text(json.dumps({**meta, "class_names": names}))
    with pytest.raises(InputError, match=f"names {len(names)} classes, but its denoiser has 10"):
        load_denoiser(snapshot)


def test_a_snapshot_is_not_called_damaged_where_a_package_is_missing(snapshot, monkeypatch):
    def without_transformers(*_, **__):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    words = r"^the installed libraries need another package \(No module named .*\): pip install transformers$"
    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(Denoiser, name, without_transformers)
        with pytest.raises(PackageError, match=words):
            load_denoiser(snapshot)
    monkeypatch.setattr("d_emo.weights.import_module", without_transformers)
    with pytest.raises(PackageError, match=words):
        load_denoiser(snapshot)


def test_a_package_that_a_class_of_the_users_own_needs_is_not_said_to_be_a_librarys(snapshot, monkeypatch):
    def without_theirs(*_):
        raise ModuleNotFoundError("No module named 'theirs'", name="theirs")

    monkeypatch.setattr("d_emo.io.snapshot.load", without_theirs)
    with pytest.raises(PackageError, match=r"^the snapshot .* needs what cannot be imported here \(.*'theirs'\)$"):
        load_denoiser(snapshot)


@pytest.mark.parametrize(("error", "words"), [
    (ModuleNotFoundError("No module named 'a'", name="a"), "the installed libraries need another package (No module "
                                                           "named 'a'): pip install a"),
    (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "the installed libraries need another package (No "
                                                               "module named 'a.b'): pip install -U a"),
    (ImportError("cannot import name 'B' from 'a'", name="a"), "a cannot be imported (cannot import name 'B' from "
                                                               "'a'): pip install -U a"),
    (ImportError("libx.so is missing"), "a package cannot be imported (libx.so is missing)"),
])  # fmt: skip
def test_an_import_that_fails_within_a_library_is_told_with_its_remedy(error, words):
    assert str(unmet(error)) == words


@pytest.mark.parametrize("blocked", ["diffusers.hooks.faster_cache", "diffusers.hooks.hooks"])
@pytest.mark.parametrize("arguments", [
    ["sample", "--output", "out.png"], ["train-vae", "--output-dir", "out"],
])  # fmt: skip
def test_what_diffusers_itself_cannot_import_is_one_sentence(arguments, blocked, tmp_path):
    code = f"import sys; sys.modules[{blocked!r}] = None; from d_emo.cli import main; main(None, {arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(Path(d_emo.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "the installed libraries need another package" in done.stderr and blocked in done.stderr


def test_damaged_snapshots_are_refused_in_a_sentence(snapshot, tmp_path):
    weights = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damage in (
        lambda: weights.write_bytes(whole[: len(whole) // 2]),
        lambda: weights.unlink(),
        lambda: weights.write_bytes(b""),
        lambda: (weights.write_bytes(whole), (snapshot / "transformer" / "config.json").write_text("{")),
        lambda: (snapshot / "transformer" / "config.json").write_text('{"_class_name": []}'),  # a TypeError, of all
        lambda: (snapshot / "snapshot.json").write_text("[]"),
        lambda: (snapshot / "snapshot.json").write_text(json.dumps({"kind": "denoiser"})),
        lambda: (snapshot / "snapshot.json").write_text(json.dumps({**META, "kind": "denoiser", "codec": None})),
        lambda: (snapshot / "snapshot.json").write_text(json.dumps({**META, "kind": "denoiser", "format": 2})),
    ):
        damage()
        with pytest.raises(InputError, match="damaged or incomplete") as caught:
            load_denoiser(snapshot)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the snapshot folder .* does not exist"):
        load_denoiser(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a snapshot"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(("file", "change"), [
    ("transformer/diffusion_pytorch_model.safetensors", lambda content: content[:-2] + bytes([content[-2] ^ 1, 0])),
    ("transformer/config.json", lambda content: content.replace(b'"window_size": 8', b'"window_size": 9')),
    ("scheduler/scheduler_config.json", lambda content: content.replace(b'"beta_end": 0.02', b'"beta_end": 0.03')),
])  # fmt: skip
def test_a_snapshot_that_is_not_what_was_written_is_refused(snapshot, file, change):
    before, meta = (snapshot / file).read_bytes(), json.loads((snapshot / "snapshot.json").read_text())
    (snapshot / file).write_bytes(change(before))
    assert (snapshot / file).read_bytes() != before
    with pytest.raises(InputError, match=f"the checksum of {file} is not the one in snapshot.json"):
        load_denoiser(snapshot)
    del meta["sha256"]  # as older snapshots have it
    (snapshot / "snapshot.json").write_text(json.dumps(meta))
    load_denoiser(snapshot)


def test_states_round_trip_and_rotate(tmp_path):
    own, others = [], ("step-4-backup", "step-7", "step-old")
    for name in others:  # which this run did not write
        (tmp_path / name).mkdir()
    for step in (1, 2, 10):
        save_state(tmp_path, step, {"step": step, "x": torch.arange(step)}, own=own)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(["step-10", "step-2", *others])
    assert [folder.name for folder in states_until(tmp_path, 7)] == ["step-2", "step-7"]
    assert find_state(tmp_path) == tmp_path / "step-10"
    assert torch.equal(load_state(tmp_path / "step-10")["x"], torch.arange(10))


@pytest.mark.parametrize("damage", ["flip", "cut", "no state", "no manifest", "bad manifest"])
def test_a_damaged_state_is_named_and_passed_over(tmp_path, capsys, damage):
    for step in (1, 2):
        save_state(tmp_path, step, {"step": step, "x": torch.zeros(1000)}, own=[])
    file, manifest = tmp_path / "step-2" / "state.pt", tmp_path / "step-2" / "manifest.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: file.write_bytes(content),
        "cut": lambda: file.write_bytes(content[:100]),
        "no state": file.unlink,
        "no manifest": manifest.unlink,
        "bad manifest": lambda: manifest.write_text("{"),
    }[damage]()
    assert find_state(tmp_path) == tmp_path / "step-1"
    assert "step-2" in capsys.readouterr().out
    with pytest.raises(InputError, match="step-2"):
        load_state(tmp_path / "step-2")
    with pytest.raises(InputError, match="a training state"):
        load_denoiser(tmp_path / "step-1")


def test_an_interrupted_write_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "thing"
    write_folder(folder, lambda temporary: (temporary / "a").write_text("old"))

    def fail(temporary):
        (temporary / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_folder(folder, fail)
    assert (folder / "a").read_text() == "old"


def test_a_snapshot_is_opened_by_the_class_that_its_config_names(tmp_path, tiny_denoiser, monkeypatch):
    class Framed(Denoiser):
        """Another frame."""

    model = Framed.from_config(tiny_denoiser.config)
    save_denoiser(tmp_path / "s", model, scheduler=DDPMScheduler(), meta=META, settings=TrainSettings())
    with pytest.raises(InputError, match="unknown denoiser 'Framed'; known are Denoiser"):
        load_denoiser(tmp_path / "s")
    monkeypatch.setattr(FRAMES, "_rows", dict(FRAMES._rows))
    FRAMES.register(FrameRow(name="Framed", denoiser=Framed))
    assert type(load_denoiser(tmp_path / "s").model) is Framed
