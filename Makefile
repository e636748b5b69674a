# make demo: .venv/installed
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

.PHONY: demo check test
