"""Prints every model's parameters and MACs beside the published ones, as a markdown table."""

import argparse
import sys

from d_emo.config import InputError
from d_emo.models.table import models_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", metavar="PATTERN", help="only names that match, e.g. 'D-EMO*' or emov2")
    arguments = parser.parse_args()
    try:
        print(models_table(arguments.match))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
