"""A made-up dataset in RecBole's format: 50 users who walk around a ring of 60 films."""

import random
from pathlib import Path

import pytest


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
