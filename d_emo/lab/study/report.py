"""The report of a study: what did not win first, then tables with intervals, then plots and pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from d_emo.lab.loss_curves import Curve
from d_emo.lab.study.results import (
    Estimate,
    Row,
    at_time,
    difference,
    last_common_step,
    minutes_by_step,
    same_loss,
    values_of,
    write_csv,
)
from d_emo.tables import with_present_names


@dataclass(frozen=True)
class Figure:
    """How a measured figure is shown.

    Attributes:
        title: Its heading.
        digits: After the point.
        better: +1 where more is better, -1 where less is.
    """

    title: str
    digits: int
    better: int


FIGURES = {
    "loss": Figure("loss", 4, -1),
    "fid": Figure("FID", 2, -1),
    "class_accuracy": Figure("class %", 1, 1),
    "shape": Figure("shape %", 1, 1),
    "colour": Figure("colour %", 1, 1),
    "ground": Figure("ground %", 1, 1),
    "empty": Figure("empty %", 1, -1),
    "precision": Figure("precision", 3, 1),
    "recall": Figure("recall", 3, 1),
    "inception_score": Figure("IS", 1, 1),
}


def findings(rows: Sequence[Row], heading: str, names: Sequence[str]) -> str:
    """What a table says of its first run: first where it loses, then what is not decided, then where it wins."""
    first, lines = names[0], []
    for other in names[1:]:
        step = last_common_step(rows, [first, other])
        if step is None:
            continue
        verdicts: dict[str, list[str]] = {"loses": [], "undecided": [], "wins": []}
        for key, figure in FIGURES.items():
            gap = difference(rows, first, other, step, key)
            if gap is None:
                continue
            ours, theirs = shared_means(rows, first, other, step, key)
            kind = "undecided" if not gap.decided else "wins" if gap.mean * figure.better > 0 else "loses"
            verdicts[kind].append(
                f"{figure.title} {ours:.{figure.digits}f} against {theirs:.{figure.digits}f} "
                f"({'+' if gap.mean > 0 else ''}{gap.show(figure.digits)})"
            )
        seeds = difference(rows, first, other, step, "fid").count
        titles = {"loses": f"**{first} loses** in", "undecided": "Not decided:", "wins": "It wins in"}
        parts = [f"{title} {'; '.join(verdicts[kind]) or 'nothing'}." for kind, title in titles.items()]
        if not same_loss(rows, first, other):
            parts.append("Their losses are over other timesteps and are not compared.")
        lines.append(f"- {heading}, {first} against {other}, step {step:,}, {plural(seeds, 'seed')}. {' '.join(parts)}")
    return "\n".join(lines)


def shared_means(rows: Sequence[Row], name: str, other: str, step: int, figure: str) -> tuple[float, float]:
    """Means of two runs over the seeds that both have."""
    ours, theirs = (values_of(rows, each, step, figure) for each in (name, other))
    shared = ours.keys() & theirs.keys()
    return mean(ours[seed] for seed in shared), mean(theirs[seed] for seed in shared)


def main_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Every run of a table at the last step that all have reached: means over seeds with 95 % intervals."""
    shown = [name for name in names if any(row["run"] == name for row in rows)]
    step = last_common_step(rows, shown)
    keys = [key for key in FIGURES if any(key in row for row in rows if row["run"] in shown)]
    head = ["run", "seeds", "parameters", "MACs", "ms/step", *(FIGURES[key].title for key in keys)]
    if len(shown) > 1:
        head.append(f"FID minus {shown[0]}'s")
    lines = [" | ".join(["", *head, ""]).strip(), "|---|" + "---:|" * (len(head) - 1)]
    for name in shown:
        mine = [row for row in rows if row["run"] == name and row["step"] == step]
        cells = [
            name, str(len(mine)), f"{mine[0]['parameters'] / 1e6:.2f}M", f"{mine[0]['macs'] / 1e6:,.1f}M",
            f"{1000 * mine[0]['seconds_per_step']:,.0f}",
        ]  # fmt: skip
        for key in keys:
            values = list(values_of(rows, name, step, key).values())
            cells.append(Estimate.of(values).show(FIGURES[key].digits) if values else "-")
        if len(shown) > 1:
            gap = difference(rows, name, shown[0], step, "fid") if name != shown[0] else None
            cells.append("-" if gap is None else f"{'+' if gap.mean > 0 else ''}{gap.show()}")
        lines.append(f"| {' | '.join(cells)} |")
    return f"Step {step:,}.\n\n" + "\n".join(lines)


