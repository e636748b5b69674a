"""Mini-BERT, how small a recommender can be, and the compiled scorer that serves it.

    python student.py "Toy Story (1995)" "Matrix, The (1999)"            # runs/ml-1m/student
    python student.py --run results/ml-1m/student 1 2571                 # the released one knows raw ids

prints what to watch next, with scores and the milliseconds that it took. Mini-BERT is a BERT4Rec
(Sun et al. 2019) with the anatomy of its teacher, `PreBert`, and a tenth of its weights or less, the item table
apart; distill.py trains it. In order: the model -> top k -> native code -> `Recommender` -> the command.

Letters: B batch (users), T sequence length, S whole history, V catalogue (items + PAD + MASK), k how many.
"""

import argparse
import difflib
import hashlib
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError, at_once, batches, cache_folder, pad_left, positive, run_command
from prebert import BertConfig, PreBert, load_run, machine, pick_device

STUDENTS = {  # hidden size, layers, heads; the feed-forward is four times as wide, as in BERT
    "tiny": (64, 2, 2),
    "small": (128, 2, 4),
    "base": (192, 2, 6),
}


class MiniBert(PreBert):
    """A small BERT4Rec with random first weights: `PreBert`'s contract at a preset of STUDENTS."""

    def __init__(self, size: str, num_items: int, max_length: int, causal: bool = False, dropout: float = 0.1):
        hidden, layers, heads = STUDENTS[size]
        shape = BertConfig(hidden, layers, heads, 4 * hidden, max_length, hidden_dropout_prob=dropout, causal=causal)
        super().__init__(shape, num_items)


# ---------------------------------------------------------------- top k


def scores_by_id(model: PreBert, states: Tensor) -> Tensor:
    """`PreBert.logits` of states (B, D) with a column an id, -inf for PAD and MASK, (B, V or V - 1, an even number).

    In two halves of the table at once: for one user, MKL reads a matrix with a single core.
    """
    table = model.item_embedding.weight
    rows = len(table) // 2 * 2  # an odd table's last row is MASK's
    halves = states.expand(2, -1, -1) @ table[:rows].unflatten(0, (2, -1)).transpose(1, 2)  # (2, B, V / 2)
    bias = F.pad(model.item_bias, (1, rows - 1 - model.num_items), value=-torch.inf)
    return halves.transpose(0, 1).flatten(1) + bias


class TopK(nn.Module):
    """tokens (B, T), see `PreBert.question`, and the whole histories, seen (B, S), to the k best unseen items.

    Returns scores (B, k) and item ids (B, k), best first.
    """

    def __init__(self, model: PreBert, k: int, exclude_seen: bool):
        super().__init__()
        self.model, self.k, self.exclude_seen = model, min(k, model.num_items), exclude_seen

    def forward(self, tokens: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)
        scores = scores_by_id(self.model, self.model(tokens, last)[:, 0]).float()  # (B, V)
        if self.exclude_seen:
            scores = scores.scatter(1, seen, -torch.inf)
        best, items = scores.topk(self.k, dim=1)
        return best, items


# ---------------------------------------------------------------- native code


