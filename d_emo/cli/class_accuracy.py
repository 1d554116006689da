"""``d-emo class-accuracy``."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from d_emo.cli import command_line
from d_emo.config import JudgeSettings, check_guidance
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.evaluation import ClassifierFeatures, ClassifierMetrics, classifier_metrics, compare_with_real
from d_emo.io.snapshot import load_denoiser
from d_emo.latents import load_codec
from d_emo.sampling import make_scheduler, prepare_denoiser, set_steps
from d_emo.tables import OBJECTIVES


def run(settings: JudgeSettings) -> None:
    """Do it.

    Raises:
        InputError: The classifier knows other classes, or the card cannot be written.
    """
    device = best_device()
    snapshot = load_denoiser(settings.checkpoint)
    check_guidance(settings.guidance_scale, label_dropout=snapshot.label_dropout)
    features, names = ClassifierFeatures(settings.classifier, device=device), snapshot.class_names
    if names != features.class_names:
        raise InputError(
            f"{settings.classifier} knows other classes than {snapshot.path}; name a classifier of the same data"
        )
    if settings.write_card and not os.access(snapshot.path, os.W_OK):
        raise InputError(f"`write_card` cannot write to {snapshot.path}; copy the snapshot and measure the copy")
    runs = settings.sampler_steps() or [(OBJECTIVES[snapshot.objective].scheduler, settings.steps)]
    for name, steps in runs:
        set_steps(make_scheduler(name, snapshot.scheduler_config), steps)  # refuses before anything is drawn
    data = snapshot.meta.get("data")
    real, held_out = classifier_metrics.open_real(
        data, snapshot.image_size, names, data_dir=settings.data_dir, validate_dir=settings.validate_dir
    )
    metrics = ClassifierMetrics(features, real, data=data, device=device)
    model, codec = prepare_denoiser(snapshot.model.to(device)), load_codec(snapshot.codec).to(device)
    draw = partial(drawings, model, codec, snapshot.scheduler_config, settings.guidance_scale)
    measurement = {
        "command": command_line(), "settings": vars(settings), "step": snapshot.meta["step"],
    }
    labels = classifier_metrics.even_labels(settings.num_images, len(names))
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    if settings.samplers:
        return compare(metrics, draw, runs, labels, measurement, Path(settings.output), device)
    drawn = metrics.measure(draw(labels.tolist(), *runs[0]), labels)
    size = (snapshot.image_size, snapshot.image_size)
    compared = compare_with_real(metrics, drawn, len(labels), held_out, size)
    measurement["features"] = features.name
    show(settings, snapshot, compared, partial(draw, scheduler=runs[0][0], steps=runs[0][1]), measurement)


def drawings(model, codec, schedule, guidance_scale, labels, scheduler, steps):
    """Batches of drawings of these classes, seeds 0, 1, 2, ..."""
    from tqdm import tqdm

    from d_emo.evaluation.classifier_metrics import BATCH
    from d_emo.sampling import make_scheduler, sample_images

    title = f"{scheduler}, {steps} steps"
    with tqdm(total=len(labels), desc=title, unit="image", disable=None, leave=False) as bar:
        for images in sample_images(
            model, make_scheduler(scheduler, schedule), codec, labels, range(len(labels)), num_inference_steps=steps,
            guidance_scale=guidance_scale, batch_size=BATCH,
        ):  # fmt: skip
            bar.update(len(images))
            yield images


def compare(metrics, draw, runs, labels, measurement, output, device) -> None:
    """Measure each sampler in turn; the table so far is written after every one."""
    from d_emo.evaluation import measure_timed, sampler_table
    from d_emo.io.card import describe_hardware

    rows: list[dict] = []
    measurement |= {"features": metrics.extractor.name, "hardware": describe_hardware(device), "rows": rows}
    for scheduler, steps in runs:
        rows.append({"scheduler": scheduler, "steps": steps,
                     **measure_timed(metrics, draw(labels.tolist(), scheduler, steps), labels)})  # fmt: skip
        table = sampler_table(metrics.values, rows, len(labels))
        print(table if len(rows) == 1 else table.rpartition("\n")[2], flush=True)
        output.with_suffix(".md").write_text(table + "\n")
        output.with_suffix(".json").write_text(json.dumps(measurement, indent=1) + "\n")
    print(f"\nwritten to {output.with_suffix('.md')}, with all settings to {output.with_suffix('.json')}")


def show(settings, snapshot, compared, draw, measurement) -> None:
    """Draw the picture of ten classes; write and print the metric values."""

    from d_emo.io import card
    from d_emo.sampling import draw_grid, save_png

    names, output = snapshot.class_names, Path(settings.output)
    shown = [index * len(names) // 10 for index in range(10)]
    images = torch.cat(list(draw([label for label in shown for _ in range(10)])))
    save_png(draw_grid(images, [f"{label}: {names[label]}" for label in shown], 10), output, vars(settings))
    how = f"{settings.steps} steps of {OBJECTIVES[snapshot.objective].scheduler}, images {settings.num_images}"
    measurement |= {
        "conditions": f"guidance {settings.guidance_scale:g}, {how}",
        "figures": [each.to_dict() for each in compared],
    }
    output.with_suffix(".json").write_text(json.dumps(measurement, indent=1) + "\n")
    print(f"picture         {output}  (seeds 0 to 99; the values beside it as JSON)")
    print(f"settings        {measurement['conditions']}")
    print(f"features        {measurement['features']}")
    for each in compared:
        print(f"{each.name:<15} {each.shown:<8} {each.remark}")
    if settings.write_card:
        shutil.copy(output, snapshot.path / card.PICTURE)
        print(f"card            {card.add_measurement(snapshot.path, measurement)}")

