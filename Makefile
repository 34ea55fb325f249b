# Every verb sets itself up on a fresh machine: Python 3.11 or newer and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

export ASK ?=
SOURCE := list running docker containers

# The oldest transformers that setup.cfg allows.
OLDEST_TRANSFORMERS := 5.18.0
OLDEST_VENV := .venv-oldest
OLDEST_READY := $(OLDEST_VENV)/.installed

.PHONY: demo demo-vision test test-slow test-oldest style quality benchmark clean

# Built with the setuptools of .venv, so that a second run needs no network: everything it asks for is there.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(PIP_INSTALL) -c constraints.txt
# gradio's metadata stops short of Pillow 13, which resizes images as the golden tests require; gradio runs with Pillow 13.
PAGE := gradio gradio_client groovy hf-gradio safehttpx semantic-version pydub python-multipart orjson brotli tomlkit \
	fastapi starlette uvicorn httpx httpcore certifi pytz opentelemetry-api
$(READY): setup.cfg pyproject.toml constraints.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77"
	$(PIP) --no-build-isolation -e ".[dev]"
	$(PIP) --no-deps $(PAGE)
	@touch $@

# The shell model answers ASK, if given, and six requests. Then a short distillation; transformers alone loads the result.
# Threads of so small models mostly wait for each other: one is faster on a busy machine.
demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python examples/shell_demo.py $${ASK:+"$$ASK"}
	$(BIN)/python examples/everyday_rows.py outputs/everyday.jsonl \
		--held-out examples/everyday.jsonl examples/everyday_validation.jsonl --topics basics --copies 30
	OMP_NUM_THREADS=1 $(BIN)/encdec-slm distill --config distill_demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/use_pipeline.py outputs/distill_demo "$(SOURCE)"

demo-vision: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/encdec-slm finetune --config vqa_synthetic

test: $(READY)
	$(BIN)/python -m pytest -n auto

# All slow tests, or those of some files: make test-slow TESTS="tests/test_docs.py tests/test_lm_eval.py"
TESTS ?=
test-slow: $(READY)
	$(BIN)/python -m pytest -n auto -m slow $(TESTS)

# The same tests with the oldest transformers, in an environment of its own.
$(OLDEST_READY): setup.cfg pyproject.toml constraints.txt Makefile
	@test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	sed 's/^transformers==.*/transformers==$(OLDEST_TRANSFORMERS)/' constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) -c $(OLDEST_VENV)/constraints.txt "setuptools>=77"
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) -c $(OLDEST_VENV)/constraints.txt --no-build-isolation -e ".[dev]"
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) -c $(OLDEST_VENV)/constraints.txt --no-deps $(PAGE)
	@touch $@

test-oldest: $(OLDEST_READY)
	$(OLDEST_VENV)/bin/python -m pytest -n auto

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: $(READY)
	$(BIN)/encdec-slm bench --preset 330m --settings 512:64 --settings 2048:128
	$(BIN)/python examples/benchmark_training.py
	$(BIN)/python examples/benchmark_vision.py --preset 800m-vlm --images 1 4

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
