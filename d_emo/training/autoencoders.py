"""Autoencoders of diffusers as they are trained, and what becomes of one in a snapshot."""

import copy
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from d_emo.config import VAESettings, check_values
from d_emo.config.encoding import SIDE
from d_emo.config.ranges import Count
from d_emo.errors import InputError, PackageError
from d_emo.files import expand_home
from d_emo.io.snapshot import kind_of, load_meta
from d_emo.latents import load_codec, sample_moments
from d_emo.latents.codec import DECODER, autoencoder_class, check_depths, codec_of, latent_side
from d_emo.models.registry import check_weights
from d_emo.tables import AUTOENCODERS, load
from d_emo.weights import first_line, telling_unmet

EPS = 1e-6
"""Added to the variance of the latents that are normalised."""


class Trained(nn.Module):
    """An autoencoder and, of ``logits``, a linear classifier of its latents; both see the latents with their noise.

    Args:
        vae: With a scaling factor of 1.
        latent_shape: (C, h, w).
        logits: Number of them; 0: no classifier.

    Attributes:
        fixed: Arguments of the autoencoder's class that are no choice.
        measured: Those of them that `scale` finds, whatever they are where a run starts from.
        widths: That which is ``block_out_channels``.
    """

    fixed: ClassVar[dict[str, Any]]
    measured: ClassVar[frozenset[str]] = frozenset()
    widths: ClassVar[str] = "block_out_channels"

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int], logits: int):
        super().__init__()
        self.vae = vae
        self.head = nn.Linear(math.prod(latent_shape), logits) if logits else None

    @staticmethod
    def defaults(settings: VAESettings) -> dict[str, Any]:
        """Arguments of the autoencoder's class where ``model_options`` do not say otherwise."""
        raise NotImplementedError

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise InputError for arguments that the class refuses without saying why."""

    @staticmethod
    def scale(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Give an autoencoder latents of variance 1, by those of a sample. Shape: mean, std (N, C, h, w)."""
        raise NotImplementedError

    @staticmethod
    def unit(latents: torch.Tensor) -> torch.Tensor | float:
        """Standard deviation that noise is measured in. Shape: (B, C, h, w) -> (B, 1, 1, 1) or ()."""
        return latents.detach().std(dim=(1, 2, 3), correction=0, keepdim=True)

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents, and the loss of their distribution, where it has one. Shape: (B, 3, H, W) -> (B, C, h, w), ()."""
        raise NotImplementedError

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents. Shape: (B, C, h, w) -> (B, 3, H, W)."""
        return self.vae.decode(latents).sample

    def forward(
        self, images: torch.Tensor, posterior: torch.Tensor, noise: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Reconstructions, under "images"; "kl", a mean over latent values; "logits".

        Shape: images (B, 3, H, W), posterior and noise (B, C, h, w) -> (B, 3, H, W), (), (B, logits).
        """
        latents, parts = self.latents(images.contiguous(memory_format=torch.channels_last), posterior)  # (B, C, h, w)
        if noise is not None:
            latents = latents + noise * self.unit(latents)
        if self.head is not None:
            parts["logits"] = self.head(latents.flatten(1))
        return {"images": self.decoded(latents), **parts}

    @torch.no_grad()
    def finished(self, batches: Iterable[torch.Tensor]) -> nn.Module:
        """The autoencoder as it is stored: latents of variance 1, weights rounded to float16.

        Args:
            batches: Images that the variance is measured on. Shape: (B, 3, H, W) each.
        """
        vae = copy.deepcopy(self.vae).float()
        codec = codec_of(vae)
        mean, std = torch.cat([codec.moments(batch) for batch in batches]).chunk(2, dim=1)
        self.scale(vae, mean, std)
        return vae.half().float()


class TrainedKL(Trained):
    """`AutoencoderKL`: latents drawn from a posterior; its scaling factor is 1 over their standard deviation."""

    fixed = {"in_channels": 3, "out_channels": 3, "block_out_channels": None, "scaling_factor": 1.0,
             "shift_factor": None, "latents_mean": None, "latents_std": None}  # fmt: skip
    measured = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})

    @staticmethod
    def defaults(settings: VAESettings) -> dict[str, Any]:
        widths = settings.block_out_channels
        return {
            "block_out_channels": tuple(widths), "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths), "layers_per_block": 1, "latent_channels": 4,
            "norm_num_groups": 8, "mid_block_add_attention": False, "sample_size": settings.image_size,
        }

    @staticmethod
    def scale(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        variance = mean.var() + std.square().mean()
        vae.register_to_config(scaling_factor=round(1 / variance.clamp(min=EPS).sqrt().item(), 5))

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        given = self.vae.encode(images).latent_dist
        given = type(given)(given.parameters.float())
        return given.mean + given.std * posterior, {"kl": given.kl().mean() / given.mean[0].numel()}


class TrainedDC(Trained):
    """`AutoencoderDC` (DC-AE; Chen et al., 2025): a batch norm without parameters behind the encoder.

    A snapshot has it in the encoder's last convolution, beside which there must be no shortcut then. Trained with noise
    on the normalised latents, the decoder is that of RAE (Zheng et al., 2025).
    """

    fixed = {"in_channels": 3, "encoder_block_out_channels": None, "scaling_factor": 1.0, "encoder_out_shortcut": False}
    widths = "encoder_block_out_channels"

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int], logits: int):
        super().__init__(vae, latent_shape, logits)
        self.norm = nn.BatchNorm2d(latent_shape[0], EPS, affine=False, track_running_stats=False)

    @staticmethod
    def defaults(settings: VAESettings) -> dict[str, Any]:
        widths, count = tuple(settings.block_out_channels), len(settings.block_out_channels)
        both = {"block_out_channels": widths, "layers_per_block": (1,) * count, "qkv_multiscales": ((),) * count}
        return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        check_values(dict(options), {"decoder_block_out_channels": list[Count], "latent_channels": Count})
        widths, channels = options["decoder_block_out_channels"], options.get("latent_channels", 32)
        if widths and options.get("decoder_in_shortcut", True) and widths[-1] % channels:
            raise InputError(
                f"the last of `block_out_channels` is {widths[-1]}, but must be a multiple of the {channels} "
                "latent_channels, for the shortcut at the decoder's start; change either, latent_channels in "
                "`model_options`"
            )

    @staticmethod
    def scale(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        conv, by_channel = vae.encoder.conv_out, (0, 2, 3)
        deviation = (mean.var(by_channel) + EPS).sqrt()  # (C,)
        conv.weight.div_(deviation[:, None, None, None])
        conv.bias.sub_(mean.mean(by_channel)).div_(deviation)

    @staticmethod
    def unit(latents: torch.Tensor) -> torch.Tensor | float:
        return 1.0

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.norm(self.vae.encode(images).latent.float()), {}


class TrainedDecoder(Trained):
    """An autoencoder whose latents stay what a codec of it gives, scaled and shifted; only the decoder is trained."""

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int], logits: int):
        super().__init__(vae, latent_shape, 0)
        self.codec = codec_of(vae)  # which freezes it
        vae.requires_grad_(True)

    @staticmethod
    def unit(latents: torch.Tensor) -> torch.Tensor | float:
        return 1.0

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast(images.device.type, enabled=False):  # as the latents of a snapshot are measured
            return sample_moments(self.codec.moments(images), posterior), {}  # without gradients

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return self.codec.unclamped(latents)

    @torch.no_grad()
    def finished(self, batches: Iterable[torch.Tensor]) -> nn.Module:
        """The autoencoder as it is stored: the decoder rounded to float16, all else as it was.

        Args:
            batches: Images, which are not looked at. Shape: (B, 3, H, W) each.
        """
        vae = copy.deepcopy(self.vae).float()
        for name, part in vae.named_children():
            if f"{name}.".startswith(DECODER):
                part.half().float()
        return vae


def in_float16(vae: nn.Module) -> bool:
    """Whether float16 holds the weights exactly, as it does those that were rounded to it."""
    floats = (value for value in vae.state_dict().values() if value.is_floating_point())
    return all(torch.equal(value, value.half().float()) for value in floats)


def open_start(settings: VAESettings) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """What a run with ``init_from`` starts from.

    Args:
        settings: What they say of the network has to be so there.

    Returns:
        The autoencoder, the facts for `VAESettings.resolve`, and what its snapshot says of itself; nothing if it is
        none of D-EMO's.

    Raises:
        InputError: There is no such codec, it is of a class that is not trained here, is another than the settings
            say, or cannot be trained so.
    """
    codec = load_codec(settings.init_from, setting="init_from")
    vae = getattr(codec, "vae", None)
    name = type(vae).__name__
    trainable = {each.name: each.network for each in AUTOENCODERS.values() if each.network}
    if name not in trainable:
        found = "has no weights" if vae is None else f"is an {name}"
        raise InputError(f"`init_from` {codec.name} {found}; give an {' or '.join(trainable)}")
    kind, config = load(trainable[name]), _config_of(vae)
    widths = config[kind.widths]
    there = {**config, "model": name, "block_out_channels": widths}
    given = {"model": settings.model, "block_out_channels": settings.block_out_channels}
    given = {key: value for key, value in given.items() if value is not None} | (settings.model_options or {})
    if differ := [f"{key} is {there.get(key)} there, {value} here" for key, value in given.items()
                  if there.get(key) != value]:  # fmt: skip
        raise InputError(
            f"`init_from` {codec.name} is another network ({'; '.join(differ)}); `model`, `block_out_channels` and "
            "`model_options` must be those in its config.json, or left out"
        )
    needed = kind.fixed.keys() - kind.measured - {kind.widths}
    odd = [f"{key} {config[key]}" for key in sorted(needed) if config[key] != kind.fixed[key]]
    if odd and settings.train == "all":
        raise InputError(f"`init_from` {codec.name} has {', '.join(odd)}, so its latents are not normalised as those "
                         f"of train-vae are; give `train` decoder, which leaves them as they are")  # fmt: skip
    folder = expand_home(codec.name)
    meta = load_meta(folder, "autoencoder") if kind_of(folder) == "autoencoder" else {}
    size = settings.image_size or meta.get("image_size") or config.get("sample_size") or SIDE
    facts = {"init_from": codec.name, "model": name, "block_out_channels": widths, "image_size": size}
    parts = inspect.signature(type(vae)).parameters
    usual = {key: part.default for key, part in parts.items()} | kind.defaults(replace(settings, **facts))
    own = {key: value for key, value in config.items() if key not in kind.fixed and value != _plain(usual[key])}
    return vae, {**facts, "model_options": own or None}, meta


def create_trained(
    settings: VAESettings, logits: int, start: nn.Module | None = None
) -> tuple[Trained, tuple[int, int, int]]:
    """The network that the settings name, with random weights or those of ``start``, and the shape of its latents.

    Raises:
        InputError: ``model_options`` that are fixed, unknown or do not go together; an image size that does not fit.
    """
    row, options = AUTOENCODERS[settings.model], settings.model_options or {}
    kind: type[Trained] = load(row.network)
    if taken := sorted(kind.fixed.keys() & options.keys()):
        raise InputError(f"`model_options`: {taken[0]} is no choice or a setting of its own; leave it out")
    check_depths(settings.model, options)
    chosen = {name: value for name, value in kind.fixed.items() if value is not None}
    chosen = {**kind.defaults(settings), **options, **chosen}
    if start is not None:
        chosen = _config_of(start)
        chosen |= {name: kind.fixed[name] for name in kind.measured} if settings.train == "all" else {}
    else:
        kind.check(chosen)
    kind = kind if settings.train == "all" else TrainedDecoder
    vae = autoencoder_class(settings.model)
    with telling_unmet():
        shape = _tried(vae, chosen, settings)
        torch.manual_seed(settings.seed)
        model = kind(vae(**chosen), shape, logits).to(memory_format=torch.channels_last)
    if start is not None:
        model.vae.load_state_dict(start.state_dict())
    return model, shape


def _config_of(vae: nn.Module) -> dict[str, Any]:
    """The arguments that an autoencoder was made with, as JSON has them."""
    return {name: _plain(vae.config[name]) for name in inspect.signature(type(vae)).parameters}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@torch.no_grad()
def _tried(vae: type[nn.Module], options: Mapping[str, Any], settings: VAESettings) -> tuple[int, int, int]:
    """The shape of the latents, found without weights."""
    try:
        with torch.device("meta"):
            made = vae(**options)
            codec, size = codec_of(made, settings.model), settings.image_size
            check_weights(made, f"{settings.model} with {settings.model_options}")
            shape = (codec.channels, *[latent_side(codec, size)] * 2)
            images = torch.zeros(2, 3, size, size)  # one would be too few for norms of a single value
            codec.moments(images)
            if codec.decode(torch.zeros(2, *shape)).shape != images.shape:
                raise InputError(f"`model_options` {settings.model_options} make images of another size than they take")
    except (InputError, PackageError):
        raise
    except Exception as error:  # diffusers checks few of its arguments
        raise InputError(
            f"`model_options` {settings.model_options} with `block_out_channels` {settings.block_out_channels} make no "
            f"{settings.model} ({first_line(error)})"
        ) from None
    return shape
