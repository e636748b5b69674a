"""data.py against logs small enough to work out by hand, and a local HTTP server in place of GroupLens."""

import gzip
import hashlib
import io
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from data import (
    PAD,
    InputError,
    Interactions,
    batches,
    leave_one_out,
    load_dataset,
    mask_items,
    next_items,
    pad_left,
    windows,
)


def atomic(tmp_path, text: str, name: str = "x.inter", **kwargs) -> Interactions:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_dataset(str(tmp_path / "x.inter"), min_count=kwargs.get("min_count", 1))


HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"


def histories(log: Interactions) -> list[list[str]]:
    raw = [log.raw_ids[item] for item in log.items]
    return [raw[a:b] for a, b in zip(log.offsets[:-1], log.offsets[1:], strict=True)]


def test_atomic_file_sorted_by_time_with_stable_ties(tmp_path):
    log = atomic(tmp_path, HEAD + "b\tx\t5\na\tp\t2\nb\ty\t1\na\tq\t2\na\tr\t1\nb\tz\t5\n")
    assert histories(log) == [["y", "x", "z"], ["r", "p", "q"]]  # users in order of first appearance
    assert log.raw_ids == ["", "x", "p", "y", "q", "r", "z"]  # items too
    assert (log.num_users, log.num_items, log.counts["read"]) == (2, 6, 6)


def test_ties_do_not_move_in_long_logs(tmp_path):
    rows = "".join(f"u{n % 7}\ti{n}\t0\n" for n in range(2000))
    log = atomic(tmp_path, HEAD + rows)
    assert histories(log)[3] == [f"i{n}" for n in range(2000) if n % 7 == 3]


def test_columns_by_header_timestamp_and_title_optional(tmp_path, capsys):
    log = atomic(tmp_path, "item_id:token\tuser_id:token\np\ta\nq\ta\n")
    assert histories(log) == [["p", "q"]] and log.titles == ["", "p", "q"] and not log.has_titles
    assert "x.inter has no column timestamp:float" in capsys.readouterr().err
    (tmp_path / "x.item").write_text("item_id:token\trelease_year:token\tmovie_title:token_seq\nq\t1999\tMatrix, The\n")
    log = atomic(tmp_path, "item_id:token\tuser_id:token\np\ta\nq\ta\n")
    assert log.titles == ["", "p", "Matrix, The (1999)"] and log.has_titles


def test_columns_of_sessions_and_of_products(tmp_path):
    (tmp_path / "x.item").write_text("app_name:token\tprice:float\tid:token\nPortal\t9.99\tq\n")
    log = atomic(tmp_path, "timestamp:float\tid:token\tproduct_id:token\tsession_id:token\n2\t7\tp\ta\n1\t8\tq\ta\n")
    assert histories(log) == [["q", "p"]] and log.titles == ["", "p", "Portal"]
    log = atomic(tmp_path, "session_id:token\tuser_id:token\titem_id:token\n1\ta\tp\n2\ta\tq\n")
    assert histories(log) == [["p", "q"]]  # where both are, a user is a user
    log = atomic(tmp_path, "visitor_id:token\tbusiness_id:token\tdate:float\n1\tp\t2\n1\tq\t1\n")
    assert histories(log) == [["q", "p"]]
    with pytest.raises(InputError, match=r"x.inter:1: no column item_id:token .* found \['user_id', 'id'\]"):
        atomic(tmp_path, "user_id:token\tid:token\na\tp\n")
    with pytest.raises(InputError, match="no column item_id:token in the header, a line with tabs between"):
        atomic(tmp_path, "user_id:token,item_id:token\na,p\n")


def test_a_line_without_a_title_is_shown_and_its_item_called_by_its_id(tmp_path, capsys):
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\np\tPortal\nbroken\nq\tQuake\tand more\n")
    log = atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\n")
    assert log.titles == ["", "Portal", "q"]
    said = capsys.readouterr().err
    assert "title left out, 1 of 2: " in said and "x.item:3: expected 2 fields, not 1" in said
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\np;Portal\nq;Quake\n")
    with pytest.raises(InputError, match=r"x.item:2: expected 2 fields, not 1; .* \(no line has a title\)"):
        atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\n")


