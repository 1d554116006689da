"""What a study refuses before it trains anything: settings that cannot work, and results of other settings."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from d_emo.config import (
    TABLE_STEPS,
    ClassifierSettings,
    EncodeSettings,
    StudySettings,
    TrainSettings,
    check_guidance,
    check_values,
    is_folder,
    read_sampler,
    type_hints,
)
from d_emo.data import ClassImages, open_dataset
from d_emo.errors import InputError
from d_emo.files import read_json
from d_emo.io.snapshot import kind_of, load_classifier
from d_emo.lab.study.plan import PlannedRun, data_dir_of, fid_settings, latents_folder, read_settings
from d_emo.latents import LatentDataset, default_codec
from d_emo.latents.shards import INDEX, Origin, repeat
from d_emo.sampling.schedulers import make_scheduler, set_steps, steps_for
from d_emo.tables import DATASETS, OBJECTIVES, load, noise_objectives, schedulers_of
from d_emo.training.classifier import open_both


def check_same_training(run: PlannedRun) -> None:
    """Raise InputError for a run that was trained, or partly trained, with other settings than the study's."""
    path = run.folder / "config.yaml"
    if not path.exists() or not any(run.folder.glob("s*s/step-*")):  # no snapshots and no states
        return
    remedy = f"remove {run.folder}, and the study's run {run.name!r}, seed {run.seed}, is trained again"
    hints = type_hints(TrainSettings)
    recorded = asdict(TrainSettings().resolve()) | read_json(path, lambda found: check_values(found, hints), remedy)
    old, new = (_what_counts(values) for values in (recorded, asdict(run.training)))
    for name in ("image_size", "exif", "background", "flip"):  # what the data decide where the study does not
        new[name] = old[name] if new[name] is None else new[name]
    if new["vae"] is None:
        new["vae"] = old["vae"] if run.training.latents else default_codec(run.training.data_dir)
    if run.training.schedule == "constant" and old["max_steps"] < new["max_steps"]:
        old["max_steps"] = new["max_steps"]  # a run that goes on, not another run
    if changed := _changes(old, new):
        raise InputError(
            f"the study's run {run.name!r}, seed {run.seed}, was trained with {changed}; give the study another "
            f"output_dir, or remove {run.folder} to train it again"
        )


