"""A library's SASRec or BERT4Rec trained on our split, a JSON line an epoch; started by tests/peers.py --accuracy.

    python tests/trained_peer.py rectools-sasrec split.npz --minutes 60       # in an environment that has that library

split.npz holds the training part in order (users, items), and of everybody who is asked the history and the item that
came next, for validation and test. Batches and learning rates are the libraries' own, losses go over all items;
RecBole's models are as it sets them (64 x 2), RecTools' have 128 x 2 and dropout 0.2. What is ranked is never what the
user has seen, unless users repeat items.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

# Train for an epoch; the ten best items of everybody who is asked in a part, (R, 10), -1 where there are fewer.
Peer = tuple[Callable[[], None], Callable[[str], np.ndarray]]
Split = Mapping[str, np.ndarray]


def rectools(model_name: str, split: Split, length: int) -> Peer:
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset, IdMap, Interactions
    from rectools.models import BERT4RecModel, SASRecModel

    parts = {}
    for part in ("train", "valid", "test"):
        users, items = split[f"{part}_users"], split[f"{part}_items"]
        table = pd.DataFrame({Columns.User: users, Columns.Item: items, Columns.Weight: 1.0})
        table[Columns.Datetime] = pd.Timestamp(0) + pd.to_timedelta(np.arange(len(users)), unit="s")
        maps = (IdMap.from_values(range(int(split[f"num_{what}"]))) for what in ("users", "items"))
        parts[part] = Dataset(*maps, Interactions(table))
    model = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}[model_name](
        n_blocks=2, n_heads=4, n_factors=128, session_max_len=length, dropout_rate=0.2, loss="softmax",
        deterministic=False, recommend_torch_device="cpu", epochs=1,
    )  # fmt: skip

    def best_ten(part: str) -> np.ndarray:
        asked = split[f"{part}_asked"]
        table = model.recommend(asked, parts[part], k=10, filter_viewed=bool(split["exclude_seen"]))
        found = np.full((len(asked), 10), -1)
        rows = pd.Index(asked).get_indexer(table[Columns.User])
        found[rows, table[Columns.Rank].to_numpy() - 1] = table[Columns.Item]
        return found

    return lambda: model.fit_partial(parts["train"], 1, 1), best_ten


def recbole(model_name: str, split: Split, length: int) -> Peer:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.data.interaction import Interaction
    from recbole.utils import get_model, get_trainer

    # RecBole holds out the last two items itself: it gets all histories whole, with their places as times.
    users = np.concatenate([split["test_users"], split["test_asked"]])
    items = np.concatenate([split["test_items"], split["test_targets"]])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "split").mkdir()
        lines = (f"{user}\t{item}\t{place}" for place, (user, item) in enumerate(zip(users, items, strict=True)))
        table = "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines])
        (Path(folder) / "split" / "split.inter").write_text(table + "\n")
        sys.argv = sys.argv[:1]  # which RecBole would read
        config = Config({"sasrec": "SASRec", "bert4rec": "BERT4Rec"}[model_name], "split", config_dict={
            "data_path": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "checkpoint_dir": folder,
            "MAX_ITEM_LIST_LENGTH": length, "loss_type": "CE", "train_neg_sample_args": None, "use_gpu": False,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
            "state": "CRITICAL", "show_progress": False,
        })  # fmt: skip
        dataset = create_dataset(config)
        train, *_ = data_preparation(config, dataset)
        model = get_model(config["model"])(config, train.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    ids = np.array([dataset.field2token_id["item_id"][str(item)] for item in range(int(split["num_items"]))])
    item_of = np.full(dataset.item_num, -1)
    item_of[ids] = np.arange(len(ids))

    def best_ten(part: str) -> np.ndarray:
        histories: dict[int, list[int]] = {int(user): [] for user in split[f"{part}_asked"]}
        for user, item in zip(split[f"{part}_users"], ids[split[f"{part}_items"]], strict=True):
            if user in histories:
                histories[user].append(item)
        found = []
        model.eval()
        for history in torch.utils.data.DataLoader(list(histories.values()), 256, collate_fn=list):
            recent = [row[-length:] for row in history]
            rows = torch.tensor([row + [0] * (length - len(row)) for row in recent])  # (B, length)
            lengths = torch.tensor([len(row) for row in recent])
            with torch.no_grad():
                scores = model.full_sort_predict(Interaction({"item_id_list": rows, "item_length": lengths}))
            scores[:, 0] = -torch.inf  # padding
            if split["exclude_seen"]:
                for row, seen in zip(scores, history, strict=True):
                    row[torch.tensor(seen)] = -torch.inf
            found.append(item_of[scores.topk(10).indices.numpy()])
        return np.concatenate(found)

    epochs = iter(range(10**6))
    return lambda: trainer._train_epoch(train, next(epochs)), best_ten


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", help="rectools-sasrec, rectools-bert4rec, recbole-sasrec or recbole-bert4rec")
    parser.add_argument("split")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    split = np.load(args.split)
    split = {name: split[name] for name in split.files}  # read once
    library, model_name = args.peer.split("-")
    torch.manual_seed(args.seed)
    train, best_ten = {"rectools": rectools, "recbole": recbole}[library](model_name, split, args.length)
    seconds, cpu_seconds, best, waited = 0.0, 0.0, -1.0, 0
    for epoch in range(1, args.epochs + 1):
        began, began_cpu = time.perf_counter(), time.process_time()
        train()
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - began_cpu
        row: dict = {"epoch": epoch, "minutes": seconds / 60, "cpu_minutes": cpu_seconds / 60}
        for part in ("valid", "test"):
            place = best_ten(part) == split[f"{part}_targets"][:, None]  # (R, 10)
            gains = place / np.log2(np.arange(2, 12))
            row |= {f"{part}_NDCG@10": gains.sum(1).mean(), f"{part}_HR@10": place.any(1).mean()}
        print(json.dumps(row), flush=True)
        waited = 0 if row["valid_NDCG@10"] > best else waited + 1
        best = max(best, row["valid_NDCG@10"])
        if waited >= args.patience or seconds / 60 > args.minutes:
            break


if __name__ == "__main__":
    main()
