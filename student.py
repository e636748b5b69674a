"""Mini-BERT, how small a recommender can be, and the compiled scorer that serves it.

    python student.py "Toy Story (1995)" "Matrix, The (1999)"            # runs/ml-1m/student
    python student.py --run results/ml-1m/student 1 2571                 # the released one knows raw ids

Prints what to watch next, with scores and the milliseconds that it took. Mini-BERT has the anatomy of its teacher,
`PreBert`, and 13 % of its weights (1.6 of 12.2 million on ML-1M); trained on masked items it is a BERT4Rec (Sun et
al. 2019), on next items nearer to a SASRec (Kang & McAuley 2018). distill.py trains it. In order: the model -> top k ->
native code -> `Recommender` -> the command.

Letters: B batch (users), T sequence length, S whole history, D hidden size, C text columns, A all ids (items,
PAD and MASK), k how many.
"""

import argparse
import difflib
import hashlib
import math
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    CONTROL, PAD, TABLE, InputError, Interactions, add_data_flags, at_once, batches, cache_folder, check_replaceable,
    load_asked, positive, read_lines, read_titles, run_command, write_atomic,
)  # fmt: skip
from prebert import BertConfig, PreBert, load_run, machine, pick_device, same_column, with_new_items

Ranked = list[tuple[str, str, float]]  # (raw id, title, score), best first
# Hidden size, layers, heads; the feed-forward is four times as wide, as in BERT.
STUDENTS = {"tiny": (64, 2, 2), "small": (128, 2, 4), "base": (192, 2, 6)}


class MiniBert(PreBert):
    """A small `PreBert` with random first weights, of a size in STUDENTS."""

    def __init__(self, size: str, num_items: int, max_length: int, causal: bool = False, dropout: float = 0.1):
        hidden, layers, heads = STUDENTS[size]
        shape = BertConfig(hidden, layers, heads, 4 * hidden, max_length, hidden_dropout_prob=dropout, causal=causal)
        super().__init__(shape, num_items)


# ---------------------------------------------------------------- top k


def scores_by_id(model: PreBert, states: Tensor) -> Tensor:
    """`PreBert.logits` of states (B, D + C) with one column per item id, -inf for PAD and MASK, (B, A or A - 1, even).

    The table is multiplied as two halves: as one, a compiled call with 200 items takes 12 % longer, since MKL reads a
    matrix with a single core for one user. Of an odd A the last column, MASK's, is left out.
    """
    table = model.item_embedding.weight
    rows = len(table) // 2 * 2
    halves = states.expand(2, -1, -1) @ table[:rows].unflatten(0, (2, -1)).transpose(1, 2)  # (2, B, A / 2)
    bias = F.pad(model.item_bias, (1, rows - 1 - model.num_items), value=-torch.inf)
    return halves.transpose(0, 1).flatten(1) + bias


