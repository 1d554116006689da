"""Networks beside the one that is trained: codecs between images and latents, and feature extractors of metrics."""

from __future__ import annotations

from dataclasses import dataclass

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
class ExtractorRow:
    """A network whose features are measured.

    Attributes:
        name: ``features`` is this name, or with ``takes`` NAME:WHAT.
        open: Called with WHAT (if ``takes``), and by keyword ``device`` and, where ``weights_file`` is True,
            ``weights``; gives a ``d_emo.evaluation.FeatureExtractor``.
        takes: What stands behind the colon, in capitals; None where nothing does.
        weights_file: Whether ``inception_weights`` is for it.
        help: What it is, in a few words.
    """

    name: str
    open: Reference
    takes: str | None = None
    weights_file: bool = False
    help: str = ""


CODECS: Table[CodecRow] = Table(
    "codec",
    [
        CodecRow(name="pixels", open="d_emo.latents.codec:PixelCodec", help="none: the latents are the pixels"),
        CodecRow(name="d-emo-f8", open="d_emo.latents.codec:shipped_vae", help="the small VAE that ships"),
    ],
)

EXTRACTORS: Table[ExtractorRow] = Table(
    "feature extractor",
    [
        ExtractorRow(
            name="inception", open="d_emo.evaluation.features:InceptionFeatures", weights_file=True,
            help="torch-fidelity's Inception, of published tables",
        ),
        ExtractorRow(
            name="emov2", open="d_emo.evaluation.features:ClassifierFeatures", takes="SNAPSHOT",
            help="a classifier trained here; needs no download",
        ),
    ],
)  # fmt: skip
