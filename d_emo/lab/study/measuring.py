"""Measuring the snapshots of a study's runs, all alike: same labels, same noise, same classifier."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from d_emo.config import StudySettings, read_sampler
from d_emo.data import Reading, open_dataset, spread
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.evaluation import ClassifierFeatures, ClassifierMetrics, draw_classes, even_labels, open_real
from d_emo.files import replacing
from d_emo.io.snapshot import DenoiserSnapshot, load_denoiser
from d_emo.lab.study.plan import PlannedRun, data_dir_of
from d_emo.latents import load_codec, sample_moments
from d_emo.models.layers import batch_norms, scratch_statistics
from d_emo.objective import StepNoise
from d_emo.sampling import Sampler, draw_grid
from d_emo.tables import OBJECTIVES, load

HELD_OUT, LEVELS = 1024, 10  # images and noise levels of the norm gap
COLUMNS, TILE = 10, 96  # classes in the grid of samples, and the least side of a drawing in pixels


class Meter:
    """Draws from a study's snapshots, and measures them by the classifier in a folder against the same real images."""

    def __init__(self, settings: StudySettings, classifier: Path | None):
        self.settings, self.device = settings, best_device()
        self._features = None if classifier is None else ClassifierFeatures(classifier, device=self.device)
        self._metrics: ClassifierMetrics | None = None

    def measure(self, snapshot: Path, norm_buffers: str = "trained") -> dict[str, float]:
        """Metric values of drawn images, see `ClassifierMetrics.measure`."""
        opened = load_denoiser(snapshot)
        metrics = self._open_metrics(opened)
        labels = even_labels(self.settings.num_images, len(opened.class_names))
        return metrics.measure(self.draw(opened, labels.tolist(), norm_buffers), labels)

    def measure_real(self, snapshot: Path) -> dict[str, float] | None:
        """The same of as many held-out images, or all, and how many; None where there are none."""
        metrics = self._open_metrics(load_denoiser(snapshot))
        if self._held_out is None:
            return None
        count = min(len(self._held_out), self.settings.num_images)
        return {"images": count, **metrics.measure_real(self._held_out, count)}

    def draw(
        self, opened: DenoiserSnapshot, labels: list[int], norm_buffers: str = "trained"
    ) -> Iterator[torch.Tensor]:
        """Batches of drawings of these classes, from the noise of seeds 0, 1, 2, ... Shape: (B, 3, H, W) uint8.

        The snapshot's model is changed in place. With ``norm_buffers`` "initial" its batch norms forget their averages.
        """
        if norm_buffers == "initial":
            for norm in batch_norms(opened.model):
                norm.reset_running_stats()
        name, steps = read_sampler(self.settings.samplers[opened.objective])
        guidance = self.settings.guidance_scale
        sampler = Sampler.open(opened, scheduler=name, steps=steps, guidance=guidance, device=self.device)
        return draw_classes(sampler, labels, exact=False)

    def _open_metrics(self, opened: DenoiserSnapshot) -> ClassifierMetrics:
        if self._metrics is None:
            if opened.class_names != self._features.class_names:
                raise InputError(f"the classifier {self._features.name} knows other classes than {opened.path}")
            data, own = opened.meta.get("data"), data_dir_of(self.settings)
            real, self._held_out = open_real(
                data, opened.image_size, opened.class_names, data_dir=own,
                validate_dir=own and self.settings.train.get("validate_dir"), reading=self._reading(),
            )
            self._metrics = ClassifierMetrics(self._features, real, data=data, device=self.device)
        return self._metrics

    def _reading(self) -> Reading:
        """How the images of the study's own folders become RGB."""
        given = {**self.settings.train, **(self.settings.encode or {})}
        return Reading(**{name: given[name] for name in ("exif", "background") if name in given})

    @torch.no_grad()
    def norm_gap(self, snapshot: Path) -> list[dict[str, float]]:
        """Error of the predicted noise in train mode over that in eval mode, by noise level, on held-out images.

        In train mode the norms use the statistics of the batch, 64 latents of mixed noise levels as in training. The
        latents, the noise and the levels are the same in both modes.

        Returns:
            For each tenth of the timesteps: "timestep" (its middle), "train" and "eval" (mean squared errors).
        """
        opened = load_denoiser(snapshot)
        codec, model = load_codec(opened.codec).to(self.device), opened.model.to(self.device)
        own = data_dir_of(self.settings) and self.settings.train["validate_dir"]
        held_out = open_dataset(
            dataset=opened.meta.get("data"), data_dir=own, split="test", image_size=opened.image_size,
            reading=self._reading(),
        )
        objective = load(OBJECTIVES[opened.objective].loss)(null_class=model.null_class).to(self.device)
        found, chosen = [], spread(len(held_out), HELD_OUT)
        for start in range(0, len(chosen) - 63, 64):
            images, labels = zip(*(held_out[index] for index in chosen[start : start + 64]), strict=True)
            draws = objective.draw(torch.Generator().manual_seed(start), 64, model.latent_shape)
            draws = StepNoise(*(part.to(self.device) for part in draws))
            moments = codec.moments(torch.stack(images).to(self.device))
            noisy = objective.noised(sample_moments(moments, draws.posterior_noise), draws)
            given = {"timestep": draws.timesteps, "class_labels": torch.tensor(labels, device=self.device)}
            errors = {"level": (draws.timesteps * LEVELS // objective.num_train_timesteps).tolist()}
            for mode in ("train", "eval"):
                with scratch_statistics(model.train(mode == "train")):
                    output = model(noisy, **given).sample[:, : noisy.shape[1]]
                errors[mode] = (output - draws.noise).square().mean(dim=(1, 2, 3)).tolist()
            found.append(pd.DataFrame(errors))
        means = pd.concat(found).groupby("level").mean().reindex(range(LEVELS))
        means.insert(0, "timestep", (means.index + 0.5) * objective.num_train_timesteps / LEVELS)
        return means.to_dict("records")


def draw_samples(path: Path, runs: list[PlannedRun], rows: pd.DataFrame, open_meter: Callable[[], Meter]) -> bool:
    """Ten classes, named on top, from the same noise by each run at its last measured step; False without any."""
    drawn, captions, classes = [], [], []
    for run in runs:
        steps = rows.step[(rows.run == run.name) & (rows.seed == run.seed)]
        if steps.empty or run.name in captions:
            continue
        opened = load_denoiser(run.folder / "snapshots" / f"step-{steps.max()}")
        labels = [i * (len(opened.class_names) - 1) // (COLUMNS - 1) for i in range(COLUMNS)]
        drawn += open_meter().draw(opened, labels, run.norm_buffers)
        classes = [opened.class_names[label] for label in labels]
        captions.append(run.name)
    if drawn:
        scale = math.ceil(TILE / drawn[0].shape[-1])
        text_size = drawn[0].shape[-1] * scale // 7
        grid = draw_grid(torch.cat(drawn), captions, COLUMNS, scale=scale, names=classes, text_size=text_size)
        with replacing(path) as temporary:
            grid.save(temporary, format="PNG")
    return bool(drawn)
