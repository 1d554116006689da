#!/usr/bin/env bash
# diffusers' pipelines load a component of somebody else's package only if the module that defines its class also has an
# attribute called ModelMixin (SchedulerMixin, ... for other kinds).
#
# The loader looks the base classes up by name in the component's own module, not in the class's bases. A subclass that
# gets ModelMixin through a base class in another file saves with its pipeline, and then cannot be loaded:
#   ValueError: The component ... cannot be loaded as it does not seem to have any of the loading methods ...
# One unused import in the module is all that is needed.
#
# Seen with diffusers 0.42.1, torch 2.13.0 (CPU) on Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1"
mkdir "$folder/ours"
cat > "$folder/ours/base.py" <<'PY'
from diffusers import ConfigMixin, ModelMixin


class Base(ModelMixin, ConfigMixin):
    pass
PY
cat > "$folder/ours/without.py" <<'PY'
from diffusers.configuration_utils import register_to_config
from torch import nn

from ours.base import Base


class Network(Base):
    @register_to_config
    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = nn.Linear(width, width)
PY
{ echo "from diffusers import ModelMixin  # noqa: F401"; cat "$folder/ours/without.py"; } > "$folder/ours/having.py"
touch "$folder/ours/__init__.py"
cat > "$folder/try.py" <<'PY'
import sys
import warnings
from importlib import import_module

warnings.simplefilter("ignore")
import diffusers
from diffusers import DDIMScheduler, DiffusionPipeline


class Pipeline(DiffusionPipeline):
    def __init__(self, network, scheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)


print("diffusers", diffusers.__version__)
outcome = {}
for name in ("without", "having"):
    network = import_module(f"ours.{name}").Network()
    Pipeline(network, DDIMScheduler()).save_pretrained(f"saved-{name}")
    try:
        loaded = Pipeline.from_pretrained(f"saved-{name}")
        outcome[name] = type(loaded.network).__name__
    except ValueError as error:
        outcome[name] = f"ValueError: ...{str(error)[str(error).find('cannot be loaded'):][:70]}"
    print(f"module {name} the name ModelMixin: {outcome[name]}")
assert outcome["without"].startswith("ValueError: ...cannot be loaded"), outcome
assert outcome["having"] == "Network", outcome
PY
cd "$folder" && PYTHONPATH="$folder" "$folder/venv/bin/python" try.py
