"""An objective of one's own: flow matching with the absolute instead of the squared error, trained, then sampled.

It is registered from outside of the package; `d-emo train --objective flow-l1` knows it too, where this module is
an entry point of the group `d_emo.plugins`.

    python examples/objective.py results/l1 --steps 1000
"""

import argparse

from d_emo.cli import run_verb
from d_emo.objective import FlowObjective
from d_emo.sampling import Sampler
from d_emo.tables import OBJECTIVES, SCHEDULERS, ObjectiveRow, SchedulerRow


class AbsoluteFlow(FlowObjective):
    """The velocity of the straight path from data to noise, by its mean absolute error."""

    def forward(self, denoiser, latents, labels, step):
        """Shape: latents (B, C, *sizes), labels (B,) -> scalars "loss" and "mae", which are equal."""
        velocity, _ = self._predict(denoiser, self.noised(latents, step), labels, step)
        loss = (velocity - (step.noise - latents)).abs().mean()
        return {"loss": loss, "mae": loss.detach()}

    def noise_schedule(self):
        """As flow matching's, with a word in its config that says whose it is."""
        schedule = super().noise_schedule()
        schedule.register_to_config(prediction_type="flow-l1")
        return schedule


OBJECTIVES.register(ObjectiveRow(
    name="flow-l1", loss=AbsoluteFlow, prediction_type="flow-l1", scheduler="euler-l1", table_scheduler="euler-l1",
    help="predict the velocity by its absolute error",
))  # fmt: skip
SCHEDULERS.register(
    SchedulerRow(name="euler-l1", objectives=("flow-l1",), scheduler="diffusers:FlowMatchEulerDiscreteScheduler")
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--steps", default="1000")
    parser.add_argument("--batch-size", default="32")
    args = parser.parse_args()

    run_verb("train", [
        "--model", "D-EMOv2-Ti-2", "--model-options", "{depth: 6}", "--objective", "flow-l1", "--dataset", "digits",
        "--image-size", "64", "--output-dir", args.output, "--max-steps", args.steps, "--batch-size", args.batch_size,
    ])  # fmt: skip
    sampler = Sampler.open(args.output, steps=10, guidance=1.5)
    images = next(sampler.images([0, 1, 2], seeds=[0, 1, 2]))
    print(f"drew {tuple(images.shape)} images with {type(sampler.scheduler).__name__}")
