"""The classifiers that are compared: ours, their plain transcriptions, and networks of timm."""

import time
from collections.abc import Callable

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from d_emo.config import ClassifierBenchmarkSettings
from d_emo.device import seconds_of
from d_emo.errors import InputError
from d_emo.lab.benchmark.timing import Case, forms_of
from d_emo.lab.benchmark.transcription import transcribe
from d_emo.models import create_model
from d_emo.models.backbone import BACKBONES
from d_emo.models.counting import count_macs
from d_emo.models.layers import fold_batch_norms
from d_emo.models.registry import resolve_name

PLAIN = "{}, plain transcription"


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
        networks[PLAIN.format(name)] = transcribe(network).eval(), macs
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