class TopK(nn.Module):
    """tokens (B, T), see `PreBert.question`, to the k best items of those `allowed` (A,), without `excluded` (B, S).

    Returns scores (B, k), -inf where nothing is left, and item ids (B, k), best first.
    """

    def __init__(self, model: PreBert, k: int):
        super().__init__()
        self.model, self.k = model, min(k, model.num_items)

    def forward(self, tokens: Tensor, excluded: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores_by_id(self.model, self.model.last_state(tokens)).float()  # (B, A or A - 1)
        scores = scores.masked_fill(~allowed[: scores.shape[1]], -torch.inf)
        best_scores, items = scores.scatter(1, excluded, -torch.inf).topk(self.k, dim=1)
        return best_scores, items


# ---------------------------------------------------------------- native code


def load_package(package: Path) -> Callable:
    """A compiled graph; InputError if it cannot be loaded."""
    try:  # what torch._inductor.aoti_load_package wraps; that imports the compiler, and parses at every call
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    except RuntimeError as error:
        raise InputError(f"the compiled copy {package} cannot be loaded: {str(error).splitlines()[0][:120]}") from error
    return lambda *inputs: loader.boxed_run(list(inputs))


def compile_ahead(graph: TopK, package: Path) -> Callable:
    """The graph as native code for any number of users and any length, kept in `package`.

    Compiling takes some ten seconds, loading a twentieth of a second; a history costs what its own length costs,
    without padding. Raises InputError where it cannot be compiled, such as without a C++ compiler.
    """
    longest, device = graph.model.max_length, graph.model.item_bias.device
    tokens = torch.ones(3, min(8, longest), dtype=torch.long, device=device)  # (B, T)
    excluded = torch.ones(3, 9, dtype=torch.long, device=device)  # (B, S)
    allowed = torch.ones(graph.model.num_items + 2, dtype=torch.bool, device=device)  # (A,)
    users, history = torch.export.Dim("users", min=1, max=2**16), torch.export.Dim("history", min=2, max=2**16)
    length = torch.export.Dim("length", min=2, max=longest)
    shapes: tuple[dict, ...] = ({0: users, 1: length}, {0: users, 1: history}, {})
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):  # PyTorch's own
            program = torch.export.export(graph, (tokens, excluded, allowed), dynamic_shapes=shapes)
            made = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/{package.name}")
            content = Path(made).read_bytes()
    except Exception as error:  # the compiler's stack raises anything: no g++, no space, a path that g++ cannot read
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise InputError(f"cannot compile, which needs a working C++ compiler such as g++: {reason[:120]}") from error
    write_atomic(package, content)
    return load_package(package)


def native(run: Path, graph: TopK, compile: bool) -> Callable | None:
    """The compiled graph of a run, or None if it was never compiled; with `compile`, compiled now if it was not.

    It is kept in the user's own cache, as the run folder may come from a stranger, and named after all that it depends
    on. Raises InputError where there is no cache, or it cannot be made or loaded.
    """
    facts = [graph.k, str(graph.model.item_bias.device), machine(), torch.get_num_threads()]
    if Path("/proc/cpuinfo").exists():  # native code of one processor may not run on another
        facts += [line for line in open("/proc/cpuinfo") if line.startswith("flags")][:1]
    code = Path(__file__)
    files = (run / "config.json", run / "model.safetensors", code, code.with_name("prebert.py"))
    content = b"".join(file.read_bytes() for file in files) + repr(facts).encode()
    package = cache_folder() / "serving" / f"{hashlib.sha256(content).hexdigest()[:32]}.pt2"
    if package.exists():
        try:
            return load_package(package)
        except InputError:
            if not compile:
                raise
            package.unlink()  # a broken copy
    return compile_ahead(graph, package) if compile else None


# ---------------------------------------------------------------- serving

SEARCHED = 5000  # names that a misspelt one is compared with; more take over a second


