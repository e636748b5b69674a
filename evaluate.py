"""What a ranking metric is, and how to time a model honestly.

    python evaluate.py                       # every run under runs/ml-1m, two baselines, each pair of runs compared
    python evaluate.py --bench --json bench.json

Scores models on the test part: for each user all items are ranked (without those seen, unless users repeat items), and
the place of the one that came next is looked up. HR is the hit rate, NDCG the normalised discounted cumulative gain,
MRR the mean reciprocal rank. With nothing trained, the released student is evaluated: on ML-1M NDCG@10 0.2090.
In order: ranks -> metrics -> bootstrap -> baselines -> `benchmark` of student.py's `TopK` -> the table -> the command.

Letters: B batch (users), T sequence length, S whole history, R targets, I items, E seeds, N draws.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import (
    PAD, SPLITS, InputError, Interactions, Spans, add_data_flags, at_once, batches, check_replaceable, command_line,
    data_flags, entries_of, item_counts, load_asked, ragged, run_command, write_json,
)  # fmt: skip
from prebert import PreBert, learning_curve, load_run, machine, pick_device, read_json, read_run, without_seed
from student import TopK, compile_ahead

Scorer = Callable[[Tensor], Tensor]  # history (B, T), left-padded, newest last -> scores (B, I) of items 1..I

# ---------------------------------------------------------------- ranks and metrics

MISS = 2**31  # the rank of a target PAD, which training never saw: no K reaches it


def target_ranks(scores: Tensor, targets: Tensor, seen: Tensor | None = None) -> Tensor:
    """Place of each target among all items, 1 is best, (B,).

    scores (B, I): column j is item j + 1. targets (B,): item ids. seen (B, S): ids to leave out, 0
    fills rows up; a target is never left out. Ties, and scores that are not numbers, count against
    the target, so that a scorer that says the same of everything gets nothing. A target PAD has the rank MISS.
    """
    target_scores = scores.gather(1, (targets[:, None] - 1).clamp(min=0))  # (B, 1)
    ahead = ~(scores < target_scores)  # true for ties, for nan and for the target itself
    if seen is not None:
        out = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        out.scatter_(1, seen, True).scatter_(1, targets[:, None], False)
        ahead &= ~out[:, 1:]
    return torch.where(targets == PAD, MISS, ahead.sum(1))


def hit_rate(ranks: Tensor, k: int) -> Tensor:
    """HR@k of each target: 1 if the target is among the first k. With one target, recall@k is the same."""
    return (ranks <= k).double()


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """NDCG@k of each target: 1 / log2(rank + 1) within the first k, else 0 (one target: the ideal is 1)."""
    return torch.where(ranks <= k, 1 / torch.log2(ranks.double() + 1), 0.0)


def metrics(ranks: Tensor) -> dict[str, float]:
    """Means over the targets with these ranks (R,): HR@K, which is Recall@K here, NDCG@K, MRR and MRR@20."""
    row = {f"HR@{k}": hit_rate(ranks, k) for k in (1, 5, 10, 20)} | {f"NDCG@{k}": ndcg(ranks, k) for k in (5, 10, 20)}
    row |= {"MRR": 1 / ranks.double(), "MRR@20": (ranks <= 20) / ranks.double(), "Recall@20": row["HR@20"]}
    return {name: of_targets.mean().item() for name, of_targets in row.items()}


@torch.inference_mode()
def rank_targets(
    score: Scorer, part: Spans, exclude_seen: bool, max_length: int, device: str | torch.device = "cpu", title: str = ""
) -> Tensor:
    """Rank of every target of a validation or test part, (R,), in its order.

    score reads at most the newest max_length items; what is left out as seen is the whole history.
    """
    ranks = torch.zeros(len(part.targets), dtype=torch.long)
    limits = at_once(torch.device(device), int(part.items.max()))  # the log holds every item
    # By lengths up to 200 even where a model reads less (baselines: one item), since whole histories are padded, too.
    sizes = part.sizes.clamp(max=max(max_length, 200))
    for rows in tqdm(batches(sizes, *limits), desc=title, leave=False, delay=1, disable=not title):
        seen = part.histories(rows, torch.device(device))  # (B, S)
        scores = score(seen[:, -max_length:])  # (B, I)
        targets = part.targets[rows].to(device)  # (B,)
        ranks[rows] = target_ranks(scores, targets, seen if exclude_seen else None).cpu()
    return ranks


# ---------------------------------------------------------------- bootstrap

DRAWS = 2000


def resampled(values: Tensor, owners: np.ndarray) -> np.ndarray:
    """Means of values (R,) over DRAWS resamples of the users, (N,).

    owners (R,): the user, from 0, of each value; a session with several questions is drawn as one. Calls with the same
    owners draw the same users, so that two models are compared on the same ones.
    """
    users, count, table, means = np.random.default_rng(0), owners.max() + 1, values.numpy(), np.empty(DRAWS)
    for draw in range(DRAWS):
        weights = np.bincount(users.integers(0, count, count), minlength=count)[owners]  # (R,)
        means[draw] = table @ weights / weights.sum()
    return means


def with_seeds(differences: np.ndarray, tables: list[Tensor]) -> np.ndarray:
    """Draws (N,) of the difference of two models, over users, with the error of their seeds added; tables (E, R) each.

    A mean of E seeds has the variance std^2 / E. Since std itself is a guess from few seeds, the draws follow Student's
    t with the degrees of freedom of Welch (1947), in which the variance over users counts as known.
    """
    variances = [(table.mean(1).var().item() / len(table), len(table) - 1) for table in tables if len(table) > 1]
    of_seeds, middle, random = sum(of_one for of_one, _ in variances), differences.mean(), np.random.default_rng(1)
    if not of_seeds:
        return differences
    freedom = (differences.var() + of_seeds) ** 2 / sum(of_one**2 / degrees for of_one, degrees in variances)
    freedom = min(freedom, 1e6)  # as good as infinitely many
    wide = differences - middle + of_seeds**0.5 * random.standard_normal(DRAWS)
    return middle + wide * (freedom / random.chisquare(freedom, DRAWS)) ** 0.5


def two_sided(differences: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0 by draws of it (N,), at least 2 / N."""
    share = max(min((differences <= 0).mean(), (differences >= 0).mean()), 1 / len(differences))
    return float(min(1.0, 2 * share))


