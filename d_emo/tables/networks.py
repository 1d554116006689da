"""Networks beside the one that is trained: codecs, feature extractors of metrics, and targets of alignment."""

import difflib
from dataclasses import dataclass
from typing import Any

from d_emo.errors import InputError
from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class CodecRow:
    """A codec with a name of its own; other names are folders or repositories of VAEs.

    Attributes:
        name: The value of ``vae``.
        open: Called without arguments; gives a ``d_emo.latents.Codec``.
        help: What it is, in a few words.
    """

    name: str
    open: Reference
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class AutoencoderRow:
    """A class of autoencoders that folders and repositories may hold.

    Attributes:
        name: The class of diffusers, as ``config.json`` names it.
        codec: Called with one and its name; gives a ``d_emo.latents.Codec``.
        depths: Names of its config that say how many layers it has, which are bounded before it is built.
        needs: A package that diffusers builds it with.
        network: A subclass of ``d_emo.training.autoencoders.Trained``, where ``train-vae`` trains it.
    """

    name: str
    codec: Reference
    depths: tuple[str, ...] = ()
    needs: str | None = None
    network: Reference | None = None


@dataclass(frozen=True, kw_only=True)
class ExtractorRow:
    """A network whose features are measured.

    Attributes:
        name: ``features`` is this name, or with ``takes`` NAME:WHAT.
        open: Called with WHAT (if ``takes``), and by keyword ``device`` and, where ``weights_file`` is True,
            ``weights``; gives a ``d_emo.evaluation.FeatureExtractor``.
        takes: What stands behind the colon, in capitals; None where nothing does.
        weights_file: Whether ``inception_weights`` is for it.
        spatial: Whether it has spatial features too.
        help: What it is, in a few words.
    """

    name: str
    open: Reference
    takes: str | None = None
    weights_file: bool = False
    spatial: bool = False
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class AlignmentRow:
    """Features that those of a denoiser's block are aligned to.

    Attributes:
        name: ``align`` is this name, or with ``takes`` NAME:WHAT.
        open: Called with the shape of the denoiser's map and that of its latents, then WHAT (if ``takes``); gives a
            ``torch.nn.Module`` of forward(images, latents, labels, step) -> (B, channels, h, w), and of ``channels``.
        takes: What stands behind the colon, in capitals; None where nothing does.
        images: Whether it looks at the images, which a run on encoded latents does not have.
        help: What it is, in a few words.
    """

    name: str
    open: Reference
    takes: str | None = None
    images: bool = False
    help: str = ""


CODECS: Table[CodecRow] = Table(
    "codec",
    [
        CodecRow(name="pixels", open="d_emo.latents.codec:PixelCodec", help="none: the latents are the pixels"),
        CodecRow(name="d-emo-f8", open="d_emo.latents.codec:shipped_vae", help="the small VAE that ships"),
    ],
)

AUTOENCODERS: Table[AutoencoderRow] = Table(
    "class of autoencoders",
    [
        AutoencoderRow(
            name="AutoencoderKL", codec="d_emo.latents.codec:VAECodec", depths=("layers_per_block",),
            network="d_emo.training.autoencoders:TrainedKL",
        ),
        AutoencoderRow(
            name="AutoencoderDC", codec="d_emo.latents.autoencoders:DCCodec",
            depths=("encoder_layers_per_block", "decoder_layers_per_block"),
            network="d_emo.training.autoencoders:TrainedDC",
        ),
        AutoencoderRow(
            name="AutoencoderRAE", codec="d_emo.latents.autoencoders:RAECodec",
            depths=("encoder_num_hidden_layers", "decoder_num_hidden_layers"), needs="transformers",
        ),
    ],
)  # fmt: skip

EXTRACTORS: Table[ExtractorRow] = Table(
    "feature extractor",
    [
        ExtractorRow(
            name="inception", open="d_emo.evaluation.features:InceptionFeatures", weights_file=True,
            spatial=True,
            help="torch-fidelity's Inception, of published tables",
        ),
        ExtractorRow(
            name="emov2", open="d_emo.evaluation.features:ClassifierFeatures", takes="SNAPSHOT",
            help="a classifier trained here; needs no download",
        ),
    ],
)  # fmt: skip


ALIGNMENTS: Table[AlignmentRow] = Table(
    "target of alignment",
    [
        AlignmentRow(name="vae", open="d_emo.training.alignment:LatentTarget", help="the clean latents themselves"),
        AlignmentRow(
            name="emov2", open="d_emo.training.alignment:ClassifierTarget", takes="SNAPSHOT", images=True,
            help="the third stage of a classifier trained here, or of a released EMO file",
        ),
        AlignmentRow(
            name="sra", open="d_emo.training.alignment:SelfTarget", help="a later block of the moving average, which "
            "sees less noise",
        ),
        AlignmentRow(
            name="dinov2", open="d_emo.training.alignment:ViTTarget", takes="FILE", images=True,
            help="the tokens of timm's DINOv2, of a file of its weights",
        ),
    ],
)  # fmt: skip


def parse_features(features: str) -> tuple[ExtractorRow, str]:
    """The extractor that ``features`` names, NAME or NAME:WHAT, and what stands behind the colon; else InputError."""
    return _parse(EXTRACTORS, "features", features)


def parse_alignment(align: str) -> tuple[AlignmentRow, str]:
    """The target that ``align`` names, NAME or NAME:WHAT, and what stands behind the colon; else InputError."""
    return _parse(ALIGNMENTS, "align", align)


def _parse(table: Table, setting: str, text: str) -> tuple[Any, str]:
    name, colon, what = text.partition(":")
    row = table[name] if name in table else None
    if row is None or bool(row.takes) != bool(what) or (colon and not what):
        forms = {each.name: f"{each.name}:{each.takes}" if each.takes else each.name for each in table.values()}
        near = difflib.get_close_matches(name.lower(), forms, n=1)
        guess = f"did you mean {forms[near[0]]}? " if near else ""
        raise InputError(f"unknown `{setting}` {text!r}; {guess}use {' or '.join(forms.values())}")
    return row, what