def test_crlf_and_byte_order_mark(tmp_path):
    log = atomic(tmp_path, b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode() + b"a\tp\t1\r\na\tq\t2\r\n")
    assert histories(log) == [["p", "q"]]


def test_official_movielens_files(tmp_path):
    for name, ratings, movies, sep, mark in (
        ("ml-1m", "ratings.dat", "movies.dat", "::", "::"),
        ("ml-100k", "u.data", "u.item", "\t", "|"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        lines = [sep.join((user, item, "5", str(time))) for user in "12" for time, item in enumerate("34")]
        (folder / ratings).write_text("\n".join(lines))
        (folder / movies).write_bytes(mark.join(("3", "Am\xe9lie (2001)", "Comedy")).encode("latin-1") + b"\n")
        log = load_dataset(name, tmp_path, min_count=2)
        assert histories(log) == [["3", "4"], ["3", "4"]] and log.titles == ["", "Amélie (2001)", "4"]


REVIEWS = """\
{u'username': u'zo\\xeb', u'hours': 1.5, u'products': 7, u'product_id': u'20', u'date': u'2015-11-08', \
u'text': u"it's {odd}, u'username': u'nobody', \\"quoted\\"", u'early_access': False, u'page': 1}
{'date': '2015-11-07', 'text': 'caf\u00e9 \\\\', 'product_id': '30', 'f': None, 'username': 'zo\u00eb', 't': ['a']}
{u'username': u'zo\\xeb', u'product_id': u'20', u'date': u'2015-11-01', u'hours': 1e2}
{u'username': u'b', u'product_id': u'20', u'date': u'2016-01-01'}
{u'username': u'b', u'product_id': u'10', u'date': u'2016-01-01'}
{u'product_id': u'10', u'date': u'2016-01-01', u'text': u'nobody wrote this'}
"""


def test_steam_from_python_literals_without_eval(tmp_path, capsys):
    folder = tmp_path / "steam"
    folder.mkdir()
    with gzip.open(folder / "steam_reviews.json.gz", "wt", encoding="utf-8") as file:
        file.write(REVIEWS)
    with gzip.open(folder / "steam_games.json.gz", "wt", encoding="utf-8") as file:
        file.write("{u'id': u'20', u'app_name': u'Half-Life', u'tags': [u'FPS', u'Action']}\n")
        file.write("{u'id': u'30', u'title': u'Day of Defeat'}\n{u'price': 1}\n{u'id': u'10'}\nbroken\n")
    log = load_dataset("steam", tmp_path, min_count=1)
    assert histories(log) == [["20", "30"], ["20", "10"]]  # a repeat counts once, at its first time
    assert log.titles == ["", "Day of Defeat", "Half-Life", "10"] and not log.repeats
    assert log.counts == {
        "read": 6, "malformed": 0, "incomplete": 1, "repeated": 1, "older": 0, "filtered": 0, "kept": 4
    }  # fmt: skip
    assert "steam_reviews.json.gz:6: no field 'username'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "{u'a': __import__('os').system('touch /tmp/pwned')}",
        "{u'a': u'b', **x}",
        "{u'a': u'b'",
        "{u'a': u'b'} + 1",
        "u'a': 1",
        "{u'a' 1}",
        "",
        "{u'a': u'\\x'}",
        "{u'a': (1).__class__}",
    ],
)
def test_what_is_no_plain_literal_is_malformed(line):
    with pytest.raises(ValueError):
        {key: data.text_of(value) for key, value in data.python2_dict(line).items()}
    assert not Path("/tmp/pwned").exists()


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), st.text(max_size=30) | st.integers(), min_size=1)
)
def test_literals_of_any_text_come_back(fields):
    line = repr(fields).replace("\n", "\\n")
    assert {key: data.text_of(value) for key, value in data.python2_dict(line).items()} == {
        repr(key)[1:-1]: value if isinstance(value, str) else str(value) for key, value in fields.items()
    }