class Recommender:
    """Histories of raw ids or titles in, the k best items out. Threads may share it; pickle needs compile=False.

    compile: True runs native code, compiled now unless it was before; None, only if it was; False never. Where that
    fails, PyTorch serves, and a note on stderr says why, or, with fallback=False, InputError is raised; `compiled`
    tells. allowed: raw ids or titles of the only items to recommend, beside those of `add_items`; unknown ones are
    skipped. exclude_seen: leave out a history's own items; None as the run was evaluated. Raises InputError for a
    broken run folder.
    """

    graph: Any  # `TopK`, or the same compiled

    def __init__(
        self, run_dir: str | Path, k: int = 10, device: str = "auto", compile: bool | None = True,
        fallback: bool = True, allowed: Iterable[object] | None = None, exclude_seen: bool | None = None,
    ):  # fmt: skip
        began = time.perf_counter()
        if not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k is {k!r}; it must be a whole number above 0")
        self.device, self.run, self.k = pick_device(str(device)), Path(run_dir), int(k)
        model, self.config, catalogue = load_run(run_dir)
        self.exclude_seen = self.config["exclude_seen"] if exclude_seen is None else exclude_seen
        self.serve(model, *(catalogue[key] for key in ("raw_ids", "titles", "counts")))
        try:
            if compile is not False and (compiled := native(self.run, self.graph, bool(compile))):
                self.graph, self.compiled = compiled, True
        except (InputError, OSError) as error:  # the latter from a cache that cannot be read
            if not fallback:
                raise
            print(f"note: {error}; serving without it", file=sys.stderr)
        self.allowed = torch.full((model.num_items + 2,), allowed is None)  # (A,)
        self.allowed[[PAD, model.mask_id]] = False
        if allowed is not None:
            self.allowed[self.items(allowed)] = True
            if not self.allowed.any():
                raise InputError("none of the items allowed is a raw id or title of the catalogue")
        for _ in range(3):  # the first calls pay for memory and threads
            self([self.raw_ids[1:2] * model.max_length])
        self.warm_up_s = time.perf_counter() - began

    def serve(self, model: PreBert, raw_ids: list[str], titles: list[str], counts: list[int]) -> None:
        """Serve with a model of these items, whose places in the lists are their internal ids."""
        self.model, self.raw_ids, self.titles, self.counts = model.requires_grad_(False), raw_ids, titles, counts
        # An id as it is written wins over the `composed` spelling of another.
        self.by_id = {spell(raw_id): item for spell in (composed, str) for item, raw_id in enumerate(raw_ids[1:], 1)}
        self.by_title: dict[str, list[int]] = {}  # in lower case
        for item, title in enumerate(titles[1:], 1):
            self.by_title.setdefault(composed(title).casefold(), []).append(item)
        self.popularity = torch.tensor(counts, dtype=torch.float64)  # (num_items + 1,)
        self.graph, self.compiled = TopK(model, self.k).to(self.device).eval(), False

    def add_items(self, texts: Mapping, titles: Mapping | None = None, bert: str | None = None) -> None:
        """Recommend and accept items that training never saw, {raw id: text}, by what BERT reads in the texts.

        titles: {raw id: title} where that is not the text. bert: where the one of the training is now, if it was a
        folder. From now on no compiled graph serves. Raises InputError for a run without titles and for an item that is
        known.
        """
        if not isinstance(texts, Mapping):
            raise InputError("new items are given as {raw id: text}")
        new = {str(raw_id): text for raw_id, text in texts.items()}
        for raw_id, text in new.items():
            if raw_id in self.by_id:
                raise InputError(f"item {raw_id!r} is in the catalogue already")
            if not isinstance(text, str) or not raw_id.strip() or CONTROL.search(raw_id):
                raise InputError(f"new items need an id without tabs and a text, not {raw_id!r}: {text!r}")
        if not new:
            return
        bert = bert or str(self.config.get("bert_folder") or self.config["settings"].get("bert", "minilm"))
        larger = with_new_items(self.model, self.run, bert, [*new.values()])
        shown = new | {str(raw_id): str(title) for raw_id, title in (titles or {}).items()}
        names = [CONTROL.sub(" ", shown[raw_id]) for raw_id in new]
        self.serve(larger, [*self.raw_ids, *new], [*self.titles, *names], self.counts + [0] * len(new))
        self.allowed = torch.cat([self.allowed[:-1], torch.tensor([True] * len(new) + [False])])

    def matches(self, name: str) -> list[int]:
        """Internal ids: of the item with this raw id, also behind `id:`, else of those with this title.

        Exact spelling wins over another case.
        """
        text = composed(name)
        for raw_id in (name, text, name.removeprefix("id:"), text.removeprefix("id:")):
            if raw_id in self.by_id:
                return [self.by_id[raw_id]]
        found = self.by_title.get(text.casefold(), [])
        return [item for item in found if composed(self.titles[item]) == text] or found

    def items(self, names: Iterable[object]) -> list[int]:
        """Internal ids of all with these names; unknown names are left out."""
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InputError(f"items are given as a list of names, not as {names!r}")
        names = list(names)
        if nested := [name for name in names if isinstance(name, Iterable) and not isinstance(name, str)]:
            raise InputError(f"items are given as one list of names, for all users; in it is {nested[0]!r}")
        return [item for name in names for item in self.matches(str(name))]

    def item(self, name: object) -> int:
        """The internal id of an item given as raw id or title, text or number; InputError unless it is one item."""
        text, found = str(name), self.matches(str(name))
        if len(found) == 1:
            return found[0]
        if found:
            which = ", ".join(f"id:{self.raw_ids[item]}" for item in found)
            raise InputError(f"{text!r} is the name of {len(found)} items; say which: {which}")
        titles = list(dict.fromkeys(self.titles[1:]))
        inside = [title for title in titles if composed(text).casefold() in composed(title).casefold()][:3]
        close = inside or difflib.get_close_matches(composed(text), titles[:SEARCHED], 3, 0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        if self.titles == self.raw_ids:
            hint += f"; without titles, items are raw ids such as {self.raw_ids[1]!r}"
        raise InputError(f"no item {text!r} in the catalogue{hint}")

    @torch.inference_mode()
    def __call__(self, people: Iterable[Sequence[object]], without: Iterable[object] = ()) -> list[Ranked]:
        """The k best items, or what is left, for each history, oldest item first; none of the items `without`.

        An empty history gets the most popular items, with their counts. Raises InputError for an unknown item of a
        history; what is unknown in `without` is not recommended anyway.
        """
        people = list(people)
        if any(isinstance(history, str) or not isinstance(history, Sequence) for history in people):
            raise InputError("people are given as a list of histories, each a list of items")
        known = [[self.item(name) for name in history] for history in people]
        allowed = self.allowed.clone()
        allowed[self.items(without)] = False
        popular = [] if all(known) else self.best(self.popularity, allowed)
        answers, asked = [popular[:] for _ in known], [row for row, history in enumerate(known) if history]
        sizes = torch.tensor([min(len(known[row]), self.model.max_length) for row in asked])
        # A single user, the case of a live service, needs no grouping.
        groups = [torch.arange(1)] if len(asked) == 1 else batches(sizes, *at_once(self.device, self.model.num_items))
        allowed = allowed.to(self.device)
        for group in groups:
            rows = [asked[place] for place in group.tolist()]
            width = max(2, *(len(known[row]) for row in rows))  # compiled graphs need two
            padded = [[PAD] * (width - len(known[row])) + known[row] for row in rows]
            history = torch.tensor(padded, device=self.device)  # (B, S)
            excluded = history if self.exclude_seen else torch.zeros_like(history[:, :2])  # PAD alone, (B, 2)
            found = (each.cpu() for each in self.graph(self.model.question(history), excluded, allowed))
            for row, *best in zip(rows, *found, strict=True):
                answers[row] = self.named(*best)
        return answers

    def best(self, scores: Tensor, allowed: Tensor) -> Ranked:
        """The k best by scores (num_items + 1,) of the items `allowed` (A,)."""
        return self.named(*scores.masked_fill(~allowed[:-1], -torch.inf).topk(min(self.k, self.model.num_items)))

    def named(self, scores: Tensor, items: Tensor) -> Ranked:
        """Raw ids, titles and scores of scores and internal ids, (k,) each."""
        ranked = zip(scores.tolist(), items.tolist(), strict=True)
        return [(self.raw_ids[item], self.titles[item], score) for score, item in ranked if score > -math.inf]

    def similar(self, name: object) -> Ranked:
        """The k items whose vectors point most nearly where this one's does, with the cosines as scores."""
        rows = self.model.item_embedding.weight[:-1, : self.model.config.hidden_size]  # without text columns
        vectors = F.normalize(rows, dim=1).cpu()  # (num_items + 1, D)
        cosines = vectors @ vectors[self.item(name)]
        cosines[self.item(name)] = -torch.inf
        return self.best(cosines, self.allowed)


def composed(name: str) -> str:
    """A name with its accents in one spelling: keyboards and files write é as one character or as two."""
    return unicodedata.normalize("NFC", name)


# ---------------------------------------------------------------- the command


def known_items(recommender: Recommender, names: list[str]) -> list[str]:
    """The names that are known; the others are reported. InputError if there are only others."""
    known: list[str] = []
    for place, name in enumerate(names, 1):
        try:
            recommender.item(name)
            known.append(name)
        except InputError as error:
            if place == len(names) and not known:
                raise
            print(f"skipped: {error}", file=sys.stderr)
    return known


def items_in(recommender: Recommender, path: str) -> list[int]:
    """Internal ids of the items that a file names, a raw id or title per line; says how many are unknown."""
    names = [line.strip() for line in read_lines(Path(path)) if line.strip()]
    if unknown := [name for name in names if not recommender.matches(name)]:
        words = f"{len(unknown):,} of {len(names):,} are not in the catalogue, such as {unknown[0]!r}"
        print(f"{path}: {words}", file=sys.stderr)
    return recommender.items(names)


def add_new_items(recommender: Recommender, path: str, bert: str | None) -> None:
    """The items of a table of titles that the run does not know; InputError for a file without items."""
    if not TABLE.search(path):
        raise InputError(f"--new-items {path}: it takes a .csv, .tsv or .item file with a header")
    read, where = read_titles(Path(path), str(recommender.config.get("item_name", "")))  # by the column of training
    if not read:
        raise InputError(f"{path}: no items with titles: {where}")
    new = {raw_id: both for raw_id, both in read.items() if raw_id not in recommender.by_id}
    print(f"{path}: {len(new):,} new items, {len(read) - len(new):,} known; titles {where}")
    titles = {raw_id: title for raw_id, (title, _) in new.items()}
    recommender.add_items({raw_id: text for raw_id, (_, text) in new.items()}, titles, bert)


def histories(recommender: Recommender, data: Interactions) -> list[list[str]]:
    """The raw ids of every user's items in a log; those that the run does not know are left out."""
    same_column(recommender.config, data)
    for what in [key for key in ("columns", "left out", "skipped", "order") if key in data.taken]:
        print(f"{what}: {data.taken[what]}")
    known = [raw_id if raw_id in recommender.by_id else "" for raw_id in data.raw_ids]
    people = [[known[item] for item in own if known[item]] for own in np.split(data.items, data.offsets[1:-1])]
    if not any(people):
        raise InputError(f"{recommender.run} knows none of the items of {data.name}; is this the log that it is for?")
    words = f"{sum(map(len, people)):,} of {len(data.items):,} interactions with items that the run knows"
    print(f"{data.name}: {data.num_users:,} users, {words}; {people.count([]):,} users get the most popular")
    return people


HEADER = "user_id\titem_id\tscore"


def recommend_all(recommender: Recommender, users: list[str], people: list[list[str]], path: Path) -> None:
    """Write the k best items of all users: user_id, item_id, score, a line each, separated by tabs."""
    began, lines, served = time.perf_counter(), [HEADER], 0
    for begin in tqdm(range(0, len(people), 1000), desc="recommending, 1000 users", leave=False):
        some = slice(begin, begin + 1000)
        for user, ranked in zip(users[some], recommender(people[some]), strict=True):
            lines += [f"{user}\t{raw_id}\t{score:.5g}" for raw_id, _, score in ranked]
            served += len(ranked) > 0
    rate = len(people) / (time.perf_counter() - began)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    print(f"{len(lines) - 1:,} recommendations for {served:,} of {len(people):,} users in {path}; {rate:,.0f} users/s")


def print_ranked(ranked: Ranked) -> None:
    if not ranked:
        print("nothing is left to recommend: the rest is seen or not allowed")
    for place, (raw_id, title, score) in enumerate(ranked, 1):
        print(f"{place:>4}  {score:7.2f}  {title}{'' if title == raw_id else f'  (id:{raw_id})'}")


def parse_flags() -> argparse.Namespace:
    """The command's flags; those that do not go together end it."""
    parser = argparse.ArgumentParser(description="Recommend what comes next after the given items, oldest first.")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("items", nargs="*", default=[], help='titles or raw ids, such as "Heat (1995)"; id:RAW: a raw id')
    parser.add_argument("--run", default="runs/ml-1m/student", help="run folder (default: %(default)s)")
    parser.add_argument("-k", type=positive, default=10, help="how many to recommend (default: %(default)s)")
    ways.add_argument("--out", type=Path, metavar="FILE", help="for every user of the log --data, into a file")
    ways.add_argument("--user", metavar="ID", help="for this user of the log --data (--user=-x for -x)")
    ways.add_argument("--similar", metavar="ITEM", help="the items most like this one instead")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--compile", action="store_true", help="compile first, for this and later calls with this -k")
    one.add_argument("--new-items", metavar="FILE", help="a table of items that the run does not know, with titles")
    parser.add_argument("--bert", metavar="FOLDER", help="where the run's BERT is now, for --new-items")
    parser.add_argument("--only", metavar="FILE", help="recommend only these items, a raw id or title per line")
    parser.add_argument("--without", metavar="FILE", help="do not recommend these")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    add_data_flags(parser)
    parser.set_defaults(data=None)
    args = parser.parse_args()
    if args.out:
        check_replaceable(args.out, f"{HEADER}\n")
        if args.out.suffix.lower() in (".gz", ".csv"):
            parser.error(f"--out {args.out}: columns are separated by tabs, not packed; name another file, as o.tsv")
    if (args.out is not None or args.user is not None) != (args.data is not None):
        parser.error("--data is the log of --out or --user: it goes with one of them, and they with it")
    if args.bert is not None and args.new_items is None:
        parser.error("--bert reads the texts of --new-items, which is not given")
    of_log = (args.columns, args.titles, args.root, args.min_count, args.min_items, args.min_length)
    if args.data is None and (any(of_log) or args.fraction > 1 or args.split != "last"):
        parser.error("--columns, --titles, --root, --min-..., --fraction and --split are of the log --data, not given")
    return args


def main() -> None:
    args = parse_flags()
    recommender = Recommender(
        args.run, args.k, args.device, compile=args.compile or None,  # None: if it was compiled before
        fallback=not args.compile, exclude_seen=None if args.seen == "auto" else args.seen == "exclude",
    )  # fmt: skip
    if args.new_items is not None:
        add_new_items(recommender, args.new_items, args.bert)
    if args.only is not None:
        recommender.allowed = torch.zeros_like(recommender.allowed)
        recommender.allowed[items_in(recommender, args.only)] = True
    if args.without is not None:
        recommender.allowed[items_in(recommender, args.without)] = False
    if not recommender.allowed.any():
        raise InputError("--only and --without leave nothing to recommend")
    if args.similar is not None:
        print_ranked(recommender.similar(args.similar))
        return
    if args.data is not None:
        args.min_count = args.min_count or 1  # whoever is in the log, with whatever history
        if recommender.config["settings"].get("split") == "sessions":
            args.split = "sessions"  # what the run knows as a user
        data = load_asked(args)
        if args.user is not None and args.user not in data.user_ids:
            what = f"no user {args.user!r} in {data.name}, which has {data.num_users:,}"
            raise InputError(f"{what}; its columns: {data.taken['columns']}")
        people = histories(recommender, data)
        if args.out:
            recommend_all(recommender, data.user_ids, people, args.out)
            return
        args.items = people[data.user_ids.index(args.user)]
    else:
        args.items = known_items(recommender, args.items)
    began = time.perf_counter()
    (ranked,) = recommender([args.items])
    milliseconds = 1000 * (time.perf_counter() - began)
    watched = ", ".join(recommender.titles[recommender.item(name)] for name in args.items[-20:])
    more = f"{len(args.items) - 20} items and " if len(args.items) > 20 else ""
    print(f"after {more}{watched}:" if args.items else "most popular, by interactions:")
    print_ranked(ranked)
    kind = "compiled" if recommender.compiled else "eager" if args.new_items else "eager, --compile makes it faster"
    print(f"{milliseconds:.1f} ms, {kind}, on {recommender.device}; ready to answer in {recommender.warm_up_s:.2f} s")


if __name__ == "__main__":
    run_command(main)
