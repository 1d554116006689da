"""Training objectives, and the schedulers that sample from what they train."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d_emo.errors import InputError
from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class ObjectiveRow:
    """What a denoiser can be trained for.

    Attributes:
        name: The value of ``objective``.
        loss: A subclass of ``d_emo.objective.Objective``.
        prediction_type: What the network predicts, in diffusers' words, as the config of its noise schedule says it.
        scheduler: The sampler of pictures where none is named.
        table_scheduler: That of tables (FID).
        help: What ``--help`` says of it.
        like: The objective whose schedulers sample from it, where that is another and it has none of its own: its
            `Objective.scheduled` turns the prediction into that one's.
        steps: Denoising steps of an image, where only one number makes sense.
        starts_from: The objective of the snapshot that a run has to start from.
        takes: Settings that only some objectives have, as arguments of ``loss``.
        papers: Keys of the papers that a model card cites, beyond those of the model.
    """

    name: str
    loss: Reference
    prediction_type: str
    scheduler: str
    table_scheduler: str
    help: str = ""
    like: str | None = None
    steps: int | None = None
    starts_from: str | None = None
    takes: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SchedulerRow:
    """A sampler.

    Attributes:
        name: The value of ``scheduler``.
        objectives: Names of the objectives that it samples from.
        scheduler: A scheduler class of diffusers, or one like them.
        changes: To the noise schedule's config.
    """

    name: str
    objectives: tuple[str, ...]
    scheduler: Reference
    changes: Mapping[str, Any] = field(default_factory=dict)


_OF_FLOW = ("time_shift", "contrastive")
_OF_ONE_STEP = ("fd_features", "fd_decay", "fd_images", "fd_labels", "fd_stages", "class_weight", "flow_weight")

OBJECTIVES: Table[ObjectiveRow] = Table(
    "objective",
    [
        ObjectiveRow(
            name="eps", loss="d_emo.objective:EpsObjective", prediction_type="epsilon", scheduler="dpm++",
            table_scheduler="ddpm", help="predict the noise, and the variance by the variational bound",
        ),
        ObjectiveRow(
            name="flow", loss="d_emo.objective:FlowObjective", prediction_type="flow", scheduler="euler",
            table_scheduler="euler", help="predict the velocity of the straight path from data to noise, as SiT",
            takes=_OF_FLOW, papers=("SiT",),
        ),
        ObjectiveRow(
            name="flow-x", loss="d_emo.objective:FlowSampleObjective", prediction_type="flow_sample", like="flow",
            scheduler="euler", table_scheduler="euler", help="predict x_0 on that path, by the error of the velocity",
            takes=_OF_FLOW, papers=("SiT", "JiT"),
        ),
        ObjectiveRow(
            name="flow-eps", loss="d_emo.objective:FlowNoiseObjective", prediction_type="flow_epsilon", like="flow",
            scheduler="euler", table_scheduler="euler", help="predict the noise there, by the error of the velocity",
            takes=_OF_FLOW, papers=("SiT", "JiT"),
        ),
        ObjectiveRow(
            name="one-step", loss="d_emo.frechet:OneStepObjective", prediction_type="flow_one_step", like="flow",
            scheduler="euler", table_scheduler="euler", help="from a flow snapshot: images in one step, by the Frechet "
            "distance of features", steps=1, starts_from="flow", takes=_OF_ONE_STEP, papers=("SiT",),
        ),
        ObjectiveRow(
            name="one-step-x", loss="d_emo.frechet:OneStepSampleObjective", prediction_type="flow_one_step_sample",
            like="flow", scheduler="euler", table_scheduler="euler", help="the same, from a flow-x snapshot",
            steps=1, starts_from="flow-x", takes=_OF_ONE_STEP, papers=("SiT", "JiT"),
        ),
        ObjectiveRow(
            name="four-step", loss="d_emo.frechet:FourStepObjective", prediction_type="flow_four_step", like="flow",
            scheduler="lcm", table_scheduler="lcm", help="from a flow snapshot: images in four steps, by the same "
            "distance", steps=4, starts_from="flow", takes=_OF_ONE_STEP, papers=("SiT",),
        ),
        ObjectiveRow(
            name="four-step-x", loss="d_emo.frechet:FourStepSampleObjective", prediction_type="flow_four_step_sample",
            like="flow", scheduler="lcm", table_scheduler="lcm", help="the same, from a flow-x snapshot", steps=4,
            starts_from="flow-x", takes=_OF_ONE_STEP, papers=("SiT", "JiT"),
        ),
    ],
)  # fmt: skip

SCHEDULERS: Table[SchedulerRow] = Table(
    "scheduler",
    [
        SchedulerRow(name="ddpm", objectives=("eps",), scheduler="diffusers:DDPMScheduler"),
        SchedulerRow(
            name="ddim", objectives=("eps",), scheduler="diffusers:DDIMScheduler",
            changes={"timestep_spacing": "leading", "set_alpha_to_one": True},
        ),
        SchedulerRow(
            name="dpm++", objectives=("eps",), scheduler="diffusers:DPMSolverMultistepScheduler",
            changes={"algorithm_type": "dpmsolver++"},
        ),
        SchedulerRow(name="unipc", objectives=("eps",), scheduler="diffusers:UniPCMultistepScheduler"),
        SchedulerRow(
            name="deis", objectives=("eps",), scheduler="diffusers:DEISMultistepScheduler",
            changes={"algorithm_type": "deis", "solver_type": "logrho"},
        ),
        SchedulerRow(name="euler", objectives=("flow",), scheduler="diffusers:FlowMatchEulerDiscreteScheduler"),
        SchedulerRow(name="heun", objectives=("flow",), scheduler="diffusers:FlowMatchHeunDiscreteScheduler"),
        SchedulerRow(
            name="lcm", objectives=("four-step", "four-step-x"), scheduler="diffusers:FlowMatchLCMScheduler",
        ),
    ],
)  # fmt: skip


def schedulers_of(objective: str) -> list[str]:
    """Names of the schedulers that sample from what an objective trains."""
    row = OBJECTIVES[objective]
    own = [name for name, scheduler in SCHEDULERS.items() if row.name in scheduler.objectives]
    return own or [name for name, scheduler in SCHEDULERS.items() if row.like in scheduler.objectives]


def takers(setting: str) -> list[str]:
    """Names of the objectives that have a setting which not all have."""
    return [name for name, row in OBJECTIVES.items() if setting in row.takes]


def going_on_from(start: str | None, steps: int | None = None) -> str | None:
    """An objective that goes on from snapshots of another one, or its own; None where there is none.

    It is the first, or one that draws in so many steps where there is one.
    """
    fitting = [row for name, row in OBJECTIVES.items() if row.starts_from and start in (row.starts_from, name)]
    return next((row.name for row in sorted(fitting, key=lambda row: row.steps != steps)), None)


def check_start(objective: str, start: str | None) -> None:
    """Refuse the snapshot that a run starts from, where its objective goes on from those of another one.

    Args:
        objective: What the run is for.
        start: What the snapshot was trained for; None without one.

    Raises:
        InputError: It does not go on from that.
    """
    row = OBJECTIVES[objective]
    if row.starts_from is not None and start not in (row.starts_from, row.name):
        remedy = f"first fine-tune it with `objective` {row.starts_from}" if start else "name one with `init_from`"
        if fitting := going_on_from(start, row.steps):
            remedy = f"choose `objective` {fitting}"
        raise InputError(
            f"`objective` {row.name} goes on from a snapshot of {row.starts_from}, not of {start or 'none'}; {remedy}"
        )


def noise_objectives() -> list[str]:
    """Names of the objectives that train a network to predict the noise."""
    return [name for name, row in OBJECTIVES.items() if row.prediction_type == "epsilon"]


def objective_of(scheduler_config: Mapping[str, Any]) -> str:
    """The objective of a noise schedule, else InputError; diffusers' flow matching names no prediction type."""
    kind = scheduler_config.get("prediction_type", "flow")
    for name, row in OBJECTIVES.items():
        if row.prediction_type == kind:
            return name
    known = ", ".join(dict.fromkeys(row.prediction_type for row in OBJECTIVES.values()))
    raise InputError(f"a denoiser with prediction_type {kind!r} cannot be used; those with {known} can")
