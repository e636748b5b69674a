"""The first hour with one's own data: recommendations for everybody, what may be recommended, new data, sessions."""

import argparse
import gzip
import itertools
import json
import math
import random
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from conftest import HEAD, ROOT, TINY, hand_log, inside, write_ring

import evaluate
import prebert
import student
import teacher
from data import HELD_OUT, PAD, InputError, SPLITS, load_dataset
from distill import load_teachers, states_of
from evaluate import hit_rate, metrics, ndcg, target_ranks
from prebert import (
    centred, check_start, encode_texts, item_vectors, load_bert, load_run, nearby, principal_components, read_run,
    read_safetensors, start_from, text_columns, trained_on, with_text_columns, without_seed, write_safetensors,
)  # fmt: skip
from student import MiniBert, Recommender, add_new_items
from teacher import join_processes, world
from test_prebert import bert_folder
from test_student import write_run

sys.path.insert(0, str(ROOT / "results"))
import run as results_run

ON_RING = ["--no-kd", "--size", "tiny", "--item-init", "cooc", *TINY]
BEST = [*ON_RING[:-8], *TINY[2:]]  # the same without --epochs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with ring.inter and a student of it under runs/ring/student-no-kd."""
    folder = tmp_path_factory.mktemp("own")
    write_ring(folder)
    inside("distill.py", "--data", "ring.inter", *ON_RING, cwd=folder)
    return folder


RUN = "runs/ring/student-no-kd"


# ---------------------------------------------------------------- everybody


