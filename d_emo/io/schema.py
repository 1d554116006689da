"""What snapshots, noise schedules and states say: names, types and ranges. It is data, and may be damaged."""

from typing import Annotated, Any, Literal

from d_emo.config import check_values
from d_emo.config.ranges import Count, Fraction, ImageSide, NotNegative, Range, Whole

_Switch = bool | None
SNAPSHOT: dict[str, Any] = {
    "kind": Literal["denoiser", "classifier", "detector", "segmenter", "video classifier", "autoencoder"],
    "class_names": list[str],
    "image_size": ImageSide, "step": Whole,
    "weights": str, "codec": str, "objective": str | None, "label_dropout": Fraction, "parameters": Whole,
    "num_images": Whole, "training_minutes": NotNegative, "hardware": str, "data": str | None,
    "started_from": dict[str, Any] | None, "accuracy": dict[str, Any] | None,
    "average_precision": dict[str, Any] | None,
    "noise": Fraction, "latent_side": Count, "encoder": str,
    "frames": Count, "sampling": Literal["uniform", "dense"], "frame_interval": Count,
    "quality": dict[str, Any] | None, "normalisation": dict[str, list[float]],
    "windows": dict[str, Any] | None,
    "channels": Count, "downsample": Count, "dtype": str, "psnr": dict[str, float], "held_out": dict[str, int],
    "sha256": dict[str, str],
}  # fmt: skip
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": Annotated[int, Range(1, 100_000)], "beta_start": Fraction, "beta_end": Fraction,
    "beta_schedule": str, "prediction_type": str, "trained_betas": list[Fraction] | None, "variance_type": str | None,
    "clip_sample": _Switch, "clip_sample_range": NotNegative, "thresholding": _Switch, "timestep_spacing": str,
    "steps_offset": Whole, "rescale_betas_zero_snr": _Switch, "shift": NotNegative,
    "stochastic_sampling": _Switch, "invert_sigmas": _Switch, "use_dynamic_shifting": _Switch,
    "use_karras_sigmas": _Switch, "use_beta_sigmas": _Switch, "use_exponential_sigmas": _Switch,
}  # fmt: skip

STATE: dict[str, Any] = {
    "step": Whole, "minutes": NotNegative, "model": dict[str, Any], "optimizer": dict[str, Any], "ema": dict[str, Any],
    "moments": Whole, "guard": dict[str, Any], "kernels": dict[str, str] | None, "class_names": list[str] | None,
    "data": dict[str, Any] | None,
}  # fmt: skip
_OF_STATES = {"ema": {"step": Whole}, "guard": {"skipped": Whole, "in_a_row": Whole}}


def snapshot_meta(content: Any) -> dict[str, Any]:
    """What ``snapshot.json`` holds, or InputError; KeyError for what every snapshot has and this one lacks."""
    meta = check_values(content, SNAPSHOT)
    for name in ("class_names", "image_size", "step", "weights", *["codec"] * (meta["kind"] == "denoiser")):
        meta[name]
    if meta["kind"] != "denoiser":
        check_values(meta["model"], {"name": str})["name"]
    return meta


def noise_schedule(content: Any) -> dict[str, Any]:
    """What ``scheduler_config.json`` holds, or InputError; KeyError without a number of timesteps."""
    schedule = check_values(content, SCHEDULE)
    schedule["num_train_timesteps"]
    return schedule


def training_state(content: Any) -> dict[str, Any]:
    """What ``state.pt`` holds, or InputError; whether its tensors fit is for the model to say."""
    state = check_values(content, STATE)
    for name, hints in _OF_STATES.items():
        check_values(state.get(name, {}), hints)
    return state
