"""Settings of what a denoiser is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from d_emo.config.base import Settings, setting
from d_emo.config.ranges import BelowOne, Fraction, Images, NotNegative, Positive, Real, Whole
from d_emo.errors import InputError
from d_emo.tables import OBJECTIVES, parse_alignment, takers

_OF_ONE_STEP = {
    "fd_features": None, "fd_decay": 0.999, "fd_images": 50_000, "fd_labels": 1.0, "fd_stages": "all",
    "class_weight": 0.0, "flow_weight": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Settings):
    """The objective, how its timesteps are drawn, and its terms."""

    objective: str | None = setting(
        None, "eps: predict the noise, and the variance by the variational bound; flow: predict the velocity of the "
        "straight path from data to noise, as SiT; flow-x and flow-eps: the same path and the same error of the "
        "velocity, but the network says x_0 or the noise; one-step and four-step (from a flow snapshot), "
        "one-step-x and four-step-x (from a flow-x one): images in so many steps. Default: flow for SiT models, "
        "else eps", group="Objective", choices=OBJECTIVES
    )
    timestep_sampling: Literal["uniform", "logit-normal"] | None = setting(
        None, "how training draws timesteps t in [0, T): uniform, as DiT and SiT, or logit-normal: the logit of t / T "
        "is normal, so that medium noise levels come more often and short runs learn shapes sooner. Default: uniform"
    )
    logit_mean: Real | None = setting(
        None, "of logit-normal: mean of the logit; negative means less noise. Default: 0"
    )
    logit_std: Positive | None = setting(None, "of logit-normal: standard deviation of the logit. Default: 1")
    time_shift: Positive | Literal["auto"] | None = setting(
        None, "of flow: factor s that moves the timesteps of training and sampling, t to s t / (1 + (s - 1) t); above "
        "1 towards noise. auto: by the size of the latents, sqrt(C h w / 4096), 1 for 4 x 32 x 32. Default: 1"
    )
    contrastive: Fraction | None = setting(
        None, "of flow: weight of contrastive flow matching, which pushes a prediction away from the velocity of the "
        "next image of the micro-batch; 0.05 is the paper's. Default: 0"
    )

    fd_features: str | None = setting(
        None, "of one-step and four-step: emov2:SNAPSHOT, a classifier, of images or of the latents, in whose "
        "features the Frechet distance is taken. Report the result in another network's", snapshot=True
    )
    fd_decay: BelowOne | None = setting(
        None, "of one-step and four-step: decay of the running statistics of what is drawn. Default: 0.999"
    )
    fd_images: Images | None = setting(
        None, "of one-step and four-step: how many images, at most, make up the statistics of real ones. Default: "
        "50,000"
    )
    fd_labels: NotNegative | None = setting(
        None, "of one-step and four-step: factor of the class means that stand beside the features, so that a "
        "drawing must be what was asked for; 0 leaves them out. Default: 1"
    )
    fd_stages: Literal["all", "last"] | None = setting(
        None, "of one-step and four-step: the features of the last four stages of the classifier, each by its "
        "deviation, or of the last alone. Default: all"
    )
    class_weight: NotNegative | None = setting(
        None, "of one-step and four-step: weight of the cross-entropy of drawings, by the head of the classifier of "
        "--fd-features, towards the class asked for. Default: 0"
    )
    flow_weight: NotNegative | None = setting(
        None, "of one-step and four-step: weight of the loss of flow on real images beside the drawings; micro-batches "
        "are then multiples of 2 (one-step) or 5 (four-step). Default: 0"
    )
    align: str | None = setting(
        None, "an auxiliary loss: align the map after a block with features of the clean image (REPA, with the "
        "convolution and spatial norm of iREPA): vae, the clean latents themselves; emov2:SNAPSHOT, a classifier "
        "trained here or a released EMO file; sra, the moving average under less noise; dinov2:FILE, weights of timm's",
        group="Alignment", snapshot=True
    )
    align_weight: NotNegative | None = setting(None, "with --align: weight of that loss. Default: 0.5")
    align_block: Whole | None = setting(
        None, "with --align: which block, from 0. Default: the one in the middle"
    )

    def check(self) -> None:
        if self.align is not None:
            parse_alignment(self.align)
        for name in ("align_weight", "align_block"):
            if self.align is None and getattr(self, name) is not None:
                raise InputError(f"`{name}` belongs to `align`, which is not given")
        super().check()

    def objective_settings(self, objective: str) -> dict[str, Any]:
        """These settings with nothing left open, for an objective by name.

        Raises:
            InputError: The objective has no such term.
        """
        plain = {"time_shift": 1.0, "contrastive": 0.0, **dict.fromkeys(_OF_ONE_STEP)}
        found = {name: value if (mine := getattr(self, name)) is None else mine for name, value in plain.items()}
        takes = OBJECTIVES[objective].takes if objective in OBJECTIVES else ()  # an unknown name is refused later
        for name, value in found.items():
            if name not in takes and value != plain[name]:
                raise InputError(
                    f"`{name}` {value} belongs to `objective` {', '.join(takers(name))}; leave it out for {objective}"
                )
        if "fd_features" in takes:
            if found["fd_features"] is None:
                raise InputError(f"`objective` {objective} needs `fd_features` emov2:SNAPSHOT, a classifier's")
            for name, value in _OF_ONE_STEP.items():
                found[name] = value if found[name] is None else found[name]
        return {
            **found, "objective": objective,
            "align_weight": 0.5 if self.align is not None and self.align_weight is None else self.align_weight,
            "timestep_sampling": self.timestep_sampling or "uniform",
            "logit_mean": 0.0 if self.logit_mean is None else self.logit_mean, "logit_std": self.logit_std or 1.0,
        }

    def timesteps_taken(self, there: dict[str, Any]) -> list[str]:
        """Which of these settings follow those of a snapshot of the same objective, ``there``, where left open."""
        if self.objective not in (None, there.get("objective")):
            return []
        shape = ["logit_mean", "logit_std"] if there.get("timestep_sampling") == "logit-normal" else []
        return ["timestep_sampling", *shape, *["time_shift"] * ("time_shift" in there)]
