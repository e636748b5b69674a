"""What a ranking metric is, and how to time a model honestly.

    python evaluate.py --data ml-1m                       # every run under runs/ml-1m, and two baselines
    python evaluate.py --data ml-1m --bench --json results/ml-1m/bench.json

scores models on the test part: for each user all items are ranked, those already seen left out,
and the place of the one that came next is looked up. In order: ranks -> metrics -> intervals ->
baselines -> `benchmark` -> the table.

Letters: B batch (users), T sequence length, R users asked about, I items.
"""

import argparse
import csv
import html
import itertools
import json
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (
    InputError, Interactions, Split, add_data_flags, histories, leave_one_out, load_dataset, positive, run_command,
    write_atomic,
)  # fmt: skip
from prebert import PreBert
from student import MiniBert, TopK, at_once, compile_ahead, load_run, pick_device, read_json

PUBLISHED = 0.1537  # NDCG@10 of BERT4Rec trained to convergence on ML-1M (Klenitskiy & Vasilev 2023), our time mark
Scorer = Callable[[Tensor], Tensor]  # history (B, T), left-padded, newest last -> scores (B, I) of items 1..I

# ---------------------------------------------------------------- ranks and metrics


def target_ranks(scores: Tensor, targets: Tensor, seen: Tensor | None = None) -> Tensor:
    """Place of each target among all items, 1 is best, (B,).

    scores (B, I): column j is item j + 1. targets (B,): item ids. seen (B, S): ids to leave out, 0
    fills rows up; a target is never left out. Ties, and scores that are not numbers, count against
    the target, so that a scorer that says the same of everything gets nothing.
    """
    target_scores = scores.gather(1, targets[:, None] - 1)  # (B, 1)
    ahead = ~(scores < target_scores)  # true for ties, for nan and for the target itself
    if seen is not None:
        out = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        out.scatter_(1, seen, True).scatter_(1, targets[:, None], False)
        ahead &= ~out[:, 1:]
    return ahead.sum(1)


def hit_rate(ranks: Tensor, k: int) -> Tensor:
    """HR@k of each user: 1 if the target is among the first k. With one target, recall@k is the same."""
    return (ranks <= k).double()


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """NDCG@k of each user: 1 / log2(rank + 1) within the first k, else 0 (one target: the ideal is 1)."""
    return torch.where(ranks <= k, 1 / torch.log2(ranks.double() + 1), 0.0)


def metrics(ranks: Tensor) -> dict[str, float]:
    """Means over users of HR@{1,5,10,20}, NDCG@{5,10,20} and MRR from ranks (R,)."""
    row = {f"HR@{k}": hit_rate(ranks, k).mean().item() for k in (1, 5, 10, 20)}
    row |= {f"NDCG@{k}": ndcg(ranks, k).mean().item() for k in (5, 10, 20)}
    return row | {"MRR": (1 / ranks.double()).mean().item()}


@torch.inference_mode()
def evaluate(
    score: Scorer, split: Split, exclude_seen: bool, *, max_length: int | None = None,
    device: str | torch.device = "cpu", negatives: Callable[[Tensor, Tensor], Tensor] | None = None, title: str = "",
) -> Tensor:  # fmt: skip
    """Rank of every target of a validation or test split, (R,), in the split's order.

    score reads at most the newest max_length items (None: all); what is left out as seen is the whole history.
    negatives(targets (B,), seen (B, S)) -> item ids (B, n): rank among these instead of all items.
    """
    ranks = torch.zeros(len(split.targets), dtype=torch.long)
    longest, limits = max_length or len(split.items), at_once(torch.device(device), int(split.items.max()))
    bar = tqdm(total=len(ranks), desc=title, leave=False, disable=not title)
    for rows, history in histories(split.items, split.starts, split.ends, longest, *limits):
        seen, targets = history.to(device), split.targets[rows].to(device)  # (B, S), (B,)
        scores = score(seen[:, -longest:]).float()  # (B, I)
        if negatives is not None:
            sample = torch.cat([targets[:, None].cpu(), negatives(targets.cpu(), seen.cpu())], dim=1).to(device)
            ranks[rows] = target_ranks(scores.gather(1, sample - 1), torch.ones_like(targets)).cpu()
        else:
            ranks[rows] = target_ranks(scores, targets, seen if exclude_seen else None).cpu()
        bar.update(len(rows))
    bar.close()
    return ranks


