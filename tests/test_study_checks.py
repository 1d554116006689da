"""What a study refuses before it trains anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_study import JUDGE, ROOT, TINY, TRAIN, open_study, settings_of

from d_emo.config import StudySettings, parse_settings, write_yaml
from d_emo.data import Digits, ImageFolder
from d_emo.errors import InputError
from d_emo.lab.study import Study, measuring
from d_emo.lab.study.plan import plan_runs
from d_emo.latents import PixelCodec
from d_emo.latents import encode as write_latents


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"samplers": {"eps": "dpm+:20"}}, r"dpm\+:20 does not draw from the eps objective; use one of ddpm, .*dpm\+\+"),
    ({"samplers": {"flow": "ddim:20"}}, "ddim:20 does not draw from the flow objective; use one of euler, heun"),
    ({"samplers": {"eps": "ddim:0"}}, "ddim:0: .*positive"),
    ({"samplers": {"noise": "ddim:20"}}, "by objective .eps, flow, .*, not by 'noise'"),
    ({"encode": {"dataset": "digits", "imagesize": 8}}, "the study's encode: there is no setting 'imagesize'"),
    ({"encode": {"image_size": 8}}, "which images to encode; give `data_dir`"),
    ({"train": {**TRAIN, "tracker": "wandb"}}, "'D-EMO' has the tracker wandb"),
    ({"train": {**TRAIN, "label_dropout": 0.0}, "guidance_scale": 2.0}, "guidance_scale must be 1"),
    ({"norm_gap": ["DiT, flow"]}, "'DiT, flow' is of the flow objective"),
    ({"runs": {"x": {"objective": "four-step", "fd_features": "emov2:x", "init_from": "y", "label_dropout": 0}},
      "guidance_scale": 1.0}, "'x' is of the four-step objective, which goes on from a snapshot"),
    ({"judge": None, "reference": "none.npz"}, "reference none.npz does not exist"),
    ({"judge": None, "reference": __file__, "fid": {"metric": ["fid"]}}, "the study's fid: there is no setting 'met"),
    ({"judge": None, "reference": __file__, "fid": {"metrics": ["fit"]}}, "the study's fid: unknown metric 'fit'"),
    ({"judge": None, "reference": __file__, "fid": {"output": "x"}}, "fid must not have output"),
    ({"judge": None, "reference": __file__, "fid": {"scheduler": "ddim"}}, "fid's scheduler ddim does not draw from"),
])  # fmt: skip
def test_what_would_fail_after_the_training_is_refused_before_it(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        open_study(tmp_path, **changes)


def test_a_study_of_imagenet_asks_for_its_images_unless_it_only_plans_or_reports():
    config = ["--config", str(ROOT / "configs" / "study" / "imagenet256.yaml"), "--reference", __file__]
    for flags in (["--plan"], ["--report-only"], ["--data-dir", "IMAGENET/train"]):
        Study(parse_settings(StudySettings, "", [*config, *flags]))
    with pytest.raises(InputError, match="give `data_dir` FOLDER"):
        Study(parse_settings(StudySettings, "", config))


def pretend_training(folder: Path, *, step: int, leave_out: tuple[str, ...] = (), **changes) -> None:
    """What a run of the study with these settings leaves behind after so many steps."""
    run = plan_runs(settings_of(folder, train={**TRAIN, **changes}))[0]
    (run.folder / "snapshots" / f"step-{step}").mkdir(parents=True)
    write_yaml(run.training, run.folder / "config.yaml")
    values = yaml.safe_load((run.folder / "config.yaml").read_text())
    for name in leave_out:
        del values[name]
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**values, "vae": "pixels", "image_size": 8}))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"learning_rate": 0.5}, "'D-EMO', seed 3, was trained with learning_rate 0.05, where the study says 0.5; give"),
    ({"batch_size": 8, "ema_decay": 0.6}, "with batch_size 4, where the study says 8; ema_decay 0.5, where"),
    ({"micro_batch_size": 2}, "micro_batch_size 4, where the study says 2"),
    ({"model_options": {**TINY, "depth": 2}}, "model_options {'depth': 1, "),
    ({"weight_decay": 0.1}, "weight_decay 0.0, where the study says 0.1"),
    ({"max_steps": 2}, "max_steps 4, where the study says 2"),
])  # fmt: skip
@pytest.mark.parametrize("step", [2, 4])
def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path, changes, sentence, step):
    pretend_training(tmp_path, step=step, leave_out=("weight_decay", "logit_mean"))
    open_study(tmp_path)
    open_study(tmp_path, train={**TRAIN, **changes}, plan=True)
    with pytest.raises(InputError, match=sentence) as refusal:
        open_study(tmp_path, train={**TRAIN, **changes}, report_only=True)
    assert f"remove {tmp_path / 'study' / 'runs' / 'd-emo-seed3'} to train it again" in str(refusal.value)


def test_settings_that_do_not_decide_the_result_may_change(tmp_path):
    pretend_training(tmp_path, step=4)
    open_study(tmp_path, train={**TRAIN, "log_every": 3, "num_workers": 1, "state_every": 9, "max_steps": 6})
    (tmp_path / "study").rename(tmp_path / "moved")
    moved = {"output_dir": str(tmp_path / "moved")}
    open_study(tmp_path, **moved)
    with pytest.raises(InputError, match="batch_size"):
        open_study(tmp_path, **moved, train={**TRAIN, "batch_size": 8})
    run = tmp_path / "moved" / "runs" / "d-emo-seed3"
    (run / "config.yaml").write_text("[")
    with pytest.raises(InputError, match="config.yaml is damaged.*the study's run 'D-EMO', seed 3, is trained again"):
        open_study(tmp_path, **moved)
    (run / "snapshots" / "step-4").rmdir()
    open_study(tmp_path, **moved)  # nothing was trained


def test_with_a_cosine_schedule_more_steps_are_another_run(tmp_path):
    cosine = {"schedule": "cosine", "max_steps": 4}
    pretend_training(tmp_path, step=4, **cosine)
    open_study(tmp_path, train={**TRAIN, **cosine})
    with pytest.raises(InputError, match="max_steps 4, where the study says 6"):
        open_study(tmp_path, train={**TRAIN, **cosine, "max_steps": 6})


@pytest.mark.parametrize(("encode", "sentence"), [
    ({"dataset": "digits", "image_size": 16, "vae": "pixels"}, "latents were encoded with image_size 8, where .* 16"),
    ({"dataset": "digits", "image_size": 8, "vae": "d-emo-f8"}, "vae pixels, where the study says d-emo-f8"),
    ({"dataset": "shapes"}, "dataset digits, where the study says shapes"),
    ({"data_dir": "photos"}, "dataset digits, where the study says folder"),
])  # fmt: skip
def test_latents_of_other_settings_are_not_taken_for_these(tmp_path, encode, sentence):
    write_latents(Digits(8), PixelCodec(), tmp_path / "study" / "latents", device=torch.device("cpu"))
    open_study(tmp_path)
    open_study(tmp_path, encode={"dataset": "digits"})
    with pytest.raises(InputError, match=sentence):
        open_study(tmp_path, encode=encode)


# ---- a classifier that measures --------------------------------------------------------------------------------------


def of_photos(folder, photos, **changes):
    """Settings of a study on a folder of one's own, with a classifier of it."""
    judge = {**JUDGE, "dataset": "shapes", "data_dir": str(photos / "train"), "image_size": 32,
             "output_dir": str(folder / "own")}  # fmt: skip
    (folder / "own.yaml").write_text(yaml.safe_dump(judge))
    encode = {"data_dir": str(photos / "train"), "image_size": 8, "vae": "pixels"}
    train = {**TRAIN, "validate_dir": str(photos / "val"), "validate_every": 2}
    return {"encode": encode, "judge": str(folder / "own.yaml"), "train": train} | changes