CLICKS = """\
1,2014-04-07T10:51:09.277Z,214536502,0
1,2014-04-07T10:54:09.868Z,214536500,0
1,2014-04-07T10:54:09.867Z,214536502,S
2,2014-04-08T10:00:00.000Z,214536506,0
3,2014-04-09T10:00:00.000Z,214577561,0
3,2014-04-09T10:00:00.500Z,214536502,0
"""


def test_yoochoose_sessions_repeats_and_fraction(tmp_path):
    folder = tmp_path / "yoochoose"
    folder.mkdir()
    with pytest.raises(InputError, match="7z x yoochoose-data"):
        load_dataset("yoochoose", tmp_path)
    (folder / "yoochoose-clicks.dat").write_text(CLICKS)
    log = load_dataset("yoochoose", tmp_path, min_count=1)
    assert histories(log)[0] == ["214536502", "214536502", "214536500"] and log.num_users == 3
    assert log.repeats and "NOT excluded" in log.protocol and not log.has_titles
    log = load_dataset("yoochoose", tmp_path, min_count=1, fraction=2)
    assert histories(log) == [["214536506"], ["214577561", "214536502"]] and log.counts["older"] == 3


def test_parsed_copy_is_the_log_and_follows_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE_FROM", 1)
    first = atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\n")
    (copy,) = tmp_path.glob("runs/x/interactions-*.npz")
    again = load_dataset(str(tmp_path / "x.inter"), min_count=1)
    assert histories(again) == histories(first) and vars(again).keys() == vars(first).keys()
    assert again.titles == first.titles and again.counts == first.counts
    assert histories(atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\na\tr\t3\n")) == [["p", "q", "r"]]
    copy.write_bytes(b"not a zip")
    atomic(tmp_path, HEAD + "a\tp\t1\n")
    for path in tmp_path.glob("runs/x/interactions-*.npz"):
        path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="delete it"):
        load_dataset(str(tmp_path / "x.inter"), min_count=1)


def test_k_core_repeats_until_stable(tmp_path):
    # c's only partner item z falls to one user once d is gone, and takes c with it.
    rows = "a\tx\t1\na\ty\t2\nb\tx\t1\nb\ty\t2\nc\tx\t1\nc\tz\t2\nd\tz\t1\n"
    log = atomic(tmp_path, HEAD + rows, min_count=2)
    assert histories(log) == [["x", "y"], ["x", "y"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "header"),
        ("user:token\titem_id:token\n", "user_id"),
        (HEAD, "none of 0 interactions"),
        (HEAD + "a\tp\n", ":2: expected 3"),
        (HEAD + "a\tp\t1\na\tq\tsoon\n", ":3: 'soon' is not a timestamp"),
        (HEAD + "a\tp\tnan\n", "nan is not a timestamp"),
        (HEAD + "a\tp\tinf\n", "not a timestamp"),
        (HEAD + "a\t\t1\n", ":2:"),
        (HEAD + "a\tp\0\t1\n", "NUL"),
        (HEAD.encode() + b"a\t\xe9\t1\n", ":2: not utf-8"),
        (HEAD + "a\tp\t1\n", "5-core"),
    ],
)
def test_bad_tables_end_in_one_clear_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        atomic(tmp_path, text, min_count=5)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown dataset 'ml-2m'"):
        load_dataset("ml-2m", tmp_path)
    with pytest.raises(InputError, match="no file"):
        load_dataset(str(tmp_path / "no.inter"))


