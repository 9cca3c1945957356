PYTHON ?= python3
VENV_BIN := .venv/bin

.PHONY: demo test torture check examples format clean
.DEFAULT_GOAL := test

# Trains a small Llama-3 from books to a merged model; prints each command as it runs it.
demo: .venv
	PATH="$(CURDIR)/$(VENV_BIN):$$PATH" bash examples/shakespeare/demo.sh

# In the order of their names files of a few long tests don't come last, when one process would work alone.
test: check
	$(VENV_BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Kills, starves and damages runs thousands of times, which takes long, and prints what became of them.
torture: .venv
	PYTHONPATH=.:tests:examples/shakespeare $(VENV_BIN)/python -m tests.torture

check: .venv
	$(VENV_BIN)/ruff check .
	$(VENV_BIN)/ruff format --check .
	$(VENV_BIN)/pyright

# Writes what compile makes of Llama-3-8B anew, for visitors to look at; a test holds it to what compile writes.
examples: .venv
	$(VENV_BIN)/python train.py --run_mode compile --engine torch --model_id examples/llama3_8b_128k --hardware h100 \
	    --sequence_length 131072 --plan_ngpus 8 --runtime_ngpus 8 --compiled_dir compiled --name llama3_8b_128k
	cp compiled/llama3_8b_128k/gencode.py compiled/llama3_8b_128k/report.md examples/llama3_8b_128k/

format: .venv
	$(VENV_BIN)/ruff check --fix .
	$(VENV_BIN)/ruff format .

# The stamp is written last, so that an interrupted install is not taken for a finished one.
.PHONY: .venv
.venv: .venv/installed

.venv/installed: requirements.txt examples/shakespeare/requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(VENV_BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV_BIN)/pip install --quiet --disable-pip-version-check --no-deps -r examples/shakespeare/requirements.txt
	touch $@

clean:
	rm -rf demo compiled checkpoints runs
