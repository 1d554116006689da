"""Metrics of a set of images, and the values that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d_emo.errors import InputError
from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A number that a metric gives, and how it is shown.

    Attributes:
        name: Its key in results.
        title: In tables.
        digits: After the point; None: three significant ones below 1, else two after the point.
        better: +1 where more is better, -1 where less is.
        deviation: Key of its standard deviation, where there is one.
        numbered: Whether the number of images belongs to its title (FID-50000).
    """

    name: str
    title: str
    digits: int | None = None
    better: int = 1
    deviation: str | None = None
    numbered: bool = True


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A metric.

    Attributes:
        name: As ``metrics`` of scripts/fid.py takes it.
        title: What it is, in words.
        needs: What is gathered of the images: of "pooled" and "spatial" (mean and covariance of features), "score"
            (class distributions) and "rows" (features of single images).
        compute: Called with what was gathered of the samples, the reference (None where ``compares`` is False) and the
            device; gives the values by name.
        values: What it gives, in the order of tables.
        compares: Whether it compares with real images.
        least: How many images it needs.
    """

    name: str
    title: str
    needs: frozenset[str]
    compute: Reference
    values: tuple[MetricValue, ...]
    compares: bool = True
    least: int = 2


METRICS: Table[MetricRow] = Table(
    "metric",
    [
        MetricRow(
            name="fid", title="Frechet Inception Distance", needs=frozenset({"pooled"}),
            compute="d_emo.evaluation.metrics:fid", values=(MetricValue(name="fid", title="FID", better=-1),),
        ),
        MetricRow(
            name="sfid", title="FID of spatial features", needs=frozenset({"spatial"}),
            compute="d_emo.evaluation.metrics:sfid", values=(MetricValue(name="sfid", title="sFID", better=-1),),
        ),
        MetricRow(
            name="isc", title="Inception Score", needs=frozenset({"score"}), compute="d_emo.evaluation.metrics:isc",
            values=(MetricValue(name="inception_score", title="IS", digits=2, deviation="inception_score_std"),),
            compares=False, least=10,
        ),
        MetricRow(
            name="prc", title="precision and recall", needs=frozenset({"rows"}),
            compute="d_emo.evaluation.metrics:prc", least=4,
            values=(
                MetricValue(name="precision", title="precision", digits=4),
                MetricValue(name="recall", title="recall", digits=4),
            ),
        ),
        MetricRow(
            name="kid", title="Kernel Inception Distance", needs=frozenset({"rows"}),
            compute="d_emo.evaluation.metrics:kid",
            values=(MetricValue(name="kid", title="KID", better=-1, deviation="kid_std"),),
        ),
    ],
)  # fmt: skip


def parse_metrics(names: Sequence[str]) -> list[str]:
    """Metric names, separated by commas or one by one, in the order of the table and each once.

    Raises:
        InputError: A name that is none, or no name.
    """
    wanted = {METRICS[part.strip()].name for name in names for part in name.split(",") if part.strip()}
    if not wanted:
        raise InputError(f"`metrics` names nothing to measure; known are {', '.join(METRICS)}")
    return [name for name in METRICS if name in wanted]
