"""What a study refuses before it trains anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_study import ROOT, TINY, TRAIN, open_study, settings_of

from d_emo.config import StudySettings, parse_settings, write_yaml
from d_emo.errors import InputError
from d_emo.files import write_json
from d_emo.lab.study import Study
from d_emo.lab.study.plan import plan_runs


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"samplers": {"eps": "dpm+:20"}}, r"dpm\+:20 does not draw from the eps objective; use one of ddpm, .*dpm\+\+"),
    ({"samplers": {"flow": "ddim:20"}}, "ddim:20 does not draw from the flow objective; use one of euler, heun"),
    ({"samplers": {"eps": "ddim:0"}}, "ddim:0: .*positive"),
    ({"samplers": {"noise": "ddim:20"}}, "by objective .eps, flow., not by 'noise'"),
    ({"encode": {"dataset": "digits", "imagesize": 8}}, "the study's encode: there is no setting 'imagesize'"),
    ({"encode": {"image_size": 8}}, "which images to encode; give `data_dir`"),
    ({"train": {**TRAIN, "tracker": "wandb"}}, "'D-EMO' has the tracker wandb"),
    ({"train": {**TRAIN, "label_dropout": 0.0}, "guidance_scale": 2.0}, "guidance_scale must be 1"),
    ({"norm_gap": ["DiT, flow"]}, "'DiT, flow' is of the flow objective"),
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
    with pytest.raises(InputError, match="config.yaml of the study's run 'D-EMO', seed 3, is damaged"):
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
    index = {"data": "digits", "images": 1438, "image_size": 8, "codec": "pixels", "dtype": "float16"}
    (tmp_path / "study" / "latents").mkdir(parents=True)
    write_json(tmp_path / "study" / "latents" / "index.json", index)
    open_study(tmp_path)
    open_study(tmp_path, encode={"dataset": "digits"})
    with pytest.raises(InputError, match=sentence):
        open_study(tmp_path, encode=encode)
