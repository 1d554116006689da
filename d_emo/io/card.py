"""Model cards: the README.md of a snapshot, in the Hugging Face form, written from the files that lie beside it.

A card is a function of its folder: ``snapshot.json`` (what was trained), ``config.yaml`` (every setting of the run)
and, once something was measured, ``metrics.json``. So it can be written anew at any time, and figures enter it through
`add_measurement`, with the command that made them, never by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData

from d_emo.files import write_file, write_json
from d_emo.tables import DATASETS, OBJECTIVES, family_of, objective_of

METRICS, PICTURE = "metrics.json", "samples.png"

PAPERS = Path(__file__).with_name("papers.bib").read_text().split("% ")[1:]
CITATIONS = {key: entry.strip() for key, _, entry in (paper.partition("\n") for paper in PAPERS)}
"""The papers that a card cites, by the keys that rows of models and objectives name; CITATION.cff names the same."""

_OWN_TERMS = "See to it that the licence named at the top of this card agrees with them before you share the weights."


def write_card(folder: str | Path) -> Path:
    """Write the card of a snapshot from what lies in its folder; facts that are not there are left out.

    Returns:
        The card's path.
    """
    folder = Path(folder)
    meta = json.loads((folder / "snapshot.json").read_text())
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    card = (_classifier_card if meta["kind"] == "classifier" else _denoiser_card)(folder, meta, settings)
    picture = f"![What it draws]({PICTURE})" if (folder / PICTURE).exists() else ""
    sections = [picture, *card["sections"], _measured(_read_metrics(folder), meta)]
    return write_card_file(
        folder, title=f"{settings['model']} on {_data_name(meta, settings)}, {meta['image_size']} px",
        sections=[*sections, _licence(meta)], cite=card["cite"], pipeline_tag=card["pipeline_tag"],
        tags=[*card["tags"], settings["model"]], datasets=_hub_datasets(meta, settings),
    )


def add_measurement(folder: str | Path, measurement: Mapping[str, Any]) -> Path:
    """Put a measurement into a snapshot's ``metrics.json`` and write its card anew.

    Args:
        folder: Snapshot.
        measurement: The "command" that made it, and "figures": rows of "name", "value" and "remark"; also
            "conditions" in words. Further entries are kept as they are. An older measurement by the same command is
            replaced.

    Returns:
        The card's path.
    """
    folder = Path(folder)
    others = [each for each in _read_metrics(folder) if each["command"] != measurement["command"]]
    write_json(folder / METRICS, [*others, dict(measurement)])
    return write_card(folder)


def write_card_file(
    folder: Path, *, title: str, sections: list[str], tags: list[str], cite: list[str] | None = None,
    library_name: str = "d-emo", pipeline_tag: str | None = None, datasets: list[str] | None = None,
) -> Path:
    """Write a README.md in the Hugging Face form: metadata, title, sections, and the papers to cite.

    Returns:
        The card's path.
    """
    data = ModelCardData(
        license="apache-2.0", library_name=library_name, pipeline_tag=pipeline_tag, datasets=datasets,
        tags=["d-emo", *tags],
    )
    papers = "\n\n".join(CITATIONS[name] for name in cite or [])
    parts = [f"# {title}", *sections, f"## Citation\n\n```bibtex\n{papers}\n```" if papers else ""]
    text = "\n\n".join(part.strip() for part in parts if part)
    path = folder / "README.md"
    write_file(path, f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    return path


def describe_hardware(device: torch.device) -> str:
    """What a run computes on, over all its processes: "8 x NVIDIA H200" or "2 CPU threads"."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    threads = f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"
    return threads if processes == 1 else f"{processes} processes of {threads}"


# ---- the parts of a card ---------------------------------------------------------------------------------------------