def sample_negatives(weights: Tensor, count: int, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Draw `count` distinct unseen items per user with probability proportional to weights (I,)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(targets: Tensor, seen: Tensor) -> Tensor:
        allowed = F.pad(weights, (1, 0)).repeat(len(targets), 1)  # (B, I + 1)
        allowed.scatter_(1, seen, 0.0).scatter_(1, targets[:, None], 0.0)
        if int((allowed > 0).sum(1).min()) < count:
            raise InputError(f"--sampled: a user has fewer than {count} unseen items to sample from")
        return torch.multinomial(allowed, count, generator=generator)

    return draw


def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of `draws` resamples of users, (draws,): the spread that another set of users would show."""
    random = np.random.default_rng(seed)
    users = len(values)
    return np.array([values.numpy()[random.integers(0, users, users)].mean() for _ in range(draws)])


def paired_p(better: Tensor, worse: Tensor) -> float:
    """Two-sided bootstrap p-value of mean(better - worse) = 0 over the same users, at least 1 / 2000."""
    means = bootstrap(better - worse)
    return float(min(1.0, 2 * max(min((means <= 0).mean(), (means >= 0).mean()), 1 / len(means))))


# ---------------------------------------------------------------- baselines


class Popularity:
    """Score = how often an item occurs in the training part, whoever asks."""

    def __init__(self, train: Split, num_items: int):
        owned = torch.zeros(len(train.items) + 1, dtype=torch.long)
        owned.index_add_(0, train.starts, torch.ones_like(train.starts))
        owned.index_add_(0, train.ends, -torch.ones_like(train.ends))
        self.inside = owned.cumsum(0)[:-1] > 0  # (L,) entries that belong to the training part
        self.counts = torch.bincount(train.items[self.inside], minlength=num_items + 1)[1:].double()  # (I,)

    def __call__(self, history: Tensor) -> Tensor:
        return self.counts.expand(len(history), -1)


class Markov:
    """Score = how often an item came right after the user's newest one; popularity breaks ties."""

    def __init__(self, train: Split, num_items: int):
        popularity = Popularity(train, num_items)
        self.fallback = popularity.counts / (popularity.counts.sum() + 1)  # (I,) below one transition
        follows = popularity.inside[1:] & popularity.inside[:-1]
        begins = torch.zeros(len(train.items), dtype=torch.bool)
        begins[train.starts] = True
        follows &= ~begins[1:]  # the next user's first item follows nothing
        pairs = train.items[:-1][follows] * (num_items + 1) + train.items[1:][follows]
        pairs, self.counts = torch.unique(pairs, return_counts=True)
        self.next = pairs % (num_items + 1) - 1
        self.offsets = torch.searchsorted(pairs, torch.arange(num_items + 2) * (num_items + 1))

    def __call__(self, history: Tensor) -> Tensor:
        scores = self.fallback.repeat(len(history), 1)  # (B, I)
        for row, item in zip(scores, history[:, -1].tolist(), strict=True):
            begin, end = self.offsets[item], self.offsets[item + 1]
            row[self.next[begin:end]] += self.counts[begin:end]
        return scores


# ---------------------------------------------------------------- speed


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the best of 20 calls."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def peak_gflops() -> float:
    """The machine's rate of float32 matrix products as PyTorch reaches it, in GFLOP/s."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / fastest(lambda: a @ b) / 1e9


def peak_gb_per_s() -> float:
    """How fast this machine reads memory, in GB/s: the sum of half a GB of numbers."""
    numbers = torch.ones(2**27)
    return 4 * len(numbers) / fastest(numbers.sum) / 1e9


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in a call; PyTorch's counter misses the fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def extra_memory_gb(call: Callable[[], object]) -> float | None:
    """GiB that this process needs at most while `call` runs, beyond what it held; None where Linux does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    reset.write_text("5")  # the peak that the kernel remembers becomes what is held now
    before = re.search(r"VmHWM:\s*(\d+)", status.read_text())
    call()
    after = re.search(r"VmHWM:\s*(\d+)", status.read_text())
    return (int(after[1]) - int(before[1])) / 2**20 if before and after else None


Groups = list[tuple[Tensor, Tensor]]  # what `TopK` takes, for each group that `histories` makes of a batch


def rank_all(graph: Callable, groups: Groups) -> None:
    for group in groups:
        graph(*group)


def prepare(plain: TopK, known: Tensor, size: int) -> tuple[dict, list[Groups]]:
    """What is said of a cell before it is timed, and its inputs: batches of `size` made-up histories.

    Their lengths are quantiles of `known` (R,), in random order.
    """
    model, random, inputs = plain.model, torch.Generator().manual_seed(0), []
    users = max(32, size)
    quantiles = (torch.arange(users) + 0.5) / users * len(known)
    lengths = known.sort().values[quantiles.long()][torch.randperm(users, generator=random)]
    limits = at_once(torch.device("cpu"), model.num_items)
    for sizes in lengths.split(size):
        entries = torch.randint(1, model.num_items + 1, (int(sizes.sum()),), generator=random)
        ends = sizes.cumsum(0)
        groups = histories(entries, ends - sizes, ends, model.max_length, *limits)
        inputs.append([(model.question(history), history) for _, history in groups])
    flops = sum(count_flops(partial(rank_all, plain, batch)) for batch in inputs)
    weights = sum(parameter.numel() for parameter in model.parameters())
    facts = {"batch_size": size, "num_items": model.num_items, "weights_gb": 4 * weights / 1e9}
    return facts | {"flops_per_user": flops / users}, inputs


def bench_cells(name: str, model: PreBert, sizes: tuple[int, ...], lengths: dict[object, Tensor]) -> list[tuple]:
    """Every mode, batch size and kind of history of one model, compiled once for all shapes.

    lengths: {what the cell is called: the lengths that histories have}.
    Returns (row, a call that ranks the next batch, room for times) a cell.
    """
    cells: list[tuple] = []
    plain = TopK(model, min(10, model.num_items), True).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        compiled = compile_ahead(plain, Path(folder) / "bench.pt2")
        seconds = time.perf_counter() - began
    for size, (length, known) in itertools.product(sizes, lengths.items()):
        cell, inputs = prepare(plain, known, size)
        for mode, graph, cost in (("eager", plain, 0.0), ("compiled", compiled, seconds)):
            row = {"name": name, "mode": mode, "length": length, "compile_s": cost, **cell}
            began = time.perf_counter()
            for batch in inputs[:2]:
                rank_all(graph, batch)
            row["warm_up_s"] = time.perf_counter() - began
            row["extra_memory_gb"] = extra_memory_gb(partial(rank_all, graph, inputs[0]))
            turn = itertools.cycle(inputs)
            cells.append((row, lambda graph=graph, turn=turn: rank_all(graph, next(turn)), []))
    return cells


@torch.inference_mode()
def benchmark(
    models: dict[str, PreBert], real: Tensor, sizes: tuple[int, ...] = (1, 8, 64, 256), rounds: int = 5
) -> list[dict]:
    """Time the top 10 of each model on the CPU, eager and compiled, by batch size and history length.

    Histories of 20 items, of 200, and with the lengths `real` (R,). What is compared is interleaved, round after
    round, so that a noisy machine disturbs all alike; p50 is the median over rounds of the rounds' medians, and users
    a second come from the median of the rounds' means. Compiling and warming up are timed apart. A row a cell.
    """
    cells = []
    for name, model in tqdm(models.items(), desc="compiling"):
        longest = model.max_length - (not model.config.causal)
        lengths: dict[object, Tensor] = {n: torch.tensor([n]) for n in (min(20, longest), min(200, longest))}
        cells += bench_cells(name, model, sizes, {**lengths, "real": real.clamp(max=longest)})
    peak, bandwidth = peak_gflops(), peak_gb_per_s()
    for _ in tqdm(range(rounds), desc="timing, rounds"):
        for _, call, times in cells:
            times.append([])
            end = time.perf_counter() + 0.3
            while time.perf_counter() < end or len(times[-1]) < 2:
                began = time.perf_counter()
                call()
                times[-1].append(1000 * (time.perf_counter() - began))
    for row, _, times in cells:
        row["p50_ms"] = float(np.median([np.median(part) for part in times]))
        row |= {f"p{q}_ms": max(row["p50_ms"], float(np.percentile(np.concatenate(times), q))) for q in (95, 99)}
        row["users_per_s"] = row["batch_size"] / float(np.median([np.mean(part) for part in times])) * 1000
        row["fraction_of_peak"] = row["flops_per_user"] * row["users_per_s"] / (peak * 1e9)
        row["fraction_of_bandwidth"] = row["weights_gb"] / row["p50_ms"] * 1000 / bandwidth
        row |= {"peak_gflops": peak, "peak_gb_per_s": bandwidth}
    return [row for row, _, _ in cells]


def print_bench(rows: list[dict]) -> None:
    """The benchmark as a table, a line a cell."""
    print(f"\nlatency of the top 10, float32, {torch.get_num_threads()} threads; the machine multiplies matrices at "
          f"{rows[0]['peak_gflops']:.0f} GFLOP/s and reads {rows[0]['peak_gb_per_s']:.0f} GB/s")  # fmt: skip
    print(f"{'model':<24}{'mode':<10}{'batch':>6}{'length':>8}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'users/s':>10}"
          f"{'MFLOP/user':>12}{'of peak':>9}{'of reading':>12}{'MiB':>7}{'compile s':>11}")  # fmt: skip
    for row in rows:
        memory = "-" if row["extra_memory_gb"] is None else f"{1024 * row['extra_memory_gb']:.0f}"
        print(
            f"{row['name']:<24}{row['mode']:<10}{row['batch_size']:>6}{row['length']:>8}{row['p50_ms']:>10.2f}"
            f"{row['p95_ms']:>10.2f}{row['p99_ms']:>10.2f}{row['users_per_s']:>10.0f}"
            f"{row['flops_per_user'] / 1e6:>12.0f}{row['fraction_of_peak']:>9.0%}{row['fraction_of_bandwidth']:>12.0%}"
            f"{memory:>7}{row['compile_s']:>11.1f}"
        )


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#999999")


def plot_svg(lines: dict[str, list[tuple[float, float]]], title: str, x_name: str, y_name: str, log_y: bool) -> str:
    """Lines through points {name: [(x, y), ...]} as SVG text, x logarithmic and with `log_y` y too.

    Runs that differ in the seed alone look alike and share a legend entry.
    """
    log = np.array([True, log_y])
    points = {name: np.log10(line, where=log, out=np.array(line, float)) for name, line in lines.items()}  # (points, 2)
    values = np.concatenate([*points.values()])
    low, span = values.min(0), np.ptp(values, axis=0).clip(1e-9)
    text = '<text x="{:.0f}" y="{:.0f}" text-anchor="{}" {}>{}</text>'.format
    parts = [
        text(270, 25, "middle", 'font-weight="bold"', title), text(270, 372, "middle", "", x_name),
        text(18, 195, "middle", 'transform="rotate(-90 18 195)"', y_name),
        '<path d="M70 330H480M70 330V55" stroke="#000" fill="none"/>',
    ]  # fmt: skip
    for share in np.linspace(0, 1, 5):
        ticks = np.where(log, 10 ** (low + share * span), low + share * span)
        x, y = (f"{tick:,.0f}" if tick >= 1000 else f"{tick:.3g}" for tick in ticks)
        parts += [text(70 + 400 * share, 348, "middle", "", x), text(64, 334 - 270 * share, "end", "", y)]
    kinds = list(dict.fromkeys(without_seed(name) for name in lines))
    looks = [f'stroke="{COLOURS[i % 8]}" stroke-dasharray="{"none" if i < 8 else "5 3"}"' for i in range(len(kinds))]
    for name, line in points.items():
        look = looks[kinds.index(without_seed(name))]
        spots = [(70 + 400 * x, 330 - 270 * y) for x, y in ((line - low) / span).tolist()]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" {look} stroke-width="1.5" fill="none"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#fff" {look}/>' for x, y in spots]
    for i, (kind, look) in enumerate(zip(kinds, looks, strict=True)):
        height = 70 + min(20, 280 / len(kinds)) * i
        parts.append(f'<path d="M490 {height - 4:.0f}h25" {look} stroke-width="2"/>')
        parts.append(text(522, height, "start", "", html.escape(kind)))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 385" font-family="sans-serif" font-size="12">'
            f'<rect width="740" height="385" fill="#fff"/>{"".join(parts)}</svg>\n')  # fmt: skip


