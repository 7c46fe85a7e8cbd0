# make demo   virtual environment, install, the main job on its embedded default
# make test   the same set-up, then every fast test
# make test PYTHON=python3.12   the other supported row (its own environment: .venv-python3.12)

PYTHON ?= python3.11
CUDA ?= 12
VENV := $(if $(filter python3.11,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
GPU := $(wildcard /dev/nvidiactl /dev/dxg)
AOT := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' '-'))

.PHONY: demo test lint test-real install clean

demo: $(VENV)/.installed
	$(BIN)/python train_llama.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The slow tests, on real data and others, that `make test` leaves out.
test-real: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist load -m slow

install: $(VENV)/.installed

# With a GPU jax brings its CUDA libraries. Without one it downloads none: the plugin alone (--no-deps, exactly jax's
# version) is enough to compile programs for a GPU and to plan its memory.
$(VENV)/.installed: requirements.txt requirements-aot.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --requirement requirements.txt
	$(if $(GPU),$(PIP) "jax[cuda$(CUDA)]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')",\
	  $(if $(AOT),$(PIP) --no-deps $$(sed "/^#/d; s/$$/==$$($(BIN)/python -c 'import jax; print(jax.__version__)')/" requirements-aot.txt)))
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-torch.txt
	$(PIP) --requirement requirements-torch.txt --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
