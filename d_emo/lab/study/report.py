"""The report of a study: how it was made, what did not win first, then tables with intervals, then plots."""

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from d_emo.config import StudySettings
from d_emo.files import read_json, write_file
from d_emo.io.snapshot import load_meta
from d_emo.lab.study.plan import PlannedRun
from d_emo.lab.study.results import (
    REMAKE,
    RESUME,
    Estimate,
    at_step,
    at_time,
    difference,
    last_common_step,
    metric_values,
    minutes_by_step,
    paired,
    runs_of,
)
from d_emo.tables import with_present_names
from d_emo.text import command, markdown_table, plural

HOW_TO_READ = (
    "Differences are between runs of the same seed (same data order, noise and labels); ± is half a 95 % confidence "
    "interval of Student's t over the seeds, without correction for looking at many metric values."
)


def introduction(
    settings: StudySettings, runs: list[PlannedRun], rows: pd.DataFrame, timed_on: str, classifier: str
) -> list[str]:
    """What was done, measured by a ``classifier`` in words, and the command that does it again."""
    training, counts = runs[0].training, rows.groupby("run").seed.nunique()
    seeds = plural(counts.max(), "seed")
    if counts.nunique() > 1:
        seeds = f"{counts.min()} to {seeds}, as the tables say"
    snapshots = [run.snapshots()[-1] for run in runs if run.name in counts and run.snapshots()]
    hardware = ", ".join(dict.fromkeys(load_meta(snapshot)["hardware"] for snapshot in snapshots))
    configs = shlex.join(part for pair in itertools.pairwise(sys.argv) if pair[0] == "--config" for part in pair)
    steps = sorted({run.training.max_steps for run in runs})
    done = (
        f"Made by `{command('compare', 'compare.py')} {configs}`: {seeds}, "
        f"{' or '.join(f'{each:,}' for each in steps)} steps of {training.batch_size}, trained on {hardware}. Time is "
        f"the number of steps times the median time of one, measured of all models in turns, step by step, on "
        f"{timed_on}, without reading data."
    )
    if training.schedule == "cosine" and len(steps) == 1:
        done += (
            " At equal time a slower run is read between its snapshots, before its learning rate has fallen to the "
            "end: that speaks against it."
        )
    if settings.reference is not None:
        measured = f"Measured by `{command('fid', 'fid.py')}` against `{settings.reference}`"
        return [done, f"{measured}, {settings.num_images:,} drawings."]
    used = {loss_over.partition(",")[0] for loss_over in rows["loss_over"]} if "loss_over" in rows else set()
    those = {name: sampler for name, sampler in settings.samplers.items() if not used or name in used}
    samplers = " and ".join(f"{sampler} ({name})" for name, sampler in those.items())
    seen = (
        ", shape, colour and ground are the shares of drawings in which it sees what was asked for, empty that of "
        "drawings without a shape." if "empty" in rows else
        " is the share of drawings that it takes for what was asked for."
    )  # fmt: skip
    measured = (
        f"Measured with {settings.num_images:,} drawings of each snapshot (averaged weights), classes in turn, "
        f"guidance {settings.guidance_scale:g}, {samplers}. FID, precision and recall are in the features of a "
        f"classifier of the same classes ({classifier}) and compare with nothing outside this study; class{seen}"
    )
    path, values = held_out_file(settings, runs), metric_values()
    if path.exists() and (real := read_json(path, remedy=REMAKE)):
        count, real = real.pop("images"), with_present_names(real)
        shown = (f"{values[name].title} {value:.{values[name].digits}f}" for name, value in real.items())
        measured += f" {count:,} real held-out images measure: {', '.join(shown)}."
    return [done, measured]


def held_out_file(settings: StudySettings, runs: list[PlannedRun]) -> Path:
    """Where the metric values of real held-out images are kept."""
    return Path(settings.output_dir) / f"held-out-{runs[0].protocol}.json"


