"""The ablations of EMOv2-5M as arguments of the model, with the paper's figures where it prints them."""

from typing import Any, NamedTuple

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


class Ablation(NamedTuple):
    """One row: what is switched, by which arguments of `EMO`, and what the paper prints."""

    name: str
    options: dict[str, Any]
    params: str = "-"
    macs: str = "-"
    note: str = ""


ABLATIONS = (
    Ablation("attention none", {"attention_mode": "none"}, "4.3M", "802M"),
    Ablation("attention near", {"attention_mode": "near"}, "5.1M", "967M"),
    Ablation("attention far", {"attention_mode": "far"}, "5.1M", "967M"),
    Ablation("attention spanning (EMOv2)", {}, "5.1M", "1035M"),
    Ablation("attention in stage 4", {"attention_stages": [4]}, "4.7M", "832M"),
    Ablation("attention in stages 2-4", {"attention_stages": [2, 3, 4]}, "5.1M", "1096M"),
    Ablation("attention in stages 1-4", {"attention_stages": [1, 2, 3, 4]}, "5.2M", "1213M", TRUNCATED),
    Ablation("kernel 1", {"kernel_sizes": [1, 1, 1, 1]}, "4.8M", "969M"),
    Ablation("kernel 3", {"kernel_sizes": [3, 3, 3, 3]}, "4.9M", "991M"),
    Ablation("kernel 7", {"kernel_sizes": [7, 7, 7, 7]}, "5.3M", "1102M"),
    Ablation("kernel 9, 7 in stage 4", {"kernel_sizes": [9, 9, 9, 7]}, "5.5M", "1184M", LARGE_KERNEL),
    Ablation("kernel 9 in all stages", {"kernel_sizes": [9, 9, 9, 9]}, note=UNPRINTED),
    Ablation("dilation 2", {"dilations": [2, 2, 2, 2]}, note=UNPRINTED),
    Ablation("pre-attention", {"attention_order": "pre"}, note=UNPRINTED),
    Ablation("convolution, then attention", {"arrangement": "conv-attention"}, note=UNPRINTED),
    Ablation("convolution beside attention", {"arrangement": "parallel"}, note=UNPRINTED),
    Ablation("batch norm in all stages", {"norms": ["batch"] * 4}, note=UNPRINTED),
    Ablation("layer norm in all stages", {"norms": ["layer"] * 4}, note=UNPRINTED),
    Ablation("depths 2 2 10 3", {"depths": [2, 2, 10, 3]}, note=SIZES),
    Ablation("depths 2 2 12 2", {"depths": [2, 2, 12, 2]}, note=SIZES),
    Ablation("depths 4 4 8 3", {"depths": [4, 4, 8, 3]}, note=SIZES),
    Ablation("widths 48 72 160 320", {"dims": [48, 72, 160, 320]}, note=SIZES),
)
"""Tables VI and XIX of the EMOv2 paper, with every other switch of the block beside them; a 224 px image."""


def matches(count: float, printed: str) -> bool:
    """True if ``count``, in units, reads as ``printed``, e.g. "5.1M", when rounded or cut off."""
    unit = {"M": 1e6, "G": 1e9}[printed[-1]]
    step = 10.0 ** -len(printed[:-1].partition(".")[2])
    return -step / 2 <= count / unit - float(printed[:-1]) < step
