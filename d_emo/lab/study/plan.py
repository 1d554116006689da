"""From the settings of a study to the list of its runs."""

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from d_emo.claims import is_claimed
from d_emo.config import FidSettings, Settings, StudySettings, TrainSettings
from d_emo.errors import InputError
from d_emo.files import digest, expand_home
from d_emo.io.training_state import step_of
from d_emo.latents import load_codec
from d_emo.tables import CODECS

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class PlannedRun:
    """One model trained with one seed, or the weights of such a run measured in another way.

    Attributes:
        name: As the study calls it.
        seed: Of weights, data order and noise.
        folder: Of the training run.
        training: Of the run.
        protocol: Digest of how the study measures, so that values measured otherwise are not taken for these.
        norm_buffers: "trained", or "initial" to measure with the batch norms' averages as they were at the start.
    """

    name: str
    seed: int
    folder: Path
    training: TrainSettings
    protocol: str
    norm_buffers: str = "trained"

    @property
    def results(self) -> Path:
        """Where its measurements are kept."""
        suffix = "" if self.norm_buffers == "trained" else f"-{self.norm_buffers}-norm-buffers"
        return self.folder / f"measurements{suffix}-{self.protocol}.json"

    def snapshots(self) -> list[Path]:
        """Its snapshots so far, by step."""
        return sorted((self.folder / "snapshots").glob("step-*"), key=step_of)

    def is_trained(self) -> bool:
        """Whether its last snapshot is there, and no process was killed between that and its last state."""
        last = self.folder / "snapshots" / f"step-{self.training.max_steps}"
        return last.is_dir() and not is_claimed(self.folder)


def plan_runs(settings: StudySettings) -> list[PlannedRun]:
    """All runs, the first seed's of every model before the second's.

    Raises:
        InputError: Two would share a folder; one cannot be trained, or measures the weights of none that is.
    """
    measured_by = ("judge", "reference", "fid", "num_images", "guidance_scale", "samplers")
    protocol = digest(json.dumps([getattr(settings, name) for name in measured_by], sort_keys=True))[:8]
    latents = {} if settings.encode is None else {"latents": str(latents_folder(settings))}
    folders: dict[str, str] = {}
    planned: dict[tuple[int, str], PlannedRun] = {}
    for name, own in settings.runs.items():
        if "of" in own:
            continue
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        if (other := folders.setdefault(slug, name)) != name:
            raise InputError(f"the study's runs {other!r} and {name!r} would share a folder, {slug}; rename one")
        options = {**(settings.train.get("model_options") or {}), **(own.get("model_options") or {})}
        for seed in settings.seeds:
            folder = Path(settings.output_dir) / "runs" / f"{slug}-seed{seed}"
            more = {"model_options": options or None, "seed": seed, "output_dir": str(folder)}
            values = settings.train | latents | own | more
            training = read_settings(TrainSettings, values, f"the run {name!r} of the study")
            if training.max_steps is None:
                raise InputError(f"the run {name!r} of the study has `epochs`; runs that compare have `max_steps`")
            planned[seed, name] = PlannedRun(name, seed, folder, training, protocol)
    for name, own in settings.runs.items():
        other = own.get("of")
        if other is None:
            continue
        if own != {"of": other, "norm_buffers": "initial"} or "of" in settings.runs[other]:
            raise InputError(
                f"the study's run {name!r} must be {{of: A TRAINED RUN, norm_buffers: initial}}, not {own}"
            )
        for seed in settings.seeds:
            planned[seed, name] = replace(planned[seed, other], name=name, norm_buffers="initial")
    return [planned[seed, name] for seed in settings.seeds for name in settings.runs]


def read_settings(kind: type[S], values: dict[str, Any], what: str) -> S:
    """The settings of another verb, checked as it checks them; an InputError names ``what`` they are."""
    try:
        return kind.from_mapping(values)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


def latents_folder(settings: StudySettings) -> Path:
    """Where the study's encoded data are."""
    return Path(settings.output_dir) / "latents"


def data_dir_of(settings: StudySettings) -> str | None:
    """The images that all runs are trained on, where these are no built-in data."""
    return (settings.encode or {}).get("data_dir") or settings.train.get("data_dir")


def fid_options(settings: StudySettings) -> dict[str, Any]:
    """What the study says to fid of every snapshot."""
    own = {"num_images": settings.num_images, "guidance_scale": settings.guidance_scale} | (settings.fid or {})
    return {"reference": settings.reference, **own}


def fid_settings(settings: StudySettings) -> FidSettings:
    """The settings of fid, but for the snapshot, checked as it checks them."""
    return read_settings(FidSettings, {**fid_options(settings), "checkpoint": "unused"}, "the study's fid")


def latent_shape_of(settings: StudySettings, training: TrainSettings) -> tuple[int, int, int]:
    """Channels, height and width of a run's latents; of a VAE that is not here, 4 channels at an eighth of the size."""
    encode = settings.encode or {}
    side, channels, downsample = training.image_size or encode.get("image_size", 256), 4, 8
    name = training.vae or encode.get("vae")
    if name is not None and (name in CODECS or expand_home(name).is_dir()):
        channels, downsample = _latents_of(name)
    return channels, side // downsample, side // downsample


@functools.cache
def _latents_of(vae: str) -> tuple[int, int]:
    """Channels of a codec's latents, and pixels along the side of one."""
    codec = load_codec(vae)
    return codec.channels, codec.downsample
