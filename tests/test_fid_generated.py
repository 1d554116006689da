"""``scripts/fid.py --checkpoint`` and ``scripts/make_reference.py``: draw and measure in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from evaluation_sets import read_all

from d_emo.cli import run_verb
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.evaluation import draw_labels
from d_emo.io.snapshot import load_denoiser, save_classifier, save_denoiser
from d_emo.models import create_model
from d_emo.sampling import Sampler

ROOT = Path(__file__).parents[1]
META = {"step": 5, "weights": "ema", "codec": "pixels", "image_size": 8, "class_names": list("abcdefghij")}
METRICS = "fid,isc,prc,kid"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A denoiser of 8 x 8 pixels, a classifier whose features are measured, and a reference of digits."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    denoiser = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, sample_size=8, num_classes=10, in_channels=3)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    save_denoiser(
        folder / "snap", denoiser.eval(), scheduler=scheduler, meta=META, settings=TrainSettings()
    )
    options = {"num_classes": 10, "depths": [1, 1, 1, 1], "window_size": 1}
    classifier = create_model("emov2_1m", **options).eval()
    for name, parameter in classifier.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)  # as layer scales start, all features are the same
    meta = {"class_names": META["class_names"], "image_size": 32, "step": 1, "weights": "ema"}
    meta["model"] = {"name": "emov2_1m", **options}
    save_classifier(folder / "judge", classifier, meta=meta, settings=TrainSettings())
    run_verb("reference", [
        "--output", str(folder / "ref.npz"), "--dataset", "digits", "--image-size", "8", "--num-images", "90",
        "--kept-images", "30", "--features", f"emov2:{folder / 'judge'}",
    ])  # fmt: skip
    return {name: folder / name for name in ("snap", "judge", "ref.npz")}


def arguments(made: dict[str, Path], output: Path, *more: object) -> list[str]:
    fixed = [
        "--checkpoint", made["snap"], "--reference", made["ref.npz"], "--features", f"emov2:{made['judge']}",
        "--metrics", METRICS, "--scheduler", "dpm++", "--steps", 2, "--output", output,
        "--work-dir", output.with_suffix(""),
    ]  # fmt: skip
    return [str(each) for each in (*fixed, *more)]


def numbers(output: Path) -> dict:
    written = json.loads(output.read_text())
    written.pop("images_per_second")
    return written


def test_reference_of_built_in_data(made: dict[str, Path]) -> None:
    with np.load(made["ref.npz"], allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (30, 8, 8, 3) and int(archive["num_images"]) == 90
        assert str(archive["features"]).startswith(f"emov2:{made['judge']}@") and archive["arr_0"].std() > 50


def test_draws_and_measures(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = partial(run_verb, "fid")
    output, png = tmp_path / "one.json", tmp_path / "png"
    main(arguments(made, output, "--num-images", 24, "--save-png", png, "--seed", 7, "--labels", "balanced"))
    printed = capsys.readouterr()
    assert "FID-24" in printed.out and f"samples       {made['snap']} (step 5)" in printed.out
    assert "sampling      dpm++, 2 steps, guidance 1.0, seed 7, balanced labels, ema weights" in printed.out
    assert "| dpm++ | 2 | 1.0 | 7 | balanced | ema |" in printed.out and "warning: FID falls" in printed.err
    written = numbers(output)
    assert written["num_samples"] == 24 and (written["num_reference"], written["num_compared"]) == (90, 30)
    images = read_all(png)
    main(arguments(made, tmp_path / "later.json", "--num-images", 12, "--save-png", tmp_path / "more", "--seed", 12))
    later = read_all(tmp_path / "more")  # image i starts from the noise of seed + i; but labels are random here
    random = draw_labels("random", range(12), seed=12, num_classes=10)
    same = [index for index in range(12) if random[index] == (index + 5) % 10]
    assert same
    torch.testing.assert_close(later[same].float(), images[5:17][same].float(), rtol=0, atol=1)
    main([
        "--samples", str(png), "--reference", str(made["ref.npz"]), "--features", f"emov2:{made['judge']}", "--metrics",
        METRICS, "--output", str(tmp_path / "stored.json"),
    ])  # fmt: skip
    stored = numbers(tmp_path / "stored.json")
    assert stored["sampling"] == written["sampling"]
    assert stored["fid"] == pytest.approx(written["fid"], rel=1e-4)


def test_two_processes_measure_like_one(made: dict[str, Path], tmp_path: Path) -> None:
    run_verb("fid", arguments(made, tmp_path / "one.json", "--num-images", 300))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "fid.py")]
    done = subprocess.run(
        [*command, *arguments(made, tmp_path / "two.json", "--num-images", 300)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes shared the work" in done.stderr
    assert done.stdout.count("FID-300") == 2  # text and table, once each
    assert numbers(tmp_path / "two.json") == numbers(tmp_path / "one.json")


@pytest.mark.slow
def test_a_killed_measurement_goes_on(made: dict[str, Path], tmp_path: Path) -> None:
    whole = arguments(made, tmp_path / "whole.json", "--num-images", 1500)
    run_verb("fid", whole)
    killed = arguments(made, tmp_path / "killed.json", "--num-images", 1500)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "fid.py"), *killed], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not (tmp_path / "killed" / "features-0000256.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed.json").exists()
    assert 2 <= len(list((tmp_path / "killed").glob("features-*"))) < 6
    run_verb("fid", killed)
    assert numbers(tmp_path / "killed.json") == numbers(tmp_path / "whole.json")


def test_settings_are_never_mixed(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main, work = partial(run_verb, "fid"), ["--work-dir", str(tmp_path / "work"), "--num-images", "12"]
    main(arguments(made, tmp_path / "half.json", *work, "--mixed-precision", "bf16", "--guidance-channels", "3",
                   "--guidance-scale", "2", "--guidance-interval", "0.1", "0.9"))  # fmt: skip
    assert "guidance 2.0 on 3 channels from 0.1 to 0.9" in capsys.readouterr().out
    half = numbers(tmp_path / "half.json")
    assert half["sampling"]["mixed_precision"] == "bf16" and half["sampling"]["guidance_channels"] == "3"
    for other in (["--mixed-precision", "no"], ["--compile"], ["--guidance-channels", "all"]):
        same = ["--mixed-precision", "bf16", "--guidance-scale", "2", "--guidance-interval", "0.1", "0.9"]
        with pytest.raises(InputError, match="of other settings"):
            main(arguments(made, tmp_path / "o.json", *work, *same, "--guidance-channels", "3", *other))
    main(arguments(made, tmp_path / "full.json", "--num-images", "12", "--guidance-scale", "2",
                   "--guidance-interval", "0.1", "0.9"))  # fmt: skip
    assert numbers(tmp_path / "full.json")["fid"] not in (half["fid"], pytest.approx(half["fid"], rel=1e-9))


def test_batch_norms_are_folded(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def images(sampler, *args, **kwargs):
        seen.extend(isinstance(module, torch.nn.BatchNorm2d) for module in sampler.model.modules())
        return original(sampler, *args, **kwargs)

    original = Sampler.images
    monkeypatch.setattr(Sampler, "images", images)
    run_verb("fid", arguments(made, tmp_path / "o.json", "--num-images", 12))
    assert seen and not any(seen)


def test_unless_told_otherwise_it_draws_in_the_250_steps_of_tables(made, tmp_path, monkeypatch) -> None:
    def images(sampler, *args, **kwargs):
        raise InputError(f"{sampler.steps} steps")

    monkeypatch.setattr(Sampler, "images", images)
    with pytest.raises(InputError, match="^2 steps"):
        run_verb("fid", arguments(made, tmp_path / "o.json", "--num-images", 12))
    words = arguments(made, tmp_path / "default.json", "--num-images", 12)
    del words[words.index("--steps"):words.index("--steps") + 2]
    with pytest.raises(InputError, match="^250 steps"):
        run_verb("fid", words)


def test_a_snapshot_of_nan_or_without_null_class_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    snapshot = load_denoiser(made["snap"])
    scheduler = DDPMScheduler.from_config(snapshot.scheduler_config)
    for name, meta, sentence in (
        ("alone", {**META, "label_dropout": 0.0}, "needs a null class"),
        ("bad", META, "holds NaN or infinite values, in final_layer"),
    ):
        save_denoiser(tmp_path / name, snapshot.model, scheduler=scheduler, meta=meta, settings=TrainSettings())
        more = ["--num-images", 12, "--checkpoint", tmp_path / name, "--guidance-scale", "1.5"]
        with pytest.raises(InputError, match=sentence):
            run_verb("fid", arguments(made, tmp_path / "o.json", *more))
        torch.nn.init.constant_(snapshot.model.final_layer.linear.weight, float("nan"))
    assert not list((tmp_path / "o").glob("features*"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--guidance-interval", "0.7", "0.2"], "--guidance-interval must be two rising numbers"),
        (["--guidance-interval", "0.7"], "--guidance-interval must be two rising numbers"),
        (["--scheduler", "unipc", "--steps", "1000"], "at most 999 steps"),
        (["--samples", "x"], "give either --samples .* or --checkpoint"),
        (["--num-images", "1"], "1 images are too few for Frechet Inception Distance .* at least 2"),
        (["--num-images", "9"], "9 images are too few for Inception Score .* at least 10"),
        (["--steps", "0"], "--steps must be at least 1 and at most 1000, not 0"),
        (["--steps", "1001"], "--steps must be at least 1 and at most 1000, not 1001"),
        (["--guidance-scale", "-1"], "--guidance-scale must be at least 0, not -1"),
        (["--guidance-scale", "nan"], "--guidance-scale must be a number, not nan"),
        (["--num-images", "3", "--metrics", "prc"], "3 images are too few for precision and recall .* at least 4"),
        (["--metrics", "fid", "clip"], "unknown metric 'clip'; known are fid, sfid, isc, prc, kid"),
        (["--metrics", ","], "--metrics names nothing"),
        (["--labels", "uniform"], "labels"),
        (["--scheduler", "karras"], "--scheduler must be one of .* not karras"),
        (["--metrics", "sfid"], "cannot be had of emov2"),
        (["--checkpoint", "none"], "--checkpoint none does not exist"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    ],
)
def test_bad_arguments(made: dict[str, Path], tmp_path: Path, more: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        run_verb("fid", [*arguments(made, tmp_path / "o.json", "--num-images", 20), *more])
    assert "\n" not in str(raised.value) and not (tmp_path / "o.json").exists()
    assert not (tmp_path / "o").exists()  # nothing was drawn


def test_what_says_how_to_draw_is_refused_where_nothing_is_drawn(tmp_path: Path) -> None:
    flags = {"--save-npz": "x", "--save-png": "x", "--work-dir": "x", "--steps": 20, "--guidance-scale": 4, "--seed": 1,
             "--scheduler": "ddim", "--labels": "balanced", "--compile": "true"}  # fmt: skip
    for flag, value in flags.items():
        with pytest.raises(InputError, match=f"{flag} is for images drawn from a --checkpoint"):
            run_verb("fid", ["--samples", str(tmp_path), "--reference", "r", flag, str(value)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data-dir", "{tmp}/none"], "--data-dir .*none does not exist"),
        (["--image-size", "4"], "--image-size must be at least 8"),
        (["--num-images", "1"], "at least two"),
        (["--dataset", "digits", "--num-images", "5000"], "5000 images were asked for .* holds 1438"),
        (["--output", "{tmp}"], "is a folder, where a file is to be written"),
        (["--output", "{tmp}/none/r.npz"], "the folder .*none does not exist"),
        (["--output", "{tmp}/r.txt"], "r.txt must end in .npz"),
        (["--kept-images", "-1"], "--kept-images must be at least 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--features", "clip"], "unknown --features 'clip'"),
    ],
)
def test_bad_reference_arguments(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    arguments = [each.replace("{tmp}", str(tmp_path)) for each in ["--output", "{tmp}/r.npz", *arguments]]
    with pytest.raises(InputError, match=sentence):
        run_verb("reference", arguments)
    assert list(tmp_path.iterdir()) == []
