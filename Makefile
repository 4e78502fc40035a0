# Every target sets up what it needs; second runs reuse .venv and build/.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where nothing may write bytecode, each of the tests' processes compiles torch's sources again: 10 s for the trainer's.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env build demo test lint fuzz sanitize aarch64 faults docs bench bench-compare gpu static wheel release-check corners pins clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.installed ## the environment: uv, then the pinned packages

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 must be 3.10 or newer, got " + sys.version.split()[0])'
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@touch $@

# Half as many again as processors: tests wait for processes that they start and for the disk.
WORKERS := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

build: build/.built ## the extension modules, in place

build/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps --editable .
	@touch $@

pins: $(VENV)/.installed ## resolve requirements.txt anew from pyproject.toml
	$(BIN)/uv pip compile --quiet pyproject.toml --all-extras --universal --python-version 3.10 --no-header \
		--no-annotate --constraint <(echo 'torch==2.13.0') --output-file requirements.txt

# Images stay at their own 8 x 8 pixels: it is the steps that count. The cut comes after epoch 8 of 30.
demo: build ## train ResNet-KL on scanned digits in under 3 minutes, then ten seconds of benchmarks
	rm -rf runs/demo
	$(BIN)/rkl train --data digits --model resnet-kl --depth 18 --width 16 --image-size 8 --cutmix --epochs 30 \
		--batch-size 32 --lr 0.05 --prune-at 0.25 --prune-ratio 0.2 --out runs/demo
	$(BIN)/rkl bench

test: build lint ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/triton
	@command -v clang++ >/dev/null || echo "not tested: the CPU kernels as clang++ compiles them; there is none on PATH (make corners)"

ifndef SEED
SEED := $(shell date +%s)
endif
FUZZ := --hypothesis-profile=fuzz --hypothesis-seed=$(SEED) --hypothesis-show-statistics
CASES := tests/test_cases.py tests/test_threads.py tests/test_memory.py tests/test_big.py tests/emulation/test_cases.py

fuzz: build ## 2,000 random programs and 10,000 random calls, in an hour; make test runs 200 and 500
	@echo "seed: $(SEED) (make fuzz SEED=$(SEED) does the same again)"
	OMP_NUM_THREADS=1 RKL_PROGRAMS=2000 $(BIN)/python -m pytest tests/test_programs.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FUZZ) $(CASES)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(FUZZ) tests/triton/test_triton_cases.py

# In a copy, whose module is always linked anew: setup.py would take the plain one beside it for up to date. What was
# copied before goes first, or files deleted since would be tested too; objects stay, as times come along with the files.
# -O1 alone fuses no multiply-adds, by which a test tells that the kernels for AVX2 were in force.
SANITIZED := build/sanitize
COPIED := csrc rkl_kernels tests benchmarks rkl
sanitize: env ## the CPU kernels under AddressSanitizer and UBSan: random calls and the operators' tests, in 20 minutes
	mkdir -p $(SANITIZED)
	rm -rf $(addprefix $(SANITIZED)/,$(COPIED))
	cp -rp $(COPIED) pyproject.toml README.md LICENSE $(SANITIZED)/
	rm -f $(SANITIZED)/rkl_kernels/*.so
	sed 's/"-O3", "-g0"/"-O1", "-fexpensive-optimizations", "-g1"/' setup.py >$(SANITIZED)/setup.py
	cd $(SANITIZED) && FORCE_CUDA=0 CFLAGS="-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer" \
		LDFLAGS="-fsanitize=address,undefined" $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace --build-temp obj
	nm -D $(SANITIZED)/rkl_kernels/_C.abi3.so | grep __asan_report >/dev/null  # or the tests below would show nothing
	cd $(SANITIZED) && OMP_NUM_THREADS=1 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=. \
		$(CURDIR)/$(BIN)/python -m pytest tests/test_cases.py tests/test_cpu_[dmt]*.py tests/test_cpu_separable*.py tests/test_guards.py

aarch64: env ## the CPU kernels compiled for aarch64, and the operators' tests on them under QEMU
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.aarch64

faults: build ## training killed before every write and 60 times at random; make test kills 6
	OMP_NUM_THREADS=1 RKL_FAULTS=120 $(BIN)/python -m pytest tests/test_faults.py

lint: build ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

docs: $(VENV)/.installed ## the documentation as a site, at port 8000
	$(BIN)/mkdocs serve

bench: build ## models and about half of the operators' rows against their rivals, in 10 minutes; writes benchmarks/results/
	$(BIN)/python -m benchmarks.suite

# All rows, as the committed records have them: a row that is not measured counts as missing.
bench-compare: build ## a run now against the committed one, in 20 minutes: names what got slower by more than the noise
	rm -rf runs/bench
	$(BIN)/python -m benchmarks.suite --within 1500 --out runs/bench
	$(BIN)/python -m benchmarks.compare runs/bench/*.json

# Needs no environment of ours and no network: the machine's own torch, Triton, NumPy, matplotlib and pytest. Takes the
# extensions that were brought along, or builds them with the machine's compilers.
GPU_FLAGS ?=
gpu: ## tests and measurements on a GPU, in 20 minutes (GPU_FLAGS=--quick: 2; --only GROUP: 20 s)
	@ls rkl_kernels/_C_cuda*.so >/dev/null 2>&1 || $(PYTHON) setup.py -q build_ext --inplace || \
		echo "the extensions could not be built: measuring without them"
	$(PYTHON) -m benchmarks.gpu $(GPU_FLAGS)

static: build ## registers, spills and instructions of the GPU kernels; writes benchmarks/results/static.*
	$(BIN)/python -m benchmarks.static_report

wheel: env ## a source distribution and the manylinux wheel made from it, with CUDA kernels; writes dist/
	rm -rf dist build/dist
	FORCE_CUDA=1 $(BIN)/python -m build --no-isolation --outdir build/dist
	mkdir dist && mv build/dist/*.tar.gz dist
	tools/repair_wheel.sh dist build/dist/*.whl

release-check: env ## what make wheel left in dist/: descriptions, contents, and the core tests on it in an empty environment
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tools.release dist

CORNERS ?=
corners: env ## the wheel in dist/ under the oldest and newest torch and Python, and the CPU kernels by clang++
	$(BIN)/python -m tools.corners dist $(CORNERS)

clean: ## remove what was built; the environment stays
	rm -rf build *.egg-info rkl_kernels/*.so
