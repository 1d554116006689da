"""Wrong values by kind of setting, crossed with every flag of every verb, and what each verb does with them.

A verb is run for real up to its first heavy work, where it is stopped (`Reached`). `python tests/fuzz_inputs.py` runs
all cases and prints the counts; the tests run a sample of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

import torch
from fuzz_world import BASE, HEAVY, Reached, make_world, warm_up

from d_emo.cli import main
from d_emo.cli.verbs import VERBS
from d_emo.config.base import flag_of, type_hints
from d_emo.tables import load

SOURCES = {"data_dir", "validate_dir", "latents", "init_from", "teacher_weights", "checkpoint", "classifier", "image",
           "samples", "reference", "inception_weights", "source", "runs", "resume", "vae", "judge", "teacher", "images",
           "annotations", "validate_annotations", "validate_images_dir", "guide"}  # fmt: skip
FILES = {"image", "samples", "reference", "inception_weights", "source", "teacher_weights", "teacher", "judge",
         "images", "annotations", "validate_annotations"}  # fmt: skip
OUTPUTS = {"output", "output_dir", "report_dir", "save_npz", "save_png", "work_dir"}
UNREAD = {("compare", "data_dir"), ("encode", "validate_dir")}
"""Sources that a verb does not open itself: a study's are encoded in another process, and encode needs no held-out."""
FREE = {"title", "match", "host", "push_to_hub", "launch", "classes", "interpolate", "published"}
"""Text that may be anything: a value of these must not end in a traceback, and that is all."""

TEXT = ["no such thing", "\u2603 \u00e4\u00f6", "x" * 10_000, "a\nb", "-", "..", "%s{}", "1e400", "~"]
WHOLE = ["", "abc", "1.5", "nan", "inf", "1e400", "-1e400", "~", "[1]", "{a: 1}", "true", "0x", "1_", "9" * 400,
         str(2**63), str(2**64), str(-(2**63) - 1)]  # fmt: skip
