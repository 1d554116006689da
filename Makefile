# `make demo` and `make test` set everything up in .venv (once) and run.
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
READY := .venv/.ready
DEV := .venv/.dev

# Without a config of its own `accelerate launch` warns of values that are not set; where there is one it stays as it is.
define DEFAULTS
from pathlib import Path
from accelerate.commands.config.config_args import default_json_config_file as file
from accelerate.utils import write_basic_config
if not Path(file).exists() and write_basic_config():
    Path(file).write_text(Path(file).read_text().replace('"use_cpu": true', '"use_cpu": false'))  # else one more warning
endef
export DEFAULTS

.PHONY: demo test lint clean

demo: $(READY)
	$(LAUNCH) scripts/train_classifier.py --config configs/demo_classifier.yaml
	$(LAUNCH) scripts/train_dit.py --config configs/demo.yaml
	$(BIN)/python scripts/judge.py --checkpoint demo/denoiser --classifier demo/classifier --output demo/digits.png

test: $(DEV)
	$(BIN)/python -m pytest

lint: $(DEV)
	$(BIN)/ruff check .

clean:
	rm -rf .venv build *.egg-info demo

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/python -c "$$DEFAULTS"
	touch $@

$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
