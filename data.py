"""How logs of clicks become training sequences.

    python data.py --data ml-1m

Prints what is in a dataset: on ML-1M 6,040 users, 3,416 items and 999,611 interactions after 5-core filtering (users
and items with fewer than five are left out, repeatedly), 3 seconds on two CPU cores.

Up to `lines` is what a recommender needs to know; the rest is about files and flags. In order: sequences -> batches ->
questions -> filtering -> lines -> tables -> public datasets -> datasets by name or path -> the command.

Letters: B batch (users, or windows of them), T sequence length, S whole history, M asked positions of a row, U users,
R rows of a `Spans`, W windows, L log entries, I items.
"""

import argparse
import ast
import csv
import email.utils
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

PAD = 0  # items are 1..num_items in the order in which they first appear, user after user; MASK is num_items + 1


class InputError(ValueError):
    """An error the user can fix: a file, a flag, a title. It ends a command with one line and exit code 2."""


# ---------------------------------------------------------------- sequences

PREFIXES = "every prefix asks for its next item, one that training never saw is a miss"
HELD_OUT = {  # what --split, --final and --all mean
    "last": "leave-one-out (test = last item, validation = second last)",
    "last-final": "leave-one-out (test = last item, all others are trained on)",
    "sessions": f"sessions (test = those of the last day, validation = the newest tenth of the rest), {PREFIXES}",
    "sessions-final": f"sessions (test = those of the last day, all others are trained on), {PREFIXES}",
    "none": "nothing (--all: everything is trained on, so nothing is left to evaluate)",
}


@dataclass(frozen=True)
class Interactions:
    """A filtered log: user u's history, oldest first, is items[offsets[u]:offsets[u + 1]]."""

    name: str
    items: np.ndarray  # (L,) int64, ids 1..num_items
    offsets: np.ndarray  # (U + 1,) int64
    raw_ids: list[str]  # (num_items + 1,) the file's own id of each item; [PAD] is empty
    titles: list[str]  # (num_items + 1,) title, or the raw id where there is none
    texts: list[str]  # (num_items + 1,) title and what else the file of titles says, empty where there is no title
    user_ids: list[str]  # (U,) the file's own id of each user
    first_times: np.ndarray  # (U,) float64, the time of each user's first item
    repeats: bool  # whether users come back to items, see `build`
    taken: dict[str, str]  # what was taken for what, and what became of the lines; the card prints it
    split: str = "last"  # a key of HELD_OUT and SPLITS
    exclude_seen: bool = True  # whether what a user had is left out of the ranking
    item_name: str = ""  # the log's column of items, by which files of titles are read

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.raw_ids) - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of items, offsets and what else decides the split: with the same one, the same items are held out."""
        split = b"" if self.split == "last" else self.split.encode() + self.first_times.tobytes()
        return hashlib.sha256(self.items.tobytes() + self.offsets.tobytes() + split).hexdigest()

    @property
    def protocol(self) -> str:
        seen = "excluded, except targets" if self.exclude_seen else "NOT excluded"
        items = f"{self.num_items:,} items, seen items {seen}, ties counted against the target"
        return f"{HELD_OUT[self.split]}; full ranking over {items}"


@dataclass(frozen=True)
class Spans:
    """Pieces of one log: row r is the history items[starts[r]:ends[r]], and targets[r] came next."""

    items: Tensor  # (L,) the whole log; all parts share it
    starts: Tensor  # (R,)
    ends: Tensor  # (R,)
    targets: Tensor  # (R,) ids; PAD, a miss, where a session's next item is not in training; (0,) in the training part

    @property
    def sizes(self) -> Tensor:
        return self.ends - self.starts  # (R,)

    def __getitem__(self, rows: Tensor | np.ndarray) -> "Spans":
        targets = self.targets[rows] if len(self.targets) else self.targets  # of the training part there are none
        return Spans(self.items, self.starts[rows], self.ends[rows], targets)

    def histories(self, rows: Tensor, device: torch.device) -> Tensor:
        """Whole histories of these rows, left-padded, (B, S); S is at least 2, which compiled graphs need."""
        width = max(2, int(self.sizes[rows].max()))
        return pad_left(self.items, self.starts[rows], self.ends[rows], width).to(device)


Parts = tuple[Spans, Spans, Spans]  # training, validation, test


def everything(data: Interactions) -> Parts:
    """Nothing held out: all is training, for a model that is served and cannot be evaluated."""
    items, offsets = torch.from_numpy(data.items), torch.from_numpy(data.offsets)
    train = Spans(items, offsets[:-1], offsets[1:], items[:0])
    none = Spans(items, offsets[:0], offsets[:0], items[:0])
    return train, none, none


def leave_one_out(data: Interactions, final: bool = False) -> Parts:
    """Training, validation and test part: of each user all but two items, the second last, and the last.

    The test history holds the validation item. A user with under three items is training only. final: the second
    last is trained on as well, and the validation part is empty.
    """
    whole, _, none = everything(data)
    items, long = whole.items, whole.sizes >= 3
    starts, ends = whole.starts[long], whole.ends[long]
    train = replace(whole, ends=torch.where(long, whole.ends - (1 if final else 2), whole.ends))
    valid = none if final else Spans(items, starts, ends - 2, items[ends - 2])
    return train, valid, Spans(items, starts, ends - 1, items[ends - 1])


def in_seconds(times: np.ndarray) -> np.ndarray:
    """Times since 1970 in seconds; their size tells whether they are seconds, milli-, micro- or nanoseconds."""
    return times / 1000.0 ** np.digitize(times.max(), [1e11, 1e14, 1e17])


def last_day(data: Interactions, final: bool = False) -> Parts:
    """Users here are sessions. Test: those that begin on the log's last day (UTC); validation: the newest tenth before.

    Every prefix of a held-out session asks for its next item, as session-based recommenders are evaluated
    (Hidasi et al. 2016, section 4). final: all but the last day is trained on, and the validation part is empty.
    Raises InputError for times that are no dates, and for fewer than ten sessions before the last day.
    """
    days = in_seconds(data.first_times) // 86400
    year = 1970 + days.max() / 365.2425
    if not 1992 < year < 2100:  # .NET's ticks, taken for nanoseconds, would be of 1990
        words = f"--split sessions needs times; the last would be of {year:.0f}; use ISO dates"
        raise InputError(f"{data.name}: {words}; its columns: {data.taken.get('columns')}")
    order = np.argsort(data.first_times, kind="stable")
    test, rest = np.flatnonzero(days == days.max()), order[days[order] < days.max()]
    if len(rest) < 10:
        raise InputError(f"{data.name}: --split sessions needs sessions before the last day, of which there are few")
    first_valid = len(rest) - (0 if final else len(rest) // 10)
    valid, rest = rest[first_valid:], np.sort(rest[:first_valid])
    whole, _, _ = everything(data)
    train = whole[rest]
    known = item_counts(train, data.num_items) > 0  # (I,)

    def prefixes(sessions: np.ndarray) -> Spans:
        part = whole[sessions]
        rows, asked = entries_of(replace(part, starts=part.starts + 1))  # (R,) each, of all items but the first
        targets = part.items[asked]
        return Spans(part.items, part.starts[rows], asked, torch.where(known[targets - 1], targets, PAD))

    return train, prefixes(valid), prefixes(test)


SPLITS: dict[str, Callable[[Interactions], Parts]] = {
    "last": leave_one_out, "last-final": partial(leave_one_out, final=True),
    "sessions": last_day, "sessions-final": partial(last_day, final=True), "none": everything,
}  # fmt: skip


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [2, 3] as rows [0, 0, 1, 1, 1] and places within the row [0, 1, 0, 1, 2], both (sum of counts,)."""
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]


def entries_of(part: Spans) -> tuple[Tensor, Tensor]:
    """The row of every item of a part and its entry, the index in the log; both (sum of sizes,)."""
    rows, places = ragged(part.sizes)
    return rows, part.starts[rows] + places


def item_counts(part: Spans, num_items: int) -> Tensor:
    """How often each item occurs in a part, (I,)."""
    return torch.bincount(part.items[entries_of(part)[1]], minlength=num_items + 1)[1:]


