"""D-EMO: class-conditional image generation with light, fast denoisers.

The names below are loaded when first used, so that ``import d_emo.config`` stays free of torch. The classifiers are
known to timm after ``import d_emo`` all the same: at once if timm is there already, else as soon as it is imported.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

__version__ = "0.1.0"
_HOMES = {
    "DEMOPipeline": "d_emo.sampling.pipeline", "Sampler": "d_emo.sampling.sampler",
    **dict.fromkeys(("Denoiser", "EMO", "create_model", "list_models"), "d_emo.models"),
}  # fmt: skip
__all__ = ["DEMOPipeline", "Denoiser", "EMO", "Sampler", "create_model", "list_models"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'd_emo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    import_module("d_emo.models.timm_registry").register_with_timm()


class _AfterTimm:
    """An import hook that runs once, when ``timm.models`` has been imported, and registers our classifiers there."""

    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "timm.models":
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


if "timm.models" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTimm)