def pictures(report: dict, runs: list[Path]) -> dict[str, str]:
    """SVG texts by name: learning curves of the runs, and with a benchmark latency and accuracy against it."""
    curves = {run.name: [(max(x, 1e-3), y) for x, y in line] for run in runs if (line := read_log(run))}
    found = {}
    if curves:
        found["curves"] = plot_svg(curves, "learning curves", "minutes of training", "validation NDCG@10", log_y=False)
    latency: dict[str, list[tuple[float, float]]] = {}
    quality = {row["name"]: row["NDCG@10"] for row in report["rows"]}
    trade = {}
    for row in report.get("bench", []):
        if row["mode"] == "compiled" and row["name"] in quality:
            if row["length"] != "real":
                name = f"{row['name']}, {row['length']} items"
                latency.setdefault(name, []).append((row["batch_size"], row["p50_ms"]))
            elif row["batch_size"] == 1:
                trade[row["name"]] = [(row["p50_ms"], quality[row["name"]])]
    if latency:
        found["latency"] = plot_svg(latency, "top 10, compiled, median", "users in a batch", "milliseconds", log_y=True)
        found["trade"] = plot_svg(
            trade, "accuracy against speed", "median ms for one user, real lengths", "test NDCG@10", log_y=False
        )
    return found


# ---------------------------------------------------------------- the table