def pad_left(items: Tensor, starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """Rows items[starts[b]:ends[b]], cut to their newest `length` entries, padded on the left, (B, length)."""
    index = ends[:, None] - length + torch.arange(length)  # (B, length)
    return torch.where(index >= starts[:, None], items[index.clamp(min=0)], PAD)


# ---------------------------------------------------------------- batches


def fixed_windows(part: Spans, length: int) -> Spans:
    """Training windows of a causal model: W pieces of a training part, of `length` + 1 items at most.

    A window is `length` items to read and one more to ask for. A history of n items is cut from its newest end
    into ceil((n - 1) / length) windows that overlap by one item, so that every item but the first is asked for once;
    one of a single item gives none. What stands to the left of an item is the same in every epoch, so a causal teacher
    need be asked only once.
    """
    rows, places = ragged((part.sizes + length - 2) // length)  # (W,) each
    ends = part.ends[rows] - length * places
    return replace(part, starts=torch.maximum(part.starts[rows], ends - length - 1), ends=ends)


LAST_SHARE = 0.1  # share of a masked model's windows in which just the last item is hidden
MASK_RATE = 0.2  # share of the items hidden in its other windows (Sun et al. 2019, for ML-1M)


def random_windows(part: Spans, length: int, generator: Generator) -> tuple[Spans, Tensor]:
    """One epoch of training windows of a masked model, W pieces of a training part, and last_only (W,).

    A history of n items gives ceil(n / length) windows: its newest items, then cuts that end at random places. A
    share LAST_SHARE of all ask what inference asks: they end at a random item, and just that one is hidden.
    """
    sizes = part.sizes
    rows, places = ragged((sizes + length - 1) // length)  # (W,) each
    uniform = torch.rand(2, len(rows), generator=generator)
    last_only = (uniform[0] < LAST_SHARE) & (sizes[rows] >= 2)
    newest = places == 0
    # Where a window may end at the earliest: with last_only after 2 items, the newest after all, others after `length`.
    least = torch.where(last_only, 2, torch.where(newest, sizes[rows], length)).minimum(sizes[rows])
    cut = least + (uniform[1] * (sizes[rows] - least + 1)).long()
    ends = part.starts[rows] + cut
    return replace(part, starts=torch.maximum(part.starts[rows], ends - length), ends=ends), last_only


def batches(sizes: Tensor, tokens: int, most: int = sys.maxsize, generator: Generator | None = None) -> list[Tensor]:
    """Group rows by similar `sizes` (R,): a batch, padded, has at most `tokens` positions (or one row) and `most` rows.

    Returns the row numbers of each batch, (B,). With a generator, ties and the order of batches are random.
    """
    noise = torch.rand(len(sizes), generator=generator) if generator else torch.zeros(len(sizes))
    order = torch.argsort(sizes + noise, stable=True)
    groups, begin = [], len(order)
    while begin > 0:  # longest first: a batch is as wide as its last row
        count = min(max(1, tokens // int(sizes[order[begin - 1]])), most)
        groups.append(order[max(0, begin - count) : begin])
        begin -= count
    if generator:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator)]
    return groups


def at_once(device: torch.device, num_items: int) -> tuple[int, int]:
    """How many positions, and how many rows of scores, to compute together: the limits of `batches`.

    On a CPU, what a layer computes for many more than 2,048 positions no longer fits the cache, and each
    takes longer. Scores of all users together take a quarter GiB at most, half of one in float64.
    """
    return 2048 if device.type == "cpu" else 2**16, max(1, 2**26 // num_items)


# ---------------------------------------------------------------- questions


class Batch(NamedTuple):
    """What is asked in one step."""

    tokens: Tensor  # (B, T) left-padded
    positions: Tensor  # (B, M) where something is asked
    labels: Tensor  # (B, M) the item asked for, PAD where nothing is
    entries: Tensor  # (B, M) the index in the log of the item at each position; a teacher's cached states lie there


def mask_items(tokens: Tensor, last_only: Tensor, mask: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hide items for the model to guess (BERT4Rec, Sun et al. 2019, section 3.5).

    tokens (B, T) left-padded, last_only (B,). Every item is hidden with probability MASK_RATE; in rows of
    `last_only`, just the newest; a row where chance hid none hides its newest.
    Returns masked tokens (B, T), positions (B, M) of the hidden items and their ids, labels (B, M);
    rows with fewer than M are filled up with other positions and label PAD, which the loss skips.
    """
    hidden = (torch.rand(tokens.shape, generator=generator) < MASK_RATE) & (tokens != PAD)  # (B, T)
    hidden &= ~last_only[:, None]
    hidden[:, -1] |= ~hidden.any(1)
    positions = torch.argsort(hidden.int(), dim=1, descending=True, stable=True)[:, : hidden.sum(1).max()]  # (B, M)
    return tokens.masked_fill(hidden, mask), positions, torch.where(hidden, tokens, PAD).gather(1, positions)


def next_items(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ask every item for its successor, which a causal model must answer without looking ahead.

    tokens (B, T) left-padded. Returns tokens, positions and labels, (B, T - 1) each, PAD where nothing is asked.
    """
    history, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(history.shape[1]).expand(history.shape)
    return history, positions, torch.where(history != PAD, labels, PAD)


# ---------------------------------------------------------------- filtering


class Clicks(NamedTuple):
    """Columns of a log in the file's order, users and items numbered by first appearance."""

    users: np.ndarray  # (L,)
    items: np.ndarray  # (L,)
    times: np.ndarray  # (L,)
    raw_users: list[str]  # the file's own ids
    raw_items: list[str]


def core_filter(users: np.ndarray, items: np.ndarray, min_items: int, min_length: int) -> np.ndarray:
    """Indices of the largest sub-log where every user occurs `min_length` and every item `min_items` times (k-core)."""
    keep = np.arange(len(users))
    while True:
        enough = np.bincount(users[keep])[users[keep]] >= min_length
        enough &= np.bincount(items[keep])[items[keep]] >= min_items
        if enough.all():
            return keep
        keep = keep[enough]


def in_order(clicks: Clicks, keep: np.ndarray, once: bool) -> np.ndarray:
    """The entries `keep` by user and time, without lines that were written twice: same user, item and time.

    Ties keep the file's order. once: of each item a user's first line alone is kept. Of a log of one time for all,
    `build` gives the numbers of lines as times: what looks written twice there may be a repeat, and stays.
    """
    keep = keep[np.lexsort((clicks.times[keep], clicks.users[keep]))]  # a stable sort
    # Copies are looked for in a user's lines or, unless `once`, in those of one time: true where these begin.
    begins = np.diff(clicks.users[keep], prepend=-1) != 0
    if not once:
        begins |= np.diff(clicks.times[keep], prepend=-np.inf) != 0
    keys = np.cumsum(begins) * len(clicks.raw_items) + clicks.items[keep]
    return keep[np.sort(np.unique(keys, return_index=True)[1])]


def latest_users(clicks: Clicks, fraction: int) -> np.ndarray:
    """The entries of the 1/fraction of users whose last click is most recent."""
    latest = np.full(clicks.users.max() + 1, -np.inf)
    np.maximum.at(latest, clicks.users, clicks.times)
    recent = np.argsort(-latest, kind="stable")[: math.ceil(len(latest) / fraction)]
    return np.flatnonzero(np.isin(clicks.users, recent))


def order_of_ties(users: np.ndarray, times: np.ndarray, lines: np.ndarray) -> str:
    """What the card says where many of a user's lines have one time; arguments (L,), in the order of `in_order`."""
    same, later = np.diff(users) == 0, np.diff(times) > 0  # (L - 1,)
    tied = np.count_nonzero(same & ~later) / len(lines)
    if tied < 0.01:
        return ""
    backwards = (same & later).any() and (np.diff(lines)[same & later] < 0).all()
    more = ", which is newest first; turn the file around" if backwards else ""
    return f"{tied:.0%} have the time of the one before; they stay in the order of lines{more}"


REPEATS_FROM = 0.01  # of a log's interactions; fewer are accidents


def build(
    name: str, clicks: Clicks, titles: dict[str, tuple[str, str]], taken: dict[str, str], item_name: str,
    min_items: int, min_length: int, fraction: int, once: bool,
) -> Interactions:  # fmt: skip
    """Filter, sort by time within users (ties keep the file's order) and number items by first appearance.

    titles: {raw item id: (title, text)}. once: see `in_order`. Users come back to items if a share REPEATS_FROM
    of what is kept was theirs before. Raises InputError when nothing is left.
    """
    read = len(clicks.users)
    if not read:
        no = f"{taken['left out']}; --columns label=none takes every line" if "left out" in taken else "it has no lines"
        raise InputError(f"{name}: the log has no interactions: {no}")
    timed = clicks if np.ptp(clicks.times) else clicks._replace(times=np.arange(read))  # one for all: the lines' order
    keep = in_order(timed, latest_users(timed, fraction) if fraction > 1 else np.arange(read), once)
    core = keep[core_filter(clicks.users[keep], clicks.items[keep], min_items, min_length)]
    older = f" or of users before the latest 1/{fraction}" if fraction > 1 else ""
    lines = f"{read:,} read, {read - len(keep):,} repeated{older}, {len(keep) - len(core):,} of rare users or items"
    lines += f", {taken['left out']}" if "left out" in taken else ""
    if not len(core):
        least = f"where a user needs {min_length} and an item {min_items}; try smaller --min-length and --min-items"
        raise InputError(f"{name}: none is left of {lines}, {least}. Its columns: {taken['columns']}")
    users, items = clicks.users[core], clicks.items[core]
    kept = list(dict.fromkeys(items.data))  # by first appearance; `.data` makes no list of all
    numbers = np.empty(len(clicks.raw_items), np.int64)
    numbers[kept] = np.arange(len(kept))
    items = numbers[items]
    starts = np.flatnonzero(np.diff(users, prepend=-1))  # (U,) where each user begins
    raw_ids = ["", *(clicks.raw_items[item] for item in kept)]
    pairs = np.sort(users * len(kept) + items)  # np.unique takes eighty times as long for many distinct numbers
    repeats = bool((pairs[1:] == pairs[:-1]).sum() >= REPEATS_FROM * len(pairs))
    taken = {**taken, "interactions": f"{lines}; {len(core):,} kept"}
    if "times" in taken and (words := order_of_ties(users, clicks.times[core], core)):
        taken["order"] = words
    named = sum(raw_id in titles for raw_id in raw_ids)
    taken["titles"] = f"{named:,} of {len(kept):,} items; {taken['titles']}"
    if titles and not named:
        other = f"; if another column has the log's ids, call it {item_name}" if item_name else ""
        taken["titles"] += f"; the log has items such as {raw_ids[1]!r}, the file {min(titles)!r}{other}"
    shown, texts = ([titles.get(raw_id, (raw_id, ""))[part] for raw_id in raw_ids] for part in (0, 1))
    user_ids = [clicks.raw_users[user] for user in users[starts]]
    offsets, first_times = np.append(starts, len(core)), clicks.times[core[starts]]
    arrays = (items + 1, offsets, raw_ids, shown, texts, user_ids, first_times)
    return Interactions(name, *arrays, repeats, taken, exclude_seen=not repeats, item_name=item_name)


# ---------------------------------------------------------------- lines


def windows_1252(field: re.Match) -> str:
    """Decode a field that may not be UTF-8, whatever the rest of its line is, so that an id always reads the same."""
    content = field[0].encode(errors="surrogateescape")
    for encoding in ("utf-8", "cp1252"):
        with suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return content.decode("latin-1")  # five bytes mean nothing in Windows-1252


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a (gzipped) file: UTF-8, or Windows-1252 where a field is not; InputError for files that are no text."""
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, leave=False, delay=1)
    guessed = ""
    with open(path, "rb") as raw, bar:
        try:
            text = io.TextIOWrapper(gzip.open(raw) if path.suffix.lower() == ".gz" else raw, "utf-8", "surrogateescape")
            for number, line in enumerate(text):
                if not number and "\0" in line[:200]:
                    raise InputError(f"{path} is UTF-16, Excel, Parquet, SQLite or packed; save it as CSV, UTF-8")
                if not line.isascii() and re.search("[\udc80-\udcff]", line):
                    line = guessed = re.sub('[^\t,;|"]+', windows_1252, line)
                yield line.removeprefix("\ufeff")  # a byte-order mark, also of a file that was joined
                if not number & 0x3FFF and raw.seekable():  # a pipe has no place
                    bar.update(raw.tell() - bar.n)
            if guessed and path.name not in OFFICIAL:
                print(f"note: not all of {path} is UTF-8; the rest is read as Windows-1252: {guessed.strip()[:60]!r}",
                      file=sys.stderr)  # fmt: skip
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: broken gzip file ({error}); download it again") from error


COMPACT = re.compile(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])([01]\d|2[0-3])([0-5]\d){0,2}")  # dates
ZONE = r"( [+-]\d{4}| GMT| UTC)?"
MAIL = re.compile(rf"(Mon|Tue|Wed|Thu|Fri|Sat|Sun),? [\w ]+ \d\d?:\d\d(:\d\d)?{ZONE}( \d{{4}})?{ZONE}")


def moment(text: str) -> float:
    """A time as a number that sorts: 978300760, 1.5e9, 2014-04-07, 2014-04-07T10:51:09.277Z, 2014/04/07 10:51.

    Also 201404071051 and, as in mails and Twitter's, Tue Apr 03 18:00:09 +0000 2012. Seconds, milliseconds and
    nanoseconds sort alike, so the unit does not matter, as long as a log has one. ValueError for anything else.
    """
    when = None
    try:
        if len(text) in (10, 12, 14) and text[:2] in ("19", "20") and COMPACT.fullmatch(text):
            text = f"{text[:4]}-{text[4:6]}-{text[6:8]}T{text[8:]}"
        if len(text) > 7 and text[4] in "-/":
            date = re.sub(r" (?=[+-]\d|Z)", "", text.replace("/", "-").removesuffix(" UTC"))
            try:
                when = datetime.fromisoformat(date)
            except ValueError:  # 2014-4-7 8:03
                when = datetime.fromisoformat(re.sub(r"(?<![\d.])\d(?!\d)", r"0\g<0>", date))
        elif text[:1] in "MTWFS" and MAIL.fullmatch(text):
            when = email.utils.parsedate_to_datetime(text)
        elif (text[:1] == "0" and text[1:2].isdigit()) or "_" in text or ("+" in text and len(text) < 14):
            raise ValueError  # 011219, a day first; 1_2, in Python 12; 1.58E+12, as Excel and %g round
        number = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() if when else float(text)
    except (ValueError, OverflowError):
        number = math.nan
    if abs(number) < (1e11 if when else 2.0**63):  # databases write the year 9999 where there is no date; nor is nan
        return number
    raise ValueError(f"{text[:60]!r} is not a time; write 2020-01-31 10:00 or a number")


def day_and_clock(day: str, clock: str) -> float:
    """`moment` of a date in one column and a time of day in another, such as 9:05 or milliseconds since midnight."""
    clock = NO_DAY.sub("", clock)
    day = re.sub(r"^(\d{4})(\d\d)(\d\d)$", r"\1-\2-\3", day)  # 20200131
    if ":" in clock:
        return moment(f"{day[:10]} {'0' * (clock[1:2] == ':')}{clock}")  # Excel writes dates with a midnight
    if day[4:5] not in ("-", "/"):
        raise ValueError(f"{day!r} is not a date; write 2020-01-31")
    if not re.fullmatch(r"\d+(\.\d+)?", clock) or float(clock) >= 86_400_000:
        raise ValueError(f"{clock!r} is not a time of day; write 9:05, or milliseconds")
    return moment(day) + float(clock) / 1000


# ---------------------------------------------------------------- tables


def plain(names: list[str]) -> list[str]:
    """Names of columns as they are compared: in lower case, letters and digits alone."""
    return [re.sub(r"[\W_]", "", name).lower() for name in names]


csv.field_size_limit(1 << 20)  # letters: descriptions may be long, but a quote that stays open is not read to the end


def open_table(path: Path) -> tuple[list[str], Callable]:
    """The names of a table's columns, and `rows_of` to read its rows; InputError if a name occurs twice.

    Fields are split as in CSV: not inside quotes, in which a quote is written twice. With tabs, that is so only if the
    header has quotes; otherwise every tab splits, and `rows_of` removes the quotes around whole fields.
    """
    lines = read_lines(path)
    dropped: list[str] = []
    if path.name in OFFICIAL:
        line_of, first = OFFICIAL[path.name]
        lines = map(line_of, filter(str.strip, lines))
    elif re.fullmatch(r'"?sep=."?\s*', first := next(lines, "")):  # for Excel
        dropped, first = ["\n"], next(lines, "")
    if not first.strip():
        raise InputError(f"{path}: its first line is empty; a header with the names of columns must be there")
    separator = max("\t,;|", key=re.sub('"[^"]*"', "", first).count)
    quoting: Any = csv.QUOTE_NONE if separator == "\t" and '"' not in first else csv.QUOTE_MINIMAL
    text = itertools.chain(dropped, [first], lines)  # an empty line in its place, for the numbers of the others
    rows: Any = csv.reader(text, delimiter=separator, quoting=quoting, skipinitialspace=True, strict=True)
    try:
        header = next(filter(None, rows))
    except csv.Error as error:
        raise InputError(f"{path}:1: this is no header of CSV ({error}): {first.strip()[:60]!r}") from error
    # RecBole writes user_id:token; pandas leaves its index without a name.
    names = [re.sub(":(token|float)(_seq)?$", "", name).strip() or f"column {n}" for n, name in enumerate(header, 1)]
    spelt = plain(names)
    for name, word in zip(names, spelt, strict=True):
        if word in KNOWN and spelt.count(word) > 1:
            raise InputError(f"{path}:1: column {name!r} occurs twice; rename one, or write a header first")
    return names, partial(rows_of, path, header, rows)


def unquoted(fields: list[str]) -> list[str]:
    """Fields between tabs without the quotes around whole ones; ValueError where one is not closed."""
    if re.fullmatch('"([^"]|"")*', fields[-1]):
        raise ValueError("a quote is not closed; if quotes are meant as in CSV, put some into the header")
    return [f[1:-1].replace('""', '"') if re.fullmatch('"([^"]|"")*"', f) else f for f in fields]


def rows_of(path: Path, header: list[str], rows: Any, parse: Callable, examples: list[str]) -> Iterator:
    """What `parse` returns for each row; where it raises, lines go to `examples`, more than 1 % are an InputError.

    Left out are empty rows and the headers of files that were joined. A line that OFFICIAL refuses never reaches the
    reader, whose line_num does not count it.
    """
    width, tabs = len(header), rows.dialect.quoting == csv.QUOTE_NONE and path.name not in OFFICIAL
    unread = 0  # lines that OFFICIAL refused
    while True:
        before = rows.line_num
        try:
            fields = next(rows)
            if rows.line_num - before > 4:  # many rows after an open quote, or one long text?
                inside = [line.count(rows.dialect.delimiter) == width - 1 for line in max(fields, key=len).split("\n")]
                if sum(inside) > len(inside) / 2:
                    raise ValueError(f"a quote is closed only {rows.line_num - before - 1} lines later")
            if tabs and any(field[:1] == '"' for field in fields):  # pandas quotes here, too
                fields = unquoted(fields)
            if fields and fields[0] in header and {*fields} == {*header}:
                if fields != header:
                    raise InputError(f"{path}:{before + 1}: here the order of columns changes; found {fields}")
            elif len(fields) > width and any(fields[width:]):  # which column has a field too many is not known
                raise ValueError(f"expected {width} fields, not {len(fields)}; has a column, as of numbers, no name?")
            elif any(fields):
                yield parse(fields)
        except StopIteration:
            break
        except InputError:
            raise
        except (csv.Error, ValueError, IndexError, KeyError, SyntaxError) as error:
            read = rows.line_num > before and not isinstance(error, csv.Error)
            if read and all(place_of(fields, COLUMNS[kind]) is not None for kind in ("user", "item")):
                raise InputError(f"{path}:{before + 1}: a header again, with other names; found {fields}") from error
            kinds = {IndexError: "fields are missing", KeyError: f"no field {error}",
                     csv.Error: f"a quote is not closed, or not written twice in quotes ({error})"}  # fmt: skip
            number = before + unread + (path.name not in OFFICIAL)
            found = f"; found {str(fields)[:60]}" if read else ""
            example = f"{path}:{number}: {kinds.get(type(error), error)}{found}"
            examples += [example] * max(1, rows.line_num - before)  # one per line
            unread += rows.line_num == before
    lost, count = len(examples), rows.line_num + unread - 1
    if lost > 0.01 * count:
        raise InputError(f"{examples[0]} ({lost:,} of {count:,} lines are unreadable)")
    for example in list(dict.fromkeys(examples))[:3]:
        print(f"skipped, one of {lost:,}: {example}", file=sys.stderr)


# Common public spellings, in order of preference, as `plain` writes them.
SESSION = "sessionid session usersession visitid sid"
# Columns that may hold the time of day, beside one of dates.
TIME_OF_DAY = (
    "timeofday time clock hour eventtime ordertime purchasetime clicktime starttime transtime hourofday orderhour "
    "orderhourofday hourmin uhrzeit zeit tijd tid hora heure ora saat godzina"
)
# What kind of interaction a line is, which is not read.
KINDS = ("event eventtype behavior behaviortype action actiontype type", "rating stars score overall", "quantity")
COLUMNS = {
    "user": "userid uid customeruniqueid customerid customerno customernumber customercode usernumber usercode user "
    "customer reviewerid visitorid memberid profileid playerid personid accountid clientid readerid username "
    f"fullvisitorid userpseudoid anonymousid distinctid {SESSION}",
    # Ids of single things, then words that may be a line's number or a kind of things, then what may hold many things.
    "item": "itemid iid productid movieid articleid newsid trackid songid videoid bookid gameid animeid recipeid "
    "postid contentid docid adid listingid upc ean gtin barcode isbn sku parentasin asin stockcode productcode "
    "articlecode itemcode material article item product movie businessid venueid artistid hotelid courseid appid "
    "locationid aid",
    "time": "timestamp time datetime date ts eventtime eventtimestamp eventdate unixtimestamp utctimestamp unixtime "
    "unixreviewtime reviewtime createdat createdtime clicktime viewtime purchasedate orderdate invoicedate "
    "transactiondate tdat",
    "clock": "timeframe",  # milliseconds in a session
    "label": "label click clicked clk clickbool isclick isclicked purchased bought liked",
}
KNOWN = {*" ".join(COLUMNS.values()).split(), "title"}
# What else may be a person, where only sessions are known: many people may have a session 1.
WHO = "user|client|cust(omer)?|member|person|visitor|shopper|buyer|household|account|subscriber|contact|student|patient"
PERSON = re.compile(f"^({WHO})$|({WHO}|guest|login|cookie|device)(id|key|code|number|no|hash|email)+$|email$")
YES, NO = {"true", "t", "yes", "y"}, {"false", "f", "no", "n"}  # besides numbers; no: shown, but not clicked
# How databases, pandas and R write what is not there.
MISSING = {"", "null", "(null)", "[null]", "#null!", "none", "(none)", "nan", "na", "<na>", "n/a", "#n/a",
           "undefined", "(not set)", "(blank)", "-", "--", "\\n"}  # fmt: skip
# 9.78014E+12, 7.19e+18, 9.78014e+12, 1.2346e+06: many ids became one.
ROUNDED = re.compile(r"\dE\+\d\d|\d[.,]\d+(E\+\d+|e\+(1[6-9]|[2-9]\d))|\d\.\d{4,5}e\+(0[5-9]|1\d)")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # what may move the cursor of a terminal
LOOKS_LIKE_TIME = re.compile(r"(?i:time(?!s|_?spent)|date|stamp|epoch|when|datum|fecha|zeit|horo|created|started|"
                             r"occurred|moment|instant|utc|(^|_)(ts|dt|at|on|day|hour|week|month|position|step|seq|"
                             r"sequence|order_number)$|^ts_|^year$)|[a-z](At|On|T[sS])$")  # fmt: skip
# Of clocks, in Excel, Access, pandas, Rails and .NET.
NO_DAY = re.compile(r"(1899-12-3[01]|1900-01-0[01]|1970-01-01|2000-01-01|0001-01-01)[ T]")
CLOCK = re.compile(r"([01]?\d|2[0-3]):[0-5]\d(:[0-5]\d([.,]\d+)?)?( ?[AaPp][Mm])?")
FINER = re.compile(r"^\d{9}|(?<![\d:])(?!00:00(:00)?(?!\d))\d\d?:\d\d")  # tells more than the day
# What may be a time: seconds and finer since 1992, 1.6e9, 20140428, 28.04.2014 10:51, Apr 28 2014, 28-APR-14.
DATED = re.compile(r"([7-9]\d{8}|1\d{9})(\d{3}){0,3}(\.\d+)?|\d\.\d+[eE]\+?\d\d?|(19|20)\d{6}(T.*)?|"
                   r"\d{1,4}[-/.]\d\d?[-/.]\d\d?.*|[A-Z][a-z]{2,8}\.? \d\d?,? .*|\d\d?[- .][A-Za-z]{3,9}[- .,].*\d\d.*|"
                   r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,? .*\d\d:\d\d.*|\d\d?:\d\d.* \d\d?[-/.]\d.*|"
                   r"\d+[^\d:].*\d\d?:\d\d.*|\d{4}\D\d\d?\D\d\d?\D.*")  # fmt: skip


Places = dict[str, int | None]  # {"user", "item", ...: the place among the columns}


def place_of(names: list[str], known: str) -> int | None:
    """The place among the columns of the first of the known spellings that occurs, else None."""
    spelt = plain(names)
    return next((spelt.index(word) for word in known.split() if word in spelt), None)


def how_fine(names: list[str], rows: list[list[str]]) -> list[int]:
    """How finely most values of a column tell the time: 2 finer than a day, 1 the day, 0 not at all; -1 without a day.

    What all have in common behind the date, as a midnight elsewhere, tells nothing.
    """
    levels = []
    for place in range(len(names)):
        column = (row[place].strip() for row in rows if place < len(row))
        values = [value for value in column if value.lower() not in MISSING]
        dates = [value for value in values if DATED.fullmatch(value) and not NO_DAY.match(value)]
        numbers, differ = dates and dates[0][:9].isdecimal(), len(dates) == 1 or len({date[10:] for date in dates}) > 1
        finer = any(map(FINER.search, dates)) and (numbers or differ)
        clock = values and all(map(CLOCK.fullmatch, values))
        levels.append(-1 if clock else 0 if 2 * len(dates) <= len(values) else 2 if finer else 1)
    return levels


def find_columns(path: Path, names: list[str], first: list[list[str]], given: dict[str, str], sessions: bool) -> Places:
    """The places of {"user", "item", "time", "clock", "label", "owner"} in a log whose first rows are `first`.

    given: names that override the known ones, "none" for no such column. sessions: a column of sessions, if there is
    one, is the user, and that of users the owner. Raises InputError where a column is missing or in doubt.
    """
    found = f"found {', '.join(names[:50])}{', ...' if len(names) > 50 else ''}"
    if wrong := [name for name in given.values() if name != "none" and names.count(name) != 1]:
        raise InputError(f"{path}:1: {'two columns' if wrong[0] in names else 'no column'} {wrong[0]!r}; {found}")
    if len(names) < 2:
        raise InputError(f"{path}:1: found one column, {names[0][:60]!r}; save the log as CSV with a header: commas, "
                         "semicolons, tabs or | between columns, and no quotes around whole lines")  # fmt: skip
    numbers = [str(number) for number in range(len(first) + 1)]
    if {*map(len, first)} == {len(names) + 1} and [row[0] for row in first] in (numbers[:-1], numbers[1:]):
        raise InputError(f"{path}: its rows begin with their number, which the header does not name; name it there")
    if lists := [name for name in names if name.endswith("_list") and place_of([name[:-5]], COLUMNS["item"]) == 0]:
        raise InputError(f"{path}: {lists[0]} holds histories; write one line a click: user_id, item_id, timestamp")
    levels = how_fine(names, first)
    places = {kind: place_of(names, known) for kind, known in COLUMNS.items()} | {"owner": None}
    if places["time"] is None or levels[places["time"]] != 1 or "time" in given:
        places["clock"] = None
    if places["label"] is not None and levels[places["label"]] > 0:  # the day of a purchase
        places["label"] = None
    if "user" not in given and (session := place_of(names, SESSION)) is not None:
        people = [place for place, name in enumerate(plain(names)) if PERSON.search(name)]
        person = places["user"] if places["user"] != session else next(iter(people), None)
        if sessions:
            places |= {"user": session, "owner": person}
        elif person not in (None, places["user"]):
            both = [shlex.quote(f"user={names[place]}") for place in (person, session)]
            raise InputError(f"{path}:1: who is the user? Say --columns {both[0]}, or, to take sessions, {both[1]}")
    places |= {kind: names.index(name) if name != "none" else None for kind, name in given.items()}
    used = {kind: place for kind, place in places.items() if place is not None}
    if len(set(used.values())) < len(used):
        taken = ", ".join(f"{kind} = {names[place]}" for kind, place in used.items())
        raise InputError(f"{path}:1: one column cannot be two things: {taken}")
    for kind in ("user", "item"):
        if places[kind] is None:
            raise InputError(f"{path}:1: no column is known as the {kind}; {found}; name it: --columns {kind}=NAME, or "
                             "write a header first, if there is none")  # fmt: skip
    if places["clock"] is not None and places["time"] is None:
        raise InputError(f"{path}:1: a clock needs the day beside it: --columns time=NAME,clock=NAME; {found}")
    if places["clock"] is None and "time" not in given:
        check_time(path, names, places, levels)
    return places


def check_time(path: Path, names: list[str], places: Places, levels: list[int]) -> None:
    """InputError if another column may tell the time better than the one taken as the time, or than no column.

    Without a time, or beside a clock, any column of dates is asked about; else one that tells the time more finely and
    is called like a time. levels: see `how_fine`; here -1 is no time.
    """
    when = places["time"]
    clock = place_of(["" if level > 0 else name for name, level in zip(names, levels, strict=True)], TIME_OF_DAY)
    if clock is None:
        pairs = enumerate(zip(names, levels, strict=True))
        clock = next((place for place, (name, level) in pairs if level < 0 and LOOKS_LIKE_TIME.search(name)), None)
    level, taken = (-1, "") if when is None else (max(0, levels[when]), names[when])
    unsure = when is None or clock is not None  # then columns of dates count under any name
    others = [place for place in range(len(names)) if place not in places.values()]
    least = level if unsure and level == 0 else level + 1  # a day may be a number, too
    likely = [place for place in others if levels[place] >= least
              and (LOOKS_LIKE_TIME.search(names[place]) or (unsure and levels[place]))]  # fmt: skip
    likely.sort(key=lambda place: (-levels[place], not LOOKS_LIKE_TIME.search(names[place])))
    finer = likely and levels[likely[0]] == 2 and LOOKS_LIKE_TIME.search(names[likely[0]])
    if level == 1 and clock is not None and not finer:  # the time of day
        likely, way = [clock], f"time={taken},clock={names[clock]}"
    elif likely:
        way = f"time={names[likely[0]] if levels[likely[0]] else 'NAME'}"
        way += f",clock={names[clock]}" if clock is not None and levels[likely[0]] == 1 else ""
    else:
        return
    what = ["no column is known as the time", f"{taken} does not look like a time", f"{taken} tells the day alone"]
    could = " or ".join(names[place] for place in likely[:3])
    raise InputError(f"{path}:1: {what[level + 1]}, but {could} could be one; say --columns {shlex.quote(way)}, or "
                     f"time={taken if level == 1 else 'none if the lines are in the order of time'}")  # fmt: skip


def says_yes(label: str) -> bool:
    """Whether a label says that an item was clicked, not just shown; ValueError for one that says neither."""
    label = label.strip().lower()
    try:
        return label in YES or (label not in NO | MISSING and float(label) > 0)
    except ValueError:
        raise ValueError(f"{label!r} is neither yes nor no; --columns label=none takes every line") from None


def check_values(path: Path, times: np.ndarray, user_ids: dict[str, int], item_ids: dict[str, int]) -> None:
    """InputError for what spreadsheets and joined files spoil: times that would not sort, ids that became others.

    That is, some times in seconds and others finer, days such as 31122019, ids rounded or written in two ways.
    """
    years = times % 10_000
    if len(times) and ((times >= 1e6) & (times < 1e8) & (years > 1900) & (years < 2100)).all():
        raise InputError(f"{path}: its times end in the year, such as {times[0]:08.0f}; write 2019-12-31")
    units = np.digitize(np.abs(times), [1e8, 1e11, 1e14, 1e17])  # 0: none, then s, ms, us, ns
    each = [times[units == unit] for unit in np.unique(units[units > 0])]
    if len(each) > 1:
        found = " and ".join(f"{len(some):,} like {some[0]:.0f}" for some in each)
        raise InputError(f"{path}: its times are not all in one unit: {found}; write seconds")
    for ids in (user_ids, item_ids):
        if rounded := [raw_id for raw_id in ids if "+" in raw_id and ROUNDED.fullmatch(raw_id)]:
            raise InputError(f"{path}: ids were rounded, as by Excel, such as {rounded[0]}; write them again, as text")
        if both := [raw_id for raw_id in ids if raw_id[-2:] == ".0" and raw_id[:-2] in ids]:
            raise InputError(f"{path}: ids are written in two ways, such as {both[0][:-2]} and {both[0]}; write one")


def read_log(path: Path, given: dict[str, str], sessions: bool) -> tuple[Clicks, dict[str, str], str]:
    """Clicks of a log, what was taken for what, and its name of the items; given, sessions: see `find_columns`."""
    names, read = open_table(path)
    with redirect_stderr(io.StringIO()):  # what is to be noted is noted when all is read
        first = list(itertools.islice(open_table(path)[1](list, []), 100))
    places = find_columns(path, names, first, given, sessions)
    user, item, when, clock, label, owner = map(places.get, ("user", "item", "time", "clock", "label", "owner"))
    session = place_of(names, SESSION)
    other = "" if session in (None, user) else f"; or take sessions: --columns {shlex.quote(f'user={names[session]}')}"
    user_ids, item_ids = dict[str, int](), dict[str, int]()
    owners: dict[str, str] = {}  # of sessions
    users, items, times = array("q"), array("q"), array("d")

    def take(fields: list[str]) -> bool:
        """Keep a row; False if its label says that nothing was clicked."""
        user_id, item_id = fields[user].strip(), fields[item].strip()  # type: ignore[index]
        if user_id.lower() in MISSING or item_id.lower() in MISSING:
            raise ValueError(f"user and item must be there, or the line left out{other}")
        if not (ids := user_id + item_id).isprintable() and CONTROL.search(ids):
            raise ValueError("user and item must be without NUL bytes, tabs and other control characters")
        time_of = 0.0
        if when is not None:
            time = fields[when].strip()
            time_of = moment(time) if clock is None else day_and_clock(time, fields[clock].strip())
        if label is not None and not says_yes(fields[label]):
            return False
        if owner is not None:
            who = fields[owner].strip()
            if who.lower() not in MISSING and owners.setdefault(user_id, who) != who:
                both = f"session {user_id} is of two users, {owners[user_id]} too; number sessions over all users"
                raise ValueError(f"{both}, or, if they are, say --columns {shlex.quote(f'user={names[user]}')}")  # type: ignore[index]
        users.append(user_ids.setdefault(user_id, len(user_ids)))
        items.append(item_ids.setdefault(item_id, len(item_ids)))
        times.append(time_of)
        return True

    skipped: list[str] = []
    left_out = sum(not clicked for clicked in read(take, skipped))
    arrays = np.frombuffer(users, np.int64), np.frombuffer(items, np.int64), np.frombuffer(times, np.float64)
    check_values(path, arrays[2], user_ids, item_ids)
    taken = what_was_taken(path, names, places, arrays[2], left_out)
    if sessions and session is None and "user" not in given:
        taken["sessions"] = "no column is known as the session, so each user is one; name it: --columns user=NAME"
    taken |= {"skipped": f"{len(skipped):,} lines could not be read"} if skipped else {}
    return Clicks(*arrays, list(user_ids), list(item_ids)), taken, names[item]  # type: ignore[index]


def what_was_taken(path: Path, names: list[str], places: Places, times: np.ndarray, left_out: int) -> dict[str, str]:
    """What the card prints of a log that was read: its columns, those left aside, and times that are no dates."""
    named = {kind: names[place] for kind, place in places.items() if place is not None}
    columns = ", ".join(f"{kind} = {name}" for kind, name in named.items())
    others = [name for name in names if name not in named.values()]
    if "time" in named:  # else any other column might be one
        others = [name for name, word in zip(others, plain(others), strict=True)
                  if LOOKS_LIKE_TIME.search(name) or word in KNOWN or PERSON.search(word)]  # fmt: skip
    no_time = "" if "time" in named else "; no time: lines are in its order"
    not_read = f"; not read: {', '.join(others[:20])}{', ...' if len(others) > 20 else ''}" if others else ""
    taken = {"columns": f"{columns} of {path.name}{no_time}{not_read}"}
    if "label" in named:
        taken["left out"] = f"{left_out:,} lines whose {named['label']} says no"
    if kinds := [names[place] for known in KINDS if (place := place_of(names, known)) is not None]:
        taken["not read"] = f"{' and '.join(kinds)}: a line is an interaction, whatever stands there"
    if "time" in named and len(times):
        ends = np.array([times.min(), times.max()])
        days = in_seconds(ends).astype(np.int64).astype("M8[s]").astype("M8[D]")
        taken["times"] = f"{days[0]} to {days[1]}" if ends[1] >= 1e8 else f"{ends[0]:g} to {ends[1]:g}, not dates"
    if len(times) and times.max() >= 1e8 and len(undated := times[times < 1e8]):
        taken["no dates"] = f"{len(undated):,} of the times, such as {undated[0]:.0f}; they are taken as the oldest"
    return taken


# Columns of titles, tried after those named like the items: track_name where these are track_id.
TITLES = (
    "movietitle booktitle producttitle itemtitle newstitle gametitle videotitle songtitle tracktitle primarytitle "
    "originaltitle name productname productdisplayname prodname itemname appname gamename animename bookname moviename "
    "trackname"
)
# How the names of columns end that describe items in words, besides their titles.
DESCRIBES = re.compile("(genre|category|categorie|class|tag|brand|developer|publisher|author|artist|studio|director)s?"
                       "(names?|list)?$")  # fmt: skip
LISTED = re.compile(r"(?<!\w)u?['\"]|['\"](?!\w)|[\[\]|]")  # the punctuation of lists, as in ['Action', 'Indie']


def read_titles(path: Path, item_name: str = "") -> tuple[dict[str, tuple[str, str]], str]:
    """Read {raw item id: (title, text)}, and say where they come from; trailing empty fields may be missing.

    item_name: what the log calls its items, tried first. The text, which BERT reads, is the title and the columns that
    DESCRIBES knows, each after its name.
    """
    names, read = open_table(path)
    item = place_of(names, f"{plain([item_name])[0]} {COLUMNS['item']} id")
    stem = "" if item is None else re.sub("(id|code|key|number|no)$", "", plain(names)[item])
    title, year = place_of(names, f"title {stem}title {stem}name {TITLES}"), place_of(names, "releaseyear")
    if item is None or title is None:
        what = "items" if item is None else "titles"
        only = f"only {', '.join(names[:9])}; write a header with item_id and title"
        return {}, f"{path.name} has no column of {what}, {only}"
    others = [n for n, name in enumerate(plain(names)) if DESCRIBES.search(name) and n not in (item, title)]

    def parse(fields: list[str]) -> tuple[str, str, str]:
        """Raw id, title and text."""
        fields = ["" if field.strip().lower() in MISSING else field.strip() for field in fields]
        fields += [""] * (len(names) - len(fields))
        shown = CONTROL.sub(" ", fields[title]).strip()
        when = fields[year].removesuffix(".0") if year is not None else ""  # pandas writes 1995.0
        # MovieLens' own titles end in the year; RecBole cut it off.
        shown = f"{shown} ({when})" if shown and when and "(" + when not in shown else shown
        more = [(names[place], " ".join(LISTED.sub(" ", fields[place]).split())) for place in others]
        if CONTROL.search(fields[item]):
            raise ValueError("items must be without NUL bytes, tabs and other control characters")
        return fields[item], shown, ". ".join([shown, *(f"{name}: {value}" for name, value in more if value)])

    titles: dict[str, tuple[str, str]] = {}
    twice = 0
    for raw_id, shown, text in read(parse, []):
        if raw_id and shown:
            twice += titles.get(raw_id, (shown, text)) != (shown, text)
            titles[raw_id] = (shown, text)
    texts = " and ".join(names[place] for place in (title, *others))
    more = f"; {twice:,} lines describe an item anew, the last counts" if twice else ""
    return titles, f"from {texts} of {path.name}, by {names[item]}{more}"


# ---------------------------------------------------------------- public datasets

STRING = r"""u?'[^'\\]*(?:\\.[^'\\]*)*'|u?"[^"\\]*(?:\\.[^"\\]*)*\""""
PAIR = re.compile(rf"\s*({STRING})\s*:\s*({STRING}|[-+.\w]+|\[[^\[\]]*\])\s*(?:,|\}}\s*$)")


def python2_dict(line: str) -> dict[str, str]:
    """Steam's {u'username': u'Zo\\xeb', u'hours': 1.5} as {key: literal}, without evaluating it.

    Token by token, as texts hold quotes, braces and things that look like other fields; faster than literal_eval.
    """
    fields, end = {}, 1
    while pair := PAIR.match(line, end):
        fields[pair[1].lstrip("u")[1:-1]], end = pair[2], pair.end()
    if not fields or line[0] != "{" or end != len(line):
        raise ValueError(f"expected {{'key': value, ...}}; unreadable at column {end}")
    return fields


def text_of(literal: str) -> str:
    """The value of a quoted literal (most have no escapes, and literal_eval takes 4 us); of any other, its letters."""
    if "\\" in literal:
        return str(ast.literal_eval(literal))
    return literal.lstrip("u")[1:-1] if literal[-1:] in "'\"" else literal


def steam_review(line: str) -> str:
    fields = python2_dict(line)
    return "\t".join([text_of(fields["username"]), text_of(fields["product_id"]), text_of(fields["date"])])


def steam_game(line: str) -> str:
    fields = {key: text_of(value) for key, value in python2_dict(line).items()}
    fields["title"] = fields.get("app_name") or fields.get("title", "")
    return "\t".join(CONTROL.sub(" ", fields.get(key, "")) for key in ("id", "title", "genres", "tags", "developer"))


OFFICIAL: dict[str, tuple[Callable[[str], str], str]] = {  # files without a header: what makes their lines fit this one
    "ratings.dat": (lambda line: line.replace("::", "\t"), "user_id\titem_id\trating\ttimestamp"),
    "movies.dat": (lambda line: line.replace("::", "\t"), "item_id\ttitle\tgenres"),
    "steam_reviews.json.gz": (steam_review, "username\tproduct_id\tdate"),
    "steam_games.json.gz": (steam_game, "id\ttitle\tgenres\ttags\tdeveloper"),
    "yoochoose-clicks.dat": (str, "session_id,timestamp,item_id,category"),
}


class Public(NamedTuple):
    """Where a dataset, or a BERT, comes from."""

    source: str  # the address of a zip, a package NAME==VERSION, or, without sha256, what people must fetch by hand
    files: list[str]  # what to take out of it; of a dataset the log, then the titles
    sha256: str = ""
    inside: str = ""  # the archive's folder of the files
    once: bool = False  # a user's repeated item counts once, its first time


PUBLIC = {
    "ml-100k": Public(
        "recbole==1.2.1", ["ml-100k.inter", "ml-100k.item"],
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407", "recbole/dataset_example/ml-100k/",
    ),
    "ml-1m": Public(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip", ["ratings.dat", "movies.dat"],
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", "ml-1m/",
    ),
    "steam": Public(
        "https://cseweb.ucsd.edu/~jmcauley/datasets.html", ["steam_reviews.json.gz", "steam_games.json.gz"], once=True
    ),
    "yoochoose": Public(
        "https://s3-eu-west-1.amazonaws.com/yc-rdata/yoochoose-data.7z, unpack it: 7z x yoochoose-data.7z",
        ["yoochoose-clicks.dat"],
    ),
}  # fmt: skip
TIMEOUT = 20  # seconds without a byte


def cache_folder() -> Path:
    """The folder of files that can be downloaded or made again: $XDG_CACHE_HOME/prebert, else ~/.cache/prebert."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prebert"
    except RuntimeError:
        raise InputError("there is no home folder to keep files in; set XDG_CACHE_HOME") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a temporary file, fsync it and rename it to `path`; InputError if that fails, with nothing changed."""
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no file")
    path = path.resolve()  # what a link points to is replaced, not the link
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


def write_if_possible(write: Callable[..., None], *args: object) -> None:
    """Write a file that can be made again; if that fails, as on a full disk, print a note and go on."""
    try:
        write(*args)
    except InputError as error:
        print(f"note: {error}", file=sys.stderr)


def check_replaceable(path: Path, beginning: str) -> None:
    """InputError if a file is there that does not begin as ours do: it may be a log or a model."""
    if path.exists() and (not path.is_file() or re.match("/dev/|/proc/", str(path))):
        raise InputError(f"{path}: is no file that can be replaced; name another")
    if path.exists():
        with open(path, "rb") as file:
            if not beginning.encode().startswith(found := file.read(len(beginning))):
                raise InputError(f"{path} is there and begins with {found[:20]!r}; name another file, to keep it")


def write_json(path: Path, content: object) -> None:
    """Strict JSON: ValueError for a number that is none."""
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def download(source: str) -> bytes:
    """Download what is at an address, or the wheel of a package NAME==VERSION from PyPI or its mirror."""
    print(f"fetching {source}", file=sys.stderr)
    if "://" in source:
        with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(response, "read", total=size, leave=False, delay=1) as bar:
                return b"".join(iter(lambda: bar.read(1 << 16), b""))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([*command, "--dest", folder, source], capture_output=True, text=True)
        if result.returncode:
            raise OSError(result.stderr.strip().rpartition("\n")[2])
        return next(Path(folder).iterdir()).read_bytes()


def fetch(folder: Path, public: Public) -> None:
    """Download the files of a public dataset into a folder; InputError says which to put there by hand."""
    source, files, sha256, inside, _ = public
    advice = f"download it elsewhere and put {' and '.join(files)} into {folder}"
    if not sha256:
        raise InputError(f"no {folder / files[0]}; from {source}: {advice}")
    by_hand = folder.parent / source.rpartition("/")[2]  # a zip that the user put beside the folder
    try:
        content = by_hand.read_bytes() if by_hand.is_file() else download(source)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"cannot fetch {source} ({' '.join(str(error).split())}); {advice}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        where = by_hand if by_hand.is_file() else source
        raise InputError(f"{where} is not the official file (its SHA-256 differs); fetch it again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for file in reversed(files):  # the first last: where it is, the others are
            write_atomic(folder / file, archive.read(inside + file))


# ---------------------------------------------------------------- datasets by name or path

TITLES_IN = [end + gz for gz in ("", ".gz") for end in (".item", ".items.csv", ".items.tsv")]
TABLE = re.compile(r"(?<=[^./])\.(inter|item|csv|tsv)(\.gz)?$", re.IGNORECASE)
CACHE_FROM = 1 << 24  # bytes; smaller logs are read faster than anyone waits
COPY_VERSION = 21  # of what a parsed copy holds


def dataset_name(name: str) -> str:
    """What run folders call the dataset of a --data flag: the name, or a file's stem."""
    return TABLE.sub("", Path(name).name) if TABLE.search(name) else name


def find_files(name: str, root: str | Path | None, titles: str | None = None) -> list[Path]:
    """Paths of a dataset's log and, if there is one, its file of titles; downloaded if possible, else InputError."""
    if titles and not (TABLE.search(name) and Path(titles).is_file()):
        raise InputError(f"--titles {titles}: it must be a file, and goes with a log of your own")
    if (other := re.search(r"\.(parquet|xlsx|jsonl?)(\.gz)?$", name)) and Path(name).name not in OFFICIAL:
        how = {"parquet": f"parquet({name!r})", "xlsx": f"excel({name!r})"}.get(other[1], f"json({name!r}, lines=True)")
        raise InputError(f"write it as CSV: import pandas; pandas.read_{how}.to_csv('x.csv', index=False)")
    if TABLE.search(name) and Path(name).is_file():
        log, others = Path(name), []
    elif name in PUBLIC:
        folder = Path(root or os.environ.get("PREBERT_DATA") or "data") / name
        log, *others = [folder / file for file in PUBLIC[name].files]
        log = next(filter(Path.exists, (log, folder / f"{name}.inter")), log)
        if not log.exists():
            fetch(folder, PUBLIC[name])
    else:
        what = "no file" if TABLE.search(name) else "unknown dataset"
        what = "a folder, not a file:" if Path(name).is_dir() else what
        raise InputError(f"{what} {name!r}; --data takes {', '.join(PUBLIC)} or a path to a .inter, .csv or .tsv file")
    # The titles of x.inter, x.csv.gz or x.train.inter are in x.item or x.items.csv.
    stems = [log.name[: dot.start()] for dot in re.finditer(r"\.", log.name)][::-1]
    beside = [log.with_name(stem + end) for stem in stems for end in TITLES_IN]
    paths = [Path(titles)] if titles else [*beside, *others]
    return [log, *[path for path in paths if path.is_file()][:1]]


def load_dataset(
    name: str, root: str | Path | None = None, min_items: int = 5, min_length: int = 5, fraction: int = 1,
    columns: dict[str, str] | None = None, titles_file: str | None = None, sessions: bool = False,
) -> Interactions:  # fmt: skip
    """Load one of PUBLIC or a table with a header; a large one leaves a parsed copy under runs/.

    The arguments are those of `add_data_flags`; columns: {"user": a column's name, ...}. Raises InputError for an
    unknown name, a missing file or too many unreadable lines.
    """
    paths = find_files(name, root, titles_file)
    source: list = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    source.append([COPY_VERSION, fraction, columns or {}, sessions])
    copy = Path("runs") / dataset_name(name) / f"interactions-{min_items}-{min_length}.npz"
    errors = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)  # no copy, or a broken one
    with suppress(*errors), np.load(copy) as saved:  # numpy refuses pickles unless told otherwise
        rest = json.loads(saved["rest"].tobytes())
        if rest.pop("source") == source:
            return Interactions(**{key: saved[key] for key in saved.files if key != "rest"}, **rest)
    clicks, taken, item_name = read_log(paths[0], columns or {}, sessions)
    titles, taken["titles"] = read_titles(paths[1], item_name) if paths[1:] else ({}, "no file of titles was found")
    once = name in PUBLIC and PUBLIC[name].once
    data = build(dataset_name(name), clicks, titles, taken, item_name, min_items, min_length, fraction, once)
    if titles_file and not any(data.texts):
        raise InputError(f"--titles {titles_file}: {data.taken['titles']}")
    if len(paths) > 1 and not any(data.texts):
        print(f"note: titles: {data.taken['titles']}", file=sys.stderr)
    if sum(size for _, size, _ in source[:-1]) >= CACHE_FROM:
        arrays = {key: value for key, value in vars(data).items() if isinstance(value, np.ndarray)}
        rest = {key: value for key, value in vars(data).items() if key not in arrays} | {"source": source}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, rest=np.frombuffer(json.dumps(rest).encode(), np.uint8), **arrays)
        write_if_possible(write_atomic, copy, buffer.getvalue())
    return data


# ---------------------------------------------------------------- the command


def card(data: Interactions) -> str:
    """What `python data.py` prints."""
    sizes = np.diff(data.offsets)
    train, valid, test = SPLITS[data.split](data)
    history = data.items[data.offsets[0] : data.offsets[1]]
    repeats, day = ", repeats too" if data.repeats else "", ""
    if "sessions" in data.split:
        day = f", those of {datetime.fromtimestamp(in_seconds(data.first_times).max(), UTC):%Y-%m-%d}"
    quantiles = ", ".join(f"{q:.0%} {np.quantile(sizes, q):.0f}" for q in (0, 0.25, 0.5, 0.75, 0.95, 1))
    return "\n".join([
        f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {len(data.items):,} interactions",
        *(f"  {what:<17} {words}" for what, words in data.taken.items()),
        f"  density           {len(data.items) / data.num_users / data.num_items:.2%}{repeats}",
        f"  history length    {quantiles}; mean {sizes.mean():.1f}",
        f"  split             {len(train.sizes):,} histories to train on, {len(valid.targets):,} validation and "
        f"{len(test.targets):,} test targets{day}",
        f"  protocol          {data.protocol}",
        f"  the first user's {len(history)} items, oldest first:",
        *(f"    {position:>3}  {data.titles[item]}" for position, item in enumerate(history[:10], 1)),
        *(["    ..."] if len(history) > 10 else []),
    ])  # fmt: skip


def number(least: float, most: float = math.inf, above: bool = False, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a number (whole if `kind` is int) from `least`, or above it, to `most`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if least <= value <= most and not (above and value == least) and value < 2**63:
                return value
        limits = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:,}" if most < math.inf else "")
        raise argparse.ArgumentTypeError(f"{text!r} must be a {'whole ' if kind is int else ''}number {limits}")

    return parse


positive = number(1, kind=int)


def column_names(text: str) -> dict[str, str]:
    """An argparse type: user=customer_id,item=sku,time=when."""
    parts = re.split(rf",(?=\s*(?:{'|'.join(COLUMNS)})\s*=)", text)  # a name may hold a comma
    found = {kind.strip(): name.strip() for kind, _, name in (part.partition("=") for part in parts)}
    if not all(found.values()) or found.keys() - COLUMNS.keys() or len(found) < len(parts) or text.endswith(","):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {','.join(f'{kind}=NAME' for kind in COLUMNS)}")
    return found


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script shares; `load_asked` reads them."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="ml-1m", help=f"{', '.join(PUBLIC)} or a path to a .inter, .csv or .tsv file")
    add("--root", help="folder of datasets (default: $PREBERT_DATA, else ./data)")
    add("--columns", type=column_names, action="append", default=[], help=f"KIND=NAME,... of {', '.join(COLUMNS)}")
    add("--titles", metavar="FILE", help="of its items, where they are not in x.item or x.items.csv beside x.inter")
    add("--min-count", type=positive, help="least interactions of a user and of an item (default: 5; student.py: 1)")
    add("--min-items", type=positive, help="the same for items alone")
    add("--min-length", type=positive, help="the same for users alone (default with --split sessions: 2)")
    add("--fraction", type=positive, default=1, metavar="N", help="keep the latest 1/N of the users")
    add("--split", choices=("last", "sessions"), default="last", help="held out: each user's last two items (default), "
        "or the sessions of the last day and the newest tenth of the rest")  # fmt: skip
    add("--seen", choices=("auto", "keep", "exclude"), default="auto", help="items of the history: rank them or leave "
        "them out (default: leave out, unless 1 %% of the log are repeats; student.py: as the run)")  # fmt: skip
    parser.set_defaults(final=False, all=False)  # flags of trainings, and --final of evaluate.py


def load_asked(args: argparse.Namespace) -> Interactions:
    """The dataset that the flags of `add_data_flags` ask for; fills in args.min_items and min_length, joins columns."""
    if empty := [flag for flag, value in vars(args).items() if value == ""]:
        raise InputError(f"--{empty[0]} is empty; is a shell's variable not set?")
    args.columns = {kind: name for given in args.columns for kind, name in given.items()}
    args.min_items = args.min_items or args.min_count or 5
    args.min_length = args.min_length or args.min_count or (2 if args.split == "sessions" else 5)
    how = (args.min_items, args.min_length, args.fraction, args.columns, args.titles)
    data = load_dataset(args.data, args.root, *how, sessions=args.split == "sessions")
    exclude_seen = data.exclude_seen if args.seen == "auto" else args.seen == "exclude"
    held_out = args.split + "-final" if args.final else args.split
    return replace(data, exclude_seen=exclude_seen, split="none" if args.all else held_out)


def data_flags(args: argparse.Namespace) -> list[str]:
    """The data flags that differ from their defaults, to be repeated in the next command."""
    usual: dict[str, object] = {"root": None, "titles": None, "split": "last", "seen": "auto", "fraction": 1}
    usual |= {"min_items": 5, "min_length": 2 if args.split == "sessions" else 5}
    given = {"data": args.data} | {key: getattr(args, key) for key in usual if getattr(args, key) != usual[key]}
    if args.columns:
        given["columns"] = ",".join(f"{kind}={name}" for kind, name in args.columns.items())
    flags = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return flags + [f"--{key}" for key in ("final", "all") if getattr(args, key)]


def command_line(script: str, *words: str) -> str:
    """A command that can be pasted where this one was."""
    return shlex.join(["python", str(Path(sys.argv[0]).with_name(script)), *words])


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main(); an error that the user can fix ends in one line on stderr and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if closed, as by >&-: what is printed goes nowhere
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that knows ASCII only
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough
        code, words = 141, ""
    except KeyboardInterrupt:
        code, words = 130, "stopped; trainings go on from their last epoch with --resume\n"
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory|overflowed", str(error)):
            raise
        short = isinstance(error, MemoryError | RuntimeError)
        code, words = 2, f"error: {'not enough memory, ask for less: ' if short else ''}{error}\n"
    with suppress(OSError):
        sys.stdout.flush()  # what was printed before comes first
    with suppress(OSError):
        sys.stderr.write(words)
    with open(os.devnull, "w") as nowhere:  # what could not be written is not tried again at exit
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what is in a dataset.")
    add_data_flags(parser)
    args = parser.parse_args()
    began = time.perf_counter()
    data = load_asked(args)
    print(card(data))
    print(f"loaded in {time.perf_counter() - began:.1f} s; next:", command_line("teacher.py", *data_flags(args)))


if __name__ == "__main__":
    run_command(main)
