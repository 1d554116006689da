"""Metrics of a set of images, and the values that they give: in features of a network, and by classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d_emo.errors import InputError
from d_emo.tables.datasets import DATASETS
from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A number that a metric gives, and how it is shown.

    Attributes:
        name: Its key in results.
        title: In tables.
        digits: After the point; None: three significant ones below 1, else two after the point.
        unit: Behind the number.
        better: +1 where more is better, -1 where less is.
        deviation: Key of its standard deviation, where there is one.
        numbered: Whether the number of images belongs to its title (FID-50000).
        former_name: Its key in older results.
    """

    name: str
    title: str
    digits: int | None = None
    unit: str = ""
    better: int = 1
    deviation: str | None = None
    numbered: bool = True
    former_name: str | None = None

    def title_for(self, count: int) -> str:
        """Its title when ``count`` images were measured: "FID-50000"."""
        return f"{self.title}-{count}" if self.numbered else self.title

    def show(self, values: Mapping[str, float]) -> str:
        """Its number among those that were measured: "4.36", "2.51 +- 0.08", "71.4 %"."""
        shown = [self._show(values[key]) for key in (self.name, self.deviation) if key is not None]
        return " +- ".join(shown) + (f" {self.unit}" if self.unit else "")

    def _show(self, value: float) -> str:
        if self.digits is not None:
            return f"{value:.{self.digits}f}"
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A metric of a set of images, in the features of a network.

    Attributes:
        name: As ``metrics`` of scripts/fid.py takes it.
        title: What it is, in words.
        needs: What is gathered of the images: of "pooled" and "spatial" (mean and covariance of features), "score"
            (class distributions) and "rows" (features of single images).
        compute: Called with what was gathered of the samples and of the reference (both have an attribute for each of
            ``needs``; the reference is None where ``compares`` is False) and the device; gives the values by name.
        values: What it gives, in the order of tables.
        compares: Whether it compares with real images.
        least: How many images it needs, on both sides.
        by_classifier: Whether scripts/judge.py and studies measure it too, in the features of their classifier.
    """

    name: str
    title: str
    needs: frozenset[str]
    compute: Reference
    values: tuple[MetricValue, ...]
    compares: bool = True
    least: int = 2
    by_classifier: bool = False


METRICS: Table[MetricRow] = Table(
    "metric",
    [
        MetricRow(
            name="fid", title="Frechet Inception Distance", needs=frozenset({"pooled"}),
            compute="d_emo.evaluation.metrics:fid", values=(MetricValue(name="fid", title="FID", better=-1),),
            by_classifier=True,
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
            compute="d_emo.evaluation.metrics:prc", least=4, by_classifier=True,
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


def check_compared(metrics: Sequence[str], reference: object) -> None:
    """Refuse to measure without a reference what compares with real images.

    Raises:
        InputError: So it is.
    """
    compared = [name for name in metrics if METRICS[name].compares]
    if compared and reference is None:
        raise InputError(f"{', '.join(compared)} of `metrics` compares with real images; name a `reference`")


CLASS_ACCURACY = MetricValue(
    name="class_accuracy", title="class accuracy", digits=2, unit="%", numbered=False, former_name="recognised"
)
EMPTY = MetricValue(name="empty", title="empty", digits=2, unit="%", better=-1, numbered=False)


def class_values(data: str | None) -> tuple[MetricValue, ...]:
    """What a classifier's answers say of images, in percent; of a built-in data set by parts of the class id, too."""
    if data not in DATASETS:
        return (CLASS_ACCURACY,)
    row = DATASETS[data]
    parts = (MetricValue(name=part, title=part, digits=2, unit="%", numbered=False) for part in row.label_parts)
    return (CLASS_ACCURACY, *parts, *([EMPTY] if row.is_empty else []))


def metric_values() -> dict[str, MetricValue]:
    """All values that any metric gives, by name, in the order of tables."""
    in_features = [value for row in METRICS.values() for value in row.values]
    by_classes = [value for data in DATASETS for value in class_values(data)]
    return {value.name: value for value in (*in_features, *by_classes)}


def with_present_names(values: Mapping[str, float]) -> dict[str, float]:
    """Values that were kept by an older version, under the names that they have now."""
    renamed = {value.former_name: name for name, value in metric_values().items() if value.former_name}
    return {renamed.get(name, name): value for name, value in values.items()}