def machine() -> dict:
    """What a reader must know to compare times."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "gpu": gpu}


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@torch.inference_mode()
def step_flops(model: PreBert, tokens: int, rate: float, negatives: int | None) -> float:
    """FLOPs of a training step on `tokens` positions in full rows; the backward pass is two forward passes."""
    length, columns = model.max_length, negatives or model.num_items
    row = torch.ones(1, length, dtype=torch.long, device=model.item_bias.device)  # (1, T)
    positions = torch.arange(max(1, round(rate * length)), device=row.device)[None]  # (1, M)
    head = 2 * positions.numel() * columns * model.config.hidden_size
    return 3 * (count_flops(lambda: model(row, positions)) + head) * tokens / length


def read_log(run: Path) -> list[tuple[float, float]]:
    """Minutes and validation NDCG@10 of each evaluation in a run's log.csv; none if it is not there."""
    if not (run / "log.csv").exists():
        return []
    with open(run / "log.csv", newline="") as file:
        try:
            return [(float(row["minutes"]), float(row["valid_NDCG@10"])) for row in csv.DictReader(file)]
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise InputError(f"{run / 'log.csv'} is not as training wrote it ({error}); delete it") from error


def run_row(run: Path, name: str, model: PreBert, config: dict) -> dict:
    """What is known of a run before it is evaluated: its size, how it was made, and what that has cost."""
    made = read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
    params = sum(parameter.numel() for parameter in model.parameters())
    row = {"name": name, "params": params, "body_params": params - model.item_embedding.weight.numel()}
    row["mb"] = (run / "model.safetensors").stat().st_size / 1e6
    row |= {key: config[key] for key in ("command", "seed", "commit", "machine") if key in config}
    costs = ("minutes", "cpu_minutes", "peak_memory_gb", "steps", "flops_per_step")
    row |= {key: made[key] for key in costs if key in made}
    reached = [minutes for minutes, quality in read_log(run) if quality >= PUBLISHED]
    return row | {"minutes_to_published": min(reached, default=None)}


