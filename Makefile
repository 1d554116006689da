# `make demo` and `make test` set everything up in .venv (once) and run.
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
READY := .venv/.ready
DEV := .venv/.dev
WORKERS := -n auto --maxprocesses 4
PYTHON_LOWEST ?= $(shell for each in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python; do \
	$$each -c "import sys; print(sys.executable)" 2> /dev/null && break; done)
LOWEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,kernels_explain compile models denoiser backbone blocks local \
	attention training resume sampling pipeline checkpoint export timm fid_script evaluation_metrics data released))

# Without a config of its own `accelerate launch` warns of values that are not set; where there is one it stays as it is.
define DEFAULTS
from pathlib import Path
from accelerate.commands.config.config_args import default_json_config_file as file
from accelerate.utils import write_basic_config
if not Path(file).exists() and write_basic_config():
    Path(file).write_text(Path(file).read_text().replace('"use_cpu": true', '"use_cpu": false'))  # else one more warning
endef
export DEFAULTS

.PHONY: demo test test-lowest lint clean

demo: $(READY)
	$(LAUNCH) scripts/train_classifier.py --config configs/demo_classifier.yaml
	$(LAUNCH) scripts/train_dit.py --config configs/demo.yaml
	$(BIN)/python scripts/judge.py --checkpoint demo/denoiser --classifier demo/classifier --output demo/digits.png --overwrite

test: $(DEV)
	$(BIN)/python -m pytest $(WORKERS)

# The lowest versions that pyproject.toml promises, with the lowest Python of them where there is one.
test-lowest: .venv-lowest/.ready
	.venv-lowest/bin/python -m pytest $(WORKERS) $(LOWEST_TESTS)

lint: $(DEV)
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-lowest build *.egg-info demo

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/python -c "$$DEFAULTS"
	touch $@

$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

.venv-lowest/.ready: pyproject.toml
	@test -n "$(PYTHON_LOWEST)" || echo "There is no Python 3.10 here; the lowest versions run on $$($(PYTHON) --version)."
	rm -rf .venv-lowest
	$(or $(PYTHON_LOWEST),$(PYTHON)) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable ".[dev,export]"
	touch $@
