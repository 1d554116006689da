"""The tables of all networks and of the ablations of EMOv2-5M, beside the published figures."""

import json
from collections.abc import Iterable
from importlib import resources
from typing import Any, NamedTuple

import torch

from d_emo.errors import InputError
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.registry import create_model, list_models
from d_emo.text import markdown_table

TRUNCATED = "The paper cuts parameters off after the first decimal, except in this row, where 5.157M became 5.2M."
LARGE_KERNEL = (
    "A kernel of 9 is wider than the 7 x 7 map of the last stage; both printed figures are met when that stage has "
    "kernel 7, and neither when all four stages have 9 (the next row)."
)
UNPRINTED = "No published figure is on record here for this form."
SIZES = (
    "Table XVII prints figures for depths and widths, which are not on record here; these rows show the arguments, the "
    "widths being those of emov1_6m."
)


class Row(NamedTuple):
    """A network: its name, or what is switched by which arguments of `EMO`, and what the papers print of it."""

    name: str
    options: dict[str, Any]
    params: str = "-"
    macs: str = "-"
    note: str = ""


ABLATIONS = (
    Row("attention none", {"attention_mode": "none"}, "4.3M", "802M"),
    Row("attention near", {"attention_mode": "near"}, "5.1M", "967M"),
    Row("attention far", {"attention_mode": "far"}, "5.1M", "967M"),
    Row("attention spanning (EMOv2)", {}, "5.1M", "1035M"),
    Row("attention in stage 4", {"attention_stages": [4]}, "4.7M", "832M"),
    Row("attention in stages 2-4", {"attention_stages": [2, 3, 4]}, "5.1M", "1096M"),
    Row("attention in stages 1-4", {"attention_stages": [1, 2, 3, 4]}, "5.2M", "1213M", TRUNCATED),
    Row("kernel 1", {"kernel_sizes": [1, 1, 1, 1]}, "4.8M", "969M"),
    Row("kernel 3", {"kernel_sizes": [3, 3, 3, 3]}, "4.9M", "991M"),
    Row("kernel 7", {"kernel_sizes": [7, 7, 7, 7]}, "5.3M", "1102M"),
    Row("kernel 9, 7 in stage 4", {"kernel_sizes": [9, 9, 9, 7]}, "5.5M", "1184M", LARGE_KERNEL),
    Row("kernel 9 in all stages", {"kernel_sizes": [9, 9, 9, 9]}, note=UNPRINTED),
    Row("dilation 2", {"dilations": [2, 2, 2, 2]}, note=UNPRINTED),
    Row("pre-attention", {"attention_order": "pre"}, note=UNPRINTED),
    Row("convolution, then attention", {"arrangement": "conv-attention"}, note=UNPRINTED),
    Row("convolution beside attention", {"arrangement": "parallel"}, note=UNPRINTED),
    Row("batch norm in all stages", {"norms": ["batch"] * 4}, note=UNPRINTED),
    Row("layer norm in all stages", {"norms": ["layer"] * 4}, note=UNPRINTED),
    Row("depths 2 2 10 3", {"depths": [2, 2, 10, 3]}, note=SIZES),
    Row("depths 2 2 12 2", {"depths": [2, 2, 12, 2]}, note=SIZES),
    Row("depths 4 4 8 3", {"depths": [4, 4, 8, 3]}, note=SIZES),
    Row("widths 48 72 160 320", {"dims": [48, 72, 160, 320]}, note=SIZES),
)
"""Tables VI and XIX of the EMOv2 paper, with every other switch of the block beside them; a 224 px image."""


def published_figures() -> dict[str, dict[str, Any]]:
    """The figures of the papers, by model name; their source is in the file's "_about"."""
    text = resources.files("d_emo.lab").joinpath("published.json").read_text(encoding="utf-8")
    return {name: figures for name, figures in json.loads(text).items() if not name.startswith("_")}


def models_table(pattern: str | None = None) -> str:
    """A Markdown table of parameters and MACs (one forward pass, batch 1), ours beside the published ones.

    Args:
        pattern: names to show, see `list_models`.

    Raises:
        InputError: if no name matches.
    """
    names, published = list_models(pattern), published_figures()
    if not names:
        raise InputError(f"No model matches {pattern!r}; the names look like 'D-EMOv2-S-2', 'DiT-S-2' or 'emov2_5m'.")
    figures = {name: published.get(name, {}) for name in names}
    return _table(["model"], [
        Row(name, {}, each.get("paper_params", "-"), each.get("paper_macs", "-"), each.get("note", ""))
        for name, each in figures.items()
    ])  # fmt: skip


def ablations_table() -> str:
    """A Markdown table of the switches of EMOv2-5M: the arguments, parameters and MACs, ours beside the published."""
    return _table(["emov2_5m with", "model_options"], ABLATIONS, "emov2_5m")


def _table(head: list[str], rows: Iterable[Row], model: str | None = None) -> str:
    """Each network, or ``model`` with what is switched, ours beside the published; notes are numbered below."""
    lines, notes = [], []
    for row in rows:
        with torch.device("meta"):  # counting needs shapes, not weights
            network = create_model(model or row.name, **row.options)
        params, macs, note = count_parameters(network), count_macs(network), row.note
        if model and not note and not (matches(params, row.params) and matches(macs, row.macs)):
            note = "This figure differs from the paper's, and the reason is not known."
        if note and note not in notes:
            notes.append(note)
        options = [f"`{json.dumps(row.options)}`".replace('"', "")] if model else []
        mark = f" [{notes.index(note) + 1}]" if note else ""
        lines.append([row.name, *options, f"{params:,}", row.params, f"{macs / 1e6:,.0f}M", row.macs + mark])
    table = markdown_table([*head, "parameters", "published", "MACs", "published"], lines, words=len(head))
    return "\n".join([table, *(f"\n[{number}] {note}" for number, note in enumerate(notes, 1))])


def matches(count: float, printed: str) -> bool:
    """True if ``count``, in units, reads as ``printed``, e.g. "5.1M", when rounded or cut off."""
    unit = {"M": 1e6, "G": 1e9}[printed[-1]]
    step = 10.0 ** -len(printed[:-1].partition(".")[2])
    return -step / 2 <= count / unit - float(printed[:-1]) < step
