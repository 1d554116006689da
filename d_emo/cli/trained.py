"""What the verbs that train say at the end."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from d_emo.config import RunSettings
from d_emo.errors import said
from d_emo.io.hub import push_snapshot
from d_emo.io.snapshot import load_meta
from d_emo.training.accuracy import Accuracy


def report(snapshot: Path | None, settings: RunSettings, tell: Callable[[Path], Iterable[str]]) -> None:
    """Say where the last snapshot of a run is, what ``tell`` knows of it, and push it where asked; None: nothing."""
    if snapshot is None:
        return
    print(f"snapshot  {snapshot}")
    for line in tell(snapshot):
        print(line)
    if settings.push_to_hub:
        print(f"pushed    {push_snapshot(snapshot, settings.push_to_hub)}")


def accuracies(snapshot: Path, kind: str = "classifier", *, unit: str = "images") -> Iterator[str]:
    """Lines about the held-out accuracy of a classifier of ``unit``, whose snapshot is of ``kind``."""
    measured: dict[str, Any] = load_meta(snapshot, kind).get("accuracy", {})
    if not measured:
        yield said(f"accuracy  not measured: there are no held-out {unit}; name some with `validate_dir`")
    for weights, shares in measured.items():
        yield f"accuracy  {Accuracy(**shares).in_words(unit)} held out ({weights} weights)"
