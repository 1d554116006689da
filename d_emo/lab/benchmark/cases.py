"""What is compared: our networks, their plain transcriptions, and networks of diffusers and timm."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from d_emo.config import ClassifierBenchmarkSettings, DenoiserBenchmarkSettings
from d_emo.device import seconds_of
from d_emo.errors import InputError
from d_emo.lab.benchmark.timing import Case, saved_bytes
from d_emo.lab.benchmark.transcription import transcribe
from d_emo.models import create_model
from d_emo.models.backbone import BACKBONES
from d_emo.models.counting import count_macs
from d_emo.models.layers import fold_batch_norms
from d_emo.models.registry import resolve_name
from d_emo.tables import FAMILIES
from d_emo.weights import telling_unmet

BASELINE = "diffusers DiT"


def denoiser_cases(settings: DenoiserBenchmarkSettings, device: torch.device) -> Iterator[list[Case]]:
    """The cases that run in turns, for each size, resolution and work."""
    works = ("training", "inference") if settings.work == "both" else (settings.work,)
    for size, pixels, work in product(settings.sizes, settings.pixels, works):
        yield cases_of(settings, size, pixels, work, device)


def cases_of(
    settings: DenoiserBenchmarkSettings, size: str, pixels: int, work: str, device: torch.device
) -> list[Case]:
    """One size at one resolution doing one thing."""
    cases, training = [], work == "training"
    for name, (build, counted) in contenders(size, pixels // 8, settings.depth).items():
        with torch.device("meta"):
            macs = count_macs(counted()) * settings.batch_size * (3 if training else 1)
        for suffix, function in forms_of(settings.compile).items():
            torch.manual_seed(0)
            network = build()
            if not training and name == "D-EMO":
                fold_batch_norms(network.eval())
            network = network.to(device).train(training)
            forward = forward_pass(network, function, pixels // 8, settings, device)
            kept = saved_bytes(forward, list(network.parameters())) / 1e6 if training and not suffix else None
            run = training_step(network, forward) if training else torch.no_grad()(forward)
            cases.append(Case(f"{size}-2, {pixels} px, {work}", name + suffix, run, macs, kept))
    return cases


def forms_of(compiled: bool) -> dict[str, Callable[[nn.Module], Callable[..., Any]]]:
    """By what the name of a network gains: as it is and, where asked for, compiled."""
    return {"": lambda network: network} | ({", compiled": torch.compile} if compiled else {})


def contenders(size: str, latent: int, depth: int | None) -> dict[str, tuple[Callable[[], nn.Module], ...]]:
    """Functions that build each network, and one of ours with as many multiply-accumulates."""
    row = {**FAMILIES["DiT"].sizes[size]} | ({"depth": depth} if depth else {})
    options = {"sample_size": latent, "depth": row["depth"]}
    demo, dit = (partial(create_model, f"{family}-{size}-2", **options) for family in ("D-EMOv2", "DiT"))

    def diffusers_dit() -> nn.Module:
        with telling_unmet():
            from diffusers import DiTTransformer2DModel
        return DiTTransformer2DModel(
            num_attention_heads=row["num_heads"], attention_head_dim=row["hidden_size"] // row["num_heads"],
            in_channels=4, out_channels=8, num_layers=row["depth"], sample_size=latent, patch_size=2,
            num_embeds_ada_norm=1000,
        )  # fmt: skip

    return {
        "D-EMO": (demo, demo), "plain transcription": (lambda: transcribe(demo()), demo), "our DiT": (dit, dit),
        BASELINE: (diffusers_dit, dit),
    }  # fmt: skip


def forward_pass(
    network: nn.Module, form: Callable, latent: int, settings: DenoiserBenchmarkSettings, device: torch.device
) -> Callable[[], Tensor]:
    """A function that denoises one fixed random batch; in training it returns the loss."""
    generator, batch = torch.Generator().manual_seed(0), settings.batch_size
    latents = torch.randn(batch, 4, latent, latent, generator=generator).to(device)
    target = torch.randn(batch, 8, latent, latent, generator=generator).to(device)
    function = form(network)
    timesteps, labels = (torch.randint(1000, (batch,), generator=generator).to(device) for _ in range(2))

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            output = function(latents, timestep=timesteps, class_labels=labels)
            output = output if isinstance(output, Tensor) else output.sample
            return torch.nn.functional.mse_loss(output, target) if network.training else output

    return forward


def training_step(network: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and the optimizer's step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0, fused=True)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def classifier_cases(settings: ClassifierBenchmarkSettings, device: torch.device) -> list[Case]:
    """The cases that run in turns: images classified in eval mode, in float32.

    Raises:
        InputError: for a name that is not there, or an EMOv1 (only EMOv2 has a transcription).
    """
    group = f"{settings.image_size} px, inference"
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size).to(device)
    networks: dict[str, tuple[nn.Module, int]] = {}
    for name in map(resolve_name, settings.models):
        if not name.startswith("emov2"):
            known = ", ".join(n for n in BACKBONES if n.startswith("emov2"))
            raise InputError(f"`models` {name!r} is none of {known}")
        network = create_model(name, img_size=settings.image_size).to(device).eval()
        macs = count_macs(network, settings.image_size) * settings.batch_size
        networks[f"{name}, plain transcription"] = transcribe(network).eval(), macs
        networks[name] = fold_batch_norms(network), macs
    for name in settings.peers:
        networks[name] = peer(name, settings.image_size).to(device), 0
    return [
        Case(group, name + suffix, classify(function(network), images, both=name in settings.peers), macs)
        for name, (network, macs) in networks.items() for suffix, function in forms_of(settings.compile).items()
    ]  # fmt: skip


def peer(name: str, image_size: int) -> nn.Module:
    """A network of timm (else InputError) with random weights, fused where it has a fused form."""
    if not timm.is_model(name):
        raise InputError(f"`peers` {name!r} is no model of timm; timm.list_models() has them")
    try:
        network = timm.create_model(name, img_size=image_size)
    except TypeError:  # most convolutional networks take any size and do not ask
        network = timm.create_model(name)
    return reparameterize_model(network.eval())


def classify(network: nn.Module, images: Tensor, *, both: bool) -> Callable[[], Tensor]:
    """A function that classifies the images; with ``both``, in the faster of the two memory layouts.

    Shape: images (B, 3, H, W) -> (B, classes).
    """

    @torch.no_grad()
    def run(batch: Tensor) -> Tensor:
        return network(batch)

    if both:
        layouts = (images, images.contiguous(memory_format=torch.channels_last))
        for batch in layouts:
            run(batch)
        images = min(layouts, key=lambda batch: seconds_of(lambda: run(batch), batch.device, time.process_time))
    return lambda: run(images)
