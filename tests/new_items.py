"""How well items are recommended that nobody has clicked yet, by what BERT reads in their texts. Run by hand.

    python tests/new_items.py FOLDER --data beauty.inter --size tiny --epochs 12 --json FILE

Takes 5 % of the items, all their clicks, out of a log, trains a student without a teacher on what is left, adds the
items by `Recommender.add_items`, and ranks the whole catalogue for those users whose next item is a new one. Beside
it stand a random order, and the items whose texts are most like that of the newest item of the history. For all other
users: how much the new items cost. With --valid the next item is the validation item instead of the test item.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import Interactions, load_dataset, pad_left, write_json  # noqa: E402
from evaluate import metrics, target_ranks  # noqa: E402
from prebert import encode_texts, load_bert, machine  # noqa: E402
from student import Recommender  # noqa: E402


def write_warm(folder: Path, data: Interactions, cold: np.ndarray, valid: bool) -> None:
    """The log without the items of `cold` (I + 1,), and without the last item or two of a user, that are asked for."""
    rows, titles = ["user_id\titem_id\ttimestamp"], ["item_id\ttitle"]
    for user, (begin, end) in enumerate(zip(data.offsets[:-1], data.offsets[1:], strict=True)):
        kept = [item for item in data.items[begin : end - 1 - valid] if not cold[item]]
        rows += [f"{user}\t{item}\t{when}" for when, item in enumerate(kept)]
    titles += [f"{item}\t{text}" for item, text in enumerate(data.texts) if text and not cold[item]]
    (folder / "warm.inter").write_text("\n".join(rows) + "\n")
    (folder / "warm.item").write_text("\n".join(titles) + "\n")


def ndcg_of(scores: torch.Tensor, targets: torch.Tensor, seen: torch.Tensor) -> dict[str, float]:
    found = metrics(target_ranks(scores, targets, seen))
    return {key: found[key] for key in ("NDCG@10", "HR@10")}


@torch.inference_mode()
def one_seed(folder: Path, data: Interactions, texts: torch.Tensor, seed: int, valid: bool, flags: list[str]) -> dict:
    """Train without 5 % of the items and rank them all; a row of the report."""
    cold = np.zeros(data.num_items + 1, bool)
    cold[1 + np.random.default_rng(seed).permutation(data.num_items)[: data.num_items // 20]] = True
    write_warm(folder, data, cold, valid)
    command = [sys.executable, ROOT / "distill.py", "--no-kd", "--data", "warm.inter", "--min-count", "1", "--seed",
               str(seed), "--all", "--overwrite", *flags]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True)
    recommend = Recommender(folder / "runs/warm/student-no-kd-all", compile=False)
    warm_items = recommend.model.num_items
    recommend.add_items({str(item): data.texts[item] for item in np.flatnonzero(cold)})
    ours = torch.tensor([recommend.by_id.get(str(item), 0) for item in range(data.num_items + 1)])
    back = torch.zeros(recommend.model.num_items + 1, dtype=torch.long)
    back[ours] = torch.arange(data.num_items + 1)
    ends = torch.from_numpy(data.offsets[1:]) - 1 - int(valid)
    starts, targets = torch.from_numpy(data.offsets[:-1]), ours[torch.from_numpy(data.items)[ends]]
    asked = (targets > 0) & (ends > starts)
    starts, ends, targets = starts[asked], ends[asked], targets[asked]
    is_cold = targets > warm_items
    histories = pad_left(ours[torch.from_numpy(data.items)], starts, ends, int((ends - starts).max()))  # (R, S)
    # A new item in a history counts as not there, as on the day before it came.
    histories[histories > warm_items] = 0
    order = (histories != 0).int().argsort(dim=1, stable=True)
    histories = histories.gather(1, order)
    some = histories[:, -1] > 0
    histories, targets, is_cold = histories[some], targets[some], is_cold[some]
    scores = torch.cat([recommend.model.score_next(part) for part in histories.split(256)])
    unit = F.normalize(texts - texts.mean(0), dim=1)[back[1:] - 1]  # in the order of the model's items
    likeness = unit[histories[:, -1] - 1] @ unit.T
    random_order = sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / recommend.model.num_items
    warm = ~is_cold
    return {
        "seed": seed, "new items": int(cold.sum()), "users asked for a new item": int(is_cold.sum()),
        "students": ndcg_of(scores[is_cold], targets[is_cold], histories[is_cold]),
        "nearest texts": ndcg_of(likeness[is_cold], targets[is_cold], histories[is_cold]),
        "random order": {"NDCG@10": random_order, "HR@10": 10 / recommend.model.num_items},
        "among new items alone": ndcg_of(scores[is_cold][:, warm_items:], targets[is_cold] - warm_items,
                                         torch.zeros_like(histories[is_cold])),
        "other users, new items in the catalogue": ndcg_of(scores[warm], targets[warm], histories[warm]),
        "other users, without them": ndcg_of(scores[warm][:, :warm_items], targets[warm], histories[warm]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--valid", action="store_true")
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()  # the rest, such as --epochs, goes to distill.py
    data = load_dataset(args.data)
    args.folder.mkdir(parents=True, exist_ok=True)
    texts = encode_texts(*load_bert("minilm"), data.texts[1:])
    rows = [one_seed(args.folder, data, texts, seed, args.valid, flags) for seed in args.seeds]
    for row in rows:
        print(*(f"{key}: {value}" for key, value in row.items()), sep="\n  ")
    if args.json:
        command = shlex.join(["python", *sys.argv])
        write_json(args.json, {"command": command, "data": data.name, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
