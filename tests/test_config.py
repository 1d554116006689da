import math
import subprocess
import sys
from dataclasses import MISSING, FrozenInstanceError, fields
from inspect import isabstract
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml

from d_emo.config import (
    ClassifierSettings,
    FidSettings,
    SampleSettings,
    Settings,
    TrainSettings,
    parse_settings,
    run_cli,
    write_yaml,
)
from d_emo.config.base import type_hints
from d_emo.errors import InputError


def test_flags_override_the_yaml_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: DiT-S-2\nmax_steps: 7\nmodel_options: {depth: 3}\n")
    settings = parse_settings(TrainSettings, "", ["--config", str(file), "--max-steps", "8"])
    assert (settings.model, settings.max_steps, settings.model_options) == ("DiT-S-2", 8, {"depth": 3})
    assert settings.batch_size == 256 and settings.ema_decay == 0.9999


def test_the_objective_follows_the_models_name_unless_given():
    assert TrainSettings().objective is None and TrainSettings().resolve().objective == "eps"
    for model in ("sit-b/4", "SiT-XL-2"):
        assert TrainSettings(model=model).resolve().objective == "flow"
    assert TrainSettings(model="DiT-S-2", objective="flow").resolve().objective == "flow"


def test_without_label_dropout_there_is_no_guidance():
    settings = TrainSettings(unconditional=True).resolve()
    assert (settings.label_dropout, settings.preview_guidance) == (0, 1)
    settings = SampleSettings().resolve(objective="flow", label_dropout=0)
    assert (settings.guidance_scale, settings.scheduler) == ([1], "euler")
    settings = SampleSettings(scheduler="ddpm").resolve(objective="eps", label_dropout=0.1)
    assert (settings.guidance_scale, settings.scheduler) == ([4], "ddpm")
    with pytest.raises(InputError, match="without label dropout"):
        SampleSettings(guidance_scale=[2.0]).resolve(objective="eps", label_dropout=0)


def test_written_settings_read_back_the_same(tmp_path):
    settings = parse_settings(TrainSettings, "", ["--learning-rate", "3e-4", "--model-options", "{depth: 2}"])
    write_yaml(settings, tmp_path / "config.yaml")
    assert parse_settings(TrainSettings, "", ["--config", str(tmp_path / "config.yaml")]) == settings
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == 3e-4


