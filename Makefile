# `make test` and `make demo` do all the set-up on a fresh machine. PYTHON chooses the interpreter for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test bench gpu lint clean

install: $(STAMP)

$(STAMP): setup.py constraints.txt $(wildcard kernels/*.cpp kernels/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[serve,dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python -m megalith.rlhf.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: install lint
	$(BIN)/python -m pytest tests

bench: install
	$(BIN)/python -m megalith.bench.step
	$(BIN)/python -m pytest tests/speed --benchmark-only

# Tests and benchmarks that need CUDA; on a machine whose own Python holds torch, call with BIN set to its folder.
gpu:
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m pytest tests/speed --benchmark-only
	$(BIN)/python -m megalith.bench.step --device cuda --model llama-1b --precision bf16 --batch_size 8 --seq_len 2048 \
		--json bench/results/step-cuda.json
	$(BIN)/python -m megalith.bench.ppo --model s --strategy torch gemini_cpu --experience_batch_size 1 --train_batch_size 1 \
		--json bench/results/ppo-cuda.json
	$(BIN)/python -m megalith.bench.ppo --model s --strategy torch gemini_cpu --experience_batch_size 1 --train_batch_size 1 \
		--precision fp32 --json bench/results/ppo-fp32-cuda.json
	$(BIN)/python -m megalith.bench.kernels --device cuda --models 7b 13b 70b --json bench/results/kernels-cuda.json
	$(BIN)/python -m megalith.bench.inference --device cuda --model llama-7b --precision bf16 --json bench/results/inference-cuda.json
	$(BIN)/python -m megalith.bench.capacity --device cuda --nvme_dir $${NVME_DIR:-.} --json bench/results/capacity-cuda.json

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.so demo_out runs
