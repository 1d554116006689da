"""Codecs between images and latents; the only owner of the scaling factor."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from torch import nn

from d_emo.config import check_values
from d_emo.config.ranges import Layers
from d_emo.errors import InputError, imported
from d_emo.files import check_sums, digest_of_tensors, expand_home, newest_snapshot, read_json
from d_emo.tables import AUTOENCODERS, CODECS, load
from d_emo.weights import STEM, check_finite, check_library, first_line, load_pretrained, telling_unmet

SHIPPED = Path(__file__).parents[1] / "pretrained"
SHIPPED_VAE = "d-emo-f8"
HUB_SECONDS = 5
"""How long the Hugging Face hub has for its first answer."""

DECODER = ("decoder.", "post_quant_conv.")  # names of weights that latents do not depend on begin so

Factor = float | list[float]
"""One number for all latent channels, or one for each."""


class Codec(Protocol):
    """What maps images in [-1, 1] to latents of about unit variance, and back.

    Attributes:
        name: The name that `load_codec` takes to open the same codec again.
        downsample: Pixels per latent position along a side.
        channels: Latent channels.
        scaling: Factor of the latents, after ``shift`` was subtracted.
        shift: What is subtracted from the latents.
        fingerprint: Tells encoders apart: equal for two codecs that give the same latents but for scaling and shift.
    """

    name: str
    downsample: int
    channels: int
    scaling: Factor
    shift: Factor
    fingerprint: str

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled mean and standard deviation of each latent. Shape: (B, 3, H, W) -> (B, 2 C, H / f, W / f)."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, clamped to [-1, 1]. Shape: (B, C, H / f, W / f) -> (B, 3, H, W)."""

    def to(self, device: torch.device) -> Codec:
        """Move to a device."""


