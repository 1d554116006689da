"""From class labels and seeds to latents and pictures: the sampler, schedulers, guidance, grids.

The diffusers pipeline is ``d_emo.DEMOPipeline``, in ``d_emo.sampling.pipeline``.
"""

from d_emo.sampling.classes import caption, find_classes, mix_classes, spell_class
from d_emo.sampling.denoising import Step, decode, denoise, sample
from d_emo.sampling.files import save_gif, save_png, save_pngs
from d_emo.sampling.grids import class_grid, draw_grid, preview_grid
from d_emo.sampling.guidance import Guidance
from d_emo.sampling.request import SampleRequest, Trajectory
from d_emo.sampling.sampler import PRECISIONS, Sampler, prepare_denoiser
from d_emo.sampling.schedulers import make_scheduler, set_steps