def _denoiser_card(folder: Path, meta: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    schedule = folder / "scheduler" / "scheduler_config.json"
    objective = meta.get("objective") or objective_of(json.loads(schedule.read_text()))
    family = family_of(settings["model"])
    recipe = f"objective {objective}, label dropout {settings.get('label_dropout')}, {_optimizer(settings)}"
    if settings.get("timestep_sampling", "uniform") != "uniform":
        recipe += f"; logit-normal timesteps ({settings['logit_mean']:g}, {settings['logit_std']:g})"
    if settings.get("label_init") == "names":
        recipe += "; label table started from the words of the class names"
    kind = "A class-conditional" if len(meta["class_names"]) > 1 else "An unconditional"
    about = f"""{kind} denoiser, trained with D-EMO: {_model(meta, settings)}, latents of the codec `{meta["codec"]}`.

## Use

    python scripts/sample.py --checkpoint FOLDER --class 0

FOLDER is this one (`hf download OWNER/NAME --local-dir FOLDER` fetches it from the hub); a class is given by its id or
name, {_examples(meta["class_names"])}. In Python: `d_emo.io.snapshot.load_denoiser(FOLDER)`."""
    return {
        "sections": [about, _training(meta, settings, recipe, "scripts/train_dit.py")],
        "cite": [*(family.papers if family else ()), *OBJECTIVES[objective].papers],
        "pipeline_tag": "unconditional-image-generation",  # the hub's list of tasks has no class-conditional one
        "tags": ["class-conditional-image-generation", "diffusion"],
    }


def _classifier_card(folder: Path, meta: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    recipe = f"cross-entropy with label smoothing {settings.get('label_smoothing')}, {_optimizer(settings)}"
    about = f"""An image classifier, trained with D-EMO: {_model(meta, settings)}.

## Use

```python
from d_emo.io.snapshot import load_classifier

snapshot = load_classifier("FOLDER")   # this folder; from the hub: hf download OWNER/NAME --local-dir FOLDER
logits = snapshot.model(images)        # (B, 3, {meta["image_size"]}, {meta["image_size"]}) in [-1, 1] -> (B, classes)
snapshot.class_names[logits[0].argmax()]
```

`python scripts/fid.py --features emov2:FOLDER` and `python scripts/judge.py --classifier FOLDER` measure denoisers with
it."""
    return {
        "sections": [about, _training(meta, settings, recipe, "scripts/train_classifier.py")],
        "cite": ["EMOv2"] * settings["model"].startswith("emov2") + ["EMO"],
        "pipeline_tag": "image-classification", "tags": ["image-classification"],
    }


def _start(meta: dict[str, Any], settings: dict[str, Any]) -> str:
    if not settings.get("init_from"):
        return ""
    before = meta.get("started_from", {})
    trained = [f"{before['step']:,} steps"] if "step" in before else []
    trained += [f"{before['training_minutes']:,} minutes"] if "training_minutes" in before else []
    labels = "" if settings.get("label_init") is None else ", with a new label table"
    return f"the weights of `{settings['init_from']}`" + (f" ({', '.join(trained)})" if trained else "") + labels


def _training(meta: dict[str, Any], settings: dict[str, Any], recipe: str, script: str) -> str:
    images = f"{meta['num_images']:,} images at " if "num_images" in meta else ""
    where = f" on {meta['hardware']}" if "hardware" in meta else ""
    rows = {
        "data": f"{_data_name(meta, settings)}, {images}{meta['image_size']} px",
        "recipe": recipe,
        "start": _start(meta, settings),
        "steps": f"{meta['step']:,} of {settings['max_steps']:,}, batch {settings['batch_size']:,}: "
                 f"{meta['step'] * settings['batch_size']:,} images seen",
        "weights": f"moving average (EMA, decay {settings['ema_decay']}) of parameters and BatchNorm statistics",
        "time": f"{meta['training_minutes']:,} minutes{where}" if "training_minutes" in meta else "",
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"""## Training

| | |
|---|---|
{table}

`config.yaml` beside this card holds every setting;
`accelerate launch {script} --config config.yaml --output-dir NEW` repeats the run."""


def _measured(measurements: list[dict[str, Any]], meta: dict[str, Any]) -> str:
    parts = []
    if "held_out_accuracy" in meta:
        parts.append(f"Accuracy on held-out images, at the end of training: {meta['held_out_accuracy']:.2%}.")
    if "accuracy" in meta:
        weights = {"ema": "moving average (EMA), these here", "raw": "raw"}
        rows = (f"| {weights[kind]} | {each['top1']:.2%} | {each['top5']:.2%} | {each['images']:,} |"
                for kind, each in meta["accuracy"].items())
        parts.append("\n".join(["| weights | top-1 | top-5 | images |", "|---|---:|---:|---:|", *rows]))
    for measurement in measurements:
        conditions = f" ({measurement['conditions']})" if "conditions" in measurement else ""
        rows = (f"| {row['name']} | {row['value']:,} | {row['remark']} |" for row in measurement["figures"])
        table = "\n".join(["| figure | value | remark |", "|---|---:|---|", *rows])
        parts.append(f"By `{measurement['command']}`{conditions}:\n\n{table}")
    return "\n\n".join(["## Measured", *parts]) if parts else ""


def _licence(meta: dict[str, Any]) -> str:
    row = DATASETS[meta["data"]] if meta.get("data") in DATASETS else None
    terms = row.licence if row and row.licence else _OWN_TERMS
    codec = meta.get("codec", "pixels")
    codec = f", and need the codec `{codec}`, which has its own" if codec != "pixels" else ""
    return f"""## Licence

The code that made and reads these weights is Apache-2.0. The weights inherit the terms of the data they were trained
on{codec}.
{terms}"""


def _model(meta: dict[str, Any], settings: dict[str, Any]) -> str:
    options = f" with `{json.dumps(settings['model_options'])}`" if settings.get("model_options") else ""
    millions = f", {meta['parameters'] / 1e6:.2f} M trained parameters" if "parameters" in meta else ""
    classes = len(meta["class_names"])
    return f"{settings['model']}{options}, {classes:,} {'classes' if classes > 1 else 'class'}{millions}"


def _optimizer(settings: dict[str, Any]) -> str:
    decay = f", weight decay {settings['weight_decay']:g}" if settings.get("weight_decay") else ""
    warmup = f" after {settings['warmup_steps']:,} warm-up steps" if settings.get("warmup_steps") else ""
    return f"AdamW at {settings['learning_rate']:g}{decay}, {settings.get('schedule', 'constant')} schedule{warmup}"


def _data_name(meta: dict[str, Any], settings: dict[str, Any]) -> str:
    """The name of the data, without the place where they lay."""
    if meta.get("data") in DATASETS:
        return DATASETS[meta["data"]].title
    place = settings.get("latents") or settings.get("data_dir") or "unnamed data"
    scheme, _, rest = place.partition(":")
    if scheme == "hf":
        return rest.partition("?")[0]
    return Path(rest).parent.name if scheme == "wds" else Path(place).name


def _examples(class_names: list[str]) -> str:
    return f'0 to {len(class_names) - 1:,}, or "{class_names[0]}"'


def _hub_datasets(meta: dict[str, Any], settings: dict[str, Any]) -> list[str] | None:
    """Its name on the hub, where it came from there or the classes tell (ImageNet-1k by its WordNet ids)."""
    if str(settings.get("data_dir")).startswith("hf:"):
        return [_data_name(meta, settings)]
    names = meta["class_names"]
    imagenet = len(names) == 1000 and (names[0], names[-1]) == ("n01440764", "n15075141")
    return ["ILSVRC/imagenet-1k"] if imagenet else None


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / METRICS
    return json.loads(file.read_text()) if file.exists() else []