def sample_moments(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from their posterior. Shape: (B, 2 C, H, W), (B, C, H, W) -> (B, C, H, W)."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * noise


class PixelCodec:
    """No codec: the latents are the pixels."""

    name, downsample, channels, scaling, shift, fingerprint = "pixels", 1, 3, 1.0, 0.0, "pixels"

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.clamp(-1, 1)

    decoded = decode

    def to(self, device: torch.device) -> PixelCodec:
        return self


class VAECodec:
    """A diffusers ``AutoencoderKL``; latents are (z - shift) * scaling with the factors of its config.

    Raises:
        InputError: It is not of RGB images, or its factors cannot be used.
    """

    def __init__(self, vae: nn.Module, name: str):
        self.vae, self.name = vae.eval().requires_grad_(False), name
        check_channels(name, vae.config.in_channels, vae.config.out_channels)
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = vae.config.latent_channels
        self.scaling, self.shift = factors_of(vae.config, self.channels, name)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the encoder's weights: a name may move, and VAEs that differ in the decoder alone share latents."""
        weights = sorted(self.vae.state_dict().items())
        kept = ((name, value.float()) for name, value in weights if not name.startswith(DECODER))
        return digest_of_tensors((f"{name} {tuple(value.shape)}", value) for name, value in kept)[:16]

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        scaling, shift = (by_channel(factor, images.device) for factor in (self.scaling, self.shift))
        mean = (posterior.mean.float() - shift) * scaling
        return torch.cat([mean, posterior.std.float() * scaling], dim=1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoded(latents)

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode` with gradients. Shape: (B, C, H / f, W / f) -> (B, 3, H, W)."""
        images = self.unclamped(latents)
        return images.where(images.isfinite(), torch.nan).clamp(-1, 1)  # clamping alone would make infinity white

    def unclamped(self, latents: torch.Tensor) -> torch.Tensor:
        """`decoded` beyond [-1, 1] too. Shape: (B, C, H / f, W / f) -> (B, 3, H, W)."""
        z = latents.float() / by_channel(self.scaling, latents.device) + by_channel(self.shift, latents.device)
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()

    def to(self, device: torch.device) -> VAECodec:
        self.vae.to(device)
        return self


def check_channels(name: str, taken: int, given: int) -> None:
    """Refuse a VAE of other images than RGB.

    Raises:
        InputError: It is of such.
    """
    if (taken, given) != (3, 3):
        raise InputError(
            f"the VAE {name} takes images of {taken} channels and gives {given}; one of RGB images, with 3 and 3, is "
            "needed"
        )


def factors_of(config: Mapping[str, Any], channels: int, name: str) -> tuple[Factor, Factor]:
    """Scaling and shift of a VAE's latents, as the pipelines of diffusers apply its config.

    ``scaling_factor`` and, of Stable Diffusion 3 and Flux, ``shift_factor``; with ``latents_mean`` and ``latents_std``
    (SDXL's pipelines) the shift is the mean and the scaling is over the deviation, channel by channel.

    Raises:
        InputError: They contradict each other, or are no numbers to scale with.
    """
    scaling, shift, mean, std = (config.get(key) for key in (
        "scaling_factor", "shift_factor", "latents_mean", "latents_std"
    ))  # fmt: skip
    if (mean is None) != (std is None) or (mean is not None and shift):
        raise InputError(
            f"the VAE {name} has latents_mean {mean}, latents_std {std} and shift_factor {shift}; its config.json must "
            "give mean and deviation together, and no shift beside them"
        )
    means, deviations = [shift or 0.0] if mean is None else list(mean), [1.0] if std is None else list(std)
    count, numbers = (1 if mean is None else channels), [scaling, *means, *deviations]
    usable = all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers)
    if not usable or min(scaling, *deviations) <= 0 or {len(means), len(deviations)} != {count}:
        raise InputError(
            f"the VAE {name} has scaling_factor {scaling}, shift_factor {shift}, latents_mean {mean} and latents_std "
            f"{std}; numbers are needed, means and deviations one for each of its {channels} channels, and scaling and "
            "deviations above 0"
        )
    if mean is None:
        return scaling, means[0]
    return [scaling / deviation for deviation in deviations], means


def by_channel(factor: Factor, device: torch.device) -> float | torch.Tensor:
    """A factor ready to be multiplied with latents. Shape: -> () or (C, 1, 1)."""
    return torch.tensor(factor, device=device)[:, None, None] if isinstance(factor, list) else factor


def latent_side(codec: Codec, image_size: int) -> int:
    """Latent positions along the side of an image; InputError where the codec's steps do not divide it."""
    if image_size % codec.downsample:
        raise InputError(
            f"`image_size` {image_size} is not a multiple of {codec.downsample}, which the codec {codec.name} needs"
        )
    if (only := getattr(codec, "image_size", image_size)) != image_size:
        raise InputError(f"the codec {codec.name} is for images of {only} px; give `image_size` {only}")
    return image_size // codec.downsample


def default_codec(data_dir: str | None) -> str:
    """The codec where none is named: the one that ships for built-in data, Stable Diffusion's for the user's own."""
    return SHIPPED_VAE if data_dir is None else "stabilityai/sd-vae-ft-ema"


def load_codec(name: str, *, setting: str = "vae") -> Codec:
    """Open a codec by name.

    Args:
        name: A name of ``d_emo.tables.CODECS``; a local folder, or the name of a repository on the Hugging Face hub, of
            an autoencoder of a class in ``d_emo.tables.AUTOENCODERS`` (also a pipeline's, in its sub-folder ``vae``);
            or a run folder of ``d-emo train-vae``, for its newest snapshot, by whose name the codec then goes.
        setting: The setting that names it, for messages.

    Raises:
        InputError: There is no such codec, or the hub cannot be reached; says what to do.
    """
    if name in CODECS:
        return load(CODECS[name].open)()
    looks_local = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    folder = expand_home(name) if looks_local else _fetch(name, setting)
    if folder.is_file():
        raise InputError(
            f"the VAE {name} is a file; `{setting}` takes the folder that diffusers makes of it by "
            f"AutoencoderKL.from_single_file({name!r}).save_pretrained(FOLDER)"
        )
    if not folder.is_dir():
        raise InputError(
            f"the VAE {name!r} does not exist; give {', '.join(CODECS)}, a folder that AutoencoderKL.save_pretrained "
            "wrote, a run folder of train-vae, or a hub name such as stabilityai/sd-vae-ft-mse"
        )
    stored = (folder / "config.json").exists()
    if not stored and ((folder / "states").is_dir() or (folder / "snapshots").is_dir()):
        run, folder = folder, newest_snapshot(folder)
        if folder == run:
            raise InputError(f"the run {name} has no snapshot yet; `snapshot_every` says when it writes one")
        name = str(folder)  # which snapshot is the newest may change
    elif not stored and (folder / "vae").is_dir():
        folder = folder / "vae"
    try:
        vae = load_pretrained(autoencoder_in(folder), folder)
        check_finite(vae.state_dict(), str(folder))
        check_sums(folder)
    except InputError as error:
        raise InputError(f"`{setting}` {name} does not hold a readable autoencoder: {error}") from None
    return codec_of(vae, name)


def autoencoder_in(folder: Path) -> type[nn.Module]:
    """The class of diffusers that a folder's ``config.json`` says to hold.

    Raises:
        InputError: It is another, is not installed, or is of more layers than can be built.
    """
    config = read_json(folder / "config.json", dict)
    if (kind := config.get("_class_name")) not in AUTOENCODERS:
        raise InputError(f"{folder} holds {kind or 'another network'}, not {' or '.join(AUTOENCODERS)}")
    read_json(folder / "config.json", lambda config: check_depths(kind, config))
    return autoencoder_class(kind)


def check_depths(kind: str, config: Mapping[str, Any]) -> None:
    """Refuse an autoencoder that would take for ever to build.

    Raises:
        InputError: Its config asks for more layers than any has.
    """
    depths = AUTOENCODERS[kind].depths
    check_values(config, {name: list[Layers] if isinstance(config.get(name), list) else Layers for name in depths})


def autoencoder_class(kind: str) -> type[nn.Module]:
    """A class of diffusers, by its name in ``d_emo.tables.AUTOENCODERS``.

    Raises:
        InputError: It is not installed.
    """
    row = AUTOENCODERS[kind]
    if row.needs:
        imported(row.needs, f"{kind} needs {row.needs}", row.needs)
    check_library()
    try:
        with telling_unmet():
            return load(f"diffusers:{kind}")
    except AttributeError:
        raise InputError(f"the installed diffusers has no {kind}; a newer one is needed") from None


def codec_of(vae: nn.Module, name: str = "vae") -> VAECodec:
    """The codec over an autoencoder of diffusers; InputError for one of a class without."""
    return load(AUTOENCODERS[type(vae).__name__].codec)(vae, name)


def shipped_vae() -> VAECodec:
    """The small VAE that ships with the package."""
    check_library()
    with telling_unmet():
        from diffusers import AutoencoderKL
    return VAECodec(load_pretrained(AutoencoderKL, SHIPPED / SHIPPED_VAE), SHIPPED_VAE)


def _fetch(name: str, setting: str) -> Path:
    """The folder of a repository on the Hugging Face hub, with the files of its VAE, fetched where they are not."""
    from huggingface_hub import HfApi, snapshot_download

    files = ("config.json", f"{STEM}*.safetensors*")
    wanted = [*files, *(f"vae/{each}" for each in files)]
    refusal = _refusal(lambda: HfApi().model_info(name, timeout=HUB_SECONDS))  # a download asks, and warns, many times
    try:
        with _of_few_words():
            return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=refusal is not None))
    except Exception as error:  # whatever the HTTP library of the day raises
        if refusal is None:
            what = f"the download of the VAE {name!r} from the Hugging Face hub broke off ({first_line(error)}). Run "
            what += "the same command again; or, where the network is better,"
        else:
            what = f"the VAE {name!r} is not in the local cache and could not be fetched from the Hugging Face hub "
            what += f"({first_line(refusal)}). On a machine with a network"
        without = " or `vae` pixels, which need" if setting == "vae" else ", which needs"
        raise InputError(
            f"{what} run `hf download {name} --local-dir FOLDER`, copy FOLDER here and give `{setting}` FOLDER; or use "
            f"`{setting}` {SHIPPED_VAE}{without} no network"
        ) from None


@contextmanager
def _of_few_words() -> Iterator[None]:
    """Inside, the hub's client tells of no attempts that failed, and shows bars on a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    if hidden := bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hidden:
            enable_progress_bars()


def _refusal(ask: Callable[[], Any]) -> Exception | None:
    """What a call of the hub raises, None where it is answered; the look-up of a name alone may take half a minute."""
    answers: list[Exception | None] = []

    def wait() -> None:
        try:
            ask()
            answers.append(None)
        except Exception as error:
            answers.append(error)

    thread = Thread(target=wait, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else TimeoutError(f"no answer within {HUB_SECONDS} s")
