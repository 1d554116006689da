"""D-EMO as a diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

import d_emo.models.denoiser  # noqa: F401  diffusers opens networks only of modules that are imported already
from d_emo.config import DEFAULT_GUIDANCE, DEFAULT_GUIDE_WEIGHT, check_guidance
from d_emo.errors import InputError
from d_emo.io.snapshot import (
    PIPELINE_CODE,
    DenoiserSnapshot,
    find_snapshot,
    kind_of,
    load_denoiser,
    pipeline_index,
)
from d_emo.latents import Codec, PixelCodec, autoencoder_in, codec_of, load_codec
from d_emo.models.contract import DenoiserFrame
from d_emo.models.layers import is_count
from d_emo.sampling.classes import Labels, as_list, find_classes
from d_emo.sampling.denoising import check_codec, decode, denoise, open_codec
from d_emo.sampling.guidance import Guidance
from d_emo.sampling.schedulers import check_scheduler, make_scheduler, set_steps, steps_for
from d_emo.tables import objective_of
from d_emo.weights import check_pretrained, find_weights


class DEMOPipeline(DiffusionPipeline):
    """Class labels in, pictures out, for any number of classes and both objectives.

    Beyond the stock ``DiTPipeline``: the null class is the denoiser's own, class names survive saving and loading, a
    learned variance is used, the generator reaches every step, all schedulers start from the noise that they expect,
    and a VAE's shift and its means and deviations by channel are applied.

    Args:
        transformer: The denoiser.
        scheduler: From `make_scheduler`, or any of diffusers' that fits the denoiser's objective.
        vae: None where the latents are pixels.
        id2label: Class names by id (a string, as JSON has it).
        label_dropout: Of the training; without any there is no guidance.
        objective: What the denoiser was trained for. Default: the first that predicts what the scheduler says.
        codec: Name of a codec to open where no VAE is given, as a snapshot has it.
        noise_schedule: Config of a snapshot's; where no scheduler is given, that of the objective is made over it.

    Raises:
        InputError: ``id2label`` does not name all classes; the VAE is of other latents, or not of RGB images; neither
            scheduler nor noise schedule.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["scheduler", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, transformer: DenoiserFrame, scheduler: Any = None, vae: ModelMixin | None = None,
        id2label: dict[str, str] | None = None, label_dropout: float = 0.1, objective: str | None = None,
        codec: str | None = None, noise_schedule: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        if vae is None and codec is not None:
            vae = getattr(load_codec(codec), "vae", None)
        if vae is not None:
            check_codec(codec_of(vae), transformer)
        if scheduler is None:
            if noise_schedule is None:
                raise InputError("the pipeline needs a `scheduler`; d_emo.sampling.make_scheduler makes one")
            scheduler = make_scheduler(None, noise_schedule, objective)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = id2label or {label: str(label) for label in range(transformer.num_classes)}
        names = {str(label): name for label, name in names.items()}
        if names.keys() != set(map(str, range(transformer.num_classes))):
            raise InputError(f"id2label must name the classes 0 to {transformer.num_classes - 1}, all of them")
        objective = objective or objective_of(scheduler.config)
        self.register_to_config(id2label=names, label_dropout=label_dropout, objective=objective)

    @classmethod
    def from_snapshot(
        cls, snapshot: str | Path | DenoiserSnapshot, scheduler: str | None = None, vae: str | None = None
    ) -> DEMOPipeline:
        """The pipeline of a training run's snapshot, with its default scheduler and codec unless others are named.

        Raises:
            InputError: There is no such snapshot; or see `make_scheduler`, `open_codec`.
        """
        if not isinstance(snapshot, DenoiserSnapshot):
            snapshot = load_denoiser(snapshot)
        return cls(
            transformer=snapshot.model,
            scheduler=make_scheduler(scheduler, snapshot.scheduler_config, snapshot.objective),
            vae=getattr(open_codec(snapshot, vae), "vae", None),
            id2label={str(label): name for label, name in enumerate(snapshot.class_names)},
            label_dropout=snapshot.label_dropout,
            objective=snapshot.objective,
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> DEMOPipeline:
        """Open a snapshot, or what `save_pretrained` wrote, from a folder or the Hugging Face hub, whole or not at all.

        Raises:
            InputError: Weights lack tensors, have others, or are of another class.
        """
        folder = Path(path) if Path(path).is_dir() else Path(cls.download(path, **options))
        folder = find_snapshot(folder) if kind_of(folder) == "denoiser" else folder
        if "transformer" not in options:
            options["variant"] = find_weights(folder / "transformer", options.get("variant"))[1]
        if "vae" not in options and (folder / "vae").is_dir():
            check_pretrained(autoencoder_in(folder / "vae"), folder / "vae", options.get("variant"))
        return super().from_pretrained(folder, **options)

    @classmethod
    def load_config(cls, path: str | os.PathLike, **options: Any) -> Any:
        """diffusers' own; a snapshot older than ``model_index.json`` in it says the same."""
        if not any(options.values()) and not (Path(path) / cls.config_name).exists() and kind_of(path) == "denoiser":
            return pipeline_index(path)
        return super().load_config(path, **options)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options: Any) -> None:
        """diffusers' own, and beside it the code that ``custom_pipeline="pipeline"`` asks for."""
        Path(save_directory, "pipeline.py").write_text(PIPELINE_CODE)
        super().save_config(save_directory, push_to_hub, **options)

    @property
    def class_names(self) -> list[str]:
        """Names in the order of their ids."""
        return [self.config.id2label[str(label)] for label in range(len(self.config.id2label))]

    def get_label_ids(self, names: Labels) -> list[int]:
        """Class ids for names or ids, also as tensors and arrays; a single one need not be in a list."""
        return find_classes(as_list(names), self.class_names)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = (),
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_channels: Literal["all", "3"] = "all",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DEMOPipeline, int, torch.Tensor, dict[str, Any]], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int = 1,
        guide: DenoiserFrame | None = None,
        guide_weight: float = DEFAULT_GUIDE_WEIGHT,
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture per class label, or more.

        Args:
            class_labels: Ids or names, or a tensor or an array of ids; may be left out where there is only one class.
            guidance_scale: 1 is none and costs one forward pass. Default: 4; without label dropout or with a guide 1.
            num_inference_steps: Denoising steps. Default: 30, or the only number that the objective has.
            generator: One for all pictures, or a list of one for each, which frees a picture from its neighbours.
            guidance_channels, guidance_interval: See `Guidance`.
            latents: Unit noise to start from in place of the generator's. Shape: (B, C, h, w).
            output_type: ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) in [0, 1], or ``latent``.
            callback_on_step_end: Called with (pipeline, index, timestep, {"latents": latents}) after every step; the
                latents that it returns in a dictionary take their place.
            num_images_per_prompt: Pictures of each class label, which follow one another.
            guide, guide_weight: Autoguidance by a weaker denoiser, such as another pipeline's ``transformer``, that was
                trained for the same; see `Guidance`.

        Raises:
            InputError: Unknown classes, settings that mean nothing, a list of generators of another length, a scheduler
                of another objective, a guide of other latents or classes.
        """
        check_scheduler(self.scheduler, self.config.objective)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"`output_type` must be pil, np, pt or latent, not {output_type!r}")
        if not is_count(num_images_per_prompt):
            raise InputError(f"`num_images_per_prompt` must be a positive integer, not {num_images_per_prompt!r}")
        labels = torch.tensor(self.get_label_ids(class_labels), device=self._execution_device)
        labels = labels.repeat_interleave(num_images_per_prompt)
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE if self.config.label_dropout and guide is None else 1.0
        guidance = Guidance(guidance_scale, guidance_channels, tuple(guidance_interval), guide_weight)
        if guide is not None and (mine := _takes(self.transformer)) != (theirs := _takes(guide)):
            raise InputError(f"the guide takes latents and classes {theirs}, the pipeline's denoiser {mine}")
        check_guidance(guidance_scale, label_dropout=self.config.label_dropout)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise InputError(f"{len(generator)} generators were given for {len(labels)} pictures; one for each, or one")
        shape = (len(labels), *self.transformer.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device)
        elif tuple(latents.shape) != shape:
            raise InputError(f"the latents must have the shape {shape}, not {tuple(latents.shape)}")
        set_steps(self.scheduler, steps_for(self.config.objective, num_inference_steps), self._execution_device)
        steps = denoise(
            self.transformer, self.scheduler, latents.to(self._execution_device, torch.float32), labels,
            guidance=guidance, generator=generator, objective=self.config.objective,
            guide=guide,
        )
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for step in steps:
                latents = step.latents
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, step.index, step.timestep, tensors) or {}
                    latents.copy_(changed.get("latents", latents))
        images = latents if output_type == "latent" else self._finish(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _finish(self, latents: torch.Tensor, output_type: str) -> Any:
        codec: Codec = PixelCodec() if self.vae is None else codec_of(self.vae)
        return VaeImageProcessor().postprocess(decode(codec, latents), output_type)


def _takes(denoiser: DenoiserFrame) -> tuple[tuple[int, ...], int]:
    """Shape of the latents and number of classes."""
    return denoiser.latent_shape, denoiser.num_classes
