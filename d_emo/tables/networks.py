"""Networks beside the one that is trained: codecs between images and latents, and feature extractors of metrics."""

import difflib
from dataclasses import dataclass

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
            spatial=True,
            help="torch-fidelity's Inception, of published tables",
        ),
        ExtractorRow(
            name="emov2", open="d_emo.evaluation.features:ClassifierFeatures", takes="SNAPSHOT",
            help="a classifier trained here; needs no download",
        ),
    ],
)  # fmt: skip


def parse_features(features: str) -> tuple[ExtractorRow, str]:
    """The extractor that ``features`` names, NAME or NAME:WHAT, and what stands behind the colon; else InputError."""
    name, colon, what = features.partition(":")
    row = EXTRACTORS[name] if name in EXTRACTORS else None
    if row is None or bool(row.takes) != bool(what) or (colon and not what):
        forms = {each.name: f"{each.name}:{each.takes}" if each.takes else each.name for each in EXTRACTORS.values()}
        near = difflib.get_close_matches(name.lower(), forms, n=1)
        guess = f"did you mean {forms[near[0]]}? " if near else ""
        raise InputError(f"unknown `features` {features!r}; {guess}use {' or '.join(forms.values())}")
    return row, what
