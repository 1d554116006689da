"""Settings of classifiers that may look at a codec's latents instead of images."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from d_emo.config.base import Settings, setting
from d_emo.errors import InputError

OF_IMAGES = (
    "dataset", "data_dir", "num_images", "skip_corrupt", "exif", "background", "shift", "rand_augment", "crop_scale",
    "crop_share", "teacher", "teacher_weights",
)
"""What means images; latents take their place."""


@dataclass(frozen=True, kw_only=True)
class LatentClassifierSettings(Settings):
    """Where latents are, and what the head is."""

    latents: str | None = setting(
        None, "folder that d-emo encode wrote, instead of images: the classifier sees its latents, for d-emo distill "
        "(--fd-features). --image-size is the side that they are enlarged to, --validate-dir another such folder",
        resumable=True, decisive=True, source=True, group="Data"
    )
    label_init: Literal["names"] | None = setting(
        None, "initial rows of the head: names, sums of random vectors, one for each word of the class name, so that "
        "'red star on sky' and 'red ring on sky' start out alike. Default: the model's own, independent", group="Model"
    )

    head: Literal["classes", "words"] = setting(
        "classes", "rows of the head: classes, one for each; words, sums of one for each word of the class name, all "
        "along: where names are combinations, as 'red star on sky', an image teaches each part of them"
    )

    def check(self) -> None:
        super().check()
        if self.latents is None:
            return
        for name, plain in _defaults(type(self)).items():
            if name in OF_IMAGES and (value := getattr(self, name)) not in (plain, "none"):
                raise InputError(
                    f"`latents` {self.latents} take the place of images, which `{name}` {value} means; leave one out"
                )


def _defaults(settings: type[Settings]) -> dict[str, Any]:
    return {each.name: each.default_factory() if each.default is MISSING else each.default
            for each in fields(settings)}  # fmt: skip
