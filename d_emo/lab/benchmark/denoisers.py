"""The denoisers that are compared: ours, its plain transcription, our DiT, and diffusers' DiT."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from d_emo.config import DenoiserBenchmarkSettings
from d_emo.lab.benchmark.timing import Case, forms_of, saved_bytes
from d_emo.lab.benchmark.transcription import transcribe
from d_emo.models import create_model
from d_emo.models.counting import count_macs
from d_emo.models.layers import fold_batch_norms
from d_emo.tables import FAMILIES

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


def contenders(size: str, latent: int, depth: int | None) -> dict[str, tuple[Callable[[], nn.Module], ...]]:
    """Functions that build each network, and one of ours with as many multiply-accumulates."""
    row = {**FAMILIES["DiT"].sizes[size]} | ({"depth": depth} if depth else {})
    options = {"sample_size": latent, "depth": row["depth"]}
    demo, dit = (partial(create_model, f"{family}-{size}-2", **options) for family in ("D-EMOv2", "DiT"))

    def diffusers_dit() -> nn.Module:
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
