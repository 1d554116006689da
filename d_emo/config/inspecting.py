"""Settings of what looks at data."""

from dataclasses import dataclass

from d_emo.config.base import overwrite_setting, setting
from d_emo.config.ranges import Count, ImageSide, Whole
from d_emo.config.training import HeldOutSettings
from d_emo.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(HeldOutSettings):
    """Settings of ``d-emo doctor``."""

    image_size: ImageSide = setting(256, "side of the (centre-cropped) images in pixels, as training will have it")
    unconditional: bool = setting(False, "take all images as one class, as --unconditional of train does")
    sample: Whole = setting(1000, "images to read, from all over the data set; 0: all", group="What to look at")
    vae: str | None = setting(
        None, "also encode the images of the contact sheet: pixels, d-emo-f8, a local folder of a VAE, a run "
        "folder of train-vae or a hub name", source="or a name"
    )
    batch_size: Count = setting(256, "images per step that training will have")
    max_steps: Count = setting(400_000, "steps that training will have")
    output: str | None = setting(
        None, "the contact sheet, a PNG. Default: samples/doctor-<data>.png, numbered if it exists", group="Output",
        output="picture",
    )
    overwrite: bool = overwrite_setting()

    def check(self) -> None:
        super().check()
        if self.skip_corrupt:
            raise InputError("`skip_corrupt` is for training; doctor counts what cannot be read and goes on")
