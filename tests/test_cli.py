"""The command line as a whole: groups of flags, inputs that are missing, completion by the shell."""

import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from functools import partial

import pytest

from d_emo.cli import VERBS, run_verb
from d_emo.config import FidSettings, ReferenceSettings
from d_emo.config.base import flag_of, make_parser
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.tables import EXTRACTORS, ExtractorRow, load
from d_emo.text import command
from d_emo.training.teacher import load_teacher

KINDS = [(name, word, load(kind)) for name, verb in VERBS.items() for word, kind in verb.kinds().items()]
kinds = pytest.mark.parametrize(("verb", "word", "kind"), KINDS, ids=[f"{name} {word}" for name, word, _ in KINDS])
INPUTS = {
    "annotations", "checkpoint", "classifier", "data_dir", "guide", "image", "images", "inception_weights", "init_from",
    "latents", "reference", "runs", "samples", "source", "teacher_weights", "validate_annotations", "validate_dir",
    "validate_images_dir",
}  # fmt: skip


@kinds
def test_no_flag_is_without_a_group(verb, word, kind):
    parser = make_parser(kind, "")
    ungrouped = {action.dest for group in parser._action_groups[:2] for action in group._group_actions}
    assert ungrouped <= {"help", "config", "print_config", "print_shtab"}
    titles = [group.title for group in parser._action_groups[2:]]
    assert titles and len(titles) == len(set(titles))


@kinds
def test_settings_are_called_alike(verb, word, kind):
    """Positional ones in capitals; another verb by its name, which is there without a checkout as well."""
    for each in fields(kind):
        assert flag_of(each).startswith("--") or flag_of(each).isupper(), each.name
        assert not re.search(r"scripts/|\w\.py\b", each.metadata["help"]), each.name


def test_help_names_no_file_of_a_checkout():
    assert [verb.name for verb in VERBS.values() if re.search(r"scripts/|\w\.py\b", verb.help)] == []


@kinds
def test_a_missing_input_is_named_before_anything_runs(verb, word, kind, tmp_path):
    required = {each.name: each for each in fields(kind) if each.default is each.default_factory is MISSING}
    for each in fields(kind):
        if verb == "compare":  # its settings are a YAML file's, see tests/test_study_checks.py
            continue
        if (verb, each.name) == ("train-vae", "init_from"):  # a codec, which may be known by a name
            continue
        assert (each.metadata.get("source") in (True, "or a pattern")) == (each.name in INPUTS), each.name
        if each.name not in INPUTS:
            continue
        argv = [word] if word else []
        for name, one in (required | {each.name: each}).items():
            value = "nowhere" if name == each.name else str(tmp_path / "x.npz") if name == "output" else str(tmp_path)
            argv += [value] if flag_of(one).isupper() else [flag_of(one), value]
        others = {"reference": ["--samples", str(tmp_path)], "samples": ["--reference", str(tmp_path)],
                  "checkpoint": ["--reference", str(tmp_path)],
                  "guide": ["--checkpoint", str(tmp_path), "--reference", str(tmp_path)],
                  "inception_weights": ["--samples", str(tmp_path), "--reference", str(tmp_path)]}  # fmt: skip
        argv += others.get(each.name, []) if verb == "fid" else []
        if each.name == "validate_dir":
            argv += ["--data-dir", str(tmp_path), *(["--validate-every", "1"] if verb.startswith("train") else [])]
        with pytest.raises(InputError, match=f"^{flag_of(each)} nowhere does not exist$"):
            run_verb(verb, argv)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("d-emo train-", {"train-classifier", "train-detector", "train-segmenter", "train-vae", "train-video"}),
        ("d-emo distill --fd-", {"--fd-features", "--fd-decay", "--fd-images", "--fd-labels", "--fd-stages"}),
        ("d-emo distill --class-w", {"--class-weight"}), ("d-emo distill --flow-", {"--flow-weight"}),
        ("d-emo train-classifier --hea", {"--head"}), ("d-emo sample --va", {"--vae"}),
        ("d-emo distill --objective ", {"one-step", "one-step-x", "four-step", "four-step-x"}),
        ("d-emo benchmark ", {"denoisers", "classifiers", "forms", "kernels", "step", "dense"}),
        ("d-emo train --max-", {"--max-steps", "--max-minutes"}),
        ("d-emo benchmark forms --dty", {"--dtype"}),
        ("d-emo sample --scheduler dp", {"dpm++"}),
    ],
)
def test_the_shell_completes(line, offered):
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "COMP_TYPE": "9",
             "COMP_LINE": line, "COMP_POINT": str(len(line))}  # fmt: skip
    code = "import os; os.dup2(1, 8); from d_emo.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | shell, capture_output=True, text=True)
    assert {word.rstrip("\\") for word in done.stdout.split("\n")} == offered, done.stderr


def test_features_are_those_of_the_table_before_anything_is_opened(monkeypatch):
    settings = {"samples": "a", "reference": "b"}
    with pytest.raises(InputError, match="unknown `features` 'emo2:x'; did you mean emov2:SNAPSHOT?"):
        FidSettings(**settings, features="emo2:x")
    monkeypatch.setitem(EXTRACTORS._rows, "edges", ExtractorRow(name="edges", open=str, takes="KERNEL"))
    assert FidSettings(**settings, features="edges:sobel").features == "edges:sobel"
    with pytest.raises(InputError, match="use inception or emov2:SNAPSHOT or edges:KERNEL"):
        ReferenceSettings(output="r.npz", features="edges")


@pytest.mark.parametrize(
    ("opens", "source"),
    [
        (open_classifier, "./nowhere"), (open_classifier, "results/nowhere"), (open_classifier, "nowhere.pth"),
        (partial(load_teacher, weights=None, class_names=["a"]), "nowhere.pth"),
    ],
)  # fmt: skip
def test_the_path_of_a_missing_classifier_is_no_unknown_model(opens, source):
    with pytest.raises(InputError, match=f"{source} does not exist"):
        opens(source)


@pytest.mark.parametrize(
    ("running", "hint"),
    [
        ("scripts/train_dit.py", "python scripts/sample.py"), ("../x/scripts/fid.py", "python ../x/scripts/sample.py"),
        ("/usr/bin/d-emo", "d-emo sample"), ("site-packages/d_emo/__main__.py", "d-emo sample"), ("-c", "d-emo sample"),
    ],
)  # fmt: skip
def test_a_hint_names_a_verb_as_it_is_run_here(monkeypatch, running, hint):
    monkeypatch.setattr(sys, "argv", [running])
    assert command("sample", "sample.py") == hint
