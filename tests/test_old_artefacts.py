"""What 6b77499 wrote loads and goes on: snapshots, training states, latents, references, pictures and metrics.

tests/data/artefacts holds tiny ones, expected.json and expected.npz what that commit made of them. What is only loaded
must be equal to the bit; what is computed must be so on the kind of machine that computed it then, and close elsewhere.
"""

import hashlib
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from d_emo.cli import run_verb
from d_emo.io.snapshot import load_classifier, load_denoiser
from d_emo.io.training_state import load_state
from d_emo.latents import LatentDataset

OLD = Path(__file__).parent / "data" / "artefacts"
EXPECTED, ARRAYS = json.loads((OLD / "expected.json").read_text()), np.load(OLD / "expected.npz")
SETTINGS = EXPECTED["settings"]
VERBS = {"train_dit": "train", "train_classifier": "train-classifier"}


def is_same_machine() -> bool:
    then, now = EXPECTED["machine"], Path("/proc/cpuinfo")
    fields = [line.partition(":")[2].strip() for line in now.read_text().splitlines()[:8]] if now.exists() else []
    return (
        {then["cpu"][key] for key in ("Vendor ID", "CPU family", "Model", "Model name")} <= set(fields)
        and then["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
        and [then["torch"], then["numpy"], then["python"]]
        == [torch.__version__, np.__version__, platform.python_version()]
    )


SAME = is_same_machine()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A copy of the artefacts as working directory, and as many threads as then."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    before = torch.get_num_threads()
    torch.set_num_threads(EXPECTED["machine"]["threads"])
    yield tmp_path / "old"
    torch.set_num_threads(before)


def sha256(value) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def load(name: str) -> torch.nn.Module:
    return (load_classifier if name == "classifier" else load_denoiser)(name).model


@pytest.mark.parametrize("name", EXPECTED["weights"])
def test_snapshots_load_to_the_bit_and_compute_the_same(name):
    model, wanted = load(name), ARRAYS[f"forward/{name}"]
    assert {key: sha256(value) for key, value in model.state_dict().items()} == EXPECTED["weights"][name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if name == "classifier":
            output = model(torch.randn(4, 3, 64, 64, generator=generator))
        else:
            noisy = torch.randn(2, *model.latent_shape, generator=generator)
            output = model(noisy, torch.tensor([100, 700]), torch.tensor([SETTINGS["class"], model.null_class])).sample
    assert np.abs(output.numpy() - wanted).max() <= (0 if SAME else 1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", EXPECTED["images"])
def test_a_seed_gives_the_picture_that_it_gave(name, tmp_path):
    snapshot, scheduler = name.split("/")
    seeds, wanted = SETTINGS["seeds"], ARRAYS[f"images/{name}"].astype(int)
    run_verb("sample", [
        "--checkpoint", snapshot, "--class", str(SETTINGS["class"]), "--num-images", str(len(seeds)), "--seed",
        str(seeds[0]), "--scheduler", scheduler, "--steps", str(SETTINGS["steps"]), "--guidance-scale",
        str(SETTINGS["guidance_scale"]), "--format", "png", "--output", str(tmp_path / "drawn"),
    ])  # fmt: skip
    drawn = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / "drawn").rglob("*.png"))])
    assert np.abs(drawn - wanted).max() <= (0 if SAME else 2)


def logged(run: Path) -> dict[str, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs"), size_guidance={"scalars": 0}).Reload()
    return {tag: {str(event.step): event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def check_ended(run: Path, expected: dict) -> None:
    state = load_state(run / "states" / f"step-{expected['step']}")
    for key, weights in (("model", state["model"]), ("ema", state["ema"]["model"])):
        assert weights.keys() == expected[key].keys()
        for name, (digest, norm) in expected[key].items():
            assert weights[name].double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name
            assert not SAME or sha256(weights[name]).startswith(digest), name
    losses = logged(run)
    for tag, values in expected["logged"].items():
        assert losses[tag] == (values if SAME else pytest.approx(values, rel=1e-4, abs=1e-5)), tag
    moments = {f"{index}.{key}": value for index, row in state["optimizer"]["state"].items()
               for key, value in row.items()}
    assert moments.keys() == expected["optimizer"].keys() and state["ema"]["step"] == expected["ema_step"]
    assert not SAME or all(sha256(moments[key]).startswith(digest) for key, digest in expected["optimizer"].items())


@pytest.mark.parametrize("name", EXPECTED["continued"])
def test_a_run_goes_on_as_it_did(name, folder):
    script, *flags = SETTINGS["runs"][name]
    config = folder / name / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    del settings["sync_batchnorm"]  # as if it had been added since, with what was done until then as default
    config.write_text(yaml.safe_dump(settings))
    run_verb(VERBS[script], [*flags, "--output-dir", str(folder / name), "--max-steps", "6"])
    check_ended(folder / name, EXPECTED["continued"][name])


def test_latents_load_to_the_bit_and_train_as_they_did(tmp_path):
    latents, expected = LatentDataset("latents"), EXPECTED["latents"]
    assert (len(latents), latents.class_names) == (expected["images"], expected["class_names"])
    assert [latents[index][1] for index in range(len(latents))] == expected["labels"]
    assert {str(index): sha256(latents[index][0]) for index in range(len(latents))} == expected["moments"]
    script, *flags = SETTINGS["from_latents"]
    run_verb(VERBS[script], [*flags, "--output-dir", str(tmp_path / "run")])
    check_ended(tmp_path / "run", EXPECTED["from_latents"])


def test_a_reference_measures_what_it_measured(tmp_path):
    stored = np.load("reference.npz")
    assert {key: sha256(stored[key]) for key in stored.files} == {
        key: value["sha256"] for key, value in EXPECTED["reference"].items()
    }
    run_verb("fid", ["--samples", "samples.npz", *SETTINGS["fid"], "--output", str(tmp_path / "fid.json")])
    report, expected = json.loads((tmp_path / "fid.json").read_text()), EXPECTED["fid_of_samples"]
    for key in ("fid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std"):
        assert report[key] == (expected[key] if SAME else pytest.approx(expected[key], rel=1e-3, abs=1e-6)), key
    assert report["features"] == expected["features"]
