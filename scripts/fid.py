"""Measure the FID between two sets of images: folders, or .npz files in ADM's layout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from d_emo.config import FidSettings, parse_settings, run_cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read arguments, measure, print."""
    settings = parse_settings(FidSettings, __doc__, argv)
    from d_emo.evaluation import measure_fid  # after parsing, so that --help and typing errors need no torch

    result = measure_fid(**vars(settings))
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(result)


if __name__ == "__main__":
    run_cli(main)