def course_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """FID at every measured step, and after the time that the fastest run takes: means over seeds, 95 % intervals."""
    shown = [name for name in names if any(row["run"] == name for row in rows)]
    steps = sorted({row["step"] for row in rows if row["run"] in shown})
    time = min(max(minutes_by_step(rows, name).values()) for name in shown)
    head = [*(f"{step:,}" for step in steps), f"after {time:.1f} minutes"]
    lines = [f"| FID at step | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for name in shown:
        values = [list(values_of(rows, name, step, "fid").values()) for step in steps] + [at_time(rows, name, time)]
        lines.append(f"| {name} | {' | '.join(Estimate.of(v).show() if v else '-' for v in values)} |")
    return "\n".join(lines)


def gap_table(gaps: Sequence[Row]) -> str:
    """Error in train mode over that in eval mode, by noise level: means over seeds."""
    levels = sorted({row["timestep"] for row in gaps})
    lines = [
        f"| train / eval error at timestep | {' | '.join(f'{t:,.0f}' for t in levels)} |",
        "|---|" + "---:|" * len(levels),
    ]
    for name in dict.fromkeys(row["run"] for row in gaps):
        ratios = [
            Estimate.of([r["train"] / r["eval"] for r in gaps if r["run"] == name and r["timestep"] == t]).mean
            for t in levels
        ]
        lines.append(f"| {name} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    return "\n".join(lines)


def write_report(
    folder: Path, *, title: str, introduction: Sequence[str], tables: dict[str, list[str]], rows: Sequence[Row],
    losses: dict[tuple[str, int], Curve], gaps: Sequence[Row], pictures: Sequence[tuple[str, str]],
) -> Path:
    """Write ``report.md``, ``results.csv``, ``losses.csv`` and, with gaps, ``norm_gap.csv``.

    Args:
        folder: Where to.
        title: Heading.
        introduction: Paragraphs on what was done, and with which command.
        tables: Names of runs by heading.
        rows: Of ``collect``.
        losses: Loss curves by (run, seed).
        gaps: Rows of the norm gap.
        pictures: File names in the folder, and what they show.
    """
    write_csv(folder / "results.csv", rows)
    write_csv(folder / "losses.csv", [
        {"run": name, "seed": seed, "step": int(step), "loss": float(value)}
        for (name, seed), curve in losses.items() for step, value in zip(curve.steps, curve.values, strict=True)
    ])  # fmt: skip
    present = {row["run"] for row in rows}
    some = {head: names for head, names in tables.items() if len(present & set(names)) >= min(2, len(names))}
    said = [text for heading, names in some.items() if (text := findings(rows, heading, names))]
    parts = [f"# {title}", *introduction, "## What it says", "\n".join(said) or "Nothing to compare yet."]
    parts.append(
        "Differences are between runs of the same seed (same data order, noise and labels); ± is half a 95 % "
        "confidence interval of Student's t over the seeds, without correction for looking at many figures."
    )
    for heading, names in some.items():
        parts += [f"## {heading}", main_table(rows, names)]
        if len({row["step"] for row in rows if row["run"] in names}) > 1:
            parts.append(course_table(rows, names))
    if gaps:
        write_csv(folder / "norm_gap.csv", gaps)
        parts += ["## Train mode against eval mode", gap_table(gaps)]
    parts += [f"![{about}]({name})" for name, about in pictures]
    parts.append("Raw figures: [results.csv](results.csv), [losses.csv](losses.csv)"
                 + (", [norm_gap.csv](norm_gap.csv)." if gaps else "."))
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def plural(count: int, what: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def read_rows(path: Path) -> list[Row]:
    """What `write_csv` wrote, numbers as numbers."""

    def value(text: str) -> float | int | str:
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if number.is_integer() and "." not in text and "e" not in text else number

    with path.open(newline="") as file:
        return [
            with_present_names({key: value(text) for key, text in row.items() if text}) for row in csv.DictReader(file)
        ]
