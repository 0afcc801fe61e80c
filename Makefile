PYTHON ?= python3
PY = .venv/bin/python
# What a stock Colab's versions could break: loading, training, exporting, answering, and the notebooks themselves.
QUICK = $(addprefix tests/test_, $(addsuffix .py, answer answers base batches colab config doctor export features inference \
	model pictures processing questions requirements runtime submission training vlm_export))
# Families whose processors want torchvision: without it their tests are skipped.
VISION = qwen or intern or smolvlm or idefics or pixels

.PHONY: demo test test-colab verify verify-real verify-gpu lint clean

demo: .venv/ready  ## the whole road on the embedded questions and tiny base
	$(PY) -m bridgeblip demo

test: .venv/ready lint  ## lint and all tests, on the newest versions; families whose processors want torchvision with it
	$(PY) -m pytest
	PYTHONPATH=.venv/vision $(PY) -m pytest -k "$(VISION)" tests/test_batches.py tests/test_tune.py tests/test_merge.py tests/test_vlm_export.py

test-colab: .venv-colab/ready  ## the quick part of the tests, on the versions of a stock Colab
	.venv-colab/bin/python -m pytest $(QUICK)

verify: .venv/ready  ## long checks: what was asked and what was measured
	$(PY) tools/verify.py

verify-real: .venv/ready  ## the published models, for whoever has a GPU and the hub: ARGS="--aokvqa FILE COCO"
	$(PY) tools/verify_real.py $(ARGS)

verify-gpu: .venv/ready  ## what a GPU can show in six minutes: ARGS="--only train answer"; ARGS=--tests runs CUDA's tests
	$(PY) tools/verify_gpu.py $(ARGS)

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m nbstripout --verify *.ipynb

.venv/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	$(PY) -m pip install --quiet --no-deps --target .venv/vision torchvision==0.28.0 num2words==0.5.14 docopt==0.6.2
	touch $@

.venv-colab/ready: requirements.txt requirements-dev.txt constraints-colab.txt
	$(PYTHON) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --quiet -r requirements-dev.txt -c constraints-colab.txt
	touch $@

clean:
	rm -rf .venv .venv-colab demo