def test_recommendations_for_all_users_are_those_of_each_alone(trained):
    log = (trained / "ring.inter").read_text()
    newcomers = "one\t101\t3\t5\nstranger\tnobody knows\t3\t5\n"
    (trained / "today.inter").write_text(log + newcomers)
    text = inside("student.py", "--run", RUN, "--data", "today.inter", "--out", "all.tsv", "-k", 4, cwd=trained)
    assert "52 users" in text and "1 users get the most popular" in text and "all.tsv" in text
    head, *rows = [line.split("\t") for line in (trained / "all.tsv").read_text().splitlines()]
    assert head == ["user_id", "item_id", "score"] and len(rows) == 52 * 4
    recommend = Recommender(trained / RUN, k=4, compile=False)
    histories: dict[str, list] = {}
    for user, item, _, when in (line.split("\t") for line in (log + newcomers).splitlines()[1:]):
        histories.setdefault(user, []).append((float(when), item))
    for user, group in itertools.groupby(rows, key=lambda row: row[0]):
        known = [item for _, item in sorted(histories[user]) if item != "nobody knows"]
        expected = recommend([[f"id:{item}" for item in known]])[0]
        for (_, item, score), (raw_id, _, value) in zip(group, expected, strict=True):
            assert item == raw_id and float(score) == pytest.approx(value, rel=1e-3, abs=1e-3)
    users = [f"v{n}" for n in range(1003)]  # more than are asked for at once
    people = [[f"id:{100 + (n + i) % 60}" for i in range(1 + n % 16)] for n in range(1003)]
    student.recommend_all(recommend, users, people, trained / "many.tsv")
    rows = [line.split("\t") for line in (trained / "many.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == [user for user in users for _ in range(4)]
    for n in (0, 500, 999, 1000, 1002):
        assert [row[1] for row in rows[4 * n : 4 * n + 4]] == [raw_id for raw_id, _, _ in recommend([people[n]])[0]]


def test_recommendations_for_users_with_enough_items(trained):
    (trained / "short.inter").write_text((trained / "ring.inter").read_text() + "one\t101\t3\t5\n")
    for flags, users in (([], 51), (["--min-length", 2], 50), (["--min-count", 8], 50)):
        text = inside("student.py", "--run", RUN, "--data", "short.inter", "--out", "x.tsv", *flags, cwd=trained)
        assert f"{users} users" in text


def test_one_user_and_one_that_is_not_in_the_log(trained):
    on = ("--run", RUN, "--data", "ring.inter", "-k", 3)
    text = inside("student.py", *on, "--user", "u7", cwd=trained)
    assert len(text.splitlines()) == 1 + 1 + 1 + 3 + 1 and "columns: user = user_id, item = item_id, time" in text
    row = next(line for line in (trained / "ring.inter").read_text().splitlines() if line.startswith("u7\t"))
    (trained / "seen.txt").write_text(row.split("\t")[1])  # the only item allowed, which u7 has had
    assert "nothing is left" in inside("student.py", *on, "--user", "u7", "--only", "seen.txt", cwd=trained)
    text = inside("student.py", *on, "--out", "only.tsv", "--only", "seen.txt", cwd=trained)
    have_not = len({line.split("\t")[0] for line in (trained / "only.tsv").read_text().splitlines()[1:]})
    assert 0 < have_not < 50 and f"for {have_not} of 50 users in only.tsv" in text
    words = inside("student.py", *on, "--user", "u77", cwd=trained, expect=2)
    assert "no user 'u77' in ring, which has 50" in words
    assert "not allowed with" in inside("student.py", *on, "--user", "u7", "--out", "x", cwd=trained, expect=2)


# ---------------------------------------------------------------- what may be recommended


def test_only_what_is_allowed_and_without_what_is_not(trained):
    everything = Recommender(trained / RUN, k=100, compile=False)
    history = ["id:103", "id:104"]
    ranked = [raw_id for raw_id, _, _ in everything([history])[0]]
    assert len(ranked) == 58 and not {"103", "104"} & {*ranked}
    allowed = [f"id:{raw_id}" for raw_id in ranked[10:30:3]]
    only = Recommender(trained / RUN, k=5, compile=False, allowed=allowed)
    assert [raw_id for raw_id, _, _ in only([history])[0]] == ranked[10:25:3]
    popular = {raw_id for raw_id, _, _ in only([[]])[0]}
    assert len(popular) == 5 and popular <= {*ranked[10:30:3]}  # of these, too
    out = [f"id:{raw_id}" for raw_id in ranked[:7]]
    assert [raw_id for raw_id, _, _ in everything([history], without=out)[0]] == ranked[7:]
    assert [raw_id for raw_id, _, _ in everything([history])[0]] == ranked  # of that call alone
    assert [raw_id for raw_id, _, _ in everything([history], without=[*out, "nothing"])[0]] == ranked[7:]
    with pytest.raises(InputError, match="none of the items allowed"):
        Recommender(trained / RUN, compile=False, allowed=["nothing", "neither"])
    some = Recommender(trained / RUN, compile=False, allowed=["nothing", f"id:{ranked[3]}"])
    assert [raw_id for raw_id, _, _ in some([history])[0]] == [ranked[3]]


def test_files_of_items(trained):
    shown = [line.split()[3] for line in inside(
        "student.py", "--run", RUN, "id:103", "-k", 60, cwd=trained).splitlines()[1:-1]]  # fmt: skip
    names = [f"film {number} ({1950 + number})" for number in range(0, 60, 2)]
    (trained / "only.txt").write_text("\n".join([*names, "", "not sold", ""]))
    (trained / "without.txt").write_text("id:110\nid:111\n")
    flags = ("--only", "only.txt", "--without", "without.txt")
    text = inside("student.py", "--run", RUN, "id:103", "-k", 60, *flags, cwd=trained).splitlines()[1:-1]
    assert [line.split()[3] for line in text] == [n for n in shown if int(n) % 2 == 0 and n not in ("10", "11")]
    (trained / "none.txt").write_text("not sold\n")
    assert "leave nothing" in inside("student.py", "--run", RUN, "--only", "none.txt", cwd=trained, expect=2)


@pytest.mark.parametrize("seen", ["keep", "exclude"])
def test_seen_items_are_a_choice(trained, seen):
    text = inside("student.py", "--run", RUN, "id:103", "-k", 99, "--seen", seen, cwd=trained)
    assert ("(id:103)" in text) == (seen == "keep")
    protocol = inside("data.py", "--data", "ring.inter", "--seen", seen, cwd=trained)
    assert ("NOT excluded" in protocol) == (seen == "keep")


def test_similar_items_by_hand(trained):
    table = load_run(trained / RUN)[0].item_embedding.weight.detach()[1:-1].numpy()
    lengths = np.linalg.norm(table, axis=1)
    cosines = table @ table[4] / lengths / lengths[4]
    recommend = Recommender(trained / RUN, k=3, compile=False)
    order = [item for item in np.argsort(-cosines) if item != 4][:3]
    assert [raw_id for raw_id, _, _ in recommend.similar(f"id:{recommend.raw_ids[5]}")] == [
        recommend.raw_ids[1 + item] for item in order
    ]


# ---------------------------------------------------------------- tables


def test_titles_and_texts_of_a_table_elsewhere(tmp_path):
    rows = [f"u{user},s{item},{when}" for user in range(6) for when, item in enumerate(range(6))]
    (tmp_path / "shop.csv.gz").write_bytes(gzip.compress(("user_id,sku,time\n" + "\n".join(rows)).encode()))
    names = [f's{item},"Pot, {item}",{item},"[\'Kitchen\', \'Steel\']",Acme' for item in range(5)]
    (tmp_path / "names.csv").write_text("sku,product_name,stage,category,brand\n" + "\n".join(names))
    log = load_dataset(str(tmp_path / "shop.csv.gz"), titles_file=str(tmp_path / "names.csv"))
    assert log.titles[1:] == ["Pot, 0", "Pot, 1", "Pot, 2", "Pot, 3", "Pot, 4", "s5"]
    assert log.texts[1:3] == [f"Pot, {item}. category: Kitchen , Steel. brand: Acme" for item in (0, 1)]
    assert log.texts[6] == "" and log.user_ids == [f"u{user}" for user in range(6)]
    flags, where = ("--data", "shop.csv.gz", "--titles"), "from product_name and category and brand of names.csv"
    assert where in inside("data.py", *flags, "names.csv", cwd=tmp_path)
    assert "--titles no.csv: it must be a file" in inside("data.py", *flags, "no.csv", cwd=tmp_path, expect=2)


def test_sum_of_starts_has_both_in_equal_shares():
    log = hand_log([1, 2, 3, 4, 5, 6, 1, 3], [2, 3, 4, 5, 6, 1, 2])
    train = SPLITS["last"](log)[0]
    log.texts[1:] = ["a", "b", "c", "d", "e", "f"]
    texts = torch.randn(6, 7)
    torch.manual_seed(0)
    cooc = item_vectors("cooc", log, train, 3, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prebert.text_vectors", lambda *_: texts)
        torch.manual_seed(0)
        both = item_vectors("text+cooc", log, train, 3, (None, None))
    assert torch.allclose(both - cooc, centred(principal_components(texts, 3)), atol=1e-5)
    assert cooc.pow(2).sum(1).mean().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match="--item-init cooc"):
        item_vectors("text", hand_log([1, 2, 3]), train, 3, None)


# ---------------------------------------------------------------- new data tomorrow


def test_a_run_goes_on_with_a_catalogue_that_has_grown(trained):
    rows = (trained / "ring.inter").read_text().splitlines()[1:]
    new = [f"u{user}\t{500 + user % 3}\t3\t{2000 + step}" for user in range(30) for step in range(2)]
    (trained / "grown.inter").write_text("\n".join(["user_id\titem_id\trating\ttimestamp", *rows, *new]))
    rates = ("--lr", "1e-9", "--body-lr", "1e-9")
    text = inside("distill.py", "--data", "grown.inter", *ON_RING, "--start", RUN, *rates, cwd=trained)
    assert "60 items known, 3 new; " in text and " users known by id" in text
    assert "before training: validation NDCG@10" in text
    assert "near the identity" not in text  # it begins as the old run ended
    old, _, before = load_run(trained / RUN)
    now, config, after = load_run(trained / "runs/grown/student-no-kd")
    places = [before["raw_ids"].index(raw_id) for raw_id in after["raw_ids"][1:] if int(raw_id) < 500]
    same = [item for item, raw_id in enumerate(after["raw_ids"]) if raw_id and int(raw_id) < 500]
    assert torch.allclose(now.item_embedding.weight[same], old.item_embedding.weight[places], atol=1e-5)
    assert torch.allclose(now.encoder.norm.weight, old.encoder.norm.weight, atol=1e-5)
    assert "NDCG" in inside("evaluate.py", "--data", "grown.inter", cwd=trained) and config["settings"]["start"] == RUN
    flags = [*ON_RING, "--start", RUN, "--epochs", 0, "--name", "as-it-was"]
    assert "before training" in inside("distill.py", "--data", "grown.inter", *flags, cwd=trained)
    table = load_run(trained / "runs/grown/as-it-was")[0].item_embedding.weight
    assert torch.equal(table[same], old.item_embedding.weight[places])
    assert "as-it-was" in inside("evaluate.py", "--data", "grown.inter", cwd=trained)
    assert "--epochs 0" in inside("distill.py", "--data", "grown.inter", *ON_RING, "--epochs", 0, cwd=trained, expect=2)
    flags = [*ON_RING, "--name", "x", "--start"]
    words = inside("distill.py", "--data", "grown.inter", *flags, RUN, "--size", "small", cwd=trained, expect=2)
    assert "2 layers of 64, --max-length 16, --objective next" in words
    # Held-out items must not come in by a run that was trained on them.
    words = inside("distill.py", "--data", "ring.inter", *flags, "runs/grown/as-it-was", cwd=trained, expect=2)
    assert "of 30 users, such as u0, it was trained on other items than are trained on here" in words
    inside("distill.py", "--data", "ring.inter", *ON_RING, "--all", "--name", "seen", cwd=trained)
    words = inside("distill.py", "--data", "ring.inter", *flags, "runs/ring/seen-all", cwd=trained, expect=2)
    assert "everything is trained on" in words
    inside("distill.py", "--data", "ring.inter", *flags, "runs/ring/seen-all", "--all", cwd=trained)
    shutil.rmtree(trained / "runs/ring/seen-all")
    shutil.rmtree(trained / "runs/ring/x-all")


def test_a_log_that_lost_items_is_not_gone_on_from(trained, tmp_path):
    lines = (trained / "ring.inter").read_text().splitlines()
    kept = [line for line in lines if "\t101\t" not in line]  # what is last of a user now was trained on
    new = [f"v{user}\t{102 + (user + step) % 50}\t3\t{step}" for user in range(20) for step in range(9)]
    (tmp_path / "less.inter").write_text("\n".join([*kept, *new]))
    flags = ["--data", "less.inter", *ON_RING, "--epochs", 0, "--start", trained / RUN]
    assert "it was trained on other items" in inside("distill.py", *flags, cwd=tmp_path, expect=2)
    assert "59 items known, 0 new" in inside("distill.py", *flags[:-3], 1, *flags[-2:], "--all", cwd=tmp_path)
    late = [f"w{user}\t{102 + (user + step) % 40}\t3\t{9000 + step}" for user in range(300) for step in range(9)]
    (tmp_path / "less.inter").write_text("\n".join([*lines, *late]))  # of other users nothing was trained on
    assert "before training" in inside("distill.py", *flags, "--fraction", 2, cwd=tmp_path)


def test_a_start_is_refused_where_what_it_was_trained_on_may_be_held_out(tmp_path):
    def written(name, rows, least, split):
        """The log of rows (user, item, time), and its training part."""
        (tmp_path / name).write_text("user_id,item_id,time\n" + "\n".join(f"{u},{i},{t}" for u, i, t in rows))
        log = replace(load_dataset(str(tmp_path / name), min_items=least, min_length=least), split=split)
        return log, SPLITS[split](log)[0]

    def pairs(log, part):
        """Independently: each user with the items that are trained on, as often as they are."""
        user = {start: name for start, name in zip(log.offsets.tolist(), log.user_ids, strict=False)}
        spans = zip(part.starts.tolist(), part.ends.tolist(), strict=True)
        return Counter((user[start], log.raw_ids[item]) for start, end in spans for item in log.items[start:end])

    def accepted(old, new, least=2, split="last"):
        log, part = written("old.csv", old, least, split)
        everything = torch.ones(log.num_items + 1, dtype=torch.bool), torch.full((log.num_users,), 99)
        write_safetensors(tmp_path / "users.safetensors", {"trained_on": trained_on(log, part, *everything)})
        grown, new_part = written("new.csv", new, least, split)
        try:
            check_start(str(tmp_path), {"split": split}, {"raw_ids": log.raw_ids}, grown, new_part)
        except InputError as error:
            assert "it was trained on other items" in str(error)
            return False
        users = set(grown.user_ids)
        held_out = [pair for pair in (pairs(log, part) - pairs(grown, new_part)) if pair[0] in users]
        assert not held_out  # what it was trained on is trained on now
        return True

    old = [(f"u{user}", f"i{(user + step) % 7}", 10 * step) for user in range(12) for step in range(5)]
    more = [(f"u{user}", f"i{user % 7}", 100) for user in range(12)]
    assert accepted(old, old) and accepted(old, old + more) and accepted(old, old + more[:3])
    assert accepted(old, old + more + [(f"v{n}", f"new{n % 2}", n) for n in range(6)])
    assert accepted(old, old + [(f"u{user}", "new", 5) for user in range(12)])  # an item of before that nobody knew
    assert not accepted(old + more, old)  # a shorter log
    two = [*old, ("w", "i1", 1), ("w", "i2", 2)]  # who has two items is trained on whole
    assert accepted(two, two + more) and not accepted(two, [*two, ("w", "i3", 3)])
    assert accepted(two, [*two, ("w", "i3", 3), ("w", "i4", 4)])
    rare = [*two, ("w", "rare", 0)]  # the same, once an item passes the filter that came before
    assert not accepted(rare, [*rare, ("u0", "rare", 200)])
    tied = [(user, item, 0) for user, item, _ in old]
    assert accepted(tied, [*tied, ("u0", "i0", 0)]) and not accepted(tied, [*tied[::-1], ("u0", "i0", 0)])
    draw, kept = random.Random(0), 0
    for trial in range(200):
        old = [(f"u{draw.randrange(9)}", f"i{draw.randrange(6)}", draw.randrange(9)) for _ in range(40)]
        more = [(f"u{draw.randrange(12)}", f"i{draw.randrange(9)}", 5 + draw.randrange(9)) for _ in range(trial % 8)]
        new = old + more
        kept += accepted(old, draw.sample(new, len(new)) if trial % 5 == 0 else new, 1 + trial % 3)
    assert 20 < kept < 180
    days = [(f"s{n}", f"i{(n + step) % 6}", 1.6e9 + 7200 * n + step) for n in range(60) for step in range(3)]
    more = [("late", f"i{step}", days[-1][2] + step) for step in range(3)]
    assert accepted(days, days + more, split="sessions")
    rare = [("s3", "rare", days[9][2] + 1), ("s4", "rare", days[12][2] + 1)]
    early = [(f"t{n}", item, 1.6e9 + n + step) for n in range(60) for step, item in enumerate((f"i{n % 6}", "old"))]
    assert accepted(days, days + rare, split="sessions")
    assert not accepted(days, days + early, split="sessions")  # the newest tenth of the sessions begins earlier


def test_a_run_without_its_config_keeps_its_weights_and_a_renamed_one_goes_on(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    run, flags = tmp_path / "copy" / RUN, ("--data", "ring.inter", *ON_RING)
    run.rename(run.with_name("other"))
    words = inside("distill.py", *flags, "--name", "other", "--resume", cwd=tmp_path / "copy")
    assert "has ended" in words
    before = (run.with_name("other") / "model.safetensors").read_bytes()
    for file in ("catalogue.json", "config.json"):
        (run.with_name("other") / file).unlink()
        words = inside("distill.py", *flags, "--name", "other", cwd=tmp_path / "copy", expect=2)
        assert "other exists; --resume goes on with it, --overwrite" in words
    assert (run.with_name("other") / "model.safetensors").read_bytes() == before


def test_a_table_that_begins_like_ours_is_kept(trained, tmp_path):
    (tmp_path / "log.tsv").write_text("user_id\titem_id\tscore\ttimestamp\nu1\t1\t5\t100\n")
    flags = ("--run", trained / RUN, "--data", trained / "ring.inter", "--out", tmp_path / "log.tsv")
    assert "name another file" in inside("student.py", *flags, cwd=tmp_path, expect=2)


def test_runs_of_one_name_are_all_evaluated_and_a_broken_one_is_skipped(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "two") / "runs/ring"
    flags = ("--data", tmp_path / "two/ring.inter", "--json", tmp_path / "x.json", "--runs")
    inside("evaluate.py", *flags, trained / RUN, "student-no-kd", cwd=folder)
    rows = [row["name"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]]
    assert rows == ["popularity", "markov", "student-no-kd", str(folder / "student-no-kd")]
    shutil.copytree(folder / "student-no-kd", folder / "broken")
    (folder / "broken/metrics.json").write_text("not json")
    words = inside("evaluate.py", "--data", "ring.inter", cwd=tmp_path / "two")
    assert "skipped" in words and "student-no-kd" in words


def test_what_is_said_to_be_next_can_be_run(tmp_path):
    write_ring(tmp_path)
    words = inside("evaluate.py", "--data", "ring.inter", "--final", cwd=tmp_path)
    assert "next:" in words and "--final" not in words.rpartition("next:")[2]
    words = inside("distill.py", "--data", "ring.inter", *TINY[2:], "--final", cwd=tmp_path, expect=2)
    assert "teacher.py --final, then distill.py --final" in words
    flags = ("--data", "ring.inter", "--bert", "none", *TINY)
    inside("teacher.py", *flags, "--epochs", 1, cwd=tmp_path)
    words = inside("teacher.py", *flags, "--all", cwd=tmp_path).rpartition("next: ")[2]
    following = [*shlex.split(words)[2:], *TINY[2:]]
    assert {"--all", "runs/ring/teacher-all"} < {*following}
    words = inside("distill.py", *following, cwd=tmp_path, expect=2)  # the student's own best epoch tells how long
    assert "runs/ring/student does not tell the best epoch; train without --all" in words
    inside("distill.py", "--data", "ring.inter", *TINY, cwd=tmp_path)
    assert "the best weights are in" in inside("distill.py", *following, cwd=tmp_path)
    (tmp_path / "ml-1m.csv").write_text((tmp_path / "ring.inter").read_text())  # not MovieLens, for all its name
    assert "no runs under runs/ml-1m" in inside("evaluate.py", "--data", "ml-1m.csv", cwd=tmp_path)


def test_a_log_is_not_overwritten_and_runs_have_plain_names(trained, tmp_path):
    log = shutil.copy(trained / "ring.inter", tmp_path / "ring.inter")
    before = log.read_bytes()
    for target in (log, tmp_path / "o.tsv.gz"):
        words = inside("student.py", "--run", trained / RUN, "--data", log, "--out", target, cwd=tmp_path, expect=2)
        assert "name another file" in words
    assert log.read_bytes() == before and not (tmp_path / "o.tsv.gz").exists()
    (tmp_path / "a.csv").write_text("item_id,title\n")
    kept = {path: path.read_bytes() for path in (log, tmp_path / "a.csv", trained / RUN / "model.safetensors")}
    for target in kept:
        words = inside("student.py", "--run", trained / RUN, "--data", log, "--out", target, cwd=tmp_path, expect=2)
        assert "name another file" in words
        words = inside("evaluate.py", "--data", log, "--json", target, cwd=tmp_path, expect=2)
        assert "name another file" in words
    assert all(path.read_bytes() == content for path, content in kept.items())
    inside("student.py", "--run", trained / RUN, "--data", log, "--out", "o.tsv", cwd=tmp_path)
    inside("student.py", "--run", trained / RUN, "--data", log, "--out", "o.tsv", cwd=tmp_path)  # our own is replaced
    for name in ("", "a/b", "..", ".", "a/"):
        assert "--name" in inside("distill.py", "--data", log, *ON_RING, "--name", name, cwd=tmp_path, expect=2)


def test_what_is_left_out_may_be_nothing_and_unknown(trained, tmp_path):
    for text in ("", "no such item\n"):
        (tmp_path / "shown.txt").write_text(text)
        flags = ("id:103", "--run", RUN, "-k", 3)
        rows = [inside("student.py", *flags, *more, cwd=trained).splitlines()[1:4]
                for more in ([], ["--without", tmp_path / "shown.txt"])]  # fmt: skip
        assert rows[0] == rows[1]
        words = inside("student.py", *flags, "--only", tmp_path / "shown.txt", cwd=trained, expect=2)
        assert "leave nothing to recommend" in words and ("1 of 1 are not in the catalogue" in words) == bool(text)
    (tmp_path / "shown.txt").write_text("id:107\n")
    both = ["--only", tmp_path / "shown.txt", "--without", tmp_path / "shown.txt"]
    assert "leave nothing to recommend" in inside("student.py", *flags, *both, cwd=trained, expect=2)


def test_a_run_that_starts_from_itself_keeps_its_weights_until_there_are_new_ones(trained, monkeypatch):
    on = ("distill.py", "--data", "ring.inter", *ON_RING, "--name", "own")
    inside(*on, cwd=trained)
    weights = trained / "runs/ring/own/model.safetensors"
    before = weights.read_bytes()

    def full(path, content):
        raise InputError(f"cannot write {path}: no space left")

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "write_json", full)
        assert "no space" in inside(*on, "--start", "runs/ring/own", "--overwrite", cwd=trained, expect=2)
    assert weights.read_bytes() == before
    inside(*on, "--start", "runs/ring/own", "--overwrite", "--epochs", 1, cwd=trained)
    assert "has ended" in inside(*on, "--start", "./runs/ring/own", "--resume", "--epochs", 1, cwd=trained)
    shutil.rmtree(weights.parent)


def test_a_run_that_starts_from_itself_goes_on_after_a_crash_between_its_files(trained, tmp_path, monkeypatch):
    rows = (trained / "ring.inter").read_text().splitlines()[1:]
    new = [f"u{user}\t{500 + user % 3}\t3\t{2000 + step}" for user in range(30) for step in range(2)]
    (tmp_path / "ring.inter").write_text("\n".join(["user_id\titem_id\trating\ttimestamp", *rows, *new]))
    on = ("distill.py", "--data", "ring.inter", *ON_RING, "--name", "own")
    again = (*on, "--start", "runs/ring/own")
    for name in ("crashed", "whole"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(trained / "ring.inter", folder)
        inside(*on, cwd=folder)
        shutil.copy(tmp_path / "ring.inter", folder)  # the log has grown, by three items as well
        if name == "whole":
            inside(*again, "--overwrite", cwd=folder)
            continue

        def crash(path, tensors):
            raise InputError(f"cannot write {path}: power is lost")

        with monkeypatch.context() as patch:
            patch.setattr(teacher, "write_safetensors", crash)
            assert "power is lost" in inside(*again, "--overwrite", cwd=folder, expect=2)
        inside(*again, "--resume", cwd=folder)
    one, other = (load_run(tmp_path / name / "runs/ring/own")[0].state_dict() for name in ("crashed", "whole"))
    assert one["item_bias"].shape == (63,) and all(torch.equal(one[key], other[key]) for key in one)
    # In a new folder the crash may come before there is a catalogue.
    write = teacher.write_json

    def crash_there(path, content):
        if path.name == "catalogue.json":
            raise InputError(f"cannot write {path}: power is lost")
        write(path, content)

    for name in ("new", "straight"):
        flags = [*again[:-4], "--name", name, *again[-2:]]
        if name == "new":
            with monkeypatch.context() as patch:
                patch.setattr(teacher, "write_json", crash_there)
                assert "power is lost" in inside(*flags, cwd=folder, expect=2)
        inside(*flags, "--resume", cwd=folder)
    one, other = (load_run(folder / "runs/ring" / name)[0].state_dict() for name in ("new", "straight"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_new_items_start_near_those_with_the_nearest_vectors(trained):
    log, (old, _, _) = load_dataset(str(trained / "ring.inter")), load_run(trained / RUN)
    table = old.item_embedding.weight.detach()
    vectors = torch.randn(60, 64)
    vectors[6] = vectors[10]  # item 7's first vector is that of item 11: with one neighbour, its row would be, too
    model = MiniBert("tiny", 60, 16, True)
    log.raw_ids[7] = "an item of today"
    start_from(model, str(trained / RUN), replace(log, split="none"), SPLITS["none"](log)[0], vectors)
    others = [item for item in range(1, 61) if item != 7]
    assert torch.equal(model.item_embedding.weight[others], table[others])
    cosines = torch.nn.functional.cosine_similarity(model.item_embedding.weight[7] - table[others].mean(0),
                                                    table[others] - table[others].mean(0))  # fmt: skip
    assert others[int(cosines.argmax())] == 11 and cosines.max() > 0.9


def test_a_new_item_that_is_like_nothing_is_average():
    known, rows, bias = torch.randn(30, 8), torch.randn(30, 4), torch.arange(30.0)
    row, its_bias = nearby(known.mean(0, keepdim=True), known, rows, bias)
    assert torch.allclose(row[0], rows.mean(0), atol=1e-6) and its_bias.item() == pytest.approx(14.5)


def test_items_from_another_column_than_the_run_s_are_told(trained):
    rows = [line.split("\t") for line in (trained / "ring.inter").read_text().splitlines()[1:]]
    items = sorted({row[1] for row in rows})
    backwards = dict(zip(items, reversed(items), strict=True))
    lines = "".join(f"{user},{item},{backwards[item]},{when}\n" for user, item, _, when in rows)
    (trained / "shop.csv").write_text("user_id,item_id,sku,timestamp\n" + lines)
    on = ("--data", "shop.csv", "--columns", "item=sku")
    words = inside("student.py", "--run", RUN, *on, "--user", "u7", cwd=trained)
    assert "note: the run's items were the column item_id, here sku" in words and "item = sku" in words
    start = ("--start", RUN, "--epochs", 1, "--name", "other")
    words = inside("distill.py", *on, *ON_RING, *start, cwd=trained, expect=2)
    assert "it was trained on other items" in words


def test_final_training_uses_everything_and_cannot_be_evaluated(trained):
    text = inside("distill.py", "--data", "ring.inter", *BEST, "--all", cwd=trained)
    run, rows = trained / (RUN + "-all"), (trained / RUN / "log.csv").read_text().split()[1:]
    best = max(range(len(rows)), key=lambda row: float(rows[row].split(",")[4])) + 1
    assert "validation" not in text and json.loads((run / "metrics.json").read_text())["epochs"] == best
    counts = json.loads((run / "catalogue.json").read_text())["counts"]
    assert sum(counts) == len((trained / "ring.inter").read_text().splitlines()) - 1
    words = inside("evaluate.py", "--data", "ring.inter", "--runs", run, cwd=trained, expect=2)
    assert "everything is trained on" in words
    assert "skipped" in inside("evaluate.py", "--data", "ring.inter", cwd=trained)
    student = ("--data", "ring.inter", "--teacher", run, *TINY, "--name", "leak")
    assert "everything is trained on" in inside("distill.py", *student, cwd=trained, expect=2)
    flags = ("--data", "ring.inter", *BEST, "--all", "--name", "none")
    words = inside("distill.py", *flags, cwd=trained, expect=2)
    assert "train without --all and --final first" in words


def test_training_on_validation_too_leaves_test_alone(trained):
    whole = load_dataset(str(trained / "ring.inter"))
    train, valid, test = SPLITS["last-final"](whole)
    assert len(valid.targets) == 0 and torch.equal(train.ends + 1, torch.from_numpy(whole.offsets[1:]))
    assert torch.equal(test.targets, SPLITS["last"](whole)[2].targets)
    flags = ("--data", "ring.inter", "--final")
    text = inside("distill.py", *flags, *BEST, cwd=trained)
    assert "validation" not in text and "evaluate.py --data ring.inter --final" in text
    counts = json.loads((trained / (RUN + "-final") / "catalogue.json").read_text())["counts"]
    assert sum(counts) == len(whole.items) - whole.num_users
    text = inside("evaluate.py", *flags, cwd=trained)
    assert "student-no-kd-final" in text and "all others are trained on" in text and "skipped" in text
    assert "--final leaves nothing" in inside("evaluate.py", *flags, "--valid", cwd=trained, expect=2)
    run = ("--runs", RUN + "-final")
    words = inside("evaluate.py", "--data", "ring.inter", *run, "--valid", cwd=trained, expect=2)
    assert "all others are trained on" in words
    assert "not allowed with" in inside("distill.py", *flags, "--no-kd", "--all", cwd=trained, expect=2)
    # A run that held out more may be gone on from; the best epoch is taken only from a run like this one.
    go_on = ("--name", "on", "--start", RUN, "--epochs", 1, "--max-length", 16)
    assert "starting from" in inside("distill.py", *flags, *BEST, *go_on, cwd=trained)
    masked = (*BEST, "--objective", "masked", "--overwrite")
    assert "another --objective" in inside("distill.py", *flags, *masked, cwd=trained, expect=2)
    wetter = (*BEST, "--dropout", 0.4, "--overwrite")
    assert "another --dropout" in inside("distill.py", *flags, *wetter, cwd=trained, expect=2)
    assert "unrecognized" in inside("student.py", "--run", RUN, "id:1", "--all", cwd=trained, expect=2)
    log = (trained / RUN / "metrics.json").read_text()
    (trained / RUN / "metrics.json").unlink()  # as after an interruption
    words = inside("distill.py", *flags, *BEST, "--overwrite", cwd=trained, expect=2)
    assert "does not tell the best epoch" in words
    (trained / RUN / "metrics.json").write_text(log)
    curve = (trained / RUN / "log.csv").read_text()
    for rest, wrong in ((curve.splitlines()[0], "does not tell the best"), (f"{curve}3,x\n", "log.csv is broken")):
        (trained / RUN / "log.csv").write_text(rest)
        assert wrong in inside("distill.py", *flags, *BEST, "--overwrite", cwd=trained, expect=2)
    (trained / RUN / "log.csv").write_text(curve)
    for name in ("student-no-kd-final", "on-final"):
        shutil.rmtree(trained / "runs/ring" / name)


def test_the_best_epoch_is_not_taken_from_a_run_with_another_start(trained, tmp_path):
    write_ring(tmp_path)
    flags = ["--data", "ring.inter", *ON_RING, "--start", trained / RUN]
    inside("distill.py", *flags, cwd=tmp_path)
    without = [flag for flag in ON_RING if flag not in ("--epochs", "2")]
    words = inside("distill.py", "--data", "ring.inter", *without, "--final", cwd=tmp_path, expect=2)
    assert "another --start" in words


def test_seeds_are_one_model_whatever_epochs_were_best_for_them():
    settings = {"seed": 1, "epochs": 3, "patience": 5, "lr": 0.1, "start": "runs/x/s1", "name": "a"}
    config = {"data": "x", "model": {}, "split": "last", "teachers": [], "settings": settings}
    again = {**config, "settings": {**settings, "seed": 2, "start": "runs/x/s2", "name": "b"}}
    assert without_seed(config) == without_seed(again)
    again["settings"]["epochs"] = 4
    assert without_seed(config) != without_seed(again)
    assert without_seed({**config, "split": "last-final"}) == without_seed({**again, "split": "last-final"})
    assert without_seed({**config, "started": "a"}) != without_seed({**again, "started": "b"})  # of other starts


# ---------------------------------------------------------------- sessions


def test_sessions_by_hand(tmp_path):
    days = {"a": ("2020-01-01", "x y z"), "b": ("2020-01-02", "y z"), "c": ("2020-01-03", "z x"),
            "d": ("2020-01-03", "x y new"), "e": ("2020-01-02", "x x z")}  # fmt: skip
    days |= {f"more{n}": ("2020-01-01", "x y") for n in range(8)} | {"last": ("2020-01-02", "z y x")}
    rows = [f"{who},{item},{day}T{10 if who != 'last' else 22}:0{step}:00"
            for who, (day, items) in days.items() for step, item in enumerate(items.split())]  # fmt: skip
    (tmp_path / "s.csv").write_text("session_id,item_id,time\n" + "\n".join(rows))
    log = load_dataset(str(tmp_path / "s.csv"), min_items=1, min_length=2)
    train, valid, test = SPLITS["sessions"](log)
    assert len(train.sizes) == 11 and len(train.targets) == 0  # "last" is the newest tenth of twelve
    names = {raw_id: item for item, raw_id in enumerate(log.raw_ids)}

    def questions(part):
        spans = zip(part.starts, part.ends, part.targets.tolist(), strict=True)
        return sorted((tuple(part.items[a:b].tolist()), target) for a, b, target in spans)

    x, y, z = names["x"], names["y"], names["z"]
    assert questions(valid) == sorted([((z,), y), ((z, y), x)])
    assert questions(test) == sorted([((z,), x), ((x,), y), ((x, y), PAD)])  # nobody trained on "new"
    final = SPLITS["sessions-final"](log)
    assert len(final[0].sizes) == 12 and len(final[1].targets) == 0 and questions(final[2]) == questions(test)
    text = inside("data.py", "--data", "s.csv", "--split", "sessions", "--min-items", 1, cwd=tmp_path)
    assert "3 test targets" in text and "next item" in text
    with pytest.raises(InputError, match="the last would be of 1970"):
        SPLITS["sessions"](load_dataset(str(write_ring(tmp_path))))
    both = "user_id,session_id,item_id,time\n" + "".join(f"u,{line}\n" for line in rows)
    (tmp_path / "both.csv").write_text(both)
    flags = ["--data", "both.csv", "--min-items", 1]
    assert "user = session_id" in inside("data.py", *flags, "--split", "sessions", cwd=tmp_path)
    assert "user = user_id" in inside("data.py", *flags, cwd=tmp_path)


def test_a_target_that_training_never_saw_is_a_miss():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    ranks = target_ranks(scores, torch.tensor([1, PAD]))
    assert ranks[0] == 1 and [hit_rate(ranks, k).tolist() for k in (1, 10, 1000)] == [[1, 0]] * 3  # of three items
    assert ndcg(ranks, 10).tolist() == [1, 0]
    many = metrics(torch.tensor([1, 2, 20, 21, 400]))
    assert many["MRR@20"] == pytest.approx((1 + 1 / 2 + 1 / 20) / 5) and many["HR@20"] == pytest.approx(3 / 5)


def test_sessions_are_trained_and_evaluated(tmp_path, monkeypatch):
    path = write_ring(tmp_path, users=60)
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    rows = [f"{user}\t{item}\t{1.6e9 + 43200 * (int(user[1:]) // 10) + int(when)}" for user, item, _, when in lines]
    (tmp_path / "s.inter").write_text(HEAD + "\n".join(rows))
    flags = ["--data", "s.inter", "--split", "sessions"]
    text = inside("distill.py", *flags, *ON_RING, cwd=tmp_path)
    assert "evaluate.py --data s.inter --split sessions" in text
    owned: list[int] = []
    draw = evaluate.resampled
    monkeypatch.setattr(evaluate, "resampled", lambda values, of: owned.append(of.max() + 1) or draw(values, of))
    text = inside("evaluate.py", *flags, "--json", "s.json", cwd=tmp_path)
    assert {*owned} == {10}  # the sessions of the last day, however many questions each asks
    assert "Recall@20" in text and "MRR@20" in text
    popular, *_, row = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert 0 < row["MRR@20"] < row["Recall@20"] == row["HR@20"] and row["Recall@20"] > popular["Recall@20"]
    inside("distill.py", *flags, *ON_RING, "--fraction", 2, "--name", "half", cwd=tmp_path)
    more = [*flags, *ON_RING, "--start", "runs/s/half", "--name", "more"]  # the newest tenth would begin earlier
    assert "it was trained on other items" in inside("distill.py", *more, cwd=tmp_path, expect=2)
    both = [f"u\t{session}\t{rest}" for session, _, rest in (row.partition("\t") for row in rows)]
    (tmp_path / "both.tsv").write_text("user_id\tsession_id\titem_id\ttimestamp\n" + "\n".join(both))
    serve = ["--run", "runs/s/student-no-kd", "--data", "both.tsv", "--out", "o.tsv", "-k", 1]
    assert "for 60 of 60 users" in inside("student.py", *serve, cwd=tmp_path)
    flags = [*flags[:2], "--runs", "runs/s/student-no-kd"]
    assert HELD_OUT["last"] in inside("evaluate.py", *flags, cwd=tmp_path, expect=2)


# ---------------------------------------------------------------- new items


def test_new_items_are_recommended_by_their_texts_and_change_no_other_score(trained, tmp_path):
    run = shutil.copytree(trained / RUN, tmp_path / "run")
    model, _, catalogue = load_run(run)
    bert_folder(tmp_path, "bert.")
    bert = load_bert(str(tmp_path))
    config = json.loads((run / "config.json").read_text())
    config["settings"]["bert"] = str(tmp_path)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its training read no titles"):
        Recommender(run, compile=False).add_items({"toy": "toy"})
    log = load_dataset(str(trained / "ring.inter"))
    torch.manual_seed(1)
    log.texts[1:] = [" ".join(["toy", "story"][bit] for bit in torch.randint(0, 2, (8,))) for _ in range(60)]
    write_safetensors(run / "texts.safetensors", {"texts": encode_texts(*bert, log.texts[1:]).half()})
    recommend, history = Recommender(run, k=100, compile=False), ["id:103", "id:104"]
    before = {raw_id: score for raw_id, _, score in recommend([history])[0]}
    recommend.add_items({"n1": "toy toy story", "n2": "story"}, titles={"n2": 1984})
    after = {raw_id: score for raw_id, _, score in recommend([history])[0]}
    assert {*after} == {*before, "n1", "n2"} and recommend.titles[-1] == "1984"
    assert all(after[raw_id] == pytest.approx(score, abs=1e-4) for raw_id, score in before.items())
    # By hand: the five items with the nearest texts.
    known = read_safetensors(run / "texts.safetensors")["texts"].float().numpy()
    read, table = encode_texts(*bert, ["toy toy story"])[0].numpy(), model.item_embedding.weight.detach().numpy()[1:-1]
    turned = known - known.mean(0)
    cosines = turned @ (read - known.mean(0)) / np.linalg.norm(turned, axis=1) / np.linalg.norm(read - known.mean(0))
    nearest = np.argsort(-cosines, kind="stable")[:5]
    shares = np.exp(10 * cosines[nearest]) / np.exp(10 * cosines[nearest]).sum()
    near = table[nearest] - table.mean(0)
    row, length = shares @ near, shares @ np.linalg.norm(near, axis=1)
    row = table.mean(0) + row / np.linalg.norm(row) * length
    tokens = torch.tensor([[catalogue["raw_ids"].index(name[3:]) for name in history]])
    state = model(tokens, torch.tensor([[1]]))[0, 0].detach().numpy()
    assert after["n1"] == pytest.approx(state @ row + shares @ model.item_bias.detach().numpy()[nearest], abs=1e-2)
    assert len(recommend([["n1", "n2"]])[0]) == 60  # accepted in histories, and left out as seen
    few = Recommender(run, k=100, compile=False, allowed=["id:110"])
    few.add_items({"n1": "toy"})
    assert {raw_id for raw_id, _, _ in few([history])[0]} == {"110", "n1"}
    few.config["bert_folder"] = ["x"]  # as a damaged config.json may say
    with pytest.raises(InputError, match="no BERT "):
        few.add_items({"n2": "toy"})
    few.add_items({"n2": "toy"}, bert=str(tmp_path))  # where it is now
    assert "n2" in {raw_id for raw_id, _, _ in few([history])[0]}
    with pytest.raises(InputError, match="'n1' is in the catalogue already"):
        recommend.add_items({"n1": "toy"})
    (tmp_path / "new.csv").write_text("item_id,title,brand\n900,New film,Acme\n103,An old one,Acme\n")
    flags = ("--run", run, "--new-items", tmp_path / "new.csv")
    text = inside("student.py", "New film", "id:103", "-k", 99, "--seen", "keep", *flags, cwd=trained)
    assert "New film  (id:900)" in text
    assert f"{tmp_path / 'new.csv'}: 1 new items, 1 known; titles from title and brand of new.csv, by item_id" in text
    (tmp_path / "new.csv").write_text('item_id,title\n"9\t0",New film\n')  # would shift the columns of --out
    assert "without NUL bytes, tabs" in inside("student.py", "id:103", *flags, cwd=trained, expect=2)
    for wrong in (tmp_path, ""):
        words = inside("student.py", "id:103", "--run", run, "--new-items", wrong, cwd=trained, expect=2)
        assert "it takes a .csv, .tsv or .item file" in words
    (tmp_path / "new.csv").write_text("item_id,brand\n900,Acme\n")
    words = "no items with titles: new.csv has no column of titles, only"
    assert words in inside("student.py", "id:103", *flags, cwd=trained, expect=2)
    write_safetensors(run / "texts.safetensors", {"texts": torch.zeros(3, 4)})
    with pytest.raises(InputError, match="does not fit the run"):
        Recommender(run, compile=False).add_items({"toy": "toy"})


def test_new_items_are_named_by_the_column_that_training_took(trained, tmp_path, capsys):
    assert read_run(trained / RUN)[0]["item_name"] == "item_id"
    (tmp_path / "art.items.csv").write_text("id,Artikel,title\n1,A101,Red shoe\n2,A102,Blue shoe\n")
    added: dict = {}
    facts = {"config": {"item_name": "Artikel"}, "by_id": {"A101": 1}}
    run = SimpleNamespace(**facts, add_items=lambda new, *_: added.update(new))
    add_new_items(run, str(tmp_path / "art.items.csv"), None)
    words = "1 new items, 1 known; titles from title of art.items.csv, by Artikel"
    assert [*added] == ["A102"] and words in capsys.readouterr().out


@pytest.mark.parametrize("distinct", [60, 5])
def test_text_columns_of_new_items_are_those_that_their_texts_would_have_had(trained, tmp_path, distinct):
    run = shutil.copytree(trained / RUN, tmp_path / "run")
    bert_folder(tmp_path)
    bert, model = load_bert(str(tmp_path)), load_run(run)[0]
    config = json.loads((run / "config.json").read_text())
    config["settings"]["bert"] = str(tmp_path)
    (run / "config.json").write_text(json.dumps(config))
    chance = random.Random(1)
    texts = [" ".join(chance.choice(["toy", "story"]) for _ in range(8)) for _ in range(distinct)] * (60 // distinct)
    read = encode_texts(*bert, [*texts[:59], ""])  # an item without a text stands where the others do on average
    columns, directions = text_columns(read, 64)
    write_safetensors(run / "texts.safetensors", {"texts": read.half(), "directions": directions.half()})
    write_safetensors(run / "model.safetensors", with_text_columns(model, columns).state_dict())
    recommend = Recommender(run, k=100, compile=False)
    recommend.add_items({"new": texts[9], "other": texts[20], "none": " ", "unseen": "story"})
    table = recommend.model.item_embedding.weight[1:, -16:]
    assert torch.allclose(table[:60], columns) and table.shape == (65, 16)  # as many as this BERT's states
    # Of at most 1: what BERT reads is kept in half precision, and here it differs little from text to text.
    assert torch.allclose(table[60:62] @ columns.T, columns[[9, 20]] @ columns.T, atol=0.05)
    assert table[62].norm() < 0.01 and not table[64].any()  # without a text, and MASK
    rows = recommend.model.item_embedding.weight[1:, :64]
    assert torch.allclose(rows[62], rows[:60].mean(0), atol=1e-6) and not torch.allclose(rows[60], rows[62], atol=1e-2)
    unit = torch.nn.functional.normalize(read - read.mean(0), dim=1)
    unseen = encode_texts(*bert, ["story"])[0] - read.mean(0)
    known = columns[[9, 20, 31]] @ columns[[9, 20, 31]].T
    assert torch.allclose(known, unit[[9, 20, 31]] @ unit[[9, 20, 31]].T, atol=1e-3)
    likeness = columns[:59] @ table[63]
    assert torch.allclose(likeness, unit[:59] @ unseen / unseen.norm(), atol=0.05)
    compiled = Recommender(run, k=9, fallback=False)
    people = [["id:103", "id:104"], ["id:110"], ["id:140", "id:120", "id:133", "id:101"]]
    for mine, theirs in zip(Recommender(run, k=9, compile=False)(people), compiled(people), strict=True):
        assert [row[0] for row in mine] == [row[0] for row in theirs]
        assert [row[2] for row in mine] == pytest.approx([row[2] for row in theirs], abs=1e-3)


def test_a_run_keeps_what_bert_read_of_its_items(tmp_path):
    bert, _ = bert_folder(tmp_path)
    log, run = write_ring(tmp_path), tmp_path / "runs/ring/student-no-kd"

    def write_titles(first: str) -> None:
        names = [f"{100 + item}\t{first if item % 2 else 'story'}" for item in range(60)]
        (tmp_path / "ring.item").write_text("item_id\ttitle\n" + "\n".join(names))

    flags = ["--data", log, *TINY, "--max-length", 8, "--bert", bert]
    flags += ["--no-kd", "--size", "tiny", "--item-init", "text"]
    write_titles("toy")
    assert "texts now count beside what was learnt" in inside("distill.py", *flags, cwd=tmp_path)
    texts = (run / "texts.safetensors").read_bytes()
    read = read_safetensors(run / "texts.safetensors")["texts"].float()
    expected = encode_texts(*load_bert(str(bert)), load_dataset(str(log)).texts[1:])
    assert torch.allclose(read, expected, atol=1e-2)
    write_titles("toy toy")  # an ended run keeps what was read for it, whatever the titles are by now
    assert "has ended" in inside("distill.py", *flags, "--resume", cwd=tmp_path)
    assert (run / "texts.safetensors").read_bytes() == texts
    inside("distill.py", *flags, "--overwrite", cwd=tmp_path)
    assert (run / "texts.safetensors").read_bytes() != texts
    # What answers as a teacher has no dropout: it says the same each time.
    empty = dict.fromkeys(("no_kd", "objective", "max_length", "bert"))
    namespace = argparse.Namespace(teacher=[str(run)], device="cpu", **empty)
    (answering,), _, in_scores = load_teachers(namespace, load_dataset(str(log)))
    # Texts count beside the rows that training left, which is what a student learns from.
    wide, (columns, _) = load_run(run)[0], text_columns(expected, 64)
    assert wide.item_embedding.weight.shape == (62, 64 + columns.shape[1])
    assert in_scores and answering.item_embedding.weight.shape == (62, 64)
    plain, history = with_text_columns(wide), torch.tensor([[5, 6, 7]])
    assert torch.equal(plain.score_next(history), answering.score_next(history))
    states = [states_of(answering, SPLITS["last"](load_dataset(str(log)))[0], torch.float32) for _ in range(2)]
    assert not answering.training and torch.equal(*states)


@pytest.mark.parametrize("start", ["text", "cooc"])
def test_texts_are_in_the_scores_where_a_model_or_its_teacher_starts_from_them(tmp_path, start):
    bert, _ = bert_folder(tmp_path)
    log, made = write_ring(tmp_path), tmp_path / "runs/ring"
    names = [f"{100 + item}\t{'toy' if item % 2 else 'story'}" for item in range(60)]
    (tmp_path / "ring.item").write_text("item_id\ttitle\n" + "\n".join(names))
    flags = ["--data", log, *TINY, "--max-length", 8, "--bert", bert]
    inside("teacher.py", *flags, "--item-init", start, cwd=tmp_path)
    inside("distill.py", *flags, "--size", "tiny", cwd=tmp_path)
    inside("distill.py", *flags, "--size", "tiny", "--item-init", "cooc", "--name", "plain", cwd=tmp_path)
    for name, counts in (("teacher", start == "text"), ("student", start == "text"), ("plain", False)):
        model = load_run(made / name)[0]
        assert len(read_safetensors(made / name / "texts.safetensors")["texts"]) == 60  # for new items, wherever
        assert (model.item_embedding.embedding_dim > model.config.hidden_size) == counts
    if start == "cooc":
        return
    # Of several teachers, any may have read texts; the order does not matter.
    inside("teacher.py", *flags[:-2], "--bert", "none", "--name", "unread", cwd=tmp_path)
    both = [*flags[:-2], "--size", "tiny", "--name", "of-two", "--teacher", "runs/ring/unread", "runs/ring/teacher"]
    inside("distill.py", *both, cwd=tmp_path)
    assert load_run(made / "of-two")[0].item_embedding.embedding_dim > 64
    assert load_run(made / "of-two")[1]["bert_folder"] == str(bert.resolve())
    # A student goes on with the teacher that it began with, or not at all.
    assert "has ended" in inside("distill.py", *both, "--resume", cwd=tmp_path)
    inside("teacher.py", *flags, "--item-init", start, "--overwrite", "--seed", 7, cwd=tmp_path)
    assert "trained anew" in inside("distill.py", *both, "--resume", cwd=tmp_path, expect=2)


def test_some_models_are_evaluated_beside_those_that_are_trained(tmp_path, monkeypatch, capsys):
    flags = ["--only", "steam", "--models", "student-tiny", "--seeds", "1", "2", "--list"]
    monkeypatch.setattr(results_run, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    for made in ("teacher-s1", "teacher-s2", "student-s1"):
        (tmp_path / "runs/steam" / made).mkdir(parents=True)
        (tmp_path / "runs/steam" / made / "metrics.json").write_text("{}")
    results_run.main()
    *trained, _, test = capsys.readouterr().out.splitlines()
    assert len(trained) == 2 and all("--size tiny" in line for line in trained)
    shown = test.partition(" --runs ")[2].split()
    assert shown == [f"runs/steam/{name}-s{seed}" for name in ("teacher", "student-tiny") for seed in (1, 2)]


def test_the_commands_behind_the_results_have_flags_that_exist():
    listed = subprocess.run([sys.executable, "results/run.py", "--list"], cwd=ROOT, capture_output=True, text=True)
    commands = [shlex.split(line.partition("] python ")[2]) for line in listed.stdout.splitlines()]
    shown = {script: inside(script, "--help", cwd=ROOT) for script in ("teacher.py", "distill.py", "evaluate.py")}
    assert len(commands) > 100 and commands.pop() == ["results/plot.py"]
    made = set()
    for script, *words in commands:
        assert (ROOT / script).exists()
        if script.startswith("tests/"):  # hands unknown flags on
            continue
        assert all(word in shown[script] for word in words if word.startswith("--")), words
        data = words[words.index("--data") + 1].replace("beauty.inter", "beauty").rpartition("/")[2]
        if script == "distill.py" and "--teacher" in words:  # what is learnt from is trained before
            teachers = words[words.index("--teacher") + 1 : words.index("--data")]
            teachers = [word for word in teachers if word.startswith("runs/")]
            assert teachers and made.issuperset(teachers)
        if script != "evaluate.py":
            made.add(f"runs/{data}/{words[words.index('--name') + 1]}{'-final' * ('--final' in words)}")
        else:
            assert made.issuperset(word for word in words if word.startswith("runs/"))


def test_of_one_seed_what_learns_from_three_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results/run.py", "--list", "--only", "beauty", "--seeds", "1"])
    results_run.main()
    text = capsys.readouterr().out
    assert "student-s2" not in text and "left out, as it learns from the seeds 1, 2 and 3: student-of-students" in text


@pytest.mark.parametrize("argument", ["nofile", "nofile.json", "results/ml-1m/test.json"])
def test_where_nothing_can_be_drawn_one_line_says_so(argument):
    drawn = subprocess.run([sys.executable, "results/plot.py", argument], cwd=ROOT, capture_output=True, text=True)
    assert drawn.returncode == 2 and drawn.stderr.startswith("error: ") and drawn.stderr.count("\n") == 1


# ---------------------------------------------------------------- what strangers do


def test_raw_ids_in_lists_mean_that_item_alone(tmp_path):
    run = write_run(tmp_path, ["", "1984", "7", "9"], ["", "A", "1984", "B"], True)
    recommend = Recommender(run, compile=False, allowed=["1984"])
    assert [raw_id for raw_id, _, _ in recommend([["id:9"]])[0]] == ["1984"]  # not the book of that name
    everything = Recommender(run, compile=False)
    assert {raw_id for raw_id, _, _ in everything([["id:9"]], without=["1984"])[0]} == {"7"}
    assert len(everything(history for history in [["id:9"]])) == 1
    wrong = (lambda: everything([["id:9"]], without="1984"), lambda: everything([], without=5),
             lambda: everything([["id:9"]], without=[["1984"]]),
             lambda: everything([["id:9"]], without=[np.array(["1984"])]))  # fmt: skip
    for call in (*wrong, lambda: everything.add_items("abc")):
        with pytest.raises(InputError, match="are given as"):
            call()
    for new in ({"q": None}, {"q": math.nan}, {" ": "toy"}, {"a\tb": "toy"}):
        with pytest.raises(InputError, match="new items need an id without tabs and a text"):
            everything.add_items(new)
    assert Recommender(run, compile=False, device=torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "x.tsv"], "--data is the log of --out or --user"),
        (["--out", "x.csv", "--data", "ring.inter"], "columns are separated by tabs"),
        (["--user", "1"], "--data is the log of --out or --user"),
        (["id:103", "--data", "ring.inter"], "--data is the log of --out or --user"),
        (["--out", "x.tsv", "--data", "other.inter"], "knows none of the items"),
        (["--device", "meta", "id:103"], "--device meta"),
        (["--only", "empty.txt", "id:103"], "leave nothing"),
        (["--columns", "item=sku", "id:103"], "of the log --data, not given"),
        (["--min-length", "9", "id:103"], "of the log --data, not given"),
        (["--out", "x.tsv", "--data", "ring.inter", "--titles", ""], "--titles is empty"),
        (["--only", "empty.txt", "--similar", "id:103"], "leave nothing"),
        (["--new-items", "empty.txt", "--similar", "id:103"], "with a header"),
    ],
)
def test_what_is_asked_for_by_mistake_ends_in_one_line(trained, flags, words):
    (trained / "empty.txt").write_text("")
    (trained / "other.inter").write_text(HEAD + "".join(f"u\tother{n}\t{n}\n" for n in range(5)))
    assert words in inside("student.py", "--run", RUN, *flags, cwd=trained, expect=2)


def test_a_log_with_blanks_tabs_and_one_column_for_two(tmp_path):
    rows = "".join(f"u{n % 3}, {n % 5}, {n}\n" for n in range(60))
    (tmp_path / "x.csv").write_text("user_id, item_id, timestamp\n" + rows)
    assert set(load_dataset(str(tmp_path / "x.csv")).raw_ids) == {"", *"01234"}
    flags = ["--data", "x.csv", "--columns", "user=item_id"]
    assert "one column cannot be two things" in inside("data.py", *flags, cwd=tmp_path, expect=2)
    rows = '"a\tb",1,1\n' + "".join(f"u,{n},{n}\n" for n in range(200))
    (tmp_path / "y.csv").write_text("user_id,item_id,timestamp\n" + rows)
    assert load_dataset(str(tmp_path / "y.csv"), min_items=1, min_length=1).user_ids == ["u"]


def test_times_that_are_no_dates_are_counted_and_escapes_leave_titles(tmp_path):
    rows = "".join(f"u,{n},{-1 if n % 4 == 0 else 1_600_000_000 - n}\n" for n in range(12))
    (tmp_path / "x.csv").write_text("user id,item id,timestamp\n" + rows)
    (tmp_path / "x.items.csv").write_text("item id,title\n" + "".join(f"{n},\x1b[31mred {n}\n" for n in range(12)))
    flags = ["--data", "x.csv", "--min-count", "1", "--columns", "user=user id, item = item id"]
    text = inside("data.py", *flags, cwd=tmp_path)
    assert "3 of the times, such as -1; they are taken as the oldest" in text
    assert "    1  [31mred 0\n" in text and "    4  [31mred 11\n" in text and "\x1b" not in text
    (tmp_path / "x.csv").write_text("user id,item id,timestamp\n" + rows.replace(",-1\n", ",1500000000\n"))
    assert "of the times" not in inside("data.py", *flags, cwd=tmp_path)


def test_days_beside_no_finer_time_are_taken(tmp_path):
    rows = "".join(f"u{n % 9},i{n % 7},2024-03-0{1 + n % 5},2024-03-09 00:00:00,Mar 12 2024\n" for n in range(90))
    (tmp_path / "x.csv").write_text("user_id,item_id,date,created_at,release_date\n" + rows)
    log = load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1)
    assert log.taken["columns"].startswith("user = user_id, item = item_id, time = date of")


def test_titles_are_those_of_the_items(tmp_path):
    tables = [
        ("track_id", "track_id,artists,album_name,track_name", "Ann,Hits,{}", "track_name and artists"),
        ("Product ID", "Customer Name,Product ID,Product Category Name,Product Name", "-", "Product Name and"),
        ("venue_id", "venue_id,city_name,venue_name,channel_title", "Rome,{},News", "venue_name"),
        ("video_id", "video_id,channel_title,title", "News,{}", "title"),
        ("album_id", "album_id,user_name,album_name", "eve,{}", "album_name"),
    ]
    for item, header, row, words in tables:
        cells = [f"Cleo {n},{n},Toys,Song {n}" if row == "-" else f"{n}," + row.format(f"Song {n}") for n in range(9)]
        (tmp_path / "x.items.csv").write_text("\n".join([header, *cells]))
        (tmp_path / "x.csv").write_text(f"user_id,{item}\n" + "".join(f"u{n % 5},{n % 9}\n" for n in range(90)))
        log = load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1, columns={"item": item})
        assert f"from {words}" in log.taken["titles"] and log.titles[1] == f"Song {log.raw_ids[1]}"


def test_quotes_over_a_tab_are_letters(tmp_path):
    rows = "".join(f'u{n % 9}\t"Weird\tAl"\ti{n % 7}\n' for n in range(90))
    (tmp_path / "x.tsv").write_text("user_id\tartist\ttrack\titem_id\n" + rows)
    log = load_dataset(str(tmp_path / "x.tsv"), min_items=1, min_length=1)
    assert sorted(log.raw_ids) == ["", *(f"i{n}" for n in range(7))]


def test_sessions_by_other_names_and_by_none(tmp_path):
    times = [f"2020-01-{1 + n // 10:02} 10:00:{n % 60:02}" for n in range(200)]
    for column, users, words in (("user_session", 40, None), ("visit", 9, "no column is known as the session")):
        rows = "".join(f"{time},u{n // 5 % 9},s{n // 5},p{n % 7},view\n" for n, time in enumerate(times))
        (tmp_path / "x.csv").write_text(f"event_time,user_id,{column},product_id,event_type\n" + rows)
        log = load_dataset(str(tmp_path / "x.csv"), min_items=1, min_length=1, sessions=True)
        assert log.num_users == users and log.taken["not read"].startswith("event_type")
        assert (words is None) == ("sessions" not in log.taken) and (words or "") in log.taken.get("sessions", "")


def test_dates_in_digits_and_dates_that_never_come(tmp_path, capsys):
    head, path = "user_id,item_id,timestamp\n", tmp_path / "x.csv"
    days = [datetime(2018, 1, 1) + timedelta(hours=31 * n) for n in range(200)]

    def write(form, *more: str) -> None:
        path.write_text(head + "".join(f"s{n},i{(n + k) % 9},{form(days[n])}\n" for n in range(200) for k in range(3)))
        path.write_text(path.read_text() + "".join(more))

    for form in ("{:%Y%m%d%H%M}", "{:%Y%m%d%H%M%S}", "{:%Y-%m-%d %H:%M}"):
        write(form.format)
        text = inside("data.py", "--data", path, "--split", "sessions", cwd=tmp_path)
        assert "2 test targets, those of 2018-09-15" in text  # by hand: 199 times 31 hours after the first of January
    write(lambda day: f"{621355968000000000 + int(day.timestamp()) * 10**7}")  # .NET's, from the year 1
    assert "use ISO dates" in inside("data.py", "--data", path, "--split", "sessions", cwd=tmp_path, expect=2)
    write("{:%Y-%m-%d}".format, "s1,i1,9999-12-31\n", "s1,i2,Mon Jan 01 00:00:00 99999999999999999999\n")
    assert len(load_dataset(str(path), min_items=1, min_length=1).items) == 600
    assert "skipped, one of 2:" in capsys.readouterr().err
    write(lambda day: f"{day:%Y-%m-%d}" if day.month < 5 else f"{day:%Y%m%d}")
    text = inside("data.py", "--data", path, "--min-count", 1, cwd=tmp_path)
    assert "of the times, such as 20180501; they are taken" in text


def test_descriptions_may_be_long_and_items_described_twice(tmp_path):
    log = write_ring(tmp_path)
    rows = "".join(f'{100 + n},"Film {n}","{"so, " * 50_000}"\n' for n in range(60))
    log.with_suffix(".item").unlink(missing_ok=True)
    (tmp_path / "ring.items.csv").write_text(f"item_id,title,description\n{rows}100,Other,\n")
    text = inside("data.py", "--data", log, cwd=tmp_path)
    assert "titles            60 of 60 items" in text and "1 lines describe an item anew, the last counts" in text


def test_a_copy_that_cannot_be_kept_is_a_note(tmp_path, monkeypatch, capsys):
    log = write_ring(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.CACHE_FROM", 0)
    (tmp_path / "runs").write_text("a file where a folder should be")
    assert load_dataset(str(log)).num_users == 50
    assert "note: cannot write" in capsys.readouterr().err


def test_ids_of_two_normal_forms_are_two_items(tmp_path):
    one, two = "Caf\u00e9", "Cafe\u0301"
    run = write_run(tmp_path, ["", one, two, "9"], ["", "A", "B", "C"], True)
    recommend = Recommender(run, compile=False)
    assert [recommend.item(f"id:{raw_id}") for raw_id in (one, two)] == [1, 2]
    assert {raw_id for raw_id, _, _ in recommend([["9"]], without=[f"id:{two}"])[0]} == {one}
    for k in (0, -1, "3"):
        with pytest.raises(InputError, match="whole number above 0"):
            Recommender(run, k=k, compile=False)


def test_a_diverged_model_is_never_the_best(ring, tmp_path, monkeypatch):
    def diverge(optimizer) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)  # in the last step, whose loss was still good
    flags = ["--data", ring, *ON_RING, "--tokens", 100_000, "--epochs", 1]
    words = inside("distill.py", *flags, cwd=tmp_path, expect=2)
    assert "try a smaller --lr" in words and not (tmp_path / "runs/ring/student-no-kd/model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("config.json", "split", ["last"], "split must be of type str"),
        ("config.json", "interactions", "441", "interactions must be of type int"),
        ("catalogue.json", "counts", [0] * 60 + [10**400], "counts must be from 0"),
        ("catalogue.json", "titles", ["\x1b[31m"] * 61, "without control characters"),
        ("metrics.json", "minutes", math.nan, "NaN is not a number"),
    ],
)
def test_a_run_with_other_types_inside_is_refused(trained, tmp_path, file, key, value, words):
    shutil.copytree(trained / RUN, tmp_path / RUN)
    path = tmp_path / RUN / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for name in ("ring.inter", "ring.item"):
        if (trained / name).exists():
            shutil.copy(trained / name, tmp_path)
    flags = ["--data", "ring.inter", "--runs", RUN]
    assert words in inside("evaluate.py", *flags, cwd=tmp_path, expect=2)


def test_broken_weights_huge_numbers_links_and_unreadable_caches(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs/ring/student-no-kd"
    shutil.copytree(trained / RUN, run)
    (run / "metrics.json").write_text('{"minutes": 1e999}')
    with pytest.raises(InputError, match="1e999 is not a number"):
        prebert.read_json(run / "metrics.json")
    (tmp_path / "precious").write_text("kept")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(tmp_path / "precious")
    inside("distill.py", "--data", trained / "ring.inter", *ON_RING, cwd=tmp_path, expect=2)
    assert (tmp_path / "precious").read_text() == "kept"
    monkeypatch.setattr(student, "native", lambda *_: (run / "x").read_bytes())
    assert not Recommender(run).compiled and "serving without it" in capsys.readouterr().err
    tensors = read_safetensors(run / "model.safetensors")
    tensors["item_bias"][0] = math.nan
    write_safetensors(run / "model.safetensors", tensors)
    with pytest.raises(InputError, match="not finite"):
        prebert.load_run(run)
    (run / "model.safetensors").unlink()  # so the training has not ended, for all its metrics.json
    inside("distill.py", "--data", trained / "ring.inter", *ON_RING, "--resume", cwd=tmp_path)
    config = prebert.load_run(run)[1]
    assert without_seed(config) == without_seed(config | {"seed": 5}) != without_seed(config | {"exclude_seen": None})
    with pytest.raises(IsADirectoryError):  # which `run_command` says in one line
        inside("student.py", "--run", run, "id:103", "--only", "", cwd=tmp_path)


def test_folders_of_bert_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    for name in ("../bert", "./x"):
        with pytest.raises(InputError, match=r"no BERT .* here"):
            load_bert(name)
    bert_folder(tmp_path)
    bert, tokenizer = load_bert(str(tmp_path))
    words = json.loads(tokenizer.to_str())
    words["model"]["vocab"].pop("[UNK]")
    with pytest.raises(InputError, match="cannot read the texts"):
        encode_texts(bert, Tokenizer.from_str(json.dumps(words)), ["\u2603"])
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a cluster sets it, for a training that is not under torchrun
    join_processes("cpu")
    assert world() == (0, 1)


def test_titles_asked_for_that_are_none(trained):
    (trained / "no.csv").write_text("a,b\n1,2\n")
    said = inside("data.py", "--data", "ring.inter", "--titles", "no.csv", cwd=trained, expect=2)
    assert "no.csv has no column of items" in said


def test_what_is_kept_of_texts_goes_with_its_run(trained):
    flags = ["--data", "ring.inter", *ON_RING, "--name", "again"]
    inside("distill.py", *flags, cwd=trained)
    run = trained / "runs/ring/again"
    write_safetensors(run / "texts.safetensors", {"weight": torch.zeros(1)})
    inside("distill.py", *flags, "--overwrite", cwd=trained)
    assert not (run / "texts.safetensors").exists()
    shutil.rmtree(run)


def test_texts_are_read_once_and_a_wrong_bert_is_noticed_before_training(ring, tmp_path, monkeypatch):
    bert, _ = bert_folder(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--data", ring, *TINY, "--max-length", 8]
    inside("teacher.py", *flags, "--bert", bert, "--item-init", "text+cooc", cwd=tmp_path)
    assert len(list((tmp_path / "cache/prebert/titles").iterdir())) == 1
    words = inside("distill.py", *flags, "--size", "tiny", "--bert", "nosuch", cwd=tmp_path, expect=2)
    assert "no BERT 'nosuch'" in words and not (tmp_path / "runs/ring/student").exists()
    [kept] = (tmp_path / "cache/prebert/titles").iterdir()
    whole = kept.read_bytes()
    for broken in (b"", whole[:-1], (tmp_path / "model.safetensors").read_bytes()):  # made again
        kept.write_bytes(broken)
        inside("teacher.py", *flags, "--bert", bert, "--item-init", "text", "--overwrite", cwd=tmp_path)
        assert kept.read_bytes() == whole
    inside("distill.py", *flags, "--size", "tiny", "--bert", "none", cwd=tmp_path)  # no texts are kept
    assert not (tmp_path / "runs/ring/student/texts.safetensors").exists()
    (tmp_path / "new.csv").write_text("item_id,title\nf,Film\n")
    flags = ("id:103", "--run", "runs/ring/student", "--new-items", "new.csv")
    words = inside("student.py", *flags, cwd=tmp_path, expect=2)
    assert "has no texts.safetensors" in words
