# `make demo` and `make test` set everything up in .venv (once) and run.
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
READY := .venv/.ready
DEV := .venv/.dev

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
	$(BIN)/accelerate config default >/dev/null  # where there is none; else accelerate launch warns of values unset
	touch $@

$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
