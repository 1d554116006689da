"""``d-emo sample``."""

import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from d_emo.cli.outputs import claimed_default
from d_emo.config import SampleSettings
from d_emo.io.snapshot import load_denoiser, newest_denoiser
from d_emo.sampling import PRECISIONS, Sampler, SampleRequest, Trajectory
from d_emo.sampling.classes import spell_class


def run(settings: SampleSettings) -> None:
    """Draw, write the files and say what was drawn."""
    snapshot = load_denoiser(settings.checkpoint or newest_denoiser())
    request = SampleRequest(settings, snapshot)
    with claimed_default("sample", request.settings, request.default_path) as output:
        draw(request, output)


def draw(request: SampleRequest, output: Path) -> None:
    """What `run` does once its output is claimed."""
    settings, snapshot = request.settings, request.snapshot
    dtype = PRECISIONS[settings.mixed_precision]
    others = {"guide": settings.guide, "vae": settings.vae}
    sampler = Sampler.open(snapshot, **request.how, dtype=dtype, compile=settings.compile, **others)
    steps, count = len(sampler.scheduler.timesteps), len(settings.guidance_scale) * len(request.labels)
    trajectory, drawn, started = Trajectory(steps), [], time.perf_counter()
    with tqdm(total=count * steps, desc="sampling", unit="step") as bar:  # of one image
        for step in request.draw(sampler):
            bar.update(len(step.latents))
            if settings.trajectory:
                trajectory.take(step)
            if step.images is not None:
                drawn.append(step.images)
    speed = count / (time.perf_counter() - started)
    request.save(output, torch.cat(drawn), trajectory.images(sampler) if settings.trajectory else None)
    step, weights = snapshot.meta["step"], snapshot.meta["weights"]
    print(f"picture   {output}\nsnapshot  {snapshot.path} (step {step:,}, {weights} weights)")
    if len(snapshot.class_names) > 1:
        print(f"classes   {', '.join(request.captions)}")
    if not (settings.classes or settings.interpolate) and len(snapshot.class_names) > 1:
        label, name = spell_class(request.classes[0], snapshot.class_names), snapshot.class_names[request.classes[0]]
        by_name = "" if name.isdecimal() else f" or --class {shlex.quote(name)}"
        count = len(snapshot.class_names)
        which = "all" if len(request.classes) == count else f"some of {count:,}"
        print(f"          {which}; choose by --class {label}{by_name}")
    print(f"seed      {settings.seed} to {request.seeds[-1]}, one per image")
    scales = ", ".join(map("{:g}".format, settings.guidance_scale))
    guide = f", guided by {settings.guide} (weight {sampler.guidance.weight:g})" if settings.guide else ""
    print(f"settings  {settings.scheduler}, {settings.steps} steps, guidance {scales}{guide}")
    if settings.vae:
        print(f"codec     {sampler.codec.name}")
    print(f"speed     {speed:.1f} images/s on {sampler.device.type}")
