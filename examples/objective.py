"""An objective of one's own: flow matching by the absolute instead of the squared error, trained, then sampled.

Where such a module is an entry point of the group `d_emo.plugins`, `d-emo train --objective flow-l1` knows it too.

    python examples/objective.py samples/l1.png --steps 1000
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from d_emo import create_model
from d_emo.data import Digits
from d_emo.latents import load_codec, sample_moments
from d_emo.objective import FlowObjective
from d_emo.sampling import Sampler, draw_grid, save_png
from d_emo.tables import OBJECTIVES, SCHEDULERS, ObjectiveRow, SchedulerRow, load


class AbsoluteFlow(FlowObjective):
    """The velocity of the straight path from data to noise, by its mean absolute error."""

    def forward(self, denoiser, latents, labels, step):
        velocity, _ = self.predict(denoiser, self.noised(latents, step), labels, step)
        return {"loss": (velocity - (step.noise - latents)).abs().mean()}

    def noise_schedule(self):  # its config, kept in a snapshot, says what the denoiser was trained for
        schedule = super().noise_schedule()
        schedule.register_to_config(prediction_type="flow-l1")
        return schedule


row = {"scheduler": "euler-l1", "table_scheduler": "euler-l1", "help": "predict the velocity by its absolute error"}
OBJECTIVES.register(ObjectiveRow(name="flow-l1", loss=AbsoluteFlow, prediction_type="flow-l1", **row))
euler = "diffusers:FlowMatchEulerDiscreteScheduler"
SCHEDULERS.register(SchedulerRow(name="euler-l1", objectives=("flow-l1",), scheduler=euler))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()

    codec, images, noise = load_codec("d-emo-f8"), Digits(64), torch.Generator().manual_seed(0)
    model = create_model("D-EMOv2-Ti-2", depth=6, sample_size=8, num_classes=10, learn_sigma=False).train()
    objective = load(OBJECTIVES["flow-l1"].loss)(null_class=model.null_class, learn_sigma=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    order = torch.utils.data.RandomSampler(images, replacement=True, num_samples=32 * args.steps)
    for pixels, labels in DataLoader(images, 32, sampler=order):
        step = objective.draw(noise, len(labels), model.latent_shape)
        loss = objective(model, sample_moments(codec.moments(pixels), step.posterior_noise), labels, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampler = Sampler(model.eval(), codec, objective.noise_schedule().config, steps=10, guidance=1.5)
    drawn = torch.cat(list(sampler.images(range(10), seeds=range(10))))
    save_png(draw_grid(drawn, [""], 10), args.picture, {"objective": "flow-l1"})
    print(f"loss {loss.item():.3f}; drew the ten digits with {type(sampler.scheduler).__name__}")