def hand_log(*rows: list[int]) -> Interactions:
    items = np.array([item for row in rows for item in row])
    names = [str(i) for i in range(items.max() + 1)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    repeats = len(set(zip(users.tolist(), items.tolist(), strict=True))) < len(items)
    return Interactions("hand", items, offsets, names, names, False, repeats, {"read": len(items)})


def rows_of(split):
    return [split.items[a:b].tolist() for a, b in zip(split.starts, split.ends, strict=True)]


def test_leave_one_out_by_hand():
    train, valid, test = leave_one_out(hand_log([1, 2, 3, 4], [5, 6], [2, 4, 6]))
    assert rows_of(train) == [[1, 2], [5, 6], [2]]
    assert rows_of(valid) == [[1, 2], [2]] and valid.targets.tolist() == [3, 4]
    assert rows_of(test) == [[1, 2, 3], [2, 4]] and test.targets.tolist() == [4, 6]


def test_a_line_written_twice_does_not_change_the_protocol(tmp_path):
    lines = [f"u{n % 10}\ti{n}\t{n}\n" for n in range(300)]
    for twice, repeats in ((0, False), (3, False), (4, True)):  # 4 of 304 are over 1 %
        log = atomic(tmp_path, HEAD + "".join(lines + lines[:twice]))
        assert log.repeats == repeats and ("NOT excluded" in log.protocol) == repeats


def test_pad_left_keeps_the_newest_at_the_right():
    items = torch.arange(1, 10)
    rows = pad_left(items, torch.tensor([0, 2, 4]), torch.tensor([2, 7, 4]), 4)
    assert rows.tolist() == [[0, 0, 1, 2], [4, 5, 6, 7], [0, 0, 0, 0]]


def test_windows_and_batches_cover_the_training_part():
    train, _, _ = leave_one_out(hand_log(list(range(1, 60)), [1, 2, 3], [7], list(range(1, 12))))
    generator = torch.Generator().manual_seed(1)
    starts, ends, last_only = windows(train, 10, 0.0, generator)
    assert len(starts) == 6 + 1 + 1 + 1 and not last_only.any()
    assert ((ends - starts) <= 10).all() and (starts >= 0).all()
    newest = {(int(s), int(e)) for s, e in zip(starts, ends, strict=True)}
    assert {(47, 57), (59, 60), (62, 63), (63, 72)} <= newest  # everyone's newest items, every epoch
    groups = batches(starts, ends, 20, generator)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(starts)))
    assert all(len(rows) * int((ends - starts)[rows].max()) <= 20 for rows in groups)


def test_last_only_windows_end_anywhere_but_have_a_past():
    train, _, _ = leave_one_out(hand_log(list(range(1, 60)), [7]))
    ends = set()
    for seed in range(300):
        starts, stops, last_only = windows(train, 10, 1.0, torch.Generator().manual_seed(seed))
        assert last_only[:-1].all() and not last_only[-1]  # a lone item has no past
        assert (stops - starts)[:-1].min() >= 2 and (stops - starts).max() <= 10 and stops[:-1].max() <= 57
        ends |= set(stops[:-1].tolist())
    assert ends == set(range(2, 58))


def test_mask_items_rate_labels_and_last_only():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (400, 30), generator=generator)
    tokens[:, :10] = PAD
    last_only = torch.arange(400) < 100
    masked, positions, labels = mask_items(tokens, last_only, 50, 0.3, generator)
    hidden = masked == 50
    assert not hidden[:, :10].any() and (masked == tokens)[~hidden].all()
    assert hidden[:100].sum() == 100 and hidden[:100, -1].all()
    assert abs(hidden[100:].float().sum().item() / (300 * 20) - 0.3) < 0.02
    assert (hidden.sum(1) == (labels != PAD).sum(1)).all() and hidden.any(1).all()
    for row in (0, 150, 399):
        pairs = {(p, t) for p, t in zip(positions[row].tolist(), labels[row].tolist(), strict=True) if t != PAD}
        assert pairs == {(p, int(tokens[row, p])) for p in range(30) if hidden[row, p]}


def test_next_items_by_hand():
    tokens = torch.tensor([[0, 0, 3, 1, 2], [5, 4, 3, 2, 1]])
    history, positions, labels = next_items(tokens, 1.0, torch.Generator())
    assert history.tolist() == [[0, 0, 3, 1], [5, 4, 3, 2]] and positions.tolist() == [[0, 1, 2, 3]] * 2
    assert labels.tolist() == [[0, 0, 1, 2], [4, 3, 2, 1]]


# ---------------------------------------------------------------- downloads


