"""Would narrower numbers serve as well? `python tests/narrow.py --json results/narrow.json`, 2 minutes.

A served student answers in float32. Here it is narrowed, and asked two things: how many of ML-1M's test users
still get the same ten items, and how long one user with a full history takes, compiled, in turns with float32.
The forms with rounded weights compute in float32: no kernel can do better with weights rounded in this way.
"""

import argparse
import copy
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import Spans, batches, leave_one_out, load_dataset, pad_left, write_json  # noqa: E402
from evaluate import ndcg  # noqa: E402
from prebert import PreBert, load_run, machine  # noqa: E402
from student import MiniBert, TopK, compile_ahead  # noqa: E402


class Autocast(nn.Module):
    """A graph whose matrix products are in bf16, and its sums, norms and softmaxes in float32."""

    def __init__(self, graph: TopK):
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return self.graph(*inputs)


def rounded(model: PreBert, narrow: Callable[[Tensor], Tensor]) -> PreBert:
    """A copy whose matrices and tables were rounded and are float32 again."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = narrow(parameter.data)
    return model


def to_int8(matrix: Tensor) -> Tensor:
    """Each row as whole numbers from -127 to 127 times its own scale."""
    scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / scale).round() * scale


def forms(model: PreBert) -> dict[str, nn.Module]:
    """Graphs from (tokens, seen, allowed) to the ten best, float32 first."""
    narrowed = {
        "float32": model,
        "bf16": copy.deepcopy(model).bfloat16(),
        "weights rounded to bf16": rounded(model, lambda matrix: matrix.bfloat16().float()),
        "weights rounded to int8": rounded(model, to_int8),
    }
    graphs: dict[str, nn.Module] = {name: TopK(form, 10).eval() for name, form in narrowed.items()}
    return graphs | {"bf16 products": Autocast(TopK(model, 10)).eval()}


@torch.inference_mode()
def agreement(graphs: dict[str, nn.Module], model: PreBert, part: Spans, count: int | None) -> dict[str, dict]:
    """Share of the first `count` users who get the same ten as in float32, and NDCG@10 of both."""
    same, quality = dict.fromkeys(graphs, 0), dict.fromkeys(graphs, 0.0)
    part = part[torch.arange(len(part.targets))[:count]]
    bar, allowed = tqdm(total=len(part.targets), desc="answers"), torch.ones(model.num_items + 2, dtype=torch.bool)
    for rows in batches(part.sizes.clamp(max=model.max_length), 2048, 64):
        history = pad_left(part.items, part.starts[rows], part.ends[rows], int(part.sizes[rows].max()))
        tokens, want = model.question(history), None
        for name, graph in graphs.items():
            found = graph(tokens, history, allowed)[1]  # (B, 10)
            want = found if want is None else want
            same[name] += int((found.sort(1).values == want.sort(1).values).all(1).sum())
            hit = found == part.targets[rows, None]
            quality[name] += ndcg(torch.where(hit.any(1), 1 + hit.int().argmax(1), 11), 10).sum().item()
        bar.update(len(rows))
    bar.close()
    users = len(part.targets)
    return {name: {"same_ten": same[name] / users, "NDCG@10": quality[name] / users} for name in graphs}


@torch.inference_mode()
def latency(model: PreBert, rounds: int) -> dict[str, float]:
    """Median over rounds of the median ms of one user with a full history, compiled, float32 and bf16 in turns."""
    graphs = {name: graph for name, graph in forms(model).items() if name in ("float32", "bf16")}
    history = torch.randint(1, model.num_items + 1, (1, model.max_length), generator=torch.Generator().manual_seed(0))
    inputs, compiled = (model.question(history), history, torch.ones(model.num_items + 2, dtype=torch.bool)), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, graph) in enumerate(tqdm(graphs.items(), desc="compiling")):
            compiled[name] = compile_ahead(graph.requires_grad_(False), Path(folder) / f"{number}.pt2")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in tqdm(range(rounds), desc="timing, rounds"):
        for name, graph in compiled.items():
            one, end = [], time.perf_counter() + 1
            while time.perf_counter() < end:
                began = time.perf_counter()
                graph(*inputs)
                one.append(1000 * (time.perf_counter() - began))
            times[name].append(sorted(one)[len(one) // 2])
    return {name: sorted(row)[len(row) // 2] for name, row in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What bf16 and int8 would change in the answers and in their time.")
    parser.add_argument("--run", type=Path, default=ROOT / "results/ml-1m/student")
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--users", type=int, help="ask for the first so many only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, _, _ = load_run(args.run)
    graphs = forms(model)
    report = agreement(graphs, model, leave_one_out(load_dataset(args.data))[2], args.users)
    small = MiniBert("small", model.num_items, model.max_length, model.config.causal).eval()
    times = {"ms": latency(model, args.rounds), "small_ms": latency(small, args.rounds)}
    for name, row in report.items():
        row |= {what: found[name] for what, found in times.items() if name in found}
        print(f"{name:<26}" + "  ".join(f"{what} {value:.4f}" for what, value in row.items()))
    if args.json:
        content = {
            "machine": machine(),
            "command": shlex.join(["python", "tests/narrow.py", *sys.argv[1:]]),
            "forms": report,
        }
        write_json(args.json, content)
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
