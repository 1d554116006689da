"""The table of all networks beside the published figures."""

import json
from importlib import resources
from typing import Any

import torch

from d_emo.errors import InputError
from d_emo.lab.ablations import ABLATIONS, matches
from d_emo.lab.text import markdown_table
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.registry import create_model, list_models


def published_figures() -> dict[str, dict[str, Any]]:
    """The figures of the papers, by model name; their source is in the file's "_about"."""
    text = resources.files("d_emo.lab").joinpath("published.json").read_text(encoding="utf-8")
    return {name: figures for name, figures in json.loads(text).items() if not name.startswith("_")}


def models_table(pattern: str | None = None) -> str:
    """A markdown table of parameters and MACs (one forward pass, batch 1), ours beside the published ones.

    Args:
        pattern: names to show, see `list_models`.

    Raises:
        InputError: if no name matches.
    """
    names = list_models(pattern)
    if not names:
        raise InputError(f"No model matches {pattern!r}; the names look like 'D-EMOv2-S-2', 'DiT-S-2' or 'emov2_5m'.")
    published = published_figures()
    lines, notes = [], []
    for name in names:
        with torch.device("meta"):  # counting needs shapes, not weights
            model = create_model(name)
        paper = published.get(name, {})
        lines.append([
            name, f"{count_parameters(model):,}", paper.get("paper_params", "-"), f"{count_macs(model) / 1e6:,.0f}M",
            paper.get("paper_macs", "-") + mark(notes, paper.get("note", "")),
        ])  # fmt: skip
    head = ["model", "parameters", "published", "MACs", "published"]
    return "\n".join([markdown_table(head, lines), *footer(notes)])


def ablations_table() -> str:
    """A markdown table of the switches of EMOv2-5M: the arguments, parameters and MACs, ours beside the published."""
    lines, notes = [], []
    for row in ABLATIONS:
        with torch.device("meta"):
            model = create_model("emov2_5m", **row.options)
        params, macs, note = count_parameters(model), count_macs(model), row.note
        if not note and not (matches(params, row.params) and matches(macs, row.macs)):
            note = "This figure differs from the paper's, and the reason is not known."
        options = json.dumps(row.options).replace('"', "")
        lines.append([
            row.name, f"`{options}`", f"{params:,}", row.params, f"{macs / 1e6:,.0f}M", row.macs + mark(notes, note)
        ])  # fmt: skip
    head = ["emov2_5m with", "model_options", "parameters", "published", "MACs", "published"]
    return "\n".join([markdown_table(head, lines, words=2), *footer(notes)])


def mark(notes: list[str], note: str) -> str:
    """The mark of a note behind a value, such as " [1]"; a new note joins the others. Nothing without one."""
    if note and note not in notes:
        notes.append(note)
    return f" [{notes.index(note) + 1}]" if note else ""


def footer(notes: list[str]) -> list[str]:
    """Numbered notes below a table."""
    return [f"\n[{i}] {note}" for i, note in enumerate(notes, 1)]
