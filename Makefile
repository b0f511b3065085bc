# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv once, from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.convpare-ready

.PHONY: demo test lint browser docs setup results zoo peers truncation kr-ablation fuzz lock clean

demo: $(STAMP)
	$(BIN)/convpare demo

test: lint browser
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# The site, in build/site; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tests open reports in the system's Chromium; CHROMIUM may name another one.
browser:
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
	    [ -n "$$name" ] && command -v "$$name" >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium && exit 0; fi; \
	echo "the tests open reports in Chromium, and there is none: apt-get install chromium, or set CHROMIUM" >&2; exit 1

setup: $(STAMP)

$(STAMP): constraints.txt requirements-nodeps.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli,report,onnx,demo,train,docs,dev]' pyyaml huggingface_hub
	$(BIN)/pip install --quiet --no-deps --requirement requirements-nodeps.txt
	touch $@

# The published figures, from the real data in CONVPARE_SHARED; every point is stored as it comes (docs/results).
results: $(STAMP)
	$(BIN)/python benchmarks/results.py

# Every convolutional model of torchvision and timm; a second run goes on where the first stopped (docs/results/zoo.json).
zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py $(ARGS)

# Torch-Pruning and TensorLy at the budgets of the results, on the same networks and images.
peers: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py

# Norm loss against accuracy along every cut, on CIFAR-10 and CIFAR-100 (docs/results/truncation.md).
truncation: $(STAMP)
	$(BIN)/python benchmarks/truncation.py $(ARGS)

# Accuracy as K/R grows, on CIFAR-10 in CONVPARE_SHARED; every training is stored (docs/results/kr_ablation.jsonl).
kr-ablation: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kr_ablation.py $(ARGS)

# Thousands of random networks, in both forms.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/graph/fuzz.py --graphs 3000 $(ARGS)

lock: $(STAMP)
	{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -viE '^(torchvision|timm)==' | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV)
