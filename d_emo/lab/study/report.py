"""The report of a study: what did not win first, then tables with intervals, then plots and samples."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from d_emo.files import write_file
from d_emo.lab.study.results import (
    RESUME,
    Estimate,
    at_time,
    difference,
    digits_of,
    last_common_step,
    metric_values,
    minutes_by_step,
    paired,
    runs_of,
)
from d_emo.lab.text import markdown_table, plural

HOW_TO_READ = (
    "Differences are between runs of the same seed (same data order, noise and labels); ± is half a 95 % confidence "
    "interval of Student's t over the seeds, without correction for looking at many metric values."
)


def findings(rows: pd.DataFrame, heading: str, names: Sequence[str]) -> str:
    """What a table says of its first run: first where it loses, then what is not decided, then where it wins."""
    first, lines = names[0], []
    for other in names[1:]:
        step = last_common_step(rows, [first, other])
        pairs = None if step is None else paired(rows, first, other, step)
        if pairs is None or pairs.empty:
            continue
        outcomes: dict[str, list[str]] = {f"**{first} loses** in": [], "Not decided:": [], "It wins in": []}
        loses, undecided, wins = outcomes.values()
        for name, value in metric_values().items():
            gap, digits = difference(pairs, name), digits_of(value)
            if not gap.count:
                continue
            ours, theirs = pairs[[name, f"{name}_other"]].dropna().mean()
            outcome = undecided if not gap.decided else wins if gap.mean * value.better > 0 else loses
            outcome.append(
                f"{value.title} {ours:.{digits}f} against {theirs:.{digits}f} ({gap.show(digits, sign=True)})"
            )
        said = [f"{title} {'; '.join(those) or 'nothing'}." for title, those in outcomes.items()]
        over = [set(pairs[column]) for column in ("loss_over", "loss_over_other")]
        if over[0] != over[1]:
            kinds = [{each.partition(",")[0] for each in kind} for kind in over]
            what = "over other timesteps" if kinds[0] == kinds[1] else "those of other objectives"
            said.append(f"Their losses are {what} and are not compared.")
        seeds = plural(len(pairs), "seed")
        lines.append(f"- {heading}, {first} against {other}, step {step:,}, {seeds}. {' '.join(said)}")
    return "\n".join(lines)


def main_table(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """Every run of a table at the last step that all have reached: means over seeds with 95 % intervals."""
    shown = runs_of(rows, names)
    step = last_common_step(rows, list(shown))
    if step is None:
        return "These runs have not been measured at a common step."
    measured = rows[rows.run.isin(names)].dropna(axis="columns", how="all")
    values = [value for name, value in metric_values().items() if name in measured]
    first, several = next(iter(shown)), len(shown) > 1
    head = ["run", "seeds", "parameters", "MACs", "ms/step", *(value.title for value in values)]
    lines = []
    for name, mine in shown.items():
        mine = mine[mine.step == step]
        one = mine.iloc[0]
        lines.append([
            name, str(len(mine)), f"{one.parameters / 1e6:.2f}M", f"{one.macs / 1e6:,.1f}M",
            f"{1000 * one.seconds_per_step:,.0f}",
            *(Estimate.of(mine[value.name]).show(digits_of(value)) for value in values),
        ])  # fmt: skip
        if several:
            gap = difference(paired(rows, name, first, step), "fid")
            lines[-1].append("-" if name == first else gap.show(sign=True))
    return f"Step {step:,}.\n\n" + markdown_table(head + [f"FID minus {first}'s"] * several, lines)


def course_table(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """FID at every measured step, and after the time that the fastest run takes: means over seeds, 95 % intervals."""
    shown = runs_of(rows, names)
    steps = sorted(set().union(*(mine.step for mine in shown.values())))
    time = min(minutes_by_step(mine).max() for mine in shown.values())
    minutes = f"{time:.1f}" if time >= 1 else f"{time:.2g}"
    head = ["FID at step", *(f"{step:,}" for step in steps), f"after {minutes} minutes"]
    courses = {name: [mine.fid[mine.step == step] for step in steps] for name, mine in shown.items()}
    return markdown_table(head, (
        [name, *(Estimate.of(values).show() for values in (*courses[name], at_time(mine, time)))]
        for name, mine in shown.items()
    ))  # fmt: skip


def gap_table(gaps: pd.DataFrame) -> str:
    """Error in train mode over that in eval mode, by noise level: means over seeds."""
    gaps = gaps.assign(ratio=gaps.train / gaps["eval"])
    ratios = gaps.groupby(["run", "timestep"], sort=False).ratio.mean().unstack()
    head = ["train / eval error at timestep", *(f"{level:,.0f}" for level in ratios)]
    return markdown_table(head, ([name, *(f"{ratio:.3f}" for ratio in row)] for name, row in ratios.iterrows()))


def write_report(
    folder: Path, *, title: str, introduction: Sequence[str], tables: dict[str, list[str]], rows: pd.DataFrame,
    losses: pd.DataFrame, gaps: pd.DataFrame, plots: dict[str, str],
) -> Path:
    """Write ``report.md``, ``results.csv``, ``losses.csv`` and, with gaps, ``norm_gap.csv``.

    Args:
        introduction: Paragraphs on what was done, and with which command.
        tables: Names of runs by heading.
        rows, losses: Of ``collect``.
        gaps: The norm gap by run, seed and timestep.
        plots: What is shown, by name of a file in the folder.
    """
    files = {"results.csv": rows, "losses.csv": losses} | ({} if gaps.empty else {"norm_gap.csv": gaps})
    for name, table in files.items():
        write_file(folder / name, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"), RESUME)
    some = {head: names for head, names in tables.items() if len(runs_of(rows, names)) >= min(2, len(set(names)))}
    said = [text for heading, names in some.items() if (text := findings(rows, heading, names))]
    parts = [f"# {title}", *introduction, "## What it says", "\n".join(said) or "Nothing to compare yet.", HOW_TO_READ]
    for heading, names in some.items():
        parts += [f"## {heading}", main_table(rows, names)]
        if rows.step[rows.run.isin(names)].nunique() > 1:
            parts.append(course_table(rows, names))
    if not gaps.empty:
        parts += ["## Train mode against eval mode", gap_table(gaps)]
    parts += [f"![{about}]({name})" for name, about in plots.items()]
    parts.append(f"Raw metric values: {', '.join(f'[{name}]({name})' for name in files)}.")
    report = folder / "report.md"
    write_file(report, "\n\n".join(parts) + "\n", RESUME)
    return report
