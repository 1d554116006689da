"""Model cards: the README.md of a snapshot, in the Hugging Face form, written from the files that lie beside it.

A card is a function of its folder, filled into ``card.md``: ``snapshot.json`` (what was trained), ``config.yaml``
(every setting of the run) and, once something was measured, ``metrics.json``. So it can be written anew at any time,
and figures enter it through `add_measurement`, with the command that made them, never by hand.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from d_emo.files import read_json, write_file, write_json
from d_emo.io.schema import noise_schedule, snapshot_meta
from d_emo.tables import DATASETS, OBJECTIVES, OPTIMIZERS, SCENES, family_of, objective_of
from d_emo.text import plural

_FIGURE = ("name", "value", "remark")
METRICS, PICTURE = "metrics.json", "samples.png"

PAPERS = Path(__file__).with_name("papers.bib").read_text().split("% ")[1:]
CITATIONS = {key: entry.strip() for key, _, entry in (paper.partition("\n") for paper in PAPERS)}
"""The papers that a card cites, by the keys that rows of models and objectives name; CITATION.cff names the same."""

_OWN_TERMS = "See to it that the licence named at the top of this card agrees with them before you share the weights."


def write_card(folder: str | Path) -> Path:
    """Write the card of a snapshot from what lies in its folder, without facts that are missing; return its path."""
    import jinja2  # here, as training and sampling start without

    folder = Path(folder)
    meta, settings = read_json(folder / "snapshot.json", snapshot_meta), read_json(folder / "config.yaml", dict)
    name, data = settings["model"], _data_name(meta, settings)
    source = {"moving-digits": "digits"}.get(meta.get("data"), meta.get("data"))
    built_in = next((table[source] for table in (DATASETS, SCENES) if source in table), None)
    optimizer = settings.get("optimizer", "adamw")
    aligned, judged, perceptual, teacher = (
        _without_place(settings.get(key) or "") for key in ("align", "fd_features", "perceptual_features", "teacher")
    )
    terms = [(built_in and built_in.licence) or _OWN_TERMS]
    terms += [DATASETS["digits"].licence] * bool(settings.get("digits_share"))
    facts = {"meta": meta, "settings": settings, "data": data, "terms": " ".join(terms),
             "optimizer": (optimizer in OPTIMIZERS and OPTIMIZERS[optimizer].label) or optimizer,
             "aligned": aligned, "judged": judged, "perceptual": perceptual, "teacher": teacher,
             "picture": PICTURE if (folder / PICTURE).exists() else "", "measurements": read_metrics(folder)}
    seen = f"{data}, {meta['image_size']} px"
    tasks = {
        "classifier": "image-classification", "detector": "object-detection", "segmenter": "image-segmentation",
        "video classifier": "video-classification",
    }  # fmt: skip
    library = "d-emo"
    if meta["kind"] == "autoencoder":
        library, cite, task, tags = "diffusers", [], None, ["vae"]
    elif meta["kind"] in tasks:
        cite = ["EMOv2"] * ("emov2" in name.lower()) + ["EMO"]
        task, tags = tasks[meta["kind"]], [tasks[meta["kind"]]]
        if "latent_side" in meta:
            task, tags = None, ["latents"]
            seen = "latents of {0}, {1} x {1}".format(data, meta["latent_side"])
    else:
        schedule = folder / "scheduler" / "scheduler_config.json"
        noise = read_json(schedule, noise_schedule)
        facts |= {"objective": meta.get("objective") or objective_of(noise), "time_shift": noise.get("shift", 1)}
        family = family_of(name)
        cite = [*(family.papers if family else ()), *OBJECTIVES[facts["objective"]].papers]
        task = "unconditional-image-generation"  # the hub's list of tasks has no class-conditional one
        tags = ["class-conditional-image-generation", "diffusion"]
    form = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("card.md").read_text(), {"dumps": json.dumps}
    )
    return write_card_file(
        folder, title=f"{name} on {seen}",
        sections=[re.sub(r"\n{3,}", "\n\n", form.render(facts))], cite=cite, library_name=library, pipeline_tag=task,
        tags=[*tags, name],
        datasets=_hub_datasets(meta, settings),
    )


def add_measurement(folder: str | Path, measurement: Mapping[str, Any]) -> Path:
    """Put a measurement into a snapshot's ``metrics.json``, write its card anew and return the card's path.

    Args:
        folder: Snapshot.
        measurement: The "command" that made it, and "figures": rows of "name", "value" and "remark"; also
            "conditions" in words. Further entries are kept as they are. An older measurement by the same command is
            replaced.
    """
    folder = Path(folder)
    others = [each for each in read_metrics(folder) if each["command"] != measurement["command"]]
    write_json(folder / METRICS, [*others, dict(measurement)])
    return write_card(folder)


def write_card_file(
    folder: Path, *, title: str, sections: list[str], tags: list[str], cite: list[str] | None = None,
    library_name: str = "d-emo", pipeline_tag: str | None = None, datasets: list[str] | None = None,
) -> Path:
    """Write a README.md in the Hugging Face form: metadata, title, sections, papers to cite; return its path."""
    from huggingface_hub import ModelCardData

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
    threads = plural(torch.get_num_threads(), "CPU thread")
    return threads if processes == 1 else f"{processes} processes of {threads}"


def _data_name(meta: dict[str, Any], settings: dict[str, Any]) -> str:
    """The name of the data, without the place where they lay."""
    if meta.get("data") in DATASETS:
        return DATASETS[meta["data"]].title
    if meta["kind"] == "detector" or meta.get("data") in (*SCENES, "moving-digits"):
        return meta.get("data") or "unnamed data"
    place = settings.get("latents") or settings.get("data_dir") or "unnamed data"
    scheme, _, rest = place.partition(":")
    if scheme == "hf":
        return rest.partition("?")[0]
    return Path(rest).parent.name if scheme == "wds" else Path(place).name


def _without_place(name: str) -> str:
    """The name of a network, such as emov2:FOLDER, of whose folders only a snapshot's and its run's are left.

    A name on the hub, as in timm:hf-hub:OWNER/NAME, stays whole.
    """
    before, colon, path = name.rpartition(":")
    parts, is_weights = Path(path).parts, Path(path).suffix in (".pth", ".pt", ".safetensors")
    if parts[-2:-1] == ("snapshots",):
        return before + colon + "/".join(parts[-3:])
    return before + colon + parts[-1] if is_weights or path[:1] in ("/", ".", "~") or os.path.exists(path) else name


def _hub_datasets(meta: dict[str, Any], settings: dict[str, Any]) -> list[str] | None:
    """Its name on the hub, where it came from there or the classes tell (ImageNet-1k by its WordNet ids)."""
    if str(settings.get("data_dir")).startswith("hf:"):
        return [_data_name(meta, settings)]
    names = meta["class_names"]
    imagenet = len(names) == 1000 and (names[0], names[-1]) == ("n01440764", "n15075141")
    return ["ILSVRC/imagenet-1k"] if imagenet else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The measurements of a snapshot so far; InputError if their file is damaged."""
    file = folder / METRICS
    return read_json(file, _checked, "remove it, or repair it") if file.exists() else []


def _checked(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they are; another error where something is missing."""
    [row[key] for each in measurements for row in each["figures"] if each["command"] for key in _FIGURE]
    return measurements
