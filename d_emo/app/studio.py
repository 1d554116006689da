"""Drawing that can be watched and stopped, as a page does it; the pictures are those of ``scripts/sample.py``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import torch

from d_emo.config import SampleSettings
from d_emo.data import to_uint8
from d_emo.errors import InputError
from d_emo.io.snapshot import DenoiserSnapshot
from d_emo.latents import load_codec
from d_emo.models.counting import trained_parameters
from d_emo.sampling.classes import find_classes
from d_emo.sampling.grids import default_path, save_samples
from d_emo.sampling.sampler import decode, latent_shape, prepare_denoiser, sample
from d_emo.sampling.schedulers import make_scheduler, scheduler_names, set_steps

_PAUSE = 0.1
"""Seconds between two views, at least, but for the last; nobody sees more."""


@dataclass(frozen=True)
class View:
    """The pictures at one moment.

    Attributes:
        images: As far as they are; None where nothing can be seen yet. Shape of each: (3, H, W) uint8.
        finished: How many pictures are done, from the first.
        step: Denoising steps that the pictures being drawn have made, of ``steps``.
        steps: Denoising steps of each picture.
        share: Of the whole work that is done, from 0 to 1.
        seconds: Since the start, previews included.
        stopped: Whether it ended before all were done.
    """

    images: list[torch.Tensor | None]
    finished: int
    step: int
    steps: int
    share: float
    seconds: float
    stopped: bool


class Studio:
    """A snapshot made ready to draw from, again and again.

    Args:
        snapshot: Its model is changed for speed and can be saved no more.
        mixed_precision: As in :class:`SampleSettings`.
        max_images: Most pictures of one drawing.
        preview_share: Ranks of the time that decoding unfinished pictures may take.
    """

    def __init__(
        self, snapshot: DenoiserSnapshot, *, mixed_precision: Literal["no", "bf16"], max_images: int,
        preview_share: float,
    ):
        self.snapshot, self.mixed_precision = snapshot, mixed_precision
        self.max_images, self.preview_share = max_images, preview_share
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.codec = load_codec(snapshot.codec).to(self.device)
        self.parameters = trained_parameters(snapshot.model)
        dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
        self.model = prepare_denoiser(snapshot.model.to(self.device), dtype=dtype)

    @property
    def path(self) -> Path:
        """Where the snapshot is, the shorter way."""
        path = self.snapshot.path
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        _, height, width = latent_shape(self.model)
        return height * self.codec.downsample, width * self.codec.downsample

    @property
    def schedulers(self) -> list[str]:
        """Names of the samplers that serve the snapshot."""
        return scheduler_names(self.snapshot.objective)

    def defaults(self) -> SampleSettings:
        """What is drawn when a visitor chooses nothing: the first class."""
        settings = SampleSettings(classes=["0"], num_images=min(SampleSettings().num_images, self.max_images))
        settings.fill_in(objective=self.snapshot.objective, label_dropout=self.snapshot.label_dropout)
        return settings

    def read(
        self, classes: Sequence[Any], num_images: Any, seed: Any, guidance_scale: Any, scheduler: str | None, steps: Any
    ) -> SampleSettings:
        """What a visitor asked for, as the settings of ``scripts/sample.py``.

        Args:
            classes: Ids or names; none for an unconditional snapshot.
            guidance_scale: None takes the snapshot's default.
            scheduler: None takes the snapshot's default.

        Raises:
            InputError: Something of it means nothing, or is too much.
        """
        settings = SampleSettings(
            classes=[str(name) for name in classes], checkpoint=str(self.snapshot.path),
            num_images=_whole("the number of pictures", num_images), seed=_whole("the seed", seed),
            guidance_scale=[] if guidance_scale is None else [_number("the guidance", guidance_scale)],
            scheduler=scheduler, steps=_whole("the number of steps", steps), mixed_precision=self.mixed_precision,
        )
        if not 0 <= settings.seed < 2**53:  # a page's numbers are exact up to there
            raise InputError(f"the seed must be from 0 to {2**53 - 1}, not {settings.seed}")
        settings.fill_in(objective=self.snapshot.objective, label_dropout=self.snapshot.label_dropout)
        set_steps(make_scheduler(settings.scheduler, self.snapshot.scheduler_config), settings.steps)
        found = find_classes(settings.classes, self.snapshot.class_names)
        if len(set(found)) < len(found):
            raise InputError("the same class was chosen twice")
        if len(found) * settings.num_images > self.max_images:
            raise InputError(
                f"{len(found)} classes of {settings.num_images} pictures are {len(found) * settings.num_images}, more "
                f"than the {self.max_images} that are drawn at once; choose fewer"
            )
        settings.classes = [str(label) for label in found]
        return settings

    def captions(self, settings: SampleSettings) -> list[str]:
        """What is written above the pictures of each class."""
        return [f"{label}: {self.snapshot.class_names[int(label)]}" for label in settings.classes]

    def command(self, settings: SampleSettings) -> str:
        """The command line that draws the same pictures."""
        words = ["python", "scripts/sample.py", "--checkpoint", self.path]
        if len(self.snapshot.class_names) > 1:
            words += ["--class", *settings.classes]
        words += ["--num-images", settings.num_images, "--seed", settings.seed]
        if self.snapshot.label_dropout:
            words += ["--guidance-scale", f"{settings.guidance_scale[0]:g}"]
        words += ["--scheduler", settings.scheduler, "--steps", settings.steps]
        if settings.mixed_precision != "no":
            words += ["--mixed-precision", settings.mixed_precision]
        return shlex.join(map(str, words))

    def draw(self, settings: SampleSettings, stop: Event) -> Iterator[View]:
        """Draw, and show the pictures on the way.

        Unfinished pictures are decoded as often as ``preview_share`` allows, so the finished ones do not wait for it.

        Args:
            settings: From :meth:`read`.
            stop: Set from outside, it ends the drawing after the step at hand. Set here when the caller loses interest.

        Yields:
            Views; the last one has all pictures finished, or is marked as stopped.

        Raises:
            InputError: The device has too little memory.
        """
        drawing = _Drawing(self, settings, stop)
        drawing.start()
        over = False
        try:
            while not over:
                drawing.changed.wait()
                drawing.changed.clear()
                over = drawing.over  # asked before the view is taken, so that the last view misses nothing
                yield drawing.view()
                drawing.join(_PAUSE)
        finally:
            stop.set()
            drawing.join()
        if isinstance(drawing.error, torch.cuda.OutOfMemoryError):
            raise InputError("the GPU has too little memory left for so many pictures at once; choose fewer")
        if drawing.error is not None:
            raise drawing.error

    def save(self, settings: SampleSettings, images: Sequence[torch.Tensor], folder: Path) -> Path:
        """Write the grid that ``scripts/sample.py`` would, with the same settings inside; tells where.

        Raises:
            InputError: It cannot be written.
        """
        labels, seeds = _labels(settings), _seeds(settings)
        meta = self.snapshot.meta
        made_by = {
            **asdict(settings), "guidance_scale": settings.guidance_scale[0], "step": meta["step"],
            "classes": [int(label) for label in settings.classes], "weights": meta["weights"],
        }
        path = folder / Path(default_path(settings, made_by["classes"])).name
        save_samples(path, torch.stack(list(images)), None, self.captions(settings), labels, seeds, settings, made_by)
        return path


class _Stopped(Exception):
    pass


class _Drawing(Thread):
    """One drawing at work, in a thread of its own, because the sampler calls back and a page wants to be fed."""

    def __init__(self, studio: Studio, settings: SampleSettings, stop: Event):
        super().__init__(daemon=True)
        self.studio, self.settings, self.stop = studio, settings, stop
        self.scheduler = make_scheduler(settings.scheduler, studio.snapshot.scheduler_config)
        set_steps(self.scheduler, settings.steps)
        self.steps = len(self.scheduler.timesteps)
        self.images: list[torch.Tensor | None] = [None] * len(_labels(settings))
        self.finished = self.step = self.width = 0
        self.decoding, self.shown, self.started = 0.0, 0.0, time.perf_counter()
        self.changed, self.over, self.stopped, self.error = Event(), False, False, None

    def run(self) -> None:
        settings = self.settings
        try:
            for _ in sample(
                self.studio.model, self.scheduler, _labels(settings), _seeds(settings),
                num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale[0],
                batch_size=settings.batch_size, on_latents=self._step_done,
            ):
                pass
        except _Stopped:
            self.stopped = True
        except Exception as error:
            self.error = error
        finally:
            self.over = True
            self.changed.set()

    def _step_done(self, index: int, latents: torch.Tensor) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.step, self.width, done = index + 1, len(latents), index + 1 == self.steps
        began = time.perf_counter()
        if done or (
            began - self.shown > _PAUSE and self.decoding < self.studio.preview_share * (began - self.started)
        ):
            images = to_uint8(decode(self.studio.codec, latents)).cpu()
            self.images[self.finished : self.finished + len(images)] = images
            self.shown = time.perf_counter()
            self.decoding += 0 if done else self.shown - began
        if done:
            self.finished, self.step, self.width = self.finished + len(latents), 0, 0
        self.changed.set()

    def view(self) -> View:
        done, count = self.finished, len(self.images)
        share = (done + self.width * self.step / self.steps) / count
        seconds = time.perf_counter() - self.started
        return View(list(self.images), done, self.step, self.steps, min(1.0, share), seconds, self.stopped)


def _labels(settings: SampleSettings) -> list[int]:
    return [int(label) for label in settings.classes for _ in range(settings.num_images)]


def _seeds(settings: SampleSettings) -> list[int]:
    return [settings.seed + index for index in range(len(settings.classes) * settings.num_images)]


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{what} must be a number, not {'empty' if value is None else repr(value)}")
    return float(value)


def _whole(what: str, value: Any) -> int:
    number = _number(what, value)
    if not number.is_integer():
        raise InputError(f"{what} must be a whole number, not {value}")
    return int(value)
