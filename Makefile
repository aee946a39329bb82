# The README's two commands, and what maintainers need. Every target sets up what it uses.
.PHONY: demo test fuzz lock docs
PYTHON ?= python3
SETUP = $(PYTHON) -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv pip install -q -r requirements.lock -e .

demo:
	$(SETUP) && .venv/bin/faultline demo

test:
	$(SETUP) && .venv/bin/pytest

fuzz:  ## the property tests with examples that nobody has seen
	$(SETUP) && .venv/bin/pytest --hypothesis-profile=fuzz -m "not processes" $$(grep -l "from hypothesis" tests/test_*.py)

lock:  ## newest versions that fit pyproject.toml, for every platform
	.venv/bin/uv pip compile -q --universal --python-version 3.11 --extra test --no-annotate --no-header --no-emit-index-url --upgrade pyproject.toml -o requirements.lock

docs:  ## the command reference, from the commands' own --help
	.venv/bin/python tests/test_docs.py
