PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test verify lint clean

demo: .venv/ready  ## the whole road on the embedded questions and tiny base
	$(PY) -m bridgeblip demo

test: .venv/ready lint  ## what CI runs
	$(PY) -m pytest

verify: .venv/ready  ## long checks: what was asked and what was measured
	$(PY) tools/verify.py

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m nbstripout --verify *.ipynb

.venv/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv demo
