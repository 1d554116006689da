"""A study so small that it trains in seconds, for the tests."""

from __future__ import annotations

from pathlib import Path

import yaml

from d_emo.config import StudySettings
from d_emo.lab.study import Study

ROOT = Path(__file__).parents[1]
TINY = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
TRAIN = {
    "model_options": TINY, "max_steps": 4, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.05,
    "snapshot_every": 2, "log_every": 1, "ema_decay": 0.5,
}  # fmt: skip
RUNS = {
    "D-EMO": {"model": "D-EMOv2-Ti-2", "model_options": {"window_size": 2}},
    "DiT, flow": {"model": "DiT-Ti-2", "objective": "flow"},
    "no buffers": {"of": "D-EMO", "norm_buffers": "initial"},
}
JUDGE = {
    "model": "emov1_1m", "dataset": "digits", "image_size": 32, "max_steps": 2, "snapshot_every": 2, "batch_size": 4,
    "model_options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "window_size": 2},
    "warmup_steps": 0,
}  # fmt: skip


def settings_of(folder: Path, **changes) -> StudySettings:
    values = {
        "title": "Tiny", "output_dir": str(folder / "study"), "report_dir": str(folder / "report"), "train": TRAIN,
        "encode": {"dataset": "digits", "image_size": 8, "vae": "pixels"}, "runs": RUNS, "seeds": [3, 5],
        "judge": str(folder / "judge.yaml"), "num_images": 20, "samplers": {"eps": "dpm++:2", "flow": "euler:2"},
    }  # fmt: skip
    (folder / "judge.yaml").write_text(yaml.safe_dump({**JUDGE, "output_dir": str(folder / "judge")}))
    return StudySettings(**{**values, **changes}).resolve()


def open_study(folder: Path, **changes) -> Study:
    return Study(settings_of(folder, **changes))