def _what_counts(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's result; latents as seen from the run's folder, so that a study can be moved."""
    decisive = TrainSettings.marked("decisive")
    kept = {name: value for name, value in values.items() if name in decisive}
    for name in ("data_dir", "init_from"):
        kept[name] = kept[name] and os.path.abspath(kept[name])
    kept["latents"] = kept["latents"] and os.path.relpath(kept["latents"], values["output_dir"])
    return kept


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What is not as it was, in words."""
    return "; ".join(f"{name} {old[name]}, where the study says {new[name]}" for name in new if old[name] != new[name])


def check_same_latents(settings: StudySettings) -> None:
    """Raise InputError for latents that were encoded with other settings than the study gives."""
    folder = latents_folder(settings)
    if settings.encode is None or not (folder / INDEX).exists():
        return
    made, encode = read_json(folder / INDEX, dict, repeat()), read_encode(settings.encode)
    index = {"exif": Origin.exif, "background": Origin.background} | made  # older ones do not say
    wanted = {name: getattr(encode, name) for name in settings.encode if getattr(encode, name) is not None}
    if encode.data_dir is not None:
        wanted["dataset"] = "folder" if is_folder(encode.data_dir) else encode.data_dir.partition(":")[0]
    same = {name: name for name in ("image_size", "dtype", "exif", "background")}
    named = {"vae": "codec", "flip": "mirrored", **same, "num_images": "images", "dataset": "data"}
    if index.get("data") not in DATASETS or not DATASETS[index["data"]].drawn:
        del named["num_images"]
    known = {name: index.get(key) for name, key in named.items() if name in wanted}
    if changed := _changes(known, {name: wanted[name] for name in known}):
        raise InputError(f"the study's latents {folder} were encoded with {changed}; give the study another output_dir")


def check_measuring(settings: StudySettings, runs: list[PlannedRun]) -> None:
    """Raise InputError for what would fail after the training only: settings that another verb does not take, a sampler
    that does not serve, a tracker that the report does not read.
    """
    if settings.encode is not None:
        read_encode(settings.encode)
    for objective, each in settings.samplers.items():
        if objective not in OBJECTIVES:
            raise InputError(f"the study's samplers are by objective ({', '.join(OBJECTIVES)}), not by {objective!r}")
        _check_sampler(*read_sampler(each), objective, f"the study's sampler {each}")
    fid = None
    if settings.reference is not None:
        if given := {"samples", "checkpoint", "reference", "output"} & (settings.fid or {}).keys():
            raise InputError(f"the study's fid must not have {min(given)}, which the study itself gives fid")
        fid = fid_settings(settings)
    for run in runs:
        training, where = run.training, f"the study's run {run.name!r}"
        if training.tracker != "tensorboard":
            raise InputError(f"{where} has the tracker {training.tracker}; the report reads those of tensorboard only")
        if OBJECTIVES[training.objective].starts_from is not None:
            raise InputError(
                f"{where} is of the {training.objective} objective, which goes on from a snapshot; a study compares "
                "runs that start from nothing (distill trains such a run, judge and fid measure it)"
            )
        if run.name in settings.norm_gap and training.objective not in noise_objectives():
            takes = " and ".join(noise_objectives())
            raise InputError(f"{where} is of the {training.objective} objective; norm_gap takes runs of {takes}")
        if training.label_dropout == 0 and settings.guidance_scale != 1:
            raise InputError(f"{where} has no label dropout; without it guidance_scale must be 1")
        if fid is not None:
            check_guidance(fid.guidance_scale, label_dropout=training.label_dropout)
            if fid.scheduler is not None:
                _check_sampler(fid.scheduler, fid.steps, training.objective, f"fid's scheduler {fid.scheduler}")


def check_inputs(settings: StudySettings) -> None:
    """Raise InputError if the study does not say what to encode, or if its reference is not there."""
    if settings.encode is not None and not settings.encode.keys() & {"dataset", "data_dir"}:
        raise InputError("the study does not say which images to encode; give `data_dir` FOLDER")
    if settings.reference is not None and not Path(settings.reference).exists():
        raise InputError(f"the study's reference {settings.reference} does not exist (`reference`)")


def check_classes(
    settings: StudySettings, runs: list[PlannedRun], classifier: Path, config: ClassifierSettings | None
) -> None:
    """Raise InputError for runs that the classifier could not measure: of other classes, or of unknown images.

    Args:
        settings, runs: Of the study.
        classifier: Its run folder, where it is trained.
        config: What it is trained with, where it is not.
    """
    if config is None or kind_of(classifier) == "classifier":
        known = load_classifier(classifier).class_names
    else:
        known = open_both(replace(config, validate_dir=None, validate_every=None))[0].class_names
    for run in runs:
        data, where = _data_of(settings, run), f"the study's run {run.name!r}"
        if data.name not in DATASETS and run.training.data_dir not in (None, data_dir_of(settings)):
            raise InputError(f"{where} has the `data_dir` {run.training.data_dir}; with `judge` all runs share one")
        if data.name not in DATASETS and data_dir_of(settings) is None:
            raise InputError(
                f"{where} is trained on latents of {data.name!r}, whose images `judge` needs: let the study encode "
                "them, or measure against a `reference`"
            )
        if data.name not in DATASETS and run.name in settings.norm_gap and run.training.validate_dir is None:
            raise InputError(f"norm_gap of {where} needs held-out images: `validate_dir` among the study's train")
        names = [data.name] if run.training.unconditional else data.class_names
        if names != known:
            odd = ", ".join(sorted({*names} ^ {*known})[:3]) or "another order"
            raise InputError(
                f"{where} is of {len(names)} classes, which are not the {len(known)} of `judge` {settings.judge} "
                f"({odd}); name a classifier of the same data, or measure against a `reference`"
            )


def _data_of(settings: StudySettings, run: PlannedRun) -> ClassImages | LatentDataset:
    """What a run is trained on, encoded or still to be."""
    latents, source = run.training.latents, run.training
    if settings.encode is not None and not (Path(latents) / INDEX).exists():
        latents, source = None, read_encode(settings.encode)
    if latents is not None:
        return LatentDataset(latents)
    size = source.image_size or 256
    return open_dataset(dataset=source.dataset, data_dir=source.data_dir, image_size=size, sequential=True)


def read_encode(options: dict[str, Any]) -> EncodeSettings:
    """The settings of encode, checked as it checks them."""
    return read_settings(EncodeSettings, {**options, "output": "unused"}, "the study's encode")


def _check_sampler(name: str, steps: int | None, objective: str, where: str) -> None:
    known = schedulers_of(objective)
    if name not in known:
        raise InputError(f"{where} does not draw from the {objective} objective; use one of {', '.join(known)}")
    try:
        steps = steps_for(objective, steps, TABLE_STEPS)
        schedule = load(OBJECTIVES[objective].loss)(null_class=0).noise_schedule()
        set_steps(make_scheduler(name, schedule.config, objective), steps)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