class Server(BaseHTTPRequestHandler):
    """Serves one zip, in a way that the test chooses."""

    def __init__(self, *args, content: bytes, mode: str, log: list):
        self.content, self.mode, self.log = content, mode, log
        super().__init__(*args)

    def do_GET(self):
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
        self.log.append(begin)
        if self.mode == "missing":
            return self.send_error(404)
        if self.mode == "redirect" and self.path != "/moved":
            self.send_response(302)
            self.send_header("Location", "/moved")
            return self.end_headers()
        self.send_response(206 if begin and self.mode != "no-range" else 200)
        body = self.content[begin:] if self.mode != "no-range" else self.content
        body = body[: len(body) // 2] if self.mode == "truncated" else body
        self.end_headers()
        if self.mode == "stalled":
            self.wfile.write(body[:10])
            self.wfile.flush()
            return time.sleep(1.5)
        self.wfile.write(body[::-1] if self.mode == "wrong" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch, request):
    """serve(mode) -> folder-filling fetch of ml-1m from a server that behaves like `mode`, and its log."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::5::1\n1::2::5::2\n")
        archive.writestr("ml-1m/movies.dat", "1::Toy Story (1995)::X\n")
        for attack in getattr(request, "param", []):
            archive.writestr(attack, "x")
    content, servers = buffer.getvalue(), []

    def start(mode: str):
        log: list = []
        server = HTTPServer(("127.0.0.1", 0), partial(Server, content=content, mode=mode, log=log))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        digest = hashlib.sha256(content).hexdigest()
        url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
        archive = data.Archive(url, len(content), digest, ("ratings.dat", "movies.dat"))
        monkeypatch.setitem(data.ARCHIVES, "ml-1m", archive)
        return log

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("mode", ["good", "redirect"])
def test_download_unpacks_only_what_we_read(serve, tmp_path, mode):
    serve(mode)
    log = load_dataset("ml-1m", tmp_path / "data", min_count=1)
    assert log.titles == ["", "Toy Story (1995)", "2"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["ml-1m.zip", "movies.dat", "ratings.dat"]


@pytest.mark.parametrize("mode", ["truncated", "wrong", "missing", "stalled"])
def test_bad_downloads_are_never_taken_for_data(serve, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    serve(mode)
    with pytest.raises(InputError, match=r"127\.0\.0\.1"):
        load_dataset("ml-1m", tmp_path, min_count=1)
    assert not (tmp_path / "ml-1m").exists() and not (tmp_path / "ml-1m.zip").exists()


def symlink() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("ml-1m/link")
    entry.external_attr = 0o120777 << 16
    return entry


ATTACKS = [["../evil"], ["/etc/evil"], ["ml-1m/../../evil"], ["..\\evil"], [symlink()]]


@pytest.mark.parametrize("serve", ATTACKS, indirect=True)
def test_zips_that_reach_out_of_their_folder_are_refused(serve, tmp_path):
    with pytest.raises(InputError, match="no honest archive"):
        serve("good")
        load_dataset("ml-1m", tmp_path / "data", min_count=1)
    assert not (tmp_path / "data" / "ml-1m").exists()


def test_zip_bombs_stop_at_the_limit(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_MEMBER", 10)
    serve("good")
    with pytest.raises(InputError, match="larger than 10 bytes"):
        load_dataset("ml-1m", tmp_path, min_count=1)
    assert not (tmp_path / "ml-1m").exists()


@pytest.mark.parametrize("mode", ["good", "no-range"])
def test_interrupted_download_goes_on(serve, tmp_path, mode):
    serve("truncated")
    with pytest.raises(InputError, match="run again"):
        load_dataset("ml-1m", tmp_path, min_count=1)
    begun = serve(mode)
    assert load_dataset("ml-1m", tmp_path, min_count=1).num_items == 2
    assert begun[0] > 0  # it asked for the missing half only


def test_unreachable_host_says_which_file_to_put_where(monkeypatch, tmp_path):
    nowhere = data.Archive("http://127.0.0.1:9/ml-1m.zip", 1, "", ("ratings.dat", "movies.dat"))
    monkeypatch.setitem(data.ARCHIVES, "ml-1m", nowhere)
    with pytest.raises(InputError, match=f"put ratings.dat and movies.dat into {tmp_path}/ml-1m"):
        load_dataset("ml-1m", tmp_path)
