# make demo: from an empty machine to recommendations. make test: everything that is checked.
# make results: the main models of all data sets again, days on two cores.
PYTHON ?= python3
BIN := .venv/bin
FILMS := "Toy Story (1995)" "Star Wars (1977)" "Fargo (1996)"
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/checked: .venv/installed tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python data.py --data ml-100k
	$(BIN)/python teacher.py --data ml-100k --minutes 3 --overwrite
	$(BIN)/python distill.py --data ml-100k --minutes 1.5 --overwrite
	$(BIN)/python evaluate.py --data ml-100k
	$(BIN)/python student.py --run runs/ml-100k/student -k 3 $(FILMS)

check: .venv/checked
	$(BIN)/ruff check .
	$(BIN)/mypy *.py

test: check
	$(BIN)/python -m pytest -q tests

results: .venv/checked
	$(BIN)/python results/run.py

.PHONY: demo check test results
