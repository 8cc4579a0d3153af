# make train, make train-classification, make test: everything on a fresh machine, from the virtual environment
# to the result. What is there already is used again.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install

TORCH := torch==2.11.0 torchvision==0.26.0
BUILD_TOOLS := ninja psutil packaging wheel "setuptools>=80,<82"
MMCV := onedl-mmcv==2.3.6
SEGMENTATION := onedl-mmengine==0.10.12 onedl-mmsegmentation==1.4.2
OTHERS := onedl-mmdetection==3.5.1 onedl-mmpretrain==1.3.6 pytest ruff

DATA := data/demo
DEMO := configs/upernet_dgt_t_demo.py
DEMO_DIR := work_dirs/upernet_dgt_t_demo
CHECKPOINT := $(DEMO_DIR)/iter_650.pth
CLASSIFIER := configs/dgt_t_demo.py
CLASSIFIER_DIR := work_dirs/dgt_t_demo
CLASSIFIER_CHECKPOINT := $(CLASSIFIER_DIR)/epoch_2.pth
SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.*)

# Threads that wait long give their core away: spinning, two threads on two cores
# stall whenever another process takes one of them.
export GOMP_SPINCOUNT := 20000

.PHONY: train train-classification test lint gpu-check sanitize clean

train: $(DEMO_DIR)/metrics.json $(DEMO_DIR)/metrics_tta.json
	@$(RUN) -W ignore tools/demo_report.py $(DEMO) $(CHECKPOINT)

train-classification: $(CLASSIFIER_DIR)/metrics.json
	@echo 'accuracy: '; cat $<; echo; echo 'checkpoint: $(CLASSIFIER_CHECKPOINT)'

test: $(VENV)/others
	$(RUN) -m pytest

lint: $(VENV)/others
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Build, tests, sanitizer and benchmark of the CUDA kernels on this machine's GPU.
gpu-check: $(VENV)/others
	PYTHON="$(CURDIR)/$(RUN)" tools/gpu_check.sh

# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/others
	MMDGT_SANITIZE=1 $(PIP) --no-build-isolation --no-deps --target build/sanitized \
	  --upgrade .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
	  $(RUN) -m pytest tests/test_ops_cpu.py

$(DEMO_DIR)/metrics.json: $(CHECKPOINT)
	$(RUN) -W ignore tools/test.py $(DEMO) $(CHECKPOINT)

$(DEMO_DIR)/metrics_tta.json: $(CHECKPOINT)
	$(RUN) -W ignore tools/test.py $(DEMO) $(CHECKPOINT) --tta

# --resume goes on where an interrupted run stopped.
$(CHECKPOINT): $(DEMO) | $(VENV)/mmdgt $(DATA)
	$(RUN) -W ignore tools/train.py $(DEMO) --resume

$(CLASSIFIER_DIR)/metrics.json: $(CLASSIFIER_CHECKPOINT)
	$(RUN) -W ignore tools/test.py $(CLASSIFIER) $<

$(CLASSIFIER_CHECKPOINT): $(CLASSIFIER) | $(VENV)/others $(DATA)/imagenet
	$(RUN) -W ignore tools/train.py $(CLASSIFIER) --resume

$(DATA) $(DATA)/imagenet: | $(VENV)/mmdgt
	$(RUN) tools/make_demo_data.py --out $(DATA)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) $(BUILD_TOOLS)
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

$(VENV)/others: $(VENV)/mmdgt
	$(PIP) $(OTHERS)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info mmdgt/*.so
