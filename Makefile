# Two commands: `make demo` sets up and runs the main job, `make test` sets up and runs lint, types and all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find src -name '*.c' -o -name '*.h' -o -name '*.pxd' -o -name '*.pyx') src/anykvm/backends/soft/run.py setup.py pyproject.toml

.PHONY: help setup demo test annotate stress fuzz sanitize bench oracle random lint types clean
help:
	@echo "make demo   set up, then compute the CRC of a 64 MiB file in a guest whose memory arrives page by page"
	@echo "make test   set up, then lint, types and all tests"
	@echo "make oracle set up, then record what real kernels do (in QEMU, a few minutes) and compare: oracle.html;"
	@echo "            and explain a real kernel's bare EFAULTs"
	@echo "make random set up, then 4,000 random sequences on a real kernel (in QEMU, half an hour) and on soft"
	@echo "make annotate  set up, then 10,000 generated faults: does the annotate layer find the cause of each?"
	@echo "make stress set up, then 5 minutes of vCPUs whose memory changes in all ways under them (SECONDS=, SEED=)"
	@echo "make fuzz   set up, then 10 minutes of instructions with operands at their boundaries, in all modes (SECONDS=, SEED=)"
	@echo "make sanitize  set up, then the engine's tests with its C under the address and undefined-behaviour sanitizers"
	@echo "make bench  set up, then the speed table beside its peers (bench-results.json)"

setup: $(STAMP)

$(STAMP): $(SOURCES)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" tools/setup.sh
	@touch $@

demo: setup
	@$(BIN)/python tools/demo_file.py demo.bin 64
	@$(BIN)/anykvm postcopy demo.bin --backend soft --html postcopy.html
	@echo "make demo: done; open postcopy.html"

test: setup
	@BIN="$(BIN)" tools/test.sh

annotate: setup
	@$(BIN)/python tests/annotate_bed.py 10000

stress: setup
	@PYTHONPATH=tests $(BIN)/python -m stress --seconds $(or $(SECONDS),300) --seed $(or $(SEED),1)

fuzz: setup
	@PYTHONPATH=tests $(BIN)/python -m instruction_fuzz --seconds $(or $(SECONDS),600) --seed $(or $(SEED),1)

lint: setup
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .

types: setup
	@$(BIN)/mypy

# Not part of `make test`: a second build, and tests that run several times as long.
sanitize: setup
	@BIN="$(BIN)" tools/sanitize.sh

# Not part of `make test`: it takes minutes, and needs QEMU and Debian's kernels (anykvm oracle gets them).
oracle: setup
	@tools/oracle.sh

# As `make oracle`. Ended, it goes on where it was: what the kernel did is in build/random.
random: setup
	@mkdir -p build/random
	@$(BIN)/anykvm conformance random --seeds 0:4000 --kernel 7.3 --records build/random/linux-7.3.jsonl \
		--archive build/random/random-linux-7.3.jsonl.xz
	@echo "make random: done; the kernel's records are in build/random"

bench: setup
	@$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info bench-results.json postcopy.html demo.bin oracle.html
	find . -name '*.so' -path './src/*' -delete
