"""D-EMO: class-conditional image generation with light, fast denoisers.

The names below are loaded when first used, so that ``import d_emo.config`` stays free of torch.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["DEMOPipeline", "Denoiser", "EMO", "create_model", "list_models"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module("d_emo.sampling.pipeline" if name == "DEMOPipeline" else "d_emo.models"), name)
    raise AttributeError(f"module 'd_emo' has no attribute {name!r}")
