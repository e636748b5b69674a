"""A made-up dataset in RecBole's format, 50 users who walk around a ring of 60 films, and how tests run commands."""

import contextlib
import importlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Before torch is imported: on a busy machine, threads that wait by spinning starve those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from data import InputError, Interactions

settings.register_profile("ours", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("ours")
ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("PREBERT_DATA") or ROOT / "data").resolve()  # where it is missing, its tests are skipped
HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"
TINY = ["--epochs", "2", "--max-length", "16", "--tokens", "256", "--eval-users", "20"]


def write_ring(folder: Path, users: int = 50, items: int = 60) -> Path:
    chance = random.Random(0)
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        start = chance.randrange(items)
        for step in range(chance.randrange(8, 30)):
            rows.append(f"u{user}\t{(start + step) % items + 100}\t3\t{1000 + step}")
    (folder / "ring.inter").write_text("\n".join(rows) + "\n")
    films = [f"{item + 100}\tFilm {item}\t{1950 + item}" for item in range(items)]
    (folder / "ring.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\trelease_year:token", *films]))
    return folder / "ring.inter"


@pytest.fixture(scope="session")
def ring(tmp_path_factory) -> Path:
    return write_ring(tmp_path_factory.mktemp("ring"))


def hand_log(*rows: list[int]) -> Interactions:
    """Histories of item numbers as a log."""
    items = np.array([item for row in rows for item in row])
    names = ["", *(str(i) for i in range(1, items.max() + 1))]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    repeats = any(len(set(row)) < len(row) for row in rows)
    users, texts, begins = [f"u{row}" for row in range(len(rows))], [""] * len(names), np.zeros(len(rows))
    arrays = (items, offsets, names, list(names), texts, users, begins)
    return Interactions("hand", *arrays, repeats, {}, exclude_seen=not repeats)


def command(script: str, *arguments: object, cwd: Path, expect: int = 0, **env: str) -> str:
    """Run a script as a user would; returns stdout, or, where failure is expected, stderr, which must be short."""
    line = [sys.executable, ROOT / script, *map(str, arguments)]
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert result.returncode == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if expect else result.stdout


def inside(script: str, *arguments: object, cwd: Path, expect: int = 0) -> str:
    """The same within this process, which saves the seconds of the imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(script.removesuffix(".py")).main()
    except InputError as error:
        err.write(f"error: {error}")
        code = 2
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    assert code == expect, err.getvalue()
    return err.getvalue() if expect else out.getvalue()
