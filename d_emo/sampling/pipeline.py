"""D-EMO as a diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from d_emo.config import DEFAULT_GUIDANCE, DEFAULT_STEPS, check_guidance
from d_emo.errors import InputError
from d_emo.io.snapshot import DenoiserSnapshot, load_denoiser
from d_emo.latents import Codec, PixelCodec, VAECodec, load_codec
from d_emo.models.contract import DenoiserFrame
from d_emo.sampling.classes import Labels, as_list, find_classes
from d_emo.sampling.denoising import check_codec, decode, denoise
from d_emo.sampling.guidance import Guidance
from d_emo.sampling.schedulers import make_scheduler, set_steps
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

    Raises:
        InputError: ``id2label`` does not name all classes; the VAE is of other latents, or not of RGB images.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, transformer: DenoiserFrame, scheduler: Any, vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None, label_dropout: float = 0.1,
    ):
        super().__init__()
        if vae is not None:
            check_codec(VAECodec(vae, "vae"), transformer)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = id2label or {label: str(label) for label in range(transformer.num_classes)}
        names = {str(label): name for label, name in names.items()}
        if names.keys() != set(map(str, range(transformer.num_classes))):
            raise InputError(f"id2label must name the classes 0 to {transformer.num_classes - 1}, all of them")
        self.register_to_config(id2label=names, label_dropout=label_dropout)

    @classmethod
    def from_snapshot(cls, snapshot: str | Path | DenoiserSnapshot, scheduler: str | None = None) -> DEMOPipeline:
        """The pipeline of a training run's snapshot, with its default scheduler unless one is named."""
        if not isinstance(snapshot, DenoiserSnapshot):
            snapshot = load_denoiser(snapshot)
        return cls(
            transformer=snapshot.model,
            scheduler=make_scheduler(scheduler, snapshot.scheduler_config, snapshot.objective),
            vae=getattr(load_codec(snapshot.codec), "vae", None),
            id2label={str(label): name for label, name in enumerate(snapshot.class_names)},
            label_dropout=snapshot.label_dropout,
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> DEMOPipeline:
        """Open what `save_pretrained` wrote, from a folder or the Hugging Face hub, whole or not at all.

        Raises:
            InputError: Weights lack tensors, have others, or are of another class.
        """
        folder = Path(path) if Path(path).is_dir() else Path(cls.download(path, **options))
        if "transformer" not in options:
            options["variant"] = find_weights(folder / "transformer", options.get("variant"))[1]
        if "vae" not in options and (folder / "vae").is_dir():
            check_pretrained(AutoencoderKL, folder / "vae", options.get("variant"))
        return super().from_pretrained(folder, **options)

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
        num_inference_steps: int = DEFAULT_STEPS,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_channels: Literal["all", "3"] = "all",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DEMOPipeline, int, torch.Tensor, dict[str, Any]], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture per class label.

        Args:
            class_labels: Ids or names, or a tensor or an array of ids; may be left out where there is only one class.
            guidance_scale: 1 is none and costs one forward pass. Default: 4, or 1 without label dropout.
            num_inference_steps: Denoising steps.
            generator: One for all pictures, or a list of one for each, which frees a picture from its neighbours.
            guidance_channels, guidance_interval: See `Guidance`.
            latents: Unit noise to start from in place of the generator's. Shape: (B, C, h, w).
            output_type: ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) in [0, 1], or ``latent``.
            callback_on_step_end: Called with (pipeline, index, timestep, {"latents": latents}) after every step; the
                latents that it returns in a dictionary take their place.

        Raises:
            InputError: Unknown classes, settings that mean nothing, a list of generators of another length.
        """
        labels = torch.tensor(self.get_label_ids(class_labels), device=self._execution_device)
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE if self.config.label_dropout else 1.0
        guidance = Guidance(guidance_scale, guidance_channels, tuple(guidance_interval))
        check_guidance(guidance_scale, label_dropout=self.config.label_dropout)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise InputError(f"{len(generator)} generators were given for {len(labels)} pictures; one for each, or one")
        shape = (len(labels), *self.transformer.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device)
        elif tuple(latents.shape) != shape:
            raise InputError(f"the latents must have the shape {shape}, not {tuple(latents.shape)}")
        set_steps(self.scheduler, num_inference_steps, self._execution_device)
        steps = denoise(
            self.transformer, self.scheduler, latents.to(self._execution_device, torch.float32), labels,
            guidance=guidance, generator=generator,
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
        codec: Codec = PixelCodec() if self.vae is None else VAECodec(self.vae, "vae")
        return VaeImageProcessor().postprocess(decode(codec, latents), output_type)
