import os

import pytest
import torch

from d_emo.models import create_model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture
def tiny_denoiser():
    """A two-block D-EMO for 8 x 8 x 4 latents and 10 classes, its gates opened so that it does something."""
    torch.manual_seed(0)
    model = create_model("D-EMOv2-Ti-2", depth=2, hidden_size=48, sample_size=8, num_classes=10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(0, 0.02)
    return model.eval()