def test_a_classifier_of_other_classes_is_refused_before_anything_is_trained(tmp_path, photos):
    own = of_photos(tmp_path, photos)
    open_study(tmp_path, **own)
    for changes, words in (
        ({"judge": str(tmp_path / "judge.yaml")}, r"of 2 classes, which are not the 10 of `judge` .* \(0, 1, 2\)"),
        ({"encode": {"dataset": "digits", "image_size": 8, "vae": "pixels"}}, "of 10 classes, which are not the 2"),
        ({"train": {**TRAIN, "unconditional": True}}, "of 1 classes, which are not the 2"),
        ({"norm_gap": ["D-EMO"], "train": TRAIN}, "needs held-out images: `validate_dir`"),
    ):
        with pytest.raises(InputError, match=words):
            open_study(tmp_path, **{**own, **changes})
    write_latents(ImageFolder(photos / "train", 8), PixelCodec(), tmp_path / "stored", device=torch.device("cpu"))
    with pytest.raises(InputError, match="trained on latents of 'folder', whose images `judge` needs"):
        open_study(tmp_path, **{**own, "encode": None, "train": {**TRAIN, "latents": str(tmp_path / "stored")}})
    assert not (tmp_path / "study").exists() and not (tmp_path / "own").exists()


def test_a_study_on_a_folder_of_ones_own_is_measured_against_its_images(tmp_path, photos, monkeypatch):
    settings = settings_of(tmp_path, **of_photos(tmp_path, photos, num_images=4))
    monkeypatch.setattr(measuring, "ClassifierFeatures", lambda *_, **__: SimpleNamespace(class_names=["ant", "bee"]))
    monkeypatch.setattr(measuring, "ClassifierMetrics", lambda features, real, **_: real)
    meter = measuring.Meter(settings, tmp_path)
    opened = SimpleNamespace(class_names=["ant", "bee"], meta={"data": "folder"}, image_size=8, path=tmp_path)
    real = meter._open_metrics(opened)
    assert real.files[0] == photos / "train" / "ant" / "0.png"
    assert meter._held_out.files[0] == photos / "val" / "ant" / "0.png"
