"""``d-emo class-accuracy``."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d_emo.cli import command_line
from d_emo.config import JudgeSettings
from d_emo.data import Reading
from d_emo.errors import InputError
from d_emo.evaluation import (
    ClassifierFeatures,
    ClassifierMetrics,
    compare_with_real,
    draw_classes,
    even_labels,
    measure_timed,
    open_real,
    sampler_table,
    words_of_parts,
)
from d_emo.files import write_file, write_json
from d_emo.io import card
from d_emo.io.snapshot import load_denoiser
from d_emo.sampling import Sampler, class_grid, save_png
from d_emo.sampling.schedulers import steps_for
from d_emo.tables import DATASETS, OBJECTIVES
from d_emo.text import plural

GUIDANCE = 1.5
"""Where none is given and the snapshot knows a null class."""


def run(settings: JudgeSettings) -> None:
    """Measure a snapshot's images by a classifier, as one sampler draws them or as several do.

    Raises:
        InputError: The classifier is of other classes, or the card cannot be written.
    """
    snapshot = load_denoiser(settings.checkpoint)
    guidance = settings.guidance_scale
    if guidance is None:
        guidance = GUIDANCE if snapshot.label_dropout else 1.0
    settings = replace(settings, guidance_scale=guidance, steps=steps_for(snapshot.objective, settings.steps))
    runs = settings.sampler_steps() or [(OBJECTIVES[snapshot.objective].scheduler, settings.steps)]
    how = {"guidance": settings.guidance_scale, "vae": settings.vae}
    sampler = Sampler.open(snapshot, scheduler=runs[0][0], steps=runs[0][1], **how)
    samplers = [sampler.replace(scheduler=name, steps=steps) for name, steps in runs]
    features = ClassifierFeatures(settings.classifier, device=sampler.device)
    if features.class_names != snapshot.class_names:
        raise InputError(
            f"{settings.classifier} knows other classes than {snapshot.path}; name a classifier of the same data"
        )
    if settings.write_card:
        card.read_metrics(snapshot.path)  # before anything is drawn
        if not os.access(snapshot.path, os.W_OK):
            raise InputError(f"`write_card` cannot write to {snapshot.path}; copy the snapshot and measure the copy")
    data = snapshot.meta.get("data")
    real, held_out = open_real(
        data, snapshot.image_size, snapshot.class_names, data_dir=settings.data_dir, validate_dir=settings.validate_dir,
        reading=Reading.of(settings),
    )
    if settings.through_codec and held_out is None:
        raise InputError("`through_codec` is for held-out images, and there are none; name their `validate_dir`")
    metrics = ClassifierMetrics(features, real, data=data, device=sampler.device)
    labels = even_labels(settings.num_images, len(snapshot.class_names))
    record = {"command": command_line(), "settings": settings.to_record(), "step": snapshot.meta["step"],
              "features": features.name}  # fmt: skip
    if settings.samplers:
        return compare_samplers(metrics, runs, samplers, labels, record, Path(settings.output))
    by_part: dict[str, dict[int, float]] = {}
    drawn = metrics.measure(draw_classes(sampler, labels.tolist()), labels, by_part)
    words = {part: words_of_parts(features.class_names, DATASETS[data].label_parts[part]) for part in by_part}
    record["by_part"] = {
        part: {words[part][digit]: rate for digit, rate in rates.items()} for part, rates in by_part.items()
    }
    record["conditions"] = (
        f"guidance {settings.guidance_scale:g}, {plural(runs[0][1], 'step')} of {runs[0][0]}, "
        f"images {settings.num_images}" + (f", codec {sampler.codec.name}" if settings.vae else "")
    )
    codec = sampler.codec if settings.through_codec else None
    compared = compare_with_real(metrics, drawn, len(labels), held_out, sampler.image_size, codec)
    record["figures"] = [each.to_dict() for each in compared]
    output = Path(settings.output)
    grid = class_grid(sampler.class_names, 10, 10, lambda labels: draw_classes(sampler, labels))
    save_png(grid, output, settings.to_record())
    write_json(output.with_suffix(".json"), record)
    print(f"picture         {output}  (seeds 0 to 99; the values beside it as JSON)")
    print(f"settings        {record['conditions']}\nfeatures        {features.name}")
    for each in compared:
        print(f"{each.name:<15} {each.shown:<8} {each.remark}".rstrip())
    for part, rates in record["by_part"].items():
        lowest = sorted(rates.items(), key=lambda each: each[1])
        print(f"{'by ' + part:<15} {', '.join(f'{word} {rate:.1f}' for word, rate in lowest)} %")
    if settings.write_card:
        write_file(snapshot.path / card.PICTURE, output.read_bytes())
        print(f"card            {card.add_measurement(snapshot.path, record)}")


def compare_samplers(
    metrics: ClassifierMetrics, runs: Sequence[tuple[str, int]], samplers: Sequence[Sampler], labels: torch.Tensor,
    record: dict[str, Any], output: Path,
) -> None:
    """Measure each sampler in turn; the table so far is written after every one. Shape: labels (N,)."""
    rows: list[dict[str, Any]] = []
    record |= {"hardware": card.describe_hardware(samplers[0].device), "rows": rows}
    for (name, steps), sampler in zip(runs, samplers, strict=True):
        measured = measure_timed(metrics, draw_classes(sampler, labels.tolist()), labels)
        rows.append({"scheduler": name, "steps": steps, **measured})
        table = sampler_table(metrics.values, rows, len(labels))
        print(table if len(rows) == 1 else table.rpartition("\n")[2], flush=True)
        write_file(output.with_suffix(".md"), table + "\n")
        write_json(output.with_suffix(".json"), record)
    print(f"\nwritten to {output.with_suffix('.md')}, with all settings to {output.with_suffix('.json')}")