# ---------------------------------------------------------------- baselines


def popularity(train: Spans, num_items: int) -> Scorer:
    """Score = how often an item occurs in the training part, the same for all users."""
    counts = item_counts(train, num_items).double()  # (I,)
    return lambda history: counts.expand(len(history), -1)


class Markov:
    """Score = how often an item came right after the newest one in the training part; popularity breaks ties."""

    def __init__(self, train: Spans, num_items: int):
        counts = item_counts(train, num_items).double()
        self.fallback = counts / (counts.sum() + 1)  # (I,) below one transition
        rows, entries = entries_of(train)
        before = entries[:-1][rows[1:] == rows[:-1]]  # a history's first item follows nothing
        pairs = train.items[before] * (num_items + 1) + train.items[before + 1]
        pairs, self.counts = torch.unique(pairs, return_counts=True)
        self.next = pairs % (num_items + 1) - 1  # of item i, from offsets[i] to offsets[i + 1], like counts
        self.offsets = torch.searchsorted(pairs, torch.arange(num_items + 2) * (num_items + 1))

    def followers(self, items: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """How often every item came right after each of these (B,), (B, I)."""
        rows, places = ragged(self.offsets[items + 1] - self.offsets[items])
        places += self.offsets[items][rows]
        counts = torch.zeros(len(items), len(self.fallback), dtype=dtype)  # (B, I)
        counts[rows, self.next[places]] = self.counts[places].to(dtype)
        return counts

    def __call__(self, history: Tensor) -> Tensor:
        return self.followers(history[:, -1], torch.float64).add_(self.fallback)


# ---------------------------------------------------------------- speed


def bench_inputs(model: PreBert, real: Tensor, size: int) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Batches of `size` made-up users, each as what `TopK` takes; lengths are quantiles of `real` (R,), shuffled."""
    generator, device = torch.Generator().manual_seed(0), model.item_bias.device
    users = max(32, size)
    quantiles = ((torch.arange(users) + 0.5) / users * len(real)).long()
    lengths = real.sort().values[quantiles][torch.randperm(users, generator=generator)]
    inputs, allowed = [], torch.ones(model.num_items + 2, dtype=torch.bool, device=device)
    for sizes in lengths.split(size):
        items, ends = torch.randint(1, model.num_items + 1, (int(sizes.sum()),), generator=generator), sizes.cumsum(0)
        people = Spans(items, ends - sizes, ends, items[:0])
        groups = batches(sizes.clamp(max=model.max_length), *at_once(device, model.num_items))
        histories = [people.histories(rows, device) for rows in groups]  # (B, S) each
        inputs.append([(model.question(history), history, allowed) for history in histories])
    return inputs


@torch.inference_mode()
def benchmark(models: dict[str, PreBert], real: Tensor, rounds: int = 6) -> list[dict]:
    """Time the top 10 of each model on its device, eager and compiled, by batch size and history length; a row each.

    Histories of 20 items, of 200, and with the lengths `real` (R,). What is compared is interleaved, round after round,
    so that a noisy machine disturbs all alike; the first round is the warm-up. p50 is the median of the rounds'
    medians, p95 and p99 (at least p50) are of all calls, users per second come from the median of the rounds' means.
    """
    cells: list[tuple[dict, Callable, list, list]] = []
    for name, model in tqdm(models.items(), desc="compiling"):
        graph = TopK(model, 10).eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            compiled = compile_ahead(graph, Path(folder) / "bench.pt2")
            seconds = time.perf_counter() - began
        longest = model.max_length - (not model.config.causal)
        lengths = {str(n): torch.tensor([n]) for n in (min(20, longest), min(200, longest))}
        lengths["real"] = real.clamp(max=longest)
        for size, (length, of_users) in itertools.product((1, 8, 64, 256), lengths.items()):
            inputs = bench_inputs(model, of_users, size)
            row = {"name": name, "batch_size": size, "length": length, "num_items": model.num_items}
            cells.append(({**row, "mode": "eager", "compile_and_load_s": 0.0}, graph, inputs, []))
            cells.append(({**row, "mode": "compiled", "compile_and_load_s": seconds}, compiled, inputs, []))
    for _ in tqdm(range(rounds), desc="timing, rounds"):
        for _, rank, inputs, times in cells:
            times.append([])
            turn, end = itertools.cycle(inputs), time.perf_counter() + 0.3
            while time.perf_counter() < end or len(times[-1]) < 2:
                began = time.perf_counter()
                for arguments in next(turn):
                    items = rank(*arguments)[1]
                if items.is_cuda:
                    torch.cuda.synchronize()
                times[-1].append(1000 * (time.perf_counter() - began))
    for row, _, _, all_times in cells:
        times = all_times[1:]  # without the warm-up
        row["p50_ms"] = float(np.median([np.median(part) for part in times]))
        row |= {f"p{q}_ms": max(row["p50_ms"], float(np.percentile(np.concatenate(times), q))) for q in (95, 99)}
        row["users_per_s"] = row["batch_size"] / float(np.median([np.mean(part) for part in times])) * 1000
    return [row for row, _, _, _ in cells]


def print_bench(rows: list[dict]) -> None:
    """The benchmark as a table: one line per model, mode, batch size and length."""
    print(f"\nlatency of the top 10, float32, {torch.get_num_threads()} threads")
    print(f"{'model':<24}{'mode':<10}{'batch':>6}{'length':>8}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'users/s':>10}"
          f"{'compile and load s':>20}")  # fmt: skip
    line = ("{name:<24}{mode:<10}{batch_size:>6}{length:>8}{p50_ms:>10.2f}{p95_ms:>10.2f}{p99_ms:>10.2f}"
            "{users_per_s:>10.0f}{compile_and_load_s:>20.1f}")  # fmt: skip
    for row in rows:
        print(line.format_map(row))


# ---------------------------------------------------------------- the table

RARE = 2  # clicks in the training part at most: targets like that are rare, and reported apart as well
# What the table shows of each split; the interval and the gain over the better baseline are those of NDCG@10.
SHOWN = {"last": ("HR@1", "HR@5", "HR@10", "MRR", "NDCG@10"), "sessions": ("Recall@20", "MRR@20", "HR@10", "NDCG@10")}


def print_table(rows: list[dict], split: str) -> None:
    """One line per model."""
    names = SHOWN[split.removesuffix("-final")]
    columns = "".join(f"{name:>10}" for name in names)
    print(f"\n{'model':<24}{'params':>12}{'MB':>7}{columns}{'95 % interval':>16}{'over baseline':>15}")
    best = max(row["NDCG@10"] for row in rows if row["name"] in ("popularity", "markov"))
    for row in rows:
        low, high = row["ci95"]
        sizes = f"{row['params']:>12,}{row['mb']:>7.1f}" if "mb" in row else " " * 19
        gain = f"{row['NDCG@10'] / best - 1:+.1%}" if best > 0 else "-"
        values = "".join(f"{row[name]:>10.4f}" for name in names)
        print(f"{row['name']:<24}{sizes}{values}{f'{low:.4f}-{high:.4f}':>16}{gain:>15}")


def compare(values: dict[str, list[Tensor]], owners: np.ndarray) -> tuple[list[dict], dict[str, dict]]:
    """Every pair of models by the mean over users and seeds, with p: bootstrap over users, Welch's t for seeds.

    values: {model: NDCG@10 of each target (R,), one tensor per seed}; owners as in `resampled`. Prints and returns
    gains, None over a model that has nothing, and {model: seeds, mean and standard deviation of NDCG@10 over seeds}.
    A gain's interval is that of the difference, as a share of the worse model's mean.
    """
    tables = {name: torch.stack(parts) for name, parts in values.items()}  # (E, R) each
    draws = {name: resampled(table.mean(0), owners) for name, table in tables.items()}
    seeds = {}
    for name, table in tables.items():
        if len(table) > 1:
            means = table.mean(1)
            seeds[name] = {"seeds": len(means), "mean": means.mean().item(), "std": means.std().item()}
            print(f"{name}: NDCG@10 {means.mean():.4f} +- {means.std():.4f} over {len(means)} seeds")
    pairs: list[dict] = []
    for pair in itertools.combinations(tables, 2):
        better, worse = sorted(pair, key=lambda name: -tables[name].mean().item())
        base = tables[worse].mean().item()
        differences = with_seeds(draws[better] - draws[worse], [tables[better], tables[worse]])
        gain, interval, shown = None, None, "undefined gain in NDCG@10"
        if base:
            gain = tables[better].mean().item() / base - 1
            interval = (np.percentile(differences, [2.5, 97.5]) / base).tolist()
            shown = f"{gain:+.2%} NDCG@10, 95 % interval {interval[0]:+.1%} to {interval[1]:+.1%}"
        p = two_sided(differences)
        print(f"{better} over {worse}: {shown}, p {'<=' if p <= 2 / DRAWS else '='} {p:.3f}")
        pairs.append({"better": better, "worse": worse, "gain": gain, "ci95": interval, "p": p})
    return pairs, seeds


def find_runs(runs: list[str] | None, data: Interactions) -> dict[str, tuple[PreBert, dict, dict]]:
    """Model, config and what is known of the runs asked for, else all of this dataset's, else the released one.

    Keys are their names in the table. Of all of a dataset, teachers first, what cannot be loaded, was trained on
    another log or held out something else is skipped, and a line says so; where nothing is left, that is an InputError.
    """
    trained = [path.parent for path in Path("runs", data.name).glob("*/model.safetensors")]
    trained.sort(key=lambda run: (not run.name.startswith("teacher"), run))
    paths = [Path(run) for run in runs or trained]
    released = Path(__file__).parent / "results" / data.name / "student"
    if not paths and released.is_dir() and read_run(released)[0].get("fingerprint") == data.fingerprint:
        print(f"nothing is trained under runs/{data.name} yet: evaluating the released student, {released}")
        paths = [released]
    found: dict[str, tuple[PreBert, dict, dict]] = {}
    for run in paths:
        try:
            model, config, _ = load_run(run, data)
            made = read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
            made |= {"curve": learning_curve(run)} if (run / "log.csv").exists() else {}
        except (InputError, OSError) as error:
            if runs or (run == paths[-1] and not found):  # asked for by name, or nothing else is left
                raise
            print(f"skipped {error}")
            continue
        params = sum(parameter.numel() for parameter in model.parameters())
        row: dict = {"params": params}
        row["mb"] = (run / "model.safetensors").stat().st_size / 1e6
        row |= {key: config[key] for key in ("command", "seed", "commit", "machine") if key in config}
        row |= {key: made[key] for key in ("minutes", "cpu_minutes", "peak_memory_gb", "steps", "curve") if key in made}
        name = str(run.resolve()) if run.name in (*found, "popularity", "markov") else run.name
        found[name] = model, config, row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on the test part, and with --bench latency.")
    add_data_flags(parser)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="RUN", help="run folders (default: all under runs/<data>, else the released one)")
    add("--valid", action="store_true", help="the validation part instead of test: to choose between models")
    add("--final", action="store_true", help="of runs <name>-final, which were trained on validation too")
    add("--bench", action="store_true", help="also time every run")
    add("--json", type=Path, metavar="FILE", help="write everything to this file")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    if args.json:
        check_replaceable(args.json, '{\n "data": {')
    data, device = load_asked(args), pick_device(args.device)
    train, valid, test = SPLITS[data.split](data)
    part = valid if args.valid else test
    if not len(part.targets):
        raise InputError(f"{data.name}: no targets: no user has three items, no session two, or --final leaves nothing")
    owners = np.unique(part.starts.numpy(), return_inverse=True)[1]  # (R,)
    rare = (part.targets > 0) & (item_counts(train, data.num_items)[part.targets - 1] <= RARE)  # (R,)
    loaded = find_runs(args.runs, data)
    protocol = f"VALIDATION part, for choosing between models; {data.protocol}" if args.valid else data.protocol
    print(f"{data.name}: {len(part.targets):,} {'validation' if args.valid else 'test'} targets; {protocol}")
    rows: list[dict] = []

    def evaluate(name: str, score: Scorer, longest: int, where: str | torch.device, **row: object) -> Tensor:
        """Append a row to the table; returns NDCG@10 of each target, (R,)."""
        ranks = rank_targets(score, part, data.exclude_seen, longest, where, title=name)
        of_targets = ndcg(ranks, 10)  # (R,)
        interval = np.percentile(resampled(of_targets, owners), [2.5, 97.5]).tolist()
        apart = {"rare targets": int(rare.sum()), "rare NDCG@10": of_targets[rare].mean().item()} if rare.any() else {}
        rows.append({"name": name, **row, **metrics(ranks), "ci95": interval, **apart})
        return of_targets

    evaluate("popularity", popularity(train, data.num_items), 1, "cpu")
    evaluate("markov", Markov(train, data.num_items), 1, "cpu")
    values: dict[str, dict[int, Tensor]] = {}  # {model: {seed: NDCG@10 of each target}}
    first: dict[str, str] = {}  # runs that differ in the seed alone are one model, under the first one's name
    for name, (model, config, row) in loaded.items():
        of_targets = evaluate(name, model.to(device).score_next, model.max_length, device, **row)
        model_name = first.setdefault(without_seed(config), name)
        if config["seed"] in values.get(model_name, {}):  # the same seed twice: a model of its own
            model_name = name
        values.setdefault(model_name, {})[config["seed"]] = of_targets
    print_table(rows, data.split)
    pairs, seeds = compare({name: list(of_seeds.values()) for name, of_seeds in values.items()}, owners)
    log = {"name": data.name, "users": data.num_users, "items": data.num_items, "interactions": len(data.items)}
    report: dict = {"data": log | {"taken": data.taken}, "protocol": protocol, "machine": machine(), "rows": rows}
    report |= {"comparisons": pairs, "seeds": seeds}
    if args.bench and loaded:
        if args.json:  # what is known is kept where nothing can be compiled
            write_json(args.json, report)
        report["bench"] = benchmark({name: model for name, (model, _, _) in loaded.items()}, part.sizes)
        print_bench(report["bench"])
    if args.json:
        write_json(args.json, report)
        print(f"written to {args.json}")
    if not loaded:
        args.final = False  # a run that is validated comes first: it tells the epochs of a final one
        print(f"no runs under runs/{data.name} yet; next:", command_line("teacher.py", *data_flags(args)))


if __name__ == "__main__":
    run_command(main)
