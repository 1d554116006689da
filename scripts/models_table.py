"""Prints every model's parameters and MACs beside the published ones, as a markdown table."""

import argparse
import sys

from d_emo.errors import InputError
from d_emo.lab.models_table import ablations_table, models_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", metavar="PATTERN", help="only names that match, e.g. 'D-EMO*' or emov2")
    parser.add_argument("--ablations", action="store_true", help="the switches of emov2_5m instead of the models")
    arguments = parser.parse_args()
    try:
        print(ablations_table() if arguments.ablations else models_table(arguments.match))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
