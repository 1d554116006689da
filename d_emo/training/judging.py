"""Whose features the objectives of few steps are trained in."""

import os
from collections.abc import Sequence
from typing import Any

from d_emo.config import TrainSettings
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.frechet import Judge, check_one_process
from d_emo.io.snapshot import load_classifier
from d_emo.latents import Codec
from d_emo.tables import OBJECTIVES, parse_features
from d_emo.training.finetuning import same_names
from d_emo.training.parallel import micro_batch_of


def open_judge(
    settings: TrainSettings, codec: Codec, class_names: Sequence[str], *, latent_side: int, encoded: bool
) -> Judge:
    """The judge that settings name, which has not learnt yet.

    Args:
        settings: Of the run.
        codec, class_names, latent_side: Of its latents.
        encoded: Whether the run reads latents, not images.

    Raises:
        InputError: Settings that such a training does not go with; a micro-batch in which the steps have no equal
            shares; a classifier without gradients, without the stages, of other latents than the run's, or of images
            where the run has none.
    """
    given = {"validate_every": settings.validate_every, "align": settings.align}
    if odd := [name for name, value in given.items() if value]:
        raise InputError(
            f"`objective` {settings.objective} has no use for `{odd[0]}`; leave it out"
        )
    check_one_process(int(os.environ.get("WORLD_SIZE", 1)))
    steps, micro = OBJECTIVES[settings.objective].steps, micro_batch_of(settings, settings.batch_size, best_device())
    shares, parts = steps + bool(settings.flow_weight), f"{steps} step{'s' * (steps > 1)}"
    if settings.flow_weight:
        parts += " and the loss of flow"
    for what, size in (("batch_size", settings.batch_size), ("micro_batch_size", micro)):
        if size % shares:
            raise InputError(
                f"`objective` {settings.objective}: {size} images have no equal shares for {parts}; give a `{what}` "
                f"that is a multiple of {shares}"
            )
    extractor, source = parse_features(settings.fd_features)
    if extractor.name != "emov2":
        raise InputError(f"`fd_features` {settings.fd_features} passes no gradients; give emov2:SNAPSHOT")
    classifier = load_classifier(source, latents=True)
    _check_latents(classifier.meta, settings, codec, latent_side=latent_side, encoded=encoded)
    shows = hasattr(classifier.model, "forward_intermediates") and len(classifier.model.feature_info) >= 4
    if settings.fd_stages == "all" and not shows:
        raise InputError(
            f"`fd_features` {settings.fd_features} is a {type(classifier.model).__name__}, which does not show four "
            "stages; take its last features by `fd_stages` last"
        )
    return Judge(
        classifier.model, None if "latent_side" in classifier.meta else codec, classifier.image_size,
        class_names=class_names, noise=classifier.meta.get("noise", 0.0), stages=settings.fd_stages == "all",
        label_weight=settings.fd_labels if len(class_names) > 1 else 0.0,
        class_rows=_rows_of(classifier.class_names, class_names, settings) if settings.class_weight else None,
    )


def _rows_of(known: Sequence[str], class_names: Sequence[str], settings: TrainSettings) -> list[int]:
    """Which class of the classifier each of the data is, by name."""
    rows, _ = same_names(list(known), list(class_names))
    if strange := [name for label, name in enumerate(class_names) if label not in rows]:
        raise InputError(
            f"`class_weight` {settings.class_weight:g} asks the classifier `fd_features` {settings.fd_features} for "
            f"classes of the data, and it does not know {len(strange):,} of {len(class_names):,}, such as {strange[0]}"
        )
    return [rows[label] for label in range(len(class_names))]


def _check_latents(
    meta: dict[str, Any], settings: TrainSettings, codec: Codec, *, latent_side: int, encoded: bool
) -> None:
    """Refuse a classifier that cannot look at what the run has; it is one of latents where it names their codec."""
    if "latent_side" not in meta:
        if encoded:
            raise InputError(
                f"`fd_features` {settings.fd_features} looks at images, of which "
                f"`{'cache_latents' if settings.latents is None else 'latents'}` leaves none; name images, or a "
                "classifier of latents (`d-emo train-classifier` with `latents`)"
            )
        return
    mine = {"latent_side": latent_side, "encoder": codec.fingerprint, "scaling": codec.scaling, "shift": codec.shift}
    if any(meta.get(key, value) != value for key, value in mine.items()):
        raise InputError(
            f"`fd_features` {settings.fd_features} looks at latents of {meta['codec']} of side {meta['latent_side']}, "
            f"those of the run are of {codec.name} of side {latent_side}, or of the same name and another encoder; "
            "train a classifier of these"
        )
