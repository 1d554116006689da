"""Drawing that can be looked at on the way; the pictures are those of ``d-emo sample``."""

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d_emo.config import AppSettings, SampleSettings
from d_emo.data import to_uint8
from d_emo.errors import InputError
from d_emo.io.snapshot import DenoiserSnapshot
from d_emo.models.counting import trained_parameters
from d_emo.sampling import PRECISIONS, Sampler, SampleRequest, decode, spell_class
from d_emo.tables import schedulers_of
from d_emo.text import command

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
        fraction: Of the whole work that is done, from 0 to 1.
        seconds: Since the start, previews included.
    """

    images: list[torch.Tensor | None]
    finished: int
    step: int
    steps: int
    fraction: float
    seconds: float


class Studio:
    """A snapshot made ready to draw from, again and again; its model is changed for speed and can be saved no more."""

    def __init__(self, snapshot: DenoiserSnapshot, settings: AppSettings):
        self.snapshot, self.settings = snapshot, settings
        self.parameters = trained_parameters(snapshot.model)  # before norms are folded
        others = {"guide": settings.guide, "vae": settings.vae}
        self.sampler = Sampler.open(snapshot, dtype=PRECISIONS[settings.mixed_precision], **others)

    @property
    def path(self) -> Path:
        """Where the snapshot is, the shorter way."""
        path = self.snapshot.path
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    @property
    def schedulers(self) -> list[str]:
        """Names of the samplers that serve the snapshot."""
        return schedulers_of(self.snapshot.objective)

    def defaults(self) -> SampleRequest:
        """What is drawn when a visitor chooses nothing: the first class."""
        count = min(SampleSettings().num_images, self.settings.max_images)
        return SampleRequest(SampleSettings(classes=["id:0"], num_images=count), self.snapshot)

    def read(
        self, classes: Sequence[Any], num_images: Any, seed: Any, guidance_scale: Any, scheduler: str | None, steps: Any
    ) -> SampleRequest:
        """What a visitor asked for; None of guidance and scheduler takes the snapshot's default.

        Args:
            guidance_scale: One, or a list of several, which are drawn one after the other from the same noise.

        Raises:
            InputError: Something of it means nothing, or is too much.
        """
        scales = guidance_scale if isinstance(guidance_scale, list) else [guidance_scale] * (guidance_scale is not None)
        settings = SampleSettings(
            classes=[f"id:{name}" if isinstance(name, int) else str(name) for name in classes],
            checkpoint=str(self.snapshot.path), num_images=_whole("the number of pictures", num_images),
            seed=_whole("the seed", seed),
            guidance_scale=[_number("the guidance", scale) for scale in scales],
            scheduler=scheduler, steps=_whole("the number of steps", steps),
            mixed_precision=self.settings.mixed_precision, guide=self.settings.guide,
            guide_weight=self.settings.guide_weight, vae=self.settings.vae,
        )
        if settings.seed >= 2**53:  # a page's numbers are exact up to there
            raise InputError(f"the seed must be from 0 to {2**53 - 1}, not {settings.seed}")
        request = SampleRequest(settings, self.snapshot)
        self.sampler.replace(**request.how)  # refuses what cannot be drawn
        if len(set(request.classes)) < len(request.classes):
            raise InputError("the same class was chosen twice")
        count, most = len(request.labels) * len(request.settings.guidance_scale), self.settings.max_images
        if count > most:
            raise InputError(f"{count} pictures are more than the {most} that are drawn at once; choose fewer")
        return request

    def command(self, request: SampleRequest) -> str:
        """The command line that draws the same pictures."""
        settings = request.settings
        words: list[Any] = ["--checkpoint", self.path, *(["--vae", settings.vae] if settings.vae else [])]
        if len(self.snapshot.class_names) > 1:
            words += ["--class", *(spell_class(label, self.snapshot.class_names) for label in request.classes)]
        words += ["--num-images", settings.num_images, "--seed", settings.seed]
        if self.snapshot.label_dropout:
            words += ["--guidance-scale", *(f"{scale:g}" for scale in settings.guidance_scale)]
        if settings.guide is not None:
            words += ["--guide", settings.guide]
            words += ["--guide-weight", f"{settings.guide_weight:g}"] if settings.guide_weight is not None else []
        words += ["--scheduler", settings.scheduler, "--steps", settings.steps]
        if settings.mixed_precision != "no":
            words += ["--mixed-precision", settings.mixed_precision]
        return f"{command('sample', 'sample.py')} {shlex.join(map(str, words))}"

    def draw(self, request: SampleRequest) -> Iterator[View]:
        """Draw, and show the pictures on the way; whoever closes the iterator ends the drawing.

        Unfinished pictures are decoded as often as ``preview_share`` of the settings allows, the time that the caller
        takes for views included, so the finished ones do not wait for it.

        Yields:
            Views; the last one has all pictures finished.

        Raises:
            InputError: The device has too little memory.
        """
        images: list[torch.Tensor | None] = [None] * len(request.labels) * len(request.settings.guidance_scale)
        done = 0
        started, shown, previews = time.perf_counter(), float("-inf"), 0.0
        try:
            for step in request.draw(self.sampler.replace(**request.how)):
                now, width = time.perf_counter(), len(step.latents)
                part, due = slice(done, done + width), now - shown > _PAUSE
                preview = due and not step.is_last and previews < self.settings.preview_share * (now - started)
                if step.is_last:
                    images[part], done = step.images, part.stop
                elif preview:
                    images[part] = to_uint8(decode(self.sampler.codec, step.latents)).cpu()
                made = 0 if step.is_last else step.index + 1
                if due or done == len(images):
                    shown = time.perf_counter()
                    fraction = (done + width * made / step.steps) / len(images)
                    yield View(list(images), done, made, step.steps, fraction, shown - started)
                    if preview:  # what is done with it takes its time from the drawing, too
                        previews += time.perf_counter() - now
        except torch.cuda.OutOfMemoryError:
            raise InputError("the GPU has too little memory left for so many pictures at once; choose fewer") from None


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{what} must be a number, not {'empty' if value is None else repr(value)}")
    return float(value)


def _whole(what: str, value: Any) -> int:
    number = _number(what, value)
    if not number.is_integer():
        raise InputError(f"{what} must be a whole number, not {value}")
    return int(value)
