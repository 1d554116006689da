"""Distance of the mean features; ``scripts/fid.py --metrics fid,mean`` measures it."""

from d_emo.tables import METRICS, MetricRow, MetricValue


def mean_distance(samples, reference, device) -> dict[str, float]:
    """Euclidean distance between the means of the features: FID without the covariances, before it is squared."""
    return {"mean_distance": float((samples.pooled.mean - reference.pooled.mean).norm())}


value = MetricValue(name="mean_distance", title="mean distance", digits=3, better=-1)
METRICS.register(MetricRow(
    name="mean", title="distance of the means", needs=frozenset({"pooled"}), compute=mean_distance, values=(value,)
))  # fmt: skip