@pytest.mark.parametrize(
    ("settings_class", "argv", "words"),
    [
        (TrainSettings, ["--max-stepz", "3"], "there is no setting 'max-stepz'; did you mean --max-steps? (--help"),
        (TrainSettings, ["--config", "{tmp}/modle.yaml"], "there is no setting 'modle'; did you mean --model?"),
        (TrainSettings, ["--nan", "3"], "--nan must be one of stop, skip, not 3"),
        (TrainSettings, ["--model-options", "3"], "--model-options must be a mapping such as '{depth: 8}', not 3"),
        (TrainSettings, ["--compile", "perhaps"], "--compile must be true or false, not perhaps"),
        (SampleSettings, ["--class", "1", "--scheduler", "ddmp"], "--scheduler must be one of ddpm, ddim, dpm++"),
        (SampleSettings, ["--class", "1", "--guidance-scale", "1", "x"], "--guidance-scale must be a number, not x"),
        (TrainSettings, ["--max-step", "3"], "max-step"),
        (TrainSettings, ["--max-steps", "many"], "--max-steps must be a whole number, not many"),
        (TrainSettings, ["--max-steps", "0"], "--max-steps must be at least 1"),
        (TrainSettings, ["--batch-size", "0"], "--batch-size"),
        (TrainSettings, ["--learning-rate", "-1"], "--learning-rate"),
        (TrainSettings, ["--label-dropout", "1.5"], "--label-dropout"),
        (TrainSettings, ["--ema-decay", "1"], "--ema-decay"),
        (TrainSettings, ["--dataset", "cifar"], "dataset"),
        (TrainSettings, ["--config", "no-such.yaml"], "--config: File does not exist: "),
        (TrainSettings, ["--model", "SiT-S/2", "--objective", "eps"], "--model DiT-S/2"),
        (TrainSettings, ["--objective", "flwo"], "--objective must be one of eps, flow, flow-x, flow-eps, one-step"),
        (TrainSettings, ["--objective", "v"], "--objective"),
        (SampleSettings, ["--class", "1", "--steps", "1001"], "--steps"),
        (SampleSettings, ["--class", "1", "--guidance-scale", "-1"], "--guidance-scale"),
        (FidSettings, ["--samples", "a"], "reference"),
    ],
)
def test_wrong_settings_are_one_sentence(settings_class, argv, words, tmp_path):
    (tmp_path / "modle.yaml").write_text("modle: DiT-S-2\n")
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    with pytest.raises(InputError) as caught:
        parse_settings(settings_class, "", argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_switches_need_no_value(tmp_path):
    (tmp_path / "x.yaml").write_text("compile: true\n")
    read = [parse_settings(TrainSettings, "", argv).compile for argv in (
        [], ["--compile"], ["--compile", "--max-steps", "3"], ["--compile", "false"],
        ["--config", str(tmp_path / "x.yaml")],
    )]
    assert read == [False, True, True, False, True]


def test_unknown_yaml_keys_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("modle: DiT-S-2\n")
    with pytest.raises(InputError, match="modle"):
        parse_settings(TrainSettings, "", ["--config", str(tmp_path / "x.yaml")])



def test_class_flag_takes_several_names():
    assert parse_settings(SampleSettings, "", ["--class", "207", "red circle"]).classes == ["207", "red circle"]


def test_run_cli_turns_input_errors_into_exit_code_2(capsys):
    def main():
        raise InputError(f"Caught it in a worker\nTraceback ...\n{InputError.__module__}.InputError: a bad image")

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a bad image\n"


def test_config_is_free_of_torch():
    code = "import sys, d_emo, d_emo.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- every number of every settings class ----------------------------------------------------------------------------


REQUIRED = {"images": ["x"], "runs": {"a": {}}, "train": {}, "reference": __file__, "encode": {}}


def kinds():
    """All settings classes that a verb reads."""
    pending, found = [Settings], []
    while pending:
        pending += pending.pop().__subclasses__()
        found += [each for each in pending if each not in found]
    return [each for each in found if not isabstract(each)]


def numbers(hint):
    """Ranges within a type."""
    if get_origin(hint) is Annotated:
        return list(get_args(hint)[1:])
    return [each for part in get_args(hint) for each in numbers(part)]


def test_every_number_has_its_range_and_a_value_outside_is_refused():
    seen = 0
    for kind in kinds():
        given = {each.name: REQUIRED.get(each.name, "x") for each in fields(kind)
                 if each.default is MISSING and each.default_factory is MISSING}
        if type_hints(kind).get("runs") == list[str]:  # folders, where a study's have settings
            given["runs"] = ["x"]
        for name, hint in type_hints(kind).items():
            bare = get_type_hints(kind)[name]
            if not {int, float} & {bare, *get_args(bare)}:
                continue
            ranges = numbers(hint)
            assert len(ranges) == 1, f"{kind.__name__}.{name} has no range"
            limits, seen = ranges[0], seen + 1
            outside = [limits.low - 1, limits.high * 2 + 1, math.nan, math.inf, 10**30, True, "x"]
            outside += [limits.low] * limits.open_low + [limits.high] * limits.open_high
            for value in outside:
                wrong = [value, value] if get_origin(bare) is list else value
                with pytest.raises(InputError, match=f"`{name}`"):
                    kind(**{**given, name: wrong})
    assert seen > 80


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        TrainSettings().batch_size = 3


def test_settings_from_a_dictionary_are_those_of_a_file():
    assert TrainSettings.from_mapping({"model": "SiT-S-2", "max_steps": 3}) == parse_settings(
        TrainSettings, "", ["--model", "SiT-S-2", "--max-steps", "3"]
    )
    with pytest.raises(InputError, match="`max_steps` must be a whole number, not many"):
        TrainSettings.from_mapping({"max_steps": "many"})
    with pytest.raises(InputError, match="there is no setting 'modle'"):
        TrainSettings.from_mapping({"modle": "DiT-S-2"})


def test_what_a_resumed_run_may_change():
    free = TrainSettings.marked("resumable")
    assert {"max_steps", "data_dir", "latents", "mixed_precision", "preview_guidance", "snapshot_every"} <= free
    assert not {"seed", "batch_size", "model", "learning_rate", "image_size"} & free
    assert {"max_steps", "snapshot_every", "validate_dir"} <= ClassifierSettings.marked("resumable")


@pytest.mark.parametrize("kind", [TrainSettings, SampleSettings, FidSettings])
def test_a_plain_no_of_yaml_means_no(tmp_path, kind):
    more = ["--reference", "b", "--checkpoint", "a"] if kind is FidSettings else []
    for text, wanted in (("no", "no"), ("'no'", "no"), ("bf16", "bf16")):
        (tmp_path / "c.yaml").write_text(f"mixed_precision: {text}\n")
        read = parse_settings(kind, "", ["--config", str(tmp_path / "c.yaml"), *more])
        assert read.mixed_precision == wanted
    assert parse_settings(kind, "", ["--mixed-precision", "no", *more]).mixed_precision == "no"
    for wrong in ("yes", "true", "fp8"):
        with pytest.raises(InputError, match="mixed.precision.? must be one of no, bf16"):
            parse_settings(kind, "", ["--mixed-precision", wrong, *more])
