"""Mini-BERT, how small a recommender can be, and the compiled scorer that serves it.

    python student.py --run runs/ml-1m/student "Toy Story (1995)" "Matrix, The (1999)"

prints what to watch next, with scores and the milliseconds that it took. Mini-BERT is a BERT4Rec
(Sun et al. 2019) with the anatomy of its teacher, `PreBert`, and a tenth of its size or less;
distill.py trains it. In order: the model -> run folders -> `Recommender` -> titles -> the command.

Letters: B batch (users), T sequence length, V catalogue (items + PAD + MASK), k how many to recommend.
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data import PAD, InputError, cache_folder, histories, positive, run_command
from prebert import BertConfig, PreBert, check_shape, load_strict, read_safetensors

VERSION = 1  # of the run folder; a folder of another version is refused

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


# ---------------------------------------------------------------- run folders


def read_json(path: Path) -> dict:
    """A JSON object from a run folder; InputError says which file is missing or broken."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {path}; train first: python teacher.py, then python distill.py") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


class NoInit(TorchFunctionMode):
    """Skips torch.nn.init: for weights without memory it would import PyTorch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def load_run(run: str | Path) -> tuple[PreBert, dict, dict]:
    """The model of a run folder with its config and catalogue {raw_ids, titles}.

    Raises InputError if a file is missing, of another version, or does not fit the others.
    """
    run = Path(run)
    config, catalogue = read_json(run / "config.json"), read_json(run / "catalogue.json")
    if config.get("version") != VERSION:
        raise InputError(f"{run}: made by version {config.get('version')} of this code, which is version {VERSION}")
    shape, num_items = check_shape(config.get("model"), run / "config.json"), config.get("num_items", 0)
    for names in (catalogue.get("raw_ids"), catalogue.get("titles")):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{run / 'catalogue.json'}: raw_ids and titles must be lists of strings")
        if not isinstance(num_items, int) or len(names) != num_items + 1 or num_items < 1:
            raise InputError(f"{run}: catalogue.json has {len(names) - 1} items, config.json {num_items}")
    if type(config.get("exclude_seen")) is not bool:
        raise InputError(f"{run / 'config.json'}: exclude_seen must be true or false")
    with torch.device("meta"), NoInit():  # shapes only: nothing is allocated until the weights prove that they fit
        model = PreBert(shape, num_items)
    load_strict(model, read_safetensors(run / "model.safetensors"), run / "model.safetensors")
    return model.eval(), config, catalogue


# ---------------------------------------------------------------- serving


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
        self.model, self.k, self.exclude_seen = model, k, exclude_seen

    def forward(self, tokens: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)
        scores = scores_by_id(self.model, self.model(tokens, last)[:, 0]).float()  # (B, V)
        if self.exclude_seen:
            scores = scores.scatter(1, seen, -torch.inf)
        best, items = scores.topk(self.k, dim=1)
        return best, items


def at_once(device: torch.device, num_items: int) -> tuple[int, int]:
    """How many positions and how many users to rank together.

    On a CPU, what a layer computes for many more than 2,048 positions no longer fits the cache, and each takes longer.
    Scores of all users together take a quarter GiB at most.
    """
    return 2048 if device.type == "cpu" else 2**16, max(1, 2**26 // num_items)


def unfused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in two steps: compiled, b is added in the pass over memory that follows, otherwise in its own."""
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def compile_ahead(graph: TopK, package: Path) -> Callable:
    """The graph as native code for any number of users and any length, from `package` if that exists.

    Compiling takes some ten seconds, loading a twentieth of one; a history costs what its own length costs,
    without padding. Raises InputError where there is no C++ compiler.
    """
    if not package.exists():
        longest, device = graph.model.max_length, graph.model.item_bias.device
        tokens = torch.ones(3, min(8, longest), dtype=torch.long, device=device)  # (B, T)
        seen = torch.ones(3, 9, dtype=torch.long, device=device)  # (B, S)
        users, length, history = (
            torch.export.Dim(name, min=low, max=high)
            for name, low, high in (("users", 1, 2**16), ("length", 2, longest), ("history", 2, 2**16))
        )
        partial = package.with_name(f"{os.getpid()}-{package.name}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        shapes = ({0: users, 1: length}, {0: users, 1: history})
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyTorch's about its own code
                program = torch.export.export(graph, (tokens, seen), dynamic_shapes=shapes)
                program = program.run_decompositions({torch.ops.aten.linear.default: unfused_linear})
                torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        except torch._inductor.exc.InvalidCxxCompiler as error:
            raise InputError("compiling needs a C++ compiler such as g++; install one, or serve without") from error
        os.replace(partial, package)
    # What torch._inductor.aoti_load_package wraps; that imports the compiler, and parses the signature at every call.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    return lambda tokens, seen: loader.boxed_run([tokens, seen])


def package_of(run: Path, k: int, device: torch.device) -> Path:
    """Where the compiled graph of a run is kept: named after its weights, k, this code, PyTorch and processor.

    It is native code, so its place is the user's own cache and not the run folder, which may come from a stranger.
    """
    facts = (k, str(device), torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    code = [Path(__file__).with_name(name) for name in ("prebert.py", "student.py")]
    files = (run / "config.json", run / "model.safetensors", *code)
    content = b"".join(file.read_bytes() for file in files) + repr(facts).encode()
    return cache_folder() / "serving" / f"{hashlib.sha256(content).hexdigest()[:32]}.pt2"


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


class Recommender:
    """Histories in, the k best items out, through a graph that scores and ranks in one piece.

    compile: run the graph as native code, see `compile_ahead`; `warm_up_s` tells what getting ready cost.
    May be called from several threads. Raises InputError for a broken run folder.
    """

    def __init__(self, run_dir: str | Path, k: int = 10, device: str = "auto", compile: bool = True):
        began, self.device = time.perf_counter(), pick_device(device)
        model, config, catalogue = load_run(run_dir)
        self.titles, self.raw_ids = catalogue["titles"], catalogue["raw_ids"]
        self.question, self.max_length = model.question, model.max_length
        graph = TopK(model.requires_grad_(False), min(k, model.num_items), config["exclude_seen"])
        graph = graph.to(self.device).eval()
        package = package_of(Path(run_dir), graph.k, self.device)
        self.graph: Callable = compile_ahead(graph, package) if compile else graph
        self.by_title: dict[str, list[int]] = {}
        for item, title in enumerate(self.titles[1:], 1):
            self.by_title.setdefault(title.casefold(), []).append(item)
        for _ in range(3):  # the first calls pay for memory and threads
            self._top_k(torch.ones(1, model.max_length, dtype=torch.long))
        self.warm_up_s = time.perf_counter() - began

    @torch.inference_mode()
    def _top_k(self, history: Tensor) -> tuple[Tensor, Tensor]:
        history = history.to(self.device)
        scores, items = self.graph(self.question(history), history)
        return scores.cpu(), items.cpu()

    def item(self, name: str | int) -> int:
        """The id of an item given as id, as title (any case) or, for equal titles, as `id:RAW`."""
        if isinstance(name, int):
            if not 1 <= name < len(self.titles):
                raise InputError(f"item {name} is not in the catalogue of 1..{len(self.titles) - 1}")
            return name
        if name.startswith("id:") and name[3:] in self.raw_ids[1:]:
            return self.raw_ids.index(name[3:], 1)
        found = self.by_title.get(name.casefold(), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{name!r} is the title of {len(found)} items; say which: "
                + ", ".join(f"id:{self.raw_ids[i]}" for i in found)
            )
        inside = [title for title in self.by_title if name.casefold() in title][:3]
        close = inside or difflib.get_close_matches(name.casefold(), self.by_title, 3, 0.5)
        hint = " or ".join(repr(self.titles[self.by_title[title][0]]) for title in close)
        raise InputError(f"no item {name!r} in the catalogue" + (f"; did you mean {hint}?" if hint else ""))

    def _groups(self, known: list[list[int]]) -> Iterable[tuple[Tensor, Tensor]]:
        """Row numbers (B,) and histories (B, S). One user, the question of a live service, waits for no grouping."""
        if len(known) == 1:
            history = torch.tensor(known)
            return [(torch.zeros(1, dtype=torch.long), F.pad(history, (max(0, 2 - history.shape[1]), 0), value=PAD))]
        sizes = torch.tensor([len(history) for history in known])
        ends, entries = sizes.cumsum(0), torch.tensor([item for history in known for item in history])
        limits = at_once(self.device, len(self.titles) - 1)
        return histories(entries, ends - sizes, ends, self.max_length, *limits)

    def __call__(self, people: Sequence[Sequence[str | int]]) -> list[list[tuple[int, str, float]]]:
        """For each history, oldest item first: [(item id, title, score), ...], best first, at most k."""
        known = [[self.item(name) for name in history] for history in people]
        if not known or not all(known):
            raise InputError("a history needs at least one item")
        answers: list[list[tuple[int, str, float]]] = [[] for _ in known]
        for rows, history in self._groups(known):
            for row, scores, items in zip(rows.tolist(), *map(Tensor.tolist, self._top_k(history)), strict=True):
                answers[row] = [(i, self.titles[i], s) for i, s in zip(items, scores, strict=True) if s > -torch.inf]
        return answers


def package_exists(args: argparse.Namespace) -> bool:
    """Whether this run was compiled before, for this machine."""
    weights = Path(args.run) / "model.safetensors"
    return weights.exists() and package_of(weights.parent, args.k, pick_device(args.device)).exists()


def main() -> None:
    parser = argparse.ArgumentParser(description="Recommend what comes next after the given titles, oldest first.")
    parser.add_argument("titles", nargs="+", help='such as "Toy Story (1995)"; id:RAW names an item by its raw id')
    parser.add_argument("--run", default="runs/ml-1m/student", help="run folder (default: %(default)s)")
    parser.add_argument("-k", type=positive, default=10, help="how many to recommend")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile first, for this and all later calls")
    args = parser.parse_args()
    compiled = package_exists(args)
    if args.compile and not compiled:
        print("compiling for this machine, some ten seconds, once", file=sys.stderr)
    compiled |= args.compile
    recommender = Recommender(args.run, args.k, args.device, compiled)
    began = time.perf_counter()
    answers = recommender([args.titles])[0]
    milliseconds = 1000 * (time.perf_counter() - began)
    watched = [recommender.titles[recommender.item(title)] for title in args.titles]
    print(f"after {', '.join(watched)}:")
    for place, (_, title, score) in enumerate(answers, 1):
        print(f"{place:>4}  {score:7.2f}  {title}")
    kind = "compiled" if compiled else "eager"
    print(f"{milliseconds:.1f} ms, {kind}, on {recommender.device}; ready to answer in {recommender.warm_up_s:.2f} s")


if __name__ == "__main__":
    run_command(main)
