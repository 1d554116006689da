"""The denoisers that are compared: ours, its plain transcription, our DiT, and diffusers' DiT."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from d_emo.config import DenoiserBenchmarkSettings
from d_emo.lab.benchmark.timing import Case, saved_bytes
from d_emo.lab.benchmark.transcription import transcribe
from d_emo.models import create_model
from d_emo.models.counting import count_macs
from d_emo.models.layers import fold_batch_norms
from d_emo.tables import FAMILIES

BASELINE = "diffusers DiT"


def denoiser_cases(settings: DenoiserBenchmarkSettings, device: torch.device) -> Iterator[list[Case]]:
    """The cases that run in turns, for each size, resolution and work."""
    works = ("training", "inference") if settings.work == "both" else (settings.work,)
    for size in settings.sizes:
        for pixels in settings.pixels:
            for work in works:
                yield cases_of(settings, size, pixels, work, device)


def cases_of(
    settings: DenoiserBenchmarkSettings, size: str, pixels: int, work: str, device: torch.device
) -> list[Case]:
    """One size at one resolution doing one thing."""
    group, steps = f"{size}-2, {pixels} px, {work}", settings.batch_size * (3 if work == "training" else 1)
    cases = []
    for name, build in contenders(size, pixels // 8, settings.depth).items():
        for compiled in (False, True) if settings.compile else (False,):
            torch.manual_seed(0)
            network, macs = build()
            if work == "inference" and name == "D-EMO":
                fold_batch_norms(network.eval())
            network = network.to(device).train(work == "training")
            case = Case(group, f"{name}, compiled" if compiled else name, lambda: None, macs * steps)
            forward = forward_pass(network, pixels // 8, settings, device, compiled)
            if work == "training":
                case.saved_bytes = saved_bytes(forward, list(network.parameters())) if not compiled else None
                case.run = training_step(network, forward)
            else:
                case.run = torch.no_grad()(forward)
            cases.append(case)
    return cases


def contenders(size: str, latent: int, depth: int | None) -> dict[str, Callable[[], tuple[nn.Module, int]]]:
    """Functions that build each network and count its multiply-accumulates for one latent."""
    row = {**FAMILIES["DiT"].sizes[size]} | ({"depth": depth} if depth else {})
    options = {"sample_size": latent, "depth": row["depth"]}

    def ours(name: str) -> nn.Module:
        return create_model(name, **options)

    def macs(name: str) -> int:
        with torch.device("meta"):
            return count_macs(ours(name))

    def diffusers_dit() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=row["num_heads"], attention_head_dim=row["hidden_size"] // row["num_heads"],
            in_channels=4, out_channels=8, num_layers=row["depth"], sample_size=latent, patch_size=2,
            num_embeds_ada_norm=1000,
        )  # fmt: skip

    demo, dit = f"D-EMOv2-{size}-2", f"DiT-{size}-2"
    return {
        "D-EMO": lambda: (ours(demo), macs(demo)),
        "plain transcription": lambda: (transcribe(ours(demo)), macs(demo)),
        "our DiT": lambda: (ours(dit), macs(dit)),
        BASELINE: lambda: (diffusers_dit(), macs(dit)),
    }


def forward_pass(
    network: nn.Module, latent: int, settings: DenoiserBenchmarkSettings, device: torch.device, compiled: bool
) -> Callable[[], Tensor]:
    """A function that denoises one fixed random batch; in training it returns the loss."""
    generator, batch = torch.Generator().manual_seed(0), settings.batch_size
    latents = torch.randn(batch, 4, latent, latent, generator=generator).to(device)
    target = torch.randn(batch, 8, latent, latent, generator=generator).to(device)
    timesteps, labels = (torch.randint(1000, (batch,), generator=generator).to(device) for _ in range(2))
    function = torch.compile(network) if compiled else network

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