def check_catalogue(run: Path, catalogue: dict, config: dict, data: Interactions) -> None:
    """InputError unless a run was trained on this very catalogue."""
    if catalogue["raw_ids"] != data.raw_ids:
        raise InputError(
            f"{run} was trained on another catalogue ({config.get('data')}, {len(catalogue['raw_ids']) - 1:,} items; "
            f"{data.name} has {data.num_items:,}); pass the same --data and --min-count"
        )


def print_table(rows: list[dict]) -> None:
    """One line a model."""
    print(
        f"\n{'model':<24}{'params':>12}{'MB':>7}{'HR@1':>8}{'HR@5':>8}{'HR@10':>8}{'NDCG@10':>9}"
        f"{'95 % interval':>16}{'MRR':>8}{'on baseline':>15}"
    )
    best = max(row["NDCG@10"] for row in rows if row["name"] in ("popularity", "markov"))
    for row in rows:
        low, high = row["ci95"]
        sizes = f"{row['params']:>12,}{row['mb']:>7.1f}" if "mb" in row else " " * 19
        gain = f"{row['NDCG@10'] / best - 1:+.1%}" if best > 0 else "-"
        print(
            f"{row['name']:<24}{sizes}{row['HR@1']:>8.4f}{row['HR@5']:>8.4f}{row['HR@10']:>8.4f}"
            f"{row['NDCG@10']:>9.4f}{f'{low:.4f}-{high:.4f}':>16}{row['MRR']:>8.4f}{gain:>15}"
        )


