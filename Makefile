# Everything runs in .venv, which "setup" makes and repairs. PYTHON names the Python it is made
# with, MMDYNSPARSE_WHEELS a folder where mmcv's compiled wheel is kept (.wheels unless set).
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: quickstart quickstart-det test test-all fuzz gpu-check benchmark reproduce lint docs setup clean

quickstart: setup
	$(RUN) tools/quickstart.py seg

quickstart-det: setup
	$(RUN) tools/quickstart.py det

test: setup
	$(RUN) -m pytest

test-all: setup
	$(RUN) -m pytest -m ''

# 10,000 random models and inputs.
fuzz: setup
	HYPOTHESIS_PROFILE=fuzz $(RUN) -m pytest tests/test_properties.py

# What only a GPU can show; after 9 minutes no step starts, and a second run does what is missing.
OUT ?= work_dirs/gpu_check
gpu-check: setup
	$(RUN) tools/gpu_check.py --out $(OUT)

benchmark: setup
	$(RUN) tools/analysis_tools/benchmark.py \
		configs/sparse_swin/sparse-swin-s_upernet_8xb2-160k_ade20k-512x512.py \
		--keep-ratios 1.0 0.7 --rounds 20 --out work_dirs/benchmark

# Runs again what the numbers of the docs come from, as much as fits into an hour.
reproduce: setup
	$(RUN) benchmarks/reproduce.py --minutes 60

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# The site is in docs/_build/html. Warnings are errors, and so are links within it that lead nowhere.
docs: setup
	$(RUN) -m pip install -q -r requirements/docs.txt
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

setup:
	@$(PYTHON) tools/setup_env.py

# Leaves compiled wheels (.wheels), data and results (work_dirs) alone.
clean:
	rm -rf .venv .setup.log build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
