"""The table of all networks beside the published figures."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch

from d_emo.errors import InputError
from d_emo.lab.ablations import ABLATIONS, matches
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.registry import create_model, list_models

HEADER = (
    "| model | parameters | published | MACs | published |",
    "|---|---:|---:|---:|---:|",
)


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
    lines, notes = list(HEADER), []
    for name in names:
        with torch.device("meta"):  # counting needs shapes, not weights
            model = create_model(name)
        figures = published.get(name, {})
        mark = ""
        if "note" in figures:
            notes = notes if figures["note"] in notes else [*notes, figures["note"]]
            mark = f" [{notes.index(figures['note']) + 1}]"
        lines.append(
            f"| {name} | {count_parameters(model):,} | {figures.get('paper_params', '-')} "
            f"| {count_macs(model) / 1e6:,.0f}M | {figures.get('paper_macs', '-')}{mark} |"
        )
    return "\n".join([*lines, *footer(notes)])


def ablations_table() -> str:
    """A markdown table of the switches of EMOv2-5M: the arguments, parameters and MACs, ours beside the published."""
    lines = ["| emov2_5m with | model_options | parameters | published | MACs | published |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    notes: list[str] = []
    for row in ABLATIONS:
        with torch.device("meta"):
            model = create_model("emov2_5m", **row.options)
        params, macs, note = count_parameters(model), count_macs(model), row.note
        if not note and not (matches(params, row.params) and matches(macs, row.macs)):
            note = "This figure differs from the paper's, and the reason is not known."
        notes = notes if note in ("", *notes) else [*notes, note]
        mark = f" [{notes.index(note) + 1}]" if note else ""
        options = json.dumps(row.options).replace('"', "")
        lines.append(
            f"| {row.name} | `{options}` | {params:,} | {row.params} | {macs / 1e6:,.0f}M | {row.macs}{mark} |"
        )
    return "\n".join([*lines, *footer(notes)])


def footer(notes: list[str]) -> list[str]:
    """Numbered notes below a table."""
    return [f"\n[{i}] {note}" for i, note in enumerate(notes, 1)]