def without_seed(name: str) -> str:
    """What runs that differ in the seed alone are called together: teacher, teacher-s1, ... are teacher."""
    return re.sub(r"-s\d+$", "", name)


def by_seed(ranks: dict[str, Tensor]) -> dict[str, Tensor]:
    """NDCG@10 of each user, of runs that differ in the seed alone, (seeds, R) a name."""
    found: dict[str, list[Tensor]] = {}
    for name, places in ranks.items():
        found.setdefault(without_seed(name), []).append(ndcg(places, 10))
    return {name: torch.stack(parts) for name, parts in found.items()}


def compare(ranks: dict[str, Tensor], rows: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """Means over seeds; teachers against each other and the controls, students against teachers and their equals.

    Prints and returns gains with paired bootstrap p over the same users, each user's value being the mean over
    seeds; and {name: seeds, mean and standard deviation of NDCG@10 over seeds}.
    """
    values, sizes = by_seed(ranks), {without_seed(row["name"]): row.get("params") for row in rows}
    seeds = {}
    for name, table in values.items():
        means = table.mean(1)
        if len(means) > 1:
            seeds[name] = {"seeds": len(means), "mean": means.mean().item(), "std": means.std().item()}
            print(f"{name}: NDCG@10 {means.mean():.4f} +- {means.std():.4f} over {len(means)} seeds")
    controls = [name for name in values if name.startswith("student-no-kd")]
    teachers = [name for name in values if name.startswith("teacher")]
    students = [name for name in values if name.startswith("student") and name not in controls]
    alike = [*itertools.product(students, controls), *itertools.combinations(students, 2)]
    pairs = [*itertools.combinations(teachers, 2), *itertools.product(teachers, controls)]
    pairs += itertools.product(students, teachers)
    pairs += [(a, b) for a, b in alike if sizes[a] == sizes[b]]
    found: list[dict] = []
    for better, worse in pairs:
        a, b = values[better].mean(0), values[worse].mean(0)
        gain, p = (a.mean() / b.mean() - 1).item(), paired_p(a, b)
        print(f"{better} over {worse}: {gain:+.2%} NDCG@10, paired bootstrap p = {p:.4f}")
        found.append({"better": better, "worse": worse, "gain": gain, "p": p})
    return found, seeds


def find_runs(args: argparse.Namespace, data: Interactions) -> list[Path]:
    """The run folders asked for, or all of this dataset's, the teacher first."""
    if args.runs:
        return [Path(run) for run in args.runs]
    folder = Path("runs") / data.name
    runs = sorted(path.parent for path in folder.glob("*/model.safetensors"))
    return sorted(runs, key=lambda run: not run.name.startswith("teacher"))


def evaluate_all(args: argparse.Namespace, data: Interactions) -> tuple[dict, dict[str, PreBert], dict[str, Tensor]]:
    """Report, models and ranks of the baselines and the runs asked for, on the test part, or on validation."""
    train, valid, test = leave_one_out(data)
    asked = valid if args.valid else test
    if not len(asked.targets):
        raise InputError(f"{data.name}: no user has three items, so there is nothing to evaluate")
    popularity, device = Popularity(train, data.num_items), pick_device(args.device)
    scorers: dict[str, tuple[dict, Scorer]] = {
        "popularity": ({}, popularity), "markov": ({}, Markov(train, data.num_items))
    }  # fmt: skip
    models = {}
    for run in find_runs(args, data):
        model, config, catalogue = load_run(run)
        check_catalogue(run, catalogue, config, data)
        name = run.name if run.name not in scorers else str(run)
        models[name] = model.to(device)
        scorers[name] = (run_row(run, name, model, config), model.score_next)
    protocol, negatives = data.protocol, None
    if args.sampled:
        protocol = f"SAMPLED: 100 {args.sampled} negatives, seed {args.sample_seed}; not comparable with full ranking"
    if args.valid:
        protocol = f"VALIDATION part, for choosing between models; {protocol}"
    print(f"{data.name}: {len(asked.targets):,} {'validation' if args.valid else 'test'} users; {protocol}")
    rows, ranks = [], {}
    for name, (row, score) in scorers.items():
        if args.sampled:  # the same draws for every model
            weights = popularity.counts.float() if args.sampled == "popularity" else torch.ones(data.num_items)
            negatives = sample_negatives(weights, 100, args.sample_seed)
        where, longest = (device, models[name].max_length) if name in models else ("cpu", 1)
        ranks[name] = evaluate(
            score, asked, not data.repeats, max_length=longest, device=where, negatives=negatives, title=name
        )
        interval = np.percentile(bootstrap(ndcg(ranks[name], 10)), [2.5, 97.5]).tolist()
        rows.append({"name": name, **row, **metrics(ranks[name]), "ci95": interval})
    size = {"users": data.num_users, "items": data.num_items, "interactions": len(data.items), "lines": data.counts}
    report = {"data": {"name": data.name, **size}, "protocol": protocol, "machine": machine(), "rows": rows}
    return report, models, ranks


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on the test part, and with --bench latency.")
    add_data_flags(parser)
    add = parser.add_argument
    add("--runs", nargs="+", metavar="RUN", help="run folders (default: all under runs/<data>)")
    add("--sampled", choices=("uniform", "popularity"),
        help="rank among 100 sampled negatives, to compare with older papers only")  # fmt: skip
    add("--valid", action="store_true", help="the validation part instead of test: to choose between models")
    add("--sample-seed", type=int, default=0, help="seed of --sampled")
    add("--bench", action="store_true", help="also time every run")
    add("--bench-items", nargs="+", type=positive, default=[], metavar="N",
        help="with --bench: also time a small student, random weights, over a catalogue of N items")  # fmt: skip
    add("--json", type=Path, help="write everything to this file")
    add("--device", default="auto")
    args = parser.parse_args()
    if args.bench_items and not args.bench:
        parser.error("--bench-items is for --bench")
    data = load_dataset(args.data, args.root, args.min_count, args.fraction)
    report, models, ranks = evaluate_all(args, data)
    print_table(report["rows"])
    report["comparisons"], report["seeds"] = compare(ranks, report["rows"])
    if args.bench and models:
        _, _, test = leave_one_out(data)
        real = test.ends - test.starts
        report["bench"] = benchmark({name: model.cpu() for name, model in models.items()}, real)
        large: dict[str, PreBert] = {
            f"small, {count:,} items": MiniBert("small", count, 200, True) for count in args.bench_items
        }
        report["bench"] += benchmark(large, real, sizes=(1, 256)) if large else []
        report["peak_gflops"] = report["bench"][0]["peak_gflops"]
        report["peak_memory_gb"] = peak_memory_gb()
        print_bench(report["bench"])
    if args.json:
        write_atomic(args.json, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
        drawn = pictures(report, find_runs(args, data))
        for name, text in drawn.items():
            write_atomic(args.json.with_name(f"{args.json.stem}-{name}.svg"), partial(Path.write_text, data=text))
        print(f"written to {args.json}" + "".join(f", {args.json.stem}-{name}.svg" for name in drawn))
    if not models:
        print(f"no runs under runs/{data.name} yet; next: python teacher.py --data {args.data}")


if __name__ == "__main__":
    run_command(main)