def unfused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in two steps: compiled, b is added in the pass over memory that follows, otherwise in its own."""
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def load_package(package: Path) -> Callable:
    """A compiled graph; InputError if it cannot be loaded."""
    try:  # what torch._inductor.aoti_load_package wraps; that imports the compiler, and parses at every call
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    except RuntimeError as error:
        raise InputError(f"the compiled copy {package} cannot be loaded: {str(error).splitlines()[0][:120]}") from error
    return lambda tokens, seen: loader.boxed_run([tokens, seen])


def compile_ahead(graph: TopK, package: Path) -> Callable:
    """The graph as native code for any number of users and any length, kept in `package`.

    Compiling takes some ten seconds, loading a twentieth of one; a history costs what its own length costs,
    without padding. Raises InputError where it cannot be compiled, such as without a C++ compiler.
    """
    longest, device = graph.model.max_length, graph.model.item_bias.device
    tokens = torch.ones(3, min(8, longest), dtype=torch.long, device=device)  # (B, T)
    seen = torch.ones(3, 9, dtype=torch.long, device=device)  # (B, S)
    users, length, history = (
        torch.export.Dim(name, min=low, max=high)
        for name, low, high in (("users", 1, 2**16), ("length", 2, longest), ("history", 2, 2**16))
    )
    shapes = ({0: users, 1: length}, {0: users, 1: history})
    partial = package.with_name(f"{os.getpid()}-{package.name}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(action="ignore"):  # PyTorch's about its own code
            program = torch.export.export(graph, (tokens, seen), dynamic_shapes=shapes)
            program = program.run_decompositions({torch.ops.aten.linear.default: unfused_linear})
            torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        os.replace(partial, package)
    except Exception as error:  # the compiler's stack raises anything: no g++, no space, a path that g++ cannot read
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise InputError(f"cannot compile, which needs a working C++ compiler such as g++: {reason[:120]}") from error
    return load_package(package)


def package_of(run: Path, graph: TopK) -> Path:
    """Where the compiled graph of a run is kept: named after its weights, k, this code, PyTorch and the processor.

    It is native code, so its place is the user's own cache and not the run folder, which may come from a stranger.
    Raises InputError where there is no cache folder.
    """
    facts = [graph.k, graph.exclude_seen, str(graph.model.item_bias.device), machine(), torch.get_num_threads()]
    if Path("/proc/cpuinfo").exists():  # native code of one processor may not run on another
        facts += [line for line in open("/proc/cpuinfo") if line.startswith("flags")][:1]
    code = [Path(__file__).with_name(name) for name in ("prebert.py", "student.py")]
    files = (run / "config.json", run / "model.safetensors", *code)
    content = b"".join(file.read_bytes() for file in files) + repr(facts).encode()
    return cache_folder() / "serving" / f"{hashlib.sha256(content).hexdigest()[:32]}.pt2"


# ---------------------------------------------------------------- serving


def native(run: Path, graph: TopK, compile: bool) -> Callable | None:
    """The compiled graph of a run, or None where nobody compiled it; with `compile`, made where there is none.

    Raises InputError where it cannot be made or loaded.
    """
    package = package_of(run, graph)
    try:
        return load_package(package) if package.exists() else compile_ahead(graph, package) if compile else None
    except InputError:
        if not compile or not package.exists():
            raise
        package.unlink()  # a broken copy
        return compile_ahead(graph, package)


class Recommender:
    """Histories of raw ids or titles in, the k best items out, through a graph that scores and ranks in one piece.

    compile: True runs it as native code, compiled first where that was not done before; None, only where it was;
    False never. Where that fails, the graph runs as it is and a note on stderr says so, or, with fallback=False,
    InputError is raised. `compiled` tells which it is, `warm_up_s` what getting ready cost.
    May be called from several threads. Raises InputError for a broken run folder.
    """

    def __init__(
        self, run_dir: str | Path, k: int = 10, device: str = "auto", compile: bool | None = True, fallback: bool = True
    ):
        began, self.device = time.perf_counter(), pick_device(device)
        model, config, catalogue = load_run(run_dir)
        self.titles, self.raw_ids, counts = catalogue["titles"], catalogue["raw_ids"], catalogue["counts"]
        self.question, self.max_length = model.question, model.max_length
        best = sorted(range(1, len(counts)), key=counts.__getitem__, reverse=True)[:k]
        self.popular = [(self.raw_ids[item], self.titles[item], float(counts[item])) for item in best]
        graph = TopK(model.requires_grad_(False), k, config["exclude_seen"]).to(self.device).eval()
        compiled = None
        try:
            compiled = None if compile is False else native(Path(run_dir), graph, bool(compile))
        except InputError as error:
            if not fallback:
                raise
            print(f"note: {error}; serving without it", file=sys.stderr)
        self.compiled, self.graph = compiled is not None, compiled or graph
        self.by_id = {normal(raw_id): item for item, raw_id in enumerate(self.raw_ids) if item}
        self.by_id |= {raw_id: item for item, raw_id in enumerate(self.raw_ids) if item}
        self.by_title: dict[str, list[int]] = {}  # exact titles, and those without case where that is another spelling
        for item, title in enumerate(self.titles[1:], 1):
            for spelling in {normal(title), "any case: " + normal(title).casefold()}:
                self.by_title.setdefault(spelling, []).append(item)
        for _ in range(3):  # the first calls pay for memory and threads
            self.top_k(torch.ones(1, model.max_length, dtype=torch.long))
        self.warm_up_s = time.perf_counter() - began

    @torch.inference_mode()
    def top_k(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and internal ids (B, k) for histories (B, S) of internal ids, left-padded."""
        history = history.to(self.device)
        scores, items = self.graph(self.question(history), history)
        return scores.cpu(), items.cpu()

    def item(self, name: object) -> int:
        """The internal id of an item given as raw id or title, text or number; `id:RAW` is a raw id for certain.

        Exact spelling wins over another case. Raises InputError for an unknown or ambiguous name.
        """
        name = str(name)
        text = normal(name)
        if text.startswith("id:") and text[3:] in self.by_id:
            return self.by_id[text[3:]]
        ids = [self.by_id[key] for key in (name, text) if key in self.by_id][:1]
        found = sorted({*ids, *self.by_title.get(text, [])}) or self.by_title.get("any case: " + text.casefold(), [])
        if len(found) == 1:
            return found[0]
        if found:
            which = ", ".join(f"id:{self.raw_ids[item]}" for item in found)
            raise InputError(f"{name!r} is the name of {len(found)} items; say which: {which}")
        titles = [title for title in self.by_title if not title.startswith("any case: ")]
        inside = [title for title in titles if text.casefold() in title.casefold()][:3]
        close = inside or difflib.get_close_matches(text, titles, 3, 0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(f"no item {name!r} in the catalogue{hint}")

    def __call__(self, people: Sequence[Sequence[object]]) -> list[list[tuple[str, str, float]]]:
        """For each history, oldest item first: [(raw id, title, score), ...], best first, at most k.

        An empty history gets the most popular items, with their counts. Raises InputError for an unknown item.
        """
        if any(isinstance(history, str) or not isinstance(history, Sequence) for history in people):
            raise InputError("people are given as a list of histories, each a list of items")
        known = [[self.item(name) for name in history] for history in people]
        answers = [list(self.popular) for _ in known]
        asked = [row for row, history in enumerate(known) if history]
        sizes = torch.tensor([len(known[row]) for row in asked], dtype=torch.long)
        entries, ends = torch.tensor([item for history in known for item in history]), sizes.cumsum(0)
        limits = at_once(self.device, len(self.titles) - 1)
        alone = [torch.zeros(1, dtype=torch.long)]  # one user, the question of a live service, waits for no grouping
        for rows in alone if len(asked) == 1 else batches(sizes.clamp(max=self.max_length), *limits):
            history = pad_left(entries, (ends - sizes)[rows], ends[rows], max(2, int(sizes[rows].max())))  # (B, S)
            for row, scores, items in zip(rows.tolist(), *map(Tensor.tolist, self.top_k(history)), strict=True):
                best = [(item, score) for item, score in zip(items, scores, strict=True) if score > -torch.inf]
                answers[asked[row]] = [(self.raw_ids[item], self.titles[item], score) for item, score in best]
        return answers


def normal(name: str) -> str:
    """Accents in one spelling: an e with an accent is one character or two, as keyboards and files differ."""
    return unicodedata.normalize("NFC", name)


# ---------------------------------------------------------------- the command


def known_items(recommender: Recommender, names: list[str]) -> list[int]:
    """Internal ids of the items that are known; the others are reported. InputError if there are only others."""
    items = []
    for place, name in enumerate(names, 1):
        try:
            items.append(recommender.item(name))
        except InputError as error:
            if place == len(names) and not items:
                raise
            print(f"skipped: {error}", file=sys.stderr)
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description="Recommend what comes next after the given items, oldest first.")
    parser.add_argument("items", nargs="*", help='titles or raw ids, such as "Toy Story (1995)"; id:RAW is a raw id')
    parser.add_argument("--run", default="runs/ml-1m/student", help="run folder (default: %(default)s)")
    parser.add_argument("-k", type=positive, default=10, help="how many to recommend (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--compile", action="store_true", help="compile first, for this and all later calls")
    args = parser.parse_args()
    recommender = Recommender(args.run, args.k, args.device, args.compile or None, fallback=not args.compile)
    items = known_items(recommender, args.items)
    began = time.perf_counter()
    answers = recommender([[f"id:{recommender.raw_ids[item]}" for item in items]])[0]
    milliseconds = 1000 * (time.perf_counter() - began)
    watched = ", ".join(recommender.titles[item] for item in items)
    print(f"after {watched}:" if items else "most popular, by interactions:")
    for place, (raw_id, title, score) in enumerate(answers, 1):
        print(f"{place:>4}  {score:7.2f}  {title}" + f"  (id:{raw_id})" * (title != raw_id))
    kind = "compiled" if recommender.compiled else "eager, --compile makes it faster"
    print(f"{milliseconds:.1f} ms, {kind}, on {recommender.device}; ready to answer in {recommender.warm_up_s:.2f} s")


if __name__ == "__main__":
    run_command(main)