NUMBER = ["", "abc", "nan", ".nan", "inf", "-.inf", "1e400", "-1e400", "~", "[1.0]", "{a: 1}", "true", "1,5", "9" * 400]
FLAG = ["maybe", "2", "[true]", "~", "1e400", "{}", "\u2603"]
WORD = ["", "nonsense", "NO WAY", "\u00e4", "x" * 10_000, "[x]", "{a: b}", "1e400", "~"]
MAPPING = [
    "", "5", "text", "[1]", "{", "{a", "{? : }", "[[[[", "&a [*a]", "{1: 2}", "{nope: 1}", "{a: {b: {c: {d: 1}}}}",
    "{depth: -1}", "{depth: many}", "{depth: 1.5}", "{depth: 1000000000}", "{hidden_size: 1000000000}",
    "{hidden_size: 99999999999999999999}", "{hidden_size: [1]}", "{num_heads: 0}", "{depth: {a: b}}", "{depth: .nan}",
    "{patch_size: 0}", "{window_size: [1, 2, 3, 4]}", "{window_size: -5}", "{kernel_size: 1000001}", "{block: nope}",
    "{expand_ratio: .inf}", "{expand_ratio: -1}", "{expand_ratio: 1e18}", "{local_norm: 7}", "{depth: null}",
    "{attention_mode: [near]}", "{position_embedding: {}}", "{learn_sigma: perhaps}", "{dims: []}", "{dims: [8, 8]}",
    "{hidden_size: 400000, depth: 1000}", "{dims: [1e400, a]}", "{depths: [1000000000, 1, 1, 1]}", "{dims: 5}",
    "{drop_path_rate: x}", "{drop_path_rate: 7}", "{dims: [800000, 800000, 800000, 800000]}", "{name: emov2_5m}",
    "{null: null}",
]  # fmt: skip
YAML = [
    "[[1]]", "{a: {b: 1}}", "!!binary aGk=", "!!set {a}", "!!python/object/apply:os.getcwd []", "2026-01-01", ".nan",
    ".inf", "18446744073709551616", "''", "'~'", "[null]", "- x", "{1: [2, {3: 4}]}",
]  # fmt: skip
CONFIGS = {
    "empty": b"", "a list": b"- 1\n- 2\n", "text": b"hello", "a number": b"7", "not UTF-8": b"seed: \xff\xfe\n",
    "bytes": bytes(range(256)) * 9, "a tab": b"seed:\n\t- 1\n", "unclosed": b"{seed: [1, ", "no such key": b"nope: 1\n",
    "a key that is no text": b"1: 2\n", "a key of null": b"~: 2\n", "a key that is a list": b"[1, 2]: 3\n",
    "deep": b"seed: " + b"[" * 5000 + b"]" * 5000, "deep mappings": b"{a: " * 3000 + b"1" + b"}" * 3000,
    "an alias bomb": b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(20)),
    "an alias of itself": b"&a\nseed: *a\n", "python": b"seed: !!python/object/apply:os.getcwd []\n",
    "two documents": b"seed: 1\n---\nseed: 2\n", "JSON": b'{"seed": "x", "nope": 1}', "null bytes": b"seed: \x00\n",
    "a config of a config": b"config: config.yaml\n", "a long line": b"x" * 2_000_000,
}  # fmt: skip
TAMED = {"empty"}  # it sets nothing
PLAUSIBLE = {"'~'", "''", "2026-01-01", "18446744073709551616", ".nan", ".inf", "- x"}
"""YAML that is text, a number or a list: whether a setting takes it is seen by its flag."""
CONFIG_PATHS = ["", "nowhere", "n" * 300, "a-file/x", "fifo", "empty-folder", "socket", "loop", "garbage",
                "garbage.npz", "/dev/zero", "/dev/null", "/proc/self/mem"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command line, and whether it must be refused; else it must only not end in a traceback."""

    verb: str
    word: str
    flag: str
    what: str
    argv: tuple[str, ...]
    refused: bool = True
    config: bytes | None = None

    def __str__(self) -> str:
        value = self.what if len(self.what) < 60 else self.what[:57] + "..."
        return " ".join(filter(None, [self.verb, self.word, self.flag, repr(value)]))


def bare(hint: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """A type without its None: the kind, whether None is allowed, and the whole list of its members."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(each for each in members if each is not NoneType)
    return kinds[0], NoneType in members, kinds


def odd_sources(odd: Path, name: str) -> Iterator[tuple[str, bool]]:
    """Paths that are no input of this name, each with whether it has to be refused."""
    for each in ("nowhere", "n" * 300, "/".join(["d" * 200] * 30), "a-file/x", "fifo", "socket", "loop", "dangling",
                 "empty", "garbage", "empty-folder", "folder-of-garbage", "text.txt", "\udcff\udcfe"):  # fmt: skip
        yield str(odd / each), True
    for suffix in (".png", ".npz", ".pth", ".safetensors", ".zip", ".yaml", ".json", ".tar"):
        if name in FILES:
            for stem in ("empty", "garbage", "folder", "fifo"):
                yield str(odd / f"{stem}{suffix}"), True
    yield from ((each, True) for each in ("", "/dev/zero", "/dev/null", "/proc/1/nope", "a\0b", "~nobody-such/x", "\0"))
    if name in ("data_dir", "validate_dir"):
        tar = odd / "garbage.tar"
        for each in ("wds:", "wds:nowhere.tar", f"wds:{tar}", f"wds:{odd}/fifo", f"wds:{odd}/empty.tar",
                     "wds:/dev/zero", f"wds:{odd}/folder.tar", "wds:a{000000000..999999999}.tar",
                     "wds:{0..99}{0..9999}{0..9999}.tar",
                     "wds:{9..0}.tar", "wds:{0..99999999999999999999999}.tar", "wds:***", f"wds:{tar}?nope=1",
                     f"wds:{tar}?class_names={odd}/fifo", "hf:", "hf:?", "hf:nowhere", f"hf:{odd}/garbage", "hf:a?b=c",
                     "hf:x?streaming=maybe", "hf:x?streaming=true&length=-1", "wds:\0", "hf:\0"):  # fmt: skip
            yield each, True


def odd_outputs(odd: Path, name: str, folder: bool) -> Iterator[tuple[str, bool]]:
    """Paths that cannot be written."""
    suffix = {"save_npz": ".npz"}.get(name, "")
    for each in ("n" * 300, "/".join(["d" * 200] * 30), "a-file/x", "a-file/x/y/z", "fifo/x", "loop/x"):
        for ending in ("", ".png", ".npz", ".json", ".onnx") if not folder else ("",):
            yield str(odd / (each + ending)), True
    for each in ("", "/dev/null/x", "/proc/nope/x", "/sys/nope/x", "/proc/1/x.npz", "a\0b", "\0"):
        yield each, True
    yield str(odd / f"\udcff{suffix}"), False
    if folder:
        yield from ((str(odd / each), True) for each in ("a-file", "fifo", "/dev/null", "socket", "loop"))
    else:
        for each in (".png", ".npz", ".json", ".onnx"):
            yield str(odd / f"folder{each}"), True
            yield str(odd / f"fifo{each}"), True


def values_for(verb: str, one: Field, hint: Any, odd: Path) -> Iterator[tuple[str, bool]]:
    """Values for a flag, each with whether it has to be refused."""
    kind, optional, _ = bare(hint)
    if get_origin(kind) is list:
        kind, optional = get_args(kind)[0], False
        if one.name not in FREE:
            yield from ((each, one.default is MISSING and one.default_factory is MISSING) for each in ("[]", "{}"))
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind  # without its range
    if get_origin(kind) is Literal or one.metadata.get("choices") is not None:
        yield from ((each, not (optional and each == "~")) for each in WORD)
    elif base is bool:
        yield from ((each, not (optional and each == "~")) for each in FLAG)
    elif base in (int, float):
        limits = get_args(kind)[1]
        yield from ((each, each not in ("~", "1_")) for each in (WHOLE if base is int else NUMBER))
        low, high = limits.low, limits.high
        for each in (low - 1, high + 1, *([low] if limits.open_low else []), *([high] if limits.open_high else [])):
            yield str(base(each)), True
        yield from (("-0", False), ("-0.0", base is int))
    elif base is dict or get_origin(base) is dict:
        for each in MAPPING:
            yield each, one.name == "model_options" or not each or each[0] not in "{[&"
    elif one.name in SOURCES:
        yield from odd_sources(odd, one.name)
    elif one.name in OUTPUTS:
        yield from odd_outputs(odd, one.name, is_folder_output(verb, one.name))
    else:
        yield from ((each, one.name not in FREE and each != "~") for each in TEXT)
        yield "", one.name not in FREE
        yield "a\0b", False


def is_folder_output(verb: str, name: str) -> bool:
    """Whether an output is a folder."""
    return name in ("output_dir", "report_dir", "work_dir", "save_png") or verb in (
        "encode", "explain", "convert", "benchmark"
    )  # fmt: skip


def cases(world: Path) -> Iterator[Case]:
    """All of them, in a fixed order."""
    for verb, row in VERBS.items():
        for word, reference in row.kinds().items():
            kind = load(reference)
            flags = {each.name: flag_of(each) for each in fields(kind)}
            base = BASE[verb, word](world)
            for each in fields(kind):
                hint = type_hints(kind)[each.name]
                for value, refused in values_for(verb, each, hint, world / "odd"):
                    changed = base | extra_for(each.name, flags, world) | {each.name: [value]}
                    free = (verb, each.name) in UNREAD
                    yield Case(verb, word, flags[each.name], value, line(word, flags, changed), refused and not free)
                if not flags[each.name].startswith("--"):
                    continue  # a positional argument is not read from a file
                rest = {name: words for name, words in base.items() if name != each.name}
                container = bare(hint)[0] is dict or get_origin(bare(hint)[0]) in (dict, list)
                for text in YAML:
                    must = not container and text not in PLAUSIBLE
                    argv, content = line(word, flags, rest, "config.yaml"), f"{each.name}: {text}\n".encode()
                    yield Case(verb, word, each.name, f"YAML {text}", argv, must, content)
            for name, content in CONFIGS.items():
                argv = line(word, flags, base, "config.yaml")
                yield Case(verb, word, "--config", name, argv, name not in TAMED, content)
            for path in CONFIG_PATHS:
                whole = str(world / "odd" / path) if path and not path.startswith("/") else path
                yield Case(verb, word, "--config", path, line(word, flags, base, whole))


def line(word: str, flags: dict[str, str], given: dict[str, list[str]], config: str | None = None) -> tuple[str, ...]:
    """A command line: the word that chooses a kind, flags, then positional arguments."""
    named = [(flags[name], *words) for name, words in given.items() if flags[name].startswith("--")]
    places = [words for name, words in given.items() if not flags[name].startswith("--")]
    head = [word] if word else []
    return (*head, *(["--config", config] if config is not None else []), *sum(map(tuple, [*named, *places]), ()))


def extra_for(name: str, flags: dict[str, str], world: Path) -> dict[str, list[str]]:
    """What a flag needs beside it to count at all."""
    held_out = {"validate_every": ["1"], "data_dir": [str(world / "photos" / "train")]}
    needed = {"teacher_weights": {"teacher": ["resnet10t"]}, "validate_dir": held_out}.get(name, {})
    return {one: words for one, words in needed.items() if one in flags and name in flags}


class Hang(BaseException):
    """The time of a case is up."""


def run(case: Case, world: Path, *, seconds: float = 5, mode: int = 0o700) -> str:
    """What became of a case: "refused", "stopped" (exit code 1, a sentence), "accepted", or what went wrong.

    It runs in a new folder with the permissions ``mode``.
    """

    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    with tempfile.TemporaryDirectory(dir=world, prefix="case-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        if case.config is not None:
            Path("config.yaml").write_bytes(case.config)
        os.chmod(folder, mode)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(None, [case.verb, *case.argv])
            code: int | str = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except Reached:
            code = "reached"
        except Hang:
            code = "hang"
        except BaseException as error:  # whatever a user would see as a traceback
            place = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in place if "d_emo" in f.filename]
            code = f"traceback {type(error).__name__} at {(ours or ['?'])[-1]}: {' '.join(str(error).split())[:90]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.chmod(folder, 0o700)
            os.chdir(here)
    if code in (0, "reached"):
        return "accepted"
    if not isinstance(code, int):
        return code
    last = err.getvalue().rstrip("\n").rpartition("\n")[2]
    if "Traceback" in err.getvalue() or not last.startswith("error: ") or err.getvalue().count("error: ") != 1:
        return f"exit code {code} without one sentence: {err.getvalue()[-200:]!r}"
    return {2: "refused", 1: "stopped"}.get(code, f"exit code {code}")


def problem(case: Case, became: str) -> str | None:
    """What is wrong with that, if anything."""
    if became in ("refused", "stopped"):
        return None
    if became == "accepted":
        return "accepted" if case.refused else None
    return became


def run_all(world: Path, *, memory_gb: float = 6, only: str = "") -> tuple[Counter, list[tuple[Case, str]]]:
    """Run every case; the counts, and what went wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_gb * 2**30),) * 2)
    counts: Counter[str] = Counter()
    wrong: list[tuple[Case, str]] = []
    with mock.patch.multiple("os", fsync=lambda descriptor: None), HEAVY():
        warm_up(world)
        for case in cases(world):
            if only and only not in str(case):
                continue
            became = run(case, world)
            counts["cases"] += 1
            counts[became.split()[0] if became.startswith("traceback") else became.split(" ")[0]] += 1
            if (what := problem(case, became)) is not None:
                wrong.append((case, what))
                print(f"{case}: {what}", flush=True)
    return counts, wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_world(place)
        figures, failures = run_all(place, only=sys.argv[1] if len(sys.argv) > 1 else "")
        kinds = Counter("hang" if what == "hang" else "accepted" if what == "accepted" else "traceback"
                        if what.startswith("traceback") else "no sentence" for _, what in failures)  # fmt: skip
        print(json.dumps({"outcomes": figures, "wrong": kinds}))
