"""What item texts and a pre-trained body are worth the fewer users there are to learn from. Run by hand, resumable.

    python tests/sparsity.py --data beauty.inter --shares 5 10 25 50 100 --json results/beauty/sparsity.json
    python tests/sparsity.py --data ml-1m --body --shares 5 10 --json sparsity.json      # PreBERT instead of students

Trains on a share of the users, drawn at random, and evaluates everybody on the same items: students without a teacher,
whose item vectors start from the items' texts and without them, or, with --body, PreBERT with BERT's weights and with
random ones, both with the texts that BERT itself reads. The recipe is that of a log of that size, and item vectors
start from texts alone or also from co-occurrence as `teacher.default_init` would have it; --starts compares starts
instead. Validation chooses the weights, test is looked at once; results/plot.py draws the picture. Other flags, such as
--size tiny, go to the training script.
"""

import argparse
import json
import re
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data as data_module  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import prebert  # noqa: E402
import teacher  # noqa: E402
from data import Interactions, Parts, dataset_name, leave_one_out, load_dataset, write_json  # noqa: E402
from prebert import ITEM_INITS, Bert, PreBert, load_bert, machine, prebert_from_bert, text_vectors  # noqa: E402
from teacher import settle, sparse  # noqa: E402

STUDENTS, BODIES = ("with texts", "without texts"), ("BERT's body", "random body")
WORDS = tuple(f"{label}, words" for label in BODIES)  # --words


def random_body(*of_bert) -> PreBert:
    """What `prebert_from_bert` gives, but layers and positions are random."""
    model = prebert_from_bert(*of_bert)
    fresh = PreBert(model.config, model.num_items)
    model.encoder, model.position_embedding = fresh.encoder, fresh.position_embedding
    return model


def word_means(bert: Bert, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The mean of BERT's word vectors over each text, (len(texts), E): what its first layer was trained to read."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [torch.tensor(entry.ids, dtype=torch.long) for entry in encoded]
    return torch.stack([bert.word_embedding.weight[own].sum(0) / max(1, len(own)) for own in ids]).detach()


def thinned(data: Interactions, percent: int, seed: int) -> Parts:
    """Leave-one-out whose training part holds a share of the users; validation and test are those of everybody."""
    train, valid, test = leave_one_out(data)
    order = torch.randperm(len(train.starts), generator=torch.Generator().manual_seed(seed))
    kept = order[: len(order) * percent // 100].sort().values
    return train[kept], valid, test


def one_run(name: str, data: Interactions, label: str, flags: list[str], percent: int, seed: int) -> dict:
    """Train the model of that label, unless that was done, and evaluate; a row of the report."""
    script = teacher if label in BODIES + WORDS else distill
    left = data.items[: len(data.items) * percent // 100]  # as many interactions, for what depends on their number
    kind = ["--seed", str(seed), *flags]
    # Share and random body are no flags: they are in the run's name, and patched in behind main's back.
    words = ["sparsity", re.sub("[',]", "", label).replace(" ", "-"), str(percent), *flags, f"s{seed}"]
    run = "-".join(word.strip("-") for word in words).replace("/", "_")
    train = [f"{script.__name__}.py", "--data", name, "--name", run, "--resume", *kind]
    train += ["--no-kd"] if script is distill else []
    patched = {
        (teacher, "prebert_from_bert"): random_body if label.startswith("random body") else prebert_from_bert,
        (prebert, "text_vectors"): word_means if label in WORDS else text_vectors,
        (script, "settle"): lambda args, recipes, data: settle(args, recipes, replace(data, items=left)),
        (teacher, "sparse"): lambda data: sparse(replace(data, items=left)),  # asked by keep_texts, too
        (sys, "argv"): train,
    }
    with mock.patch.dict(data_module.SPLITS, last=lambda data: thinned(data, percent, seed)):
        with ExitStack() as stack:
            for (module, attribute), value in patched.items():
                stack.enter_context(mock.patch.object(module, attribute, value))
            script.main()
        with tempfile.TemporaryDirectory() as folder:
            rows = {}
            for part in ("--valid", "--test"):
                file = f"{folder}/{part}.json"
                words = ["evaluate.py", "--data", name, "--runs", f"runs/{dataset_name(name)}/{run}", "--json", file]
                with mock.patch.object(sys, "argv", words + ["--valid"] * (part == "--valid")), redirect_stdout(None):
                    evaluate.main()
                rows[part] = json.loads(Path(file).read_text())["rows"][-1]
    test = rows["--test"]
    return {"model": label, "users": percent, "seed": seed, "valid NDCG@10": rows["--valid"]["NDCG@10"],
            "NDCG@10": test["NDCG@10"], "HR@10": test["HR@10"], "minutes": test["minutes"], "commit": test["commit"],
            "command": " ".join(train)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--shares", type=int, nargs="+", default=[5, 10, 25, 50, 100], help="per cent of the users")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--body", action="store_true", help="PreBERT, with BERT's body and with a random one")
    parser.add_argument("--words", action="store_true", help="the same, started from the mean of BERT's word vectors")
    parser.add_argument("--starts", nargs="+", choices=ITEM_INITS, help="students with texts, by these starts")
    parser.add_argument("--json", type=Path, required=True, help="rows that it holds already are kept")
    args, flags = parser.parse_known_args()
    data = load_dataset(args.data)
    report = json.loads(args.json.read_text()) if args.json.exists() else {"data": data.name, "rows": []}
    report |= {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    for percent in args.shares:
        for seed in args.seeds:
            share = teacher.titles_beside_counts(data, thinned(data, percent, seed), load_bert("minilm"))
            starts = args.starts or ["text" if share >= teacher.TITLES_ALONE else "text+cooc"]
            labels = BODIES if args.body else WORDS if args.words else STUDENTS[:1]
            tried = [(label, ["--item-init", start]) for label in labels for start in starts]
            if not (args.body or args.words or args.starts):
                tried.append(("without texts", ["--item-init", "cooc"]))
            for label, kind in tried:
                row = one_run(args.data, data, label, [*kind, *flags], percent, seed)
                row |= {"item_init": kind[1], "titles beside counts": share, "flags": " ".join(flags)}
                same = ("model", "users", "seed", "item_init", "flags")  # an older row that tells no flags is replaced
                others = (old for old in report["rows"] if any(old.get(key, row[key]) != row[key] for key in same))
                report["rows"] = [*others, row]
                write_json(args.json, report)
                what = f"{label}, {kind[1]}, {percent} % of the users, seed {seed}"
                print(f"{what}: test NDCG@10 {row['NDCG@10']:.4f}", flush=True)


if __name__ == "__main__":
    main()
