"""Schedulers by name, over the noise schedule of a snapshot."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from d_emo.config import DEFAULT_STEPS
from d_emo.errors import InputError
from d_emo.tables import OBJECTIVES, SCHEDULERS, load, objective_of, schedulers_of
from d_emo.text import plural

_SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler)


def make_scheduler(name: str | None, config: Mapping[str, Any], objective: str | None = None) -> Any:
    """A diffusers scheduler over a snapshot's noise schedule.

    Args:
        name: Of a row of ``d_emo.tables.SCHEDULERS``; None takes the default of the snapshot's objective.
        config: The snapshot's ``scheduler_config``, or the config of a scheduler made here.
        objective: What the snapshot was trained for. Default: the first that predicts what the config says.

    Raises:
        InputError: There is no such scheduler, or it does not serve the snapshot's objective.
    """
    objective = objective or objective_of(config)
    row = SCHEDULERS[name or OBJECTIVES[objective].scheduler]
    if row.name not in schedulers_of(objective):
        raise InputError(
            f"`scheduler` {row.name} serves the {' and the '.join(row.objectives)} objective, but this snapshot was "
            f"trained with {objective}; use one of {', '.join(schedulers_of(objective))}"
        )
    kind, changes, variance = load(row.scheduler), dict(row.changes), config.get("variance_type")
    if issubclass(kind, DPMSolverMultistepScheduler) and variance == "learned_range":
        changes["variance_type"] = None  # it would cut the output after three channels; we cut it ourselves
    if issubclass(kind, DDPMScheduler) and variance is None:
        changes["variance_type"] = "learned_range"  # the config came from such a dpm++
    if (predicts := OBJECTIVES[objective]).like is None:
        return kind.from_config({**config, **changes})
    made = kind.from_config({**{key: value for key, value in config.items() if key != "prediction_type"}, **changes})
    made.register_to_config(prediction_type=predicts.prediction_type)  # as a noise schedule says it, see `Objective`
    return made


def check_scheduler(scheduler: Any, objective: str) -> None:
    """Refuse a scheduler, ours or any of diffusers', that does not sample from what an objective trains.

    One made of another's config forgets a learned variance that it would misread.

    Raises:
        InputError: It is for another prediction of the network; names those that serve.
    """
    # What a scheduler's class does not know is in its config all the same, if it was made of another's.
    known = "prediction_type" in inspect.signature(type(scheduler).__init__).parameters
    kind, row = scheduler.config.prediction_type if known else "flow", OBJECTIVES[objective]
    wanted = OBJECTIVES[row.like or objective].prediction_type
    own = [SCHEDULERS[name].scheduler for name in schedulers_of(objective)]
    others = [each.scheduler for each in SCHEDULERS.values() if each.scheduler not in own]
    if kind.replace("flow_prediction", "flow") != wanted or type(scheduler) in map(load, others):
        raise InputError(
            f"the scheduler {type(scheduler).__name__} is for denoisers that predict {kind}, but this one was trained "
            f"with {objective} and predicts {row.prediction_type}; make one of "
            f"{', '.join(schedulers_of(objective))} with d_emo.sampling.make_scheduler"
        )
    if not isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type") == "learned_range":
        scheduler.register_to_config(variance_type=None)  # of DDPM's config; see `make_scheduler`


def steps_for(objective: str, steps: int | None, default: int = DEFAULT_STEPS) -> int:
    """How many denoising steps to make: those asked for, else the only number that the objective has, else a default.

    Raises:
        InputError: The objective has another number.
    """
    only = OBJECTIVES[objective].steps
    if only is not None and steps not in (None, only):
        raise InputError(
            f"images of the {objective} objective take {plural(only, 'step')}, not {steps}; give `steps` {only}"
        )
    return (only or default) if steps is None else steps


def set_steps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> None:
    """Lay out the timesteps of so many denoising steps. Heun looks twice in every step but the last.

    Left alone, diffusers' Euler and LCM would spend the last of their steps on the last thousandth of the path; here
    all steps are equal. Heun's last step does so, being a plain Euler step there.

    Raises:
        InputError: More steps than the schedule has, or a count that the scheduler cannot lay out.
    """
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"`steps` must be a positive integer, not {steps!r}")
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)):
        return scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)], device=device)
    longest = scheduler.config.num_train_timesteps
    if steps > longest:
        raise InputError(f"{steps} steps are more than the {longest} that the denoiser was trained on")
    if isinstance(scheduler, _SOLVERS) and steps == longest:  # diffusers would take a timestep twice, and give NaN
        raise InputError(f"solvers (dpm++, unipc, deis) take at most {longest - 1} steps, not {steps}; 50 are plenty")
    if isinstance(scheduler, DDIMScheduler) and steps * (longest // steps) < 0.9 * longest:
        # diffusers steps by longest // steps from 0 upwards, so that the top of the schedule would be left out
        raise InputError(
            f"ddim cannot lay {steps} steps over {longest} timesteps evenly; use {longest // (longest // steps)}"
        )
    scheduler.set_timesteps(steps, device=device)
