"""A block, an objective, a data set and a metric from outside of D-EMO; ``import extending`` makes them known.

A package that is installed has its module imported by every ``d-emo`` command if its pyproject.toml says

    [project.entry-points."d_emo.plugins"]
    extending = "extending"
"""

from extending import block, dataset, metric, objective

__all__ = ["block", "dataset", "metric", "objective"]
