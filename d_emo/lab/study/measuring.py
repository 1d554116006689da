"""Measuring the snapshots of a study's runs, all alike: same labels, same noise, same classifier."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from d_emo.config import StudySettings
from d_emo.data import ClassImages, Reading, open_dataset, spread
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.evaluation import ClassifierFeatures, ClassifierMetrics, classifier_metrics
from d_emo.io.snapshot import DenoiserSnapshot, load_denoiser
from d_emo.lab.study.plan import data_dir_of
from d_emo.latents import load_codec, sample_moments
from d_emo.models.layers import batch_norms, scratch_statistics
from d_emo.objective import StepNoise
from d_emo.sampling import Sampler
from d_emo.tables import OBJECTIVES, load

HELD_OUT, LEVELS = 1024, 10  # images and noise levels of the norm gap


class Meter:
    """Draws from a study's snapshots, and measures them by the classifier in a folder against the same real images."""

    def __init__(self, settings: StudySettings, classifier: Path | None):
        self.settings = settings
        self.device = best_device()
        self._features = None if classifier is None else ClassifierFeatures(classifier, device=self.device)
        self._metrics: ClassifierMetrics | None = None
        self._held_out: ClassImages | None = None

    def measure(self, snapshot: Path, norm_buffers: str = "trained") -> dict[str, float]:
        """Metric values of drawn images, see `ClassifierMetrics.measure`."""
        opened = load_denoiser(snapshot)
        metrics = self._open_metrics(opened)
        labels = classifier_metrics.even_labels(self.settings.num_images, len(opened.class_names))
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
        name, _, steps = self.settings.samplers[opened.objective].rpartition(":")
        guidance = self.settings.guidance_scale
        sampler = Sampler.open(opened, scheduler=name, steps=int(steps), guidance=guidance, device=self.device)
        with tqdm(total=len(labels), desc=f"{name}, {steps} steps", unit="image", disable=None, leave=False) as bar:
            for images in sampler.images(labels, range(len(labels)), batch_size=classifier_metrics.BATCH, exact=False):
                bar.update(len(images))
                yield images

    def _open_metrics(self, opened: DenoiserSnapshot) -> ClassifierMetrics:
        if self._metrics is None:
            if opened.class_names != self._features.class_names:
                raise InputError(f"the classifier {self._features.name} knows other classes than {opened.path}")
            data, own = opened.meta.get("data"), data_dir_of(self.settings)
            real, self._held_out = classifier_metrics.open_real(
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
        errors = {mode: torch.zeros(LEVELS) for mode in ("train", "eval")}
        counts, chosen = torch.zeros(LEVELS), spread(len(held_out), HELD_OUT)
        for start in range(0, len(chosen) - 63, 64):
            images, labels = zip(*(held_out[index] for index in chosen[start : start + 64]), strict=True)
            draws = objective.draw(torch.Generator().manual_seed(start), 64, model.latent_shape)
            draws = StepNoise(*(part.to(self.device) for part in draws._asdict().values()))
            moments = codec.moments(torch.stack(images).to(self.device))
            noisy = objective.noised(sample_moments(moments, draws.posterior_noise), draws)
            levels = (draws.timesteps * LEVELS // objective.num_train_timesteps).cpu()
            counts += levels.bincount(minlength=LEVELS)
            given = {"timestep": draws.timesteps, "class_labels": torch.tensor(labels, device=self.device)}
            for mode in errors:
                with scratch_statistics(model.train(mode == "train")):
                    output = model(noisy, **given).sample[:, : noisy.shape[1]]
                errors[mode].index_add_(0, levels, (output - draws.noise).square().mean(dim=(1, 2, 3)).cpu())
        means = {mode: (total / counts).tolist() for mode, total in errors.items()}
        width = objective.num_train_timesteps / LEVELS
        return [
            {"timestep": (i + 0.5) * width, **{mode: values[i] for mode, values in means.items()}}
            for i in range(LEVELS)
        ]
