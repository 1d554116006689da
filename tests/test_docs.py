"""README and docs: short, with links that lead somewhere and commands that exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from d_emo.cli import VERBS
from d_emo.tables import load

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(text: str) -> list[str]:
    """Lines that are neither code nor tables, without addresses."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for line in text.splitlines() if not line.startswith(("    ", "|"))]
    return [re.sub(r"\]\([^)]*\)|https?://\S+", "", line) for line in lines]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(verb, flags) of every command of ours in a page, its continued lines joined."""
    text = re.sub(r"\\\n\s*", "", text)
    scripts = {verb.script: name for name, verb in VERBS.items()}
    found = []
    for kind, name, rest in re.findall(r"(scripts/|d-emo )([\w-]+)(?:\.py)?([^\n`#]*)", text):
        if kind == "scripts/":
            assert name in scripts, f"there is no scripts/{name}.py"
            assert (ROOT / "scripts" / f"{name}.py").exists()
        name = scripts[name] if kind == "scripts/" else name
        if name in VERBS:
            found.append((name, re.findall(r"--([a-z][\w-]*)", re.sub(r"'[^']*'|\"[^\"]*\"|\(.*", "", rest))))
    return found


def flags(verb: str) -> set[str]:
    """What a verb's settings are called on the command line."""
    kinds = VERBS[verb].kinds().values()
    names = {"config", "help"}
    for kind in kinds:
        for field in dataclasses.fields(load(kind)):
            name = (field.metadata.get("flag") or field.name).lstrip("-").replace("_", "-")
            names |= {alias.lstrip("-") for alias in field.metadata.get("aliases", ())}
            names |= {name, f"no-{name}"} if "bool" in str(field.type) and field.default is not False else {name}
    return names


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_readme_has_the_five_commands():
    text = (ROOT / "README.md").read_text()
    for command in (
        "make demo", "make test", "accelerate launch scripts/train_dit.py --model D-EMOv2-S-2",
        "python scripts/sample.py --class 207", "python scripts/fid.py --samples DIR_OR_NPZ --reference DIR_OR_NPZ",
    ):  # fmt: skip
        assert re.search(rf"^    {re.escape(command)}( |$)", text, re.M), command


@pages
def test_lines_are_short(page):
    assert [line for line in prose(page.read_text()) if len(line) > 120] == []


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if not target.startswith(("http://", "https://")):
            path, _, heading = target.partition("#")
            there = (page.parent / path) if path else page
            assert there.exists(), target
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.M) if heading else [""]
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@pages
def test_commands_and_flags_exist(page):
    for verb, named in commands(page.read_text()):
        assert set(named) <= flags(verb), f"{verb} has no {sorted(set(named) - flags(verb))}"


@pages
def test_commands_can_be_pasted(page):
    """None is broken over lines, which a copied text keeps."""
    spans = re.findall(r"`([^`]*)`", "\n".join(prose(page.read_text())))
    command = r"(python|accelerate|scripts/|d-emo |pip|make|hf|--)"
    assert [each for each in spans if "\n" in each and re.match(command, each)] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page for page in ROOT.glob("docs/*.md") if f"({page.name})" not in index] == [ROOT / "docs/README.md"]


def test_contributing_shows_the_files_of_the_examples():
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    files = [ROOT / "examples" / "extending" / f"{name}.py" for name in ("block", "objective", "dataset", "metric")]
    assert shown == [file.read_text() for file in files]
    for code in shown:
        assert sum(bool(line.strip()) for line in code.splitlines()) < 30


def test_no_word_of_our_own_for_what_has_a_name():
    """What DESIGN and the field call otherwise must not come back."""
    banned = r"the same command goes on|recognised|stop watch|deepspeed\.yaml|\bthe judges?\b"
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            found = re.findall(banned, re.sub(r"\s+", " ", page.read_text()))
            assert not found, f"{page.name}: {found}"
