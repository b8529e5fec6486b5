# make demo             install, then ask the bundled model about a drawn scene, and about a photograph
# make demo-video       the same about a clip
# make demo-tp          the same with every layer divided over two processes
# make demo-search      find drawn scenes by words and by a picture, offline, with the bundled retrieval model
# make demo-llava       both stages of LLaVA at toy size on drawn scenes, minutes of a CPU
# make demo-mpo         the demo model loses a wrong habit by preference training, minutes of a CPU
# make demo-thinking    a toy learns to think before it answers, minutes of a CPU; its thought comes apart from its answer
# make test             install, then run the tests; make test-fast the quickest of them, make test-slow those that take long,
#                       make soak what goes on for SOAK_SECONDS each, make test-npu those that need g++,
#                       make test-transformers those that compare with transformers and torch themselves
# make web              a web page at http://127.0.0.1:7860/ that asks the server at URL (by default that of `paddlemix serve`)
# make wheel            the package in dist/
# make demo DEVICE=gpu  the same with the GPU build of Paddle (CUDA 12.6); DEVICE=npu for Ascend 910B
PYTHON ?= python3
DEVICE ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)

# The CPU build comes from PyPI; the others only from Paddle's own index.
PADDLE_INDEX := https://www.paddlepaddle.org.cn/packages/stable
PADDLE_cpu := paddlepaddle==3.3.1
PADDLE_gpu := paddlepaddle-gpu==3.3.1 -i $(PADDLE_INDEX)/cu126/
PADDLE_npu := -r tools/npu/requirements.txt

.PHONY: llama openvino bench-torch web web-install demo demo-tp demo-video demo-search demo-llava demo-mpo install test test-fast test-slow test-npu soak wheel lint format clean test-transformers demo-thinking

demo: install
	@echo "A drawn scene, as the bundled model knows them. What color is the star?"
	$(BIN)/python paddlemix/examples/internvl2/chat_demo.py --device $(DEVICE)
	@echo "A photograph, of which it knows nothing. Please describe this picture."
	$(BIN)/python paddlemix/examples/internvl2/chat_demo.py --device $(DEVICE) \
	  --image_path paddlemix/demo_images/coffee.jpg --text "Please describe this picture."

demo-video: install
	$(BIN)/python paddlemix/examples/internvl2/chat_demo_video.py --device $(DEVICE)

demo-search: install
	$(BIN)/python paddlemix/examples/internvl/demo/run.py --device $(DEVICE)

demo-llava: install
	$(BIN)/python paddlemix/examples/internvl_llava/demo/run.py --device $(DEVICE)

demo-mpo: install
	$(BIN)/python paddlemix/examples/internvl2/demo_mpo/run.py --device $(DEVICE)

demo-thinking: install
	$(BIN)/python paddlemix/examples/internvl2/demo_thinking.py --device $(DEVICE)

demo-tp: install
	$(BIN)/python paddlemix/examples/internvl2/chat_demo.py --device $(DEVICE) --tensor_parallel 2

install: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(if $(PADDLE_$(DEVICE)),,$(error DEVICE=$(DEVICE) is not known: use cpu, gpu or npu))
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  "Python %d.%d is not supported: install 3.10, 3.11 or 3.12 and run make PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "could not create $(VENV): install Python's venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Installing into $(VENV) (about 1.5 GB, a few minutes) ..."
	$(BIN)/pip install --disable-pip-version-check $(PADDLE_$(DEVICE))
	grep -v '^paddlepaddle' requirements.txt > $(VENV)/requirements.txt
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -q -r $(VENV)/requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -e .
	@rm -f $(VENV)/.installed-*
	@touch $@

# As many processes as there are cores, but not more than the memory of a small machine holds.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
OTHERS := not slow and not soak and not npu

test: install
	$(PYTEST) -m "$(OTHERS)"

test-fast: install
	$(PYTEST) -m "not medium and $(OTHERS)"

test-slow: install
	$(PYTEST) -m "slow and not soak and not npu"

# Each soak goes on for SOAK_SECONDS, one after another.
SOAK_SECONDS ?= 600
soak: install
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -m soak

# On the stand-in for Ascend (needs g++); then those of models and training with the setting that Ascend needs, which changes
# what views are.
test-npu: install
	$(BIN)/python -m pytest -m npu
	FLAGS_use_stride_kernel=0 $(PYTEST) -m "$(OTHERS)" tests/models tests/training tests/kernels

# The web page has an environment of its own, since Gradio wants another Pillow and hub library than the package pins.
URL ?= http://127.0.0.1:23333/v1
web: web-install
	PYTHONPATH=$(CURDIR) $(VENV)/web/bin/python -m paddlemix.serving.web --url $(URL)

web-install: $(VENV)/web/.installed

$(VENV)/web/.installed:
	$(PYTHON) -m venv $(VENV)/web
	$(VENV)/web/bin/pip install --disable-pip-version-check -q gradio==6.31.0 openai==3.57.0
	@touch $@

# transformers loads what `--layout hf` writes: in an environment with torch's CPU build beside the package's own pins. Where the
# registry has no such build of the version that the extra bench names, TORCH_INDEX=https://download.pytorch.org/whl/cpu has.
TORCH_INDEX ?=
TRANSFORMERS := torch==2.13.0 'transformers>=4.57,<5'
test-transformers: $(VENV)/transformers/.installed
	PYTHONPATH=$(CURDIR) $(VENV)/transformers/bin/python -m pytest tests/models/internvl2/test_transformers.py

$(VENV)/transformers/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)/transformers
	$(VENV)/transformers/bin/pip install --disable-pip-version-check -q torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(VENV)/transformers/bin/pip install --disable-pip-version-check -q -r requirements.txt pytest==8.4.2 $(TRANSFORMERS)
	@touch $@

# What benchmarks/inference.py measures beside ours, each in an environment of its own. llama.cpp, whose server
# benchmarks/serving.py asks too, is built here with g++; bench-torch is transformers + torch.
llama: $(VENV)/llama/.installed

openvino: $(VENV)/openvino/.installed

bench-torch: $(VENV)/bench/.installed

$(VENV)/openvino/.installed:
	$(PYTHON) -m venv $(VENV)/openvino
	$(VENV)/openvino/bin/pip install --disable-pip-version-check -q openvino==2026.4.1 nncf==3.4.0
	@touch $@

$(VENV)/bench/.installed:
	$(PYTHON) -m venv $(VENV)/bench
	$(VENV)/bench/bin/pip install --disable-pip-version-check -q torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(VENV)/bench/bin/pip install --disable-pip-version-check -q -r requirements.txt 'transformers>=4.57,<5'
	@touch $@

$(VENV)/llama/.installed:
	$(PYTHON) -m venv $(VENV)/llama
	$(VENV)/llama/bin/pip install --disable-pip-version-check -q 'llama-cpp-python[server]==0.3.36' gguf==0.19.0
	@touch $@

# The wheel of a release, from what is committed alone.
wheel: install
	rm -rf build dist
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-deps -w dist .
	rm -rf build

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
