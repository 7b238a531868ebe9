# Every target sets up .venv by itself where it is missing.
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process 2

.PHONY: setup demo demo-teacher bench test test-slow faults check clean

setup: .venv/installed

.venv/installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Proteus needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: setup  ## distil the digits teacher afresh and print what the student kept
	rm -rf runs/demo runs/demo_supervised
	$(LAUNCH) tools/train.py --cfg demo.yaml
	$(LAUNCH) tools/train.py --cfg demo/supervised.yaml run.dir=runs/demo_supervised
	$(BIN)/python -m benchmarks.demo.table

OUT ?= runs/bench
ifdef MODEL
bench: setup  ## the 19 tasks: make bench MODEL=runs/x/student.safetensors DATA=/data [OUT=DIR] [ARGS="--teacher ..."]
	$(BIN)/python benchmarks/run.py --model $(MODEL) $(if $(DATA),--data-root $(DATA)) --out $(OUT) $(ARGS)
else
bench: setup  ## the embedded tasks on the demo's student, which is trained where it is not there yet
	$(LAUNCH) tools/train.py --cfg demo.yaml
	$(BIN)/python benchmarks/run.py --model runs/demo/student.safetensors --teacher benchmarks/demo/teacher.safetensors \
		--compare untrained:runs/demo/student.safetensors --tasks embedded --out $(OUT) $(ARGS)
endif

demo-teacher: setup  ## train the demo's teacher (with labels) and replace the shipped file
	$(BIN)/python -m benchmarks.demo.make_teacher

test: setup  ## in two processes, of one thread each
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -n 2 --slow -m slow

faults: setup  ## harm real runs in every way that docs/reliability.md names, as often as it says
	$(BIN)/python -m pytest -n 2 --thorough tests/faults tests/data/test_load_batches.py \
		$(addprefix tests/training/test_,resume.py changes.py errors.py shard.py)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy proteus tools benchmarks

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
