"""RecTools' SASRec or BERT4Rec trained on our split, a JSON line an epoch; started by tests/peers.py --accuracy.

    python tests/rectools_peer.py sasrec split.npz --minutes 60       # in an environment that has rectools[torch]

split.npz holds the training part in order (users, items), and of everybody who is asked the history and the item that
came next, for validation and test. The model, its loss over all items, its batches and its learning rate are
RecTools' own; 128 x 2, length and dropout are ours. What is ranked is never what the user has seen.
"""

import argparse
import json
import time

import numpy as np
import pandas as pd
import torch
from rectools import Columns
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import BERT4RecModel, SASRecModel

MODELS = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}


def dataset_of(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> Dataset:
    """Interactions in order of time, with the same numbers for users and items in every part."""
    table = pd.DataFrame({Columns.User: users, Columns.Item: items, Columns.Weight: 1.0})
    table[Columns.Datetime] = pd.Timestamp(0) + pd.to_timedelta(np.arange(len(users)), unit="s")
    maps = IdMap.from_values(range(num_users)), IdMap.from_values(range(num_items))
    return Dataset(*maps, Interactions(table))


def best_ten(model: object, dataset: Dataset, users: np.ndarray, seen: bool) -> np.ndarray:
    """The ten best items of each user, (R, 10), -1 where there are fewer."""
    table = model.recommend(users, dataset, k=10, filter_viewed=not seen)  # type: ignore[attr-defined]
    found = np.full((len(users), 10), -1)
    rows = pd.Index(users).get_indexer(table[Columns.User])
    found[rows, table[Columns.Rank].to_numpy() - 1] = table[Columns.Item]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=tuple(MODELS))
    parser.add_argument("split")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    split = np.load(args.split)
    num_users, num_items = int(split["num_users"]), int(split["num_items"])
    parts = {name: dataset_of(split[f"{name}_users"], split[f"{name}_items"], num_users, num_items)
             for name in ("train", "valid", "test")}  # fmt: skip
    torch.manual_seed(args.seed)
    model = MODELS[args.model](
        n_blocks=2, n_heads=4, n_factors=128, session_max_len=args.length, dropout_rate=args.dropout, loss="softmax",
        deterministic=False, recommend_torch_device="cpu", epochs=1,
    )  # fmt: skip
    seconds, cpu_seconds, best, waited = 0.0, 0.0, -1.0, 0
    for epoch in range(1, args.epochs + 1):
        began, began_cpu = time.perf_counter(), time.process_time()
        model.fit_partial(parts["train"], 1, 1)
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - began_cpu
        row: dict = {"epoch": epoch, "minutes": seconds / 60, "cpu_minutes": cpu_seconds / 60}
        for name in ("valid", "test"):
            targets = split[f"{name}_targets"]
            asked = split[f"{name}_asked"]
            place = best_ten(model, parts[name], asked, not split["exclude_seen"]) == targets[:, None]  # (R, 10)
            gains = place / np.log2(np.arange(2, 12))
            row |= {f"{name}_NDCG@10": gains.sum(1).mean(), f"{name}_HR@10": place.any(1).mean()}
        print(json.dumps(row), flush=True)
        waited = 0 if row["valid_NDCG@10"] > best else waited + 1
        best = max(best, row["valid_NDCG@10"])
        if waited >= args.patience or seconds / 60 > args.minutes:
            break


if __name__ == "__main__":
    main()
