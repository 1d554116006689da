"""Velocity prediction on the cosine schedule (Salimans and Ho, 2022); ``--objective velocity`` trains for it."""

from diffusers import DDIMScheduler

from d_emo.objective import Objective, per_image
from d_emo.tables import OBJECTIVES, SCHEDULERS, ObjectiveRow, SchedulerRow


class VelocityObjective(Objective):
    """Mean squared error of v = sqrt(abar) noise - sqrt(1 - abar) x_0."""

    whole_timesteps = True

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("abar", self.noise_schedule().alphas_cumprod, persistent=False)

    def noise_schedule(self):
        kind = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
        return DDIMScheduler(num_train_timesteps=self.num_train_timesteps, **kind)

    def noised(self, latents, step):
        abar = per_image(self.abar[step.timesteps], latents)
        return abar.sqrt() * latents + (1 - abar).sqrt() * step.noise

    def forward(self, denoiser, latents, labels, step):
        abar = per_image(self.abar[step.timesteps], latents)
        velocity, _ = self.predict(denoiser, self.noised(latents, step), labels, step)
        loss = (velocity - abar.sqrt() * step.noise + (1 - abar).sqrt() * latents).square().mean()
        return {"loss": loss, "mse": loss.detach()}


row = {"scheduler": "ddim-velocity", "table_scheduler": "ddim-velocity", "help": "predict the velocity, cosine path"}
OBJECTIVES.register(ObjectiveRow(name="velocity", loss=VelocityObjective, prediction_type="v_prediction", **row))
SCHEDULERS.register(SchedulerRow(name="ddim-velocity", objectives=("velocity",), scheduler=DDIMScheduler))