def findings(rows: pd.DataFrame, heading: str, names: Sequence[str]) -> str:
    """What a table says of its first run: first where it loses, then what is not decided, then where it wins."""
    first, lines = names[0], []
    for other in names[1:]:
        step = last_common_step(rows, [first, other])
        pairs = paired(rows, first, other, step)
        if pairs.empty:
            continue
        loses, undecided, wins = f"**{first} loses** in", "Not decided:", "It wins in"
        outcomes: dict[str, list[str]] = {loses: [], undecided: [], wins: []}
        for name, value in metric_values().items():
            gap, digits = difference(pairs, name), value.digits
            if gap.count:
                ours, theirs = pairs[[name, f"{name}_other"]].dropna().mean()
                text = f"{value.title} {ours:.{digits}f} against {theirs:.{digits}f} ({gap.show(digits, sign=True)})"
                outcomes[undecided if not gap.decided else wins if gap.mean * value.better > 0 else loses].append(text)
        said = [f"{title} {'; '.join(those) or 'nothing'}." for title, those in outcomes.items()]
        over = [set(pairs[column]) for column in ("loss_over", "loss_over_other")]
        if over[0] != over[1]:
            kinds = [{each.partition(",")[0] for each in kind} for kind in over]
            what = "over other timesteps or with other terms" if kinds[0] == kinds[1] else "those of other objectives"
            said.append(f"Their losses are {what} and are not compared.")
        seeds = plural(len(pairs), "seed")
        when = "at the end of each" if step is None else f"step {step:,}"
        lines.append(f"- {heading}, {first} against {other}, {when}, {seeds}. {' '.join(said)}")
    return "\n".join(lines)


def main_table(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """Every run of a table at the last step that all have reached: means over seeds with 95 % intervals.

    Where there is none, as the runs have steps of their own, at the last of each, with the minutes that it took.
    """
    shown = runs_of(rows, names)
    step = last_common_step(rows, list(shown))
    own = step is None
    measured = rows[rows.run.isin(names)].dropna(axis="columns", how="all")
    values, first = [value for name, value in metric_values().items() if name in measured], next(iter(shown))
    head = ["run", *["steps", "minutes"] * own, "seeds", "parameters", "MACs", "ms/step", *(v.title for v in values)]
    lines = []
    for name, mine in shown.items():
        mine = at_step(mine, step)
        one, estimates = mine.iloc[0], (Estimate.of(mine[value.name]).show(value.digits) for value in values)
        gap = "-" if name == first else difference(paired(rows, name, first, step), "fid").show(sign=True)
        ends = [f"{one.step:,}", f"{one.step * one.seconds_per_step / 60:.1f}"] * own
        lines.append([name, *ends, str(len(mine)), f"{one.parameters / 1e6:.2f}M", f"{one.macs / 1e6:,.1f}M",
                      f"{1000 * one.seconds_per_step:,.0f}", *estimates, *[gap] * (len(shown) > 1)])  # fmt: skip
    when = "The last step of each." if own else f"Step {step:,}."
    return f"{when}\n\n" + markdown_table(head + [f"FID minus {first}'s"] * (len(shown) > 1), lines)


def course_table(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """FID at every measured step, and after the time that the fastest run takes: means over seeds, 95 % intervals."""
    shown = runs_of(rows, names)
    steps = sorted(rows.step[rows.run.isin(names)].unique())
    time = min(minutes_by_step(mine).max() for mine in shown.values())
    minutes = f"{time:.1f}" if time >= 1 else f"{time:.2g}"
    courses = {name: [*(mine.fid[mine.step == step] for step in steps), at_time(mine, time)]
               for name, mine in shown.items()}  # fmt: skip
    head = ["FID at step", *(f"{step:,}" for step in steps), f"after {minutes} minutes"]
    return markdown_table(head, ([name, *(Estimate.of(each).show() for each in row)] for name, row in courses.items()))


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
    said = "\n".join(text for heading, names in some.items() if (text := findings(rows, heading, names)))
    parts = [f"# {title}", *introduction, "## What it says", said or "Nothing to compare yet.", HOW_TO_READ]
    for heading, names in some.items():
        parts += [f"## {heading}", main_table(rows, names)]
        if rows.step[rows.run.isin(names)].nunique() > 1 and last_common_step(rows, list(runs_of(rows, names))):
            parts.append(course_table(rows, names))
    if not gaps.empty:
        parts += ["## Train mode against eval mode", gap_table(gaps)]
    parts += [f"![{about}]({name})" for name, about in plots.items()]
    parts.append(f"Raw metric values: {', '.join(f'[{name}]({name})' for name in files)}.")
    report = folder / "report.md"
    write_file(report, "\n\n".join(parts) + "\n", RESUME)
    return report
