"""Which forms the operators of a network take on this machine."""

import torch

from d_emo import kernels
from d_emo.config import FormsSettings
from d_emo.device import best_device
from d_emo.models import create_model
from d_emo.models.contract import DenoiserFrame
from d_emo.tables import family_of


def forms_table(settings: FormsSettings) -> str:
    """The table of `d_emo.kernels.explain` for a network of random weights."""
    device, batch = best_device(settings.device), settings.batch_size
    options = {"sample_size": settings.image_size // 8} if family_of(settings.model) else {}
    with device:
        model = create_model(settings.model, **options)
        if isinstance(model, DenoiserFrame):
            numbers = torch.arange(batch)
            inputs = torch.randn(batch, *model.latent_shape), numbers, numbers
        else:
            inputs = (torch.randn(batch, 3, settings.image_size, settings.image_size),)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        found = kernels.explain(model, *inputs, compiled=settings.compile)
    return f"{settings.model}, {settings.dtype}, batch {batch}, on {device}\n\n{found}"
