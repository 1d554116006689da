"""The report of a measurement: the numbers, and all that is needed to compare them with others."""

import json
from dataclasses import dataclass, field
from typing import Any

from d_emo.tables import METRICS
from d_emo.text import markdown_table

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Result:
    """Distances and scores, and how they were measured.

    Attributes:
        values: Number by name, as the rows of ``d_emo.tables.METRICS`` call them, and deviations (``_std``).
        num_samples: How many samples were measured.
        num_reference: How many reference images the statistics are over; None if their file does not say.
        reference_cropped: Side in pixels to which reference images of several sizes were cropped, if they were.
        num_compared: How many reference images precision, recall and KID were measured against, if they were.
        features: Name of the feature extractor and of its weights.
        samples: Where the samples came from.
        reference: Where the reference came from.
        sampling: How samples were drawn: scheduler, steps, guidance_scale, seed, labels, weights, step, and further
            settings of ``scripts/fid.py``; may be empty.
        images_per_second: Speed of drawing and extracting features, over all processes, if it was done now.
        warnings: What a reader must know before comparing, one sentence each.
    """

    values: dict[str, float]
    num_samples: int
    num_reference: int | None
    features: str
    samples: str
    reference: str | None
    num_compared: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    images_per_second: float | None = None
    reference_cropped: int | None = None
    warnings: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> float:
        """The numbers are attributes too: ``result.fid``."""
        if name != "values" and name in self.values:
            return self.values[name]
        raise AttributeError(name)

    def __str__(self) -> str:
        rows = [*self._numbers(), ("features", self.features), ("samples", self._samples())]
        if self.reference is not None:
            rows.append(("reference", self._reference()))
        how = "{sampler}, {steps} steps, guidance {guidance}, seed {seed}, {labels} labels, {weights} weights"
        rows.append(("sampling", how.format_map(dict(self._sampling())) if self.sampling else NOT_RECORDED))
        if self.images_per_second is not None:
            rows.append(("speed", f"{self.images_per_second:.1f} images/s, features included"))
        width = max(len(title) for title, _ in rows) + 2
        return "\n".join(f"{title:<{width}}{text}" for title, text in rows)

    def to_json(self) -> str:
        """The result as a flat JSON object: the numbers, then one field per attribute."""
        fields = {name: value for name, value in vars(self).items() if name != "values"}
        return json.dumps({**self.values, **fields}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The result as a table of one row, with its head."""
        titles, cells = zip(*self._columns(), strict=True)
        return markdown_table(titles, [cells], words=len(titles))

    def _columns(self) -> list[tuple[str, str]]:
        where = [("samples", self._samples()), ("reference", self._reference()), ("features", self.features)]
        return self._numbers() + where + self._sampling()

    def _numbers(self) -> list[tuple[str, str]]:
        return [
            (value.title_for(self.num_samples), value.show(self.values))
            for row in METRICS.values() for value in row.values if value.name in self.values
        ]  # fmt: skip

    def _sampling(self) -> list[tuple[str, str]]:
        how = {key: str(self.sampling.get(key, NOT_RECORDED)) for key in _SAMPLING}
        if self.sampling.get("guidance_channels", "all") != "all":
            how["guidance_scale"] += f" on {self.sampling['guidance_channels']} channels"
        interval = list(self.sampling.get("guidance_interval", (0, 1)))
        if interval != [0, 1]:
            how["guidance_scale"] += f" from {interval[0]:g} to {interval[1]:g}"
        if "guide" in self.sampling:
            how["guidance_scale"] += " and by {guide} (step {guide_step:,}, weight {guide_weight:g})".format_map(
                self.sampling
            )
        if self.sampling.get("mixed_precision", "no") != "no":
            how["weights"] += f" in {self.sampling['mixed_precision']}"
        return [(title, how[key]) for key, title in _SAMPLING.items()]

    def _samples(self) -> str:
        step = self.sampling.get("step")
        return self.samples if step is None else f"{self.samples} (step {step:,})"

    def _reference(self) -> str:
        if self.reference is None:
            return "none"
        count = "stored statistics" if self.num_reference is None else f"{self.num_reference:,} images"
        side = self.reference_cropped
        note = f" of several sizes, cropped as in training to {side} x {side} px" if side else ""
        if self.num_compared not in (None, self.num_reference):
            by_image = [each.title for row in METRICS.values() if "rows" in row.needs for each in row.values
                        if each.name in self.values]  # fmt: skip
            names = " and ".join(filter(None, [", ".join(by_image[:-1]), by_image[-1]]))
            note += f", {names}: {self.num_compared:,} images"
        return f"{self.reference} ({count}{note})"


_SAMPLING = {
    "scheduler": "sampler", "steps": "steps", "guidance_scale": "guidance", "seed": "seed", "labels": "labels",
    "weights": "weights",
}  # fmt: skip
