"""Sampling with a compiled denoiser, as CUDA graphs on a GPU."""

import pytest
import torch
from test_sampling import SCHEDULER_NAMES, draw

from d_emo import sampling


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_denoiser_may_use_the_memory_of_its_last_output_again(tiny_denoiser, name, scale):
    """As one does that was recorded as a CUDA graph, while schedulers keep what it said some steps ago."""
    expected, memory = draw(tiny_denoiser, name, scale=scale), {}

    def reuse(module, args, output):
        place = memory.setdefault(output.sample.shape, torch.empty_like(output.sample))
        return type(output)(sample=place.copy_(output.sample))

    tiny_denoiser.register_forward_hook(reuse)
    assert torch.equal(draw(tiny_denoiser, name, scale=scale), expected) and memory


@pytest.mark.parametrize("device, mode", [("cpu", None), ("cuda", "reduce-overhead")])
def test_a_denoiser_is_compiled_as_cuda_graphs_on_a_gpu(tiny_denoiser, monkeypatch, device, mode):
    compiled = []
    monkeypatch.setattr(type(tiny_denoiser), "device", torch.device(device))
    monkeypatch.setattr(type(tiny_denoiser), "compile", lambda self, **options: compiled.append(options))
    sampling.prepare_denoiser(tiny_denoiser, compile=True)
    assert compiled == [{"mode": mode}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_on_a_gpu_a_compiled_denoiser_draws_the_same(tiny_denoiser, scale):
    tiny_denoiser.cuda()
    expected = draw(tiny_denoiser, scale=scale)
    compiled = sampling.prepare_denoiser(tiny_denoiser, compile=True)
    for _ in range(2):
        torch.testing.assert_close(draw(compiled, scale=scale), expected, rtol=1e-2, atol=1e-2)
