"""D-EMO: class-conditional image generation with light, fast denoisers.

The names below, and the subpackages, are loaded when first used, so that ``import d_emo.config`` stays free of torch.
After ``import d_emo`` timm knows the classifiers, and diffusers the pipeline and the denoisers, all the same: at once
if they are there already, else as soon as they are imported.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pkgutil import iter_modules

__version__ = "0.1.0"
_HOMES = {
    "DEMOPipeline": "d_emo.sampling.pipeline", "Sampler": "d_emo.sampling.sampler",
    **dict.fromkeys(("Denoiser", "EMO", "create_model", "list_models"), "d_emo.models"),
}  # fmt: skip
__all__ = ["DEMOPipeline", "Denoiser", "EMO", "Sampler", "create_model", "list_models"]


def _parts() -> set[str]:
    return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _parts():
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'd_emo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_parts()})


def _register_with_timm() -> None:
    import_module("d_emo.models.timm_registry")  # which may be what imports timm


def _register_with_diffusers() -> None:
    """Let diffusers find our classes where it looks for its own by name, importing them no sooner than that."""
    diffusers = sys.modules["diffusers"]

    class WithOurs(type(diffusers)):
        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name == "DEMOPipeline":
                    return __getattr__(name)
                tables = import_module("d_emo.tables")
                if not name.startswith("_") and name in tables.FRAMES:
                    return tables.load(tables.FRAMES[name].denoiser)
                raise

    diffusers.__class__ = WithOurs


class _After:
    """An import hook that calls ``register`` once, when the module called ``wanted`` has been imported."""

    def __init__(self, wanted: str, register: Callable[[], None]) -> None:
        self.wanted, self.register = wanted, register

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != self.wanted:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                self.register()

            spec.loader.exec_module = execute_and_register
        return spec


for _name, _register in (("timm.models", _register_with_timm), ("diffusers", _register_with_diffusers)):
    if _name in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _After(_name, _register))
