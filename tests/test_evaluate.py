"""Metrics against loops, baselines against counting by hand."""

import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import sparsity
import torch
from conftest import HEAD, REAL, TINY, hand_log, inside

from data import SPLITS, Spans, leave_one_out, pad_left
from evaluate import (
    DRAWS, Markov, compare, metrics, ndcg, popularity, rank_targets, resampled, target_ranks, two_sided,
    with_seeds,
)  # fmt: skip
from prebert import read_safetensors


def loop_rank(scores: list[float], target: int, seen: set[int]) -> int:
    rank = 1
    for item, score in enumerate(scores, 1):
        if item != target and item not in seen and not score < scores[target - 1]:
            rank += 1
    return rank


def test_ranks_and_metrics_equal_loops():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (300, 30), generator=generator).float()  # many ties
    targets = torch.randint(1, 31, (300,), generator=generator)
    seen = torch.randint(0, 31, (300, 8), generator=generator)
    ranks = target_ranks(scores, targets, seen)
    expected = [
        loop_rank(s.tolist(), int(t), set(row.tolist())) for s, t, row in zip(scores, targets, seen, strict=True)
    ]
    assert ranks.tolist() == expected
    row = metrics(ranks)
    for k in (1, 5, 10, 20):
        assert row[f"HR@{k}"] == pytest.approx(sum(r <= k for r in expected) / 300)
    for k in (5, 10, 20):
        assert row[f"NDCG@{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in expected if r <= k) / 300)
    assert row["MRR"] == pytest.approx(sum(1 / r for r in expected) / 300)


def test_scorers_that_say_nothing_get_nothing():
    targets = torch.tensor([1, 30, 7])
    for value in (0.0, -math.inf, math.nan):
        assert target_ranks(torch.full((3, 30), value), targets).tolist() == [30, 30, 30]


def test_known_places():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert target_ranks(scores, torch.tensor([3])).tolist() == [3]
    assert target_ranks(scores, torch.tensor([3]), torch.tensor([[2, 0]])).tolist() == [2]
    assert target_ranks(scores, torch.tensor([3]), torch.tensor([[2, 3]])).tolist() == [2]  # a target is never left out
    assert ndcg(torch.tensor([3]), 10).item() == pytest.approx(0.5)


def test_rank_targets_gives_each_user_the_rank_of_the_whole_history():
    log = hand_log(*[[(u + t) % 40 + 1 for t in range(3 + u % 20)] for u in range(60)])
    _, _, test = leave_one_out(log)
    scores = torch.randn(41, 40, generator=torch.Generator().manual_seed(0))
    score = lambda history: scores[history[:, -1]]  # noqa: E731
    ranks = rank_targets(score, test, True, max_length=4)  # the model reads 4 items, the exclusion all of them
    for row in range(len(test.targets)):
        history = test.items[test.starts[row] : test.ends[row]]
        expected = loop_rank(scores[history[-1]].tolist(), int(test.targets[row]), set(history.tolist()))
        assert ranks[row] == expected


def test_popularity_and_transitions_by_hand():
    train, _, _ = leave_one_out(hand_log([1, 2, 1, 2, 3, 9, 9], [2, 3, 9, 9], [4, 2], [5]))
    # training part: 1 2 1 2 3 | 2 3 | 4 2 | 5
    history = torch.tensor([[0, 2], [0, 9], [2, 1]])
    assert popularity(train, 9)(history)[0].tolist() == [2, 4, 2, 1, 1, 0, 0, 0, 0]
    scores = Markov(train, 9)(history)
    assert scores.long().tolist() == [[1, 0, 2, 0, 0, 0, 0, 0, 0], [0] * 9, [0, 2, 0, 0, 0, 0, 0, 0, 0]]
    assert scores[1].argmax() == 1  # 9 was held out and has no successor: popularity decides


def test_popularity_breaks_the_ties_of_transitions_however_small():
    # Item 1 is followed 20 times by each of 2 and 3; 3 stands once more at the end of a long log.
    rows = [[1, 2], [1, 3]] * 20 + [[4] * 1000] * 1000 + [[3]]
    log = hand_log(*rows)
    everything, _, _ = SPLITS["none"](log)
    part = Spans(everything.items, torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 3]))  # after 1
    assert rank_targets(Markov(everything, 4), part, False, 1).tolist() == [2, 1]


def test_ranking_in_chunks_gives_the_same_ranks():
    torch.manual_seed(0)
    items, sizes = 2**21, torch.arange(3, 40)  # so many items that 32 users are scored at once
    ends = sizes.cumsum(0)
    log = torch.randint(1, items, (int(ends[-1]),))
    log[0] = items
    part = Spans(log, ends - sizes, ends, torch.randint(1, 100, (len(sizes),)))
    widths = []

    def score(history: torch.Tensor) -> torch.Tensor:
        widths.append(len(history))
        return (history.sum(1, keepdim=True) * torch.arange(1, 101) % 101).float()

    whole = target_ranks(score(pad_left(log, part.starts, part.ends, 39)), part.targets)
    assert torch.equal(rank_targets(score, part, False, 200), whole) and max(widths[1:]) <= 32


def test_one_huge_history_does_not_make_all_others_as_wide():
    sizes = torch.cat([torch.full((3000,), 3), torch.tensor([100_000])])
    ends = sizes.cumsum(0)
    part = Spans(torch.ones(int(ends[-1]), dtype=torch.long), ends - sizes, ends, torch.full((len(sizes),), 2))
    users = []  # of each batch, that of the longest history first

    def score(history: torch.Tensor) -> torch.Tensor:  # a model that reads one item, as the Markov baseline does
        users.append(len(history))
        return torch.tensor([[0.0, 1.0]]).expand(len(history), -1)

    assert torch.equal(rank_targets(score, part, False, 1), torch.ones(3001, dtype=torch.long))
    assert users[0] <= 10 and sum(users) == 3001


# ---------------------------------------------------------------- bootstrap


def test_bootstrap_is_that_of_a_mean():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0)).double()
    means = resampled(values, np.arange(2000))
    assert means.mean() == pytest.approx(values.mean().item(), rel=0.002)
    assert means.std() == pytest.approx(values.std().item() / 2000**0.5, rel=0.1)
    assert np.allclose(resampled(values + 0.1, np.arange(2000)) - means, 0.1)  # the same users each time


def test_questions_of_one_session_are_drawn_together():
    of_session = torch.rand(300, generator=torch.Generator().manual_seed(0)).double()
    owners = np.repeat(np.arange(300), 8)
    assert np.allclose(resampled(of_session[owners], owners), resampled(of_session, np.arange(300)))
    assert resampled(of_session[owners], np.arange(2400)).std() < 0.5 * resampled(of_session, np.arange(300)).std()


@pytest.mark.parametrize(
    ("models", "quantile", "p"),  # of Student's t, from a table: with two degrees of freedom, with four, the normal one
    [(1, 4.303, 0.05), (1, 9.925, 0.01), (2, 2.776 * 2**0.5, 0.05), (2, 4.604 * 2**0.5, 0.01), (0, 1.96, 0.05)],
)
def test_p_of_three_seeds_is_that_of_a_t_test(models, quantile, p):
    three = (torch.tensor([-1.0, 0.0, 1.0]).double() * 3**0.5)[:, None].expand(3, 50)  # their mean's error is 1
    tables = [three] * models + [torch.zeros(1, 50).double()] * (2 - models)
    users = np.random.default_rng(0).normal(0, 1 if models == 0 else 1e-3, DRAWS)  # else they hardly differ
    draws = with_seeds(quantile + users, tables)
    assert two_sided(draws) == pytest.approx(p, rel=0.3) and np.median(draws) == pytest.approx(quantile, rel=0.05)


def test_the_spread_of_users_and_that_of_seeds_add_up():
    users = np.random.default_rng(0).normal(0.5, 0.1, DRAWS)
    seeds = (torch.tensor([0.0, 0.1, 0.5, 0.2, 0.3, 0.9, 0.4, 0.1])[:, None] + torch.zeros(8, 20)).double()
    wide = with_seeds(users, [seeds, torch.zeros(1, 20).double()])
    variance = 0.1**2 + seeds[:, 0].var().item() / 8
    assert np.subtract(*np.percentile(wide, [84.13, 15.87])) / 2 == pytest.approx(variance**0.5, rel=0.08)


def test_p_values_have_a_floor_and_are_uniform_without_a_difference():
    assert two_sided(np.full(DRAWS, 0.3)) == two_sided(np.full(DRAWS, -0.3)) == 2 / DRAWS
    assert two_sided(np.zeros(DRAWS)) == 1.0
    assert two_sided(np.arange(-100, 300) + 0.5) == pytest.approx(0.5)  # a quarter of the draws is below 0
    generator = torch.Generator().manual_seed(0)
    for gap, least, most in ((0.0, 0.05, 1.0), (0.3, 0.0, 0.001)):
        one, other = (torch.rand(3000, generator=generator).double() for _ in range(2))
        p = two_sided(resampled(one + gap, np.arange(3000)) - resampled(other, np.arange(3000)))
        assert least <= p <= most


def test_seeds_that_differ_make_a_comparison_unsure():
    one = torch.full((400,), 0.5).double()
    (pair,), _ = compare({"a": [one + gap for gap in (-0.2, 0.1, 0.4)], "b": [one]}, np.arange(400))
    assert pair["better"] == "a" and pair["p"] == pytest.approx(0.622, abs=0.05)  # t = 0.577, two degrees of freedom


def test_every_pair_is_compared_seeds_being_averaged(capsys):
    values = {"teacher": [[1.0, 0.5]], "student": [[1.0, 1.0], [0.5, 0.0]], "none": [[0.0, 0.0]], "nil": [[0.0, 0.0]]}
    tensors = {name: [torch.tensor(row).double() for row in rows] for name, rows in values.items()}
    pairs, seeds = compare(tensors, np.arange(2))
    gains = {frozenset((pair["better"], pair["worse"])): pair["gain"] for pair in pairs}
    assert len(pairs) == 6 and gains[frozenset(("teacher", "student"))] == pytest.approx(0.75 / 0.625 - 1)
    assert gains[frozenset(("teacher", "none"))] is None and gains[frozenset(("none", "nil"))] is None  # not NaN
    assert all((pair["ci95"] is None) == (pair["gain"] is None) for pair in pairs)
    assert all(2 / DRAWS <= pair["p"] <= 1 for pair in pairs)
    assert seeds == {"student": {"seeds": 2, "mean": pytest.approx(0.625), "std": pytest.approx(0.75 / 2**0.5)}}
    printed = capsys.readouterr().out
    assert "teacher over student: +20.00% NDCG@10" in printed and "nan" not in printed.lower()


def test_the_interval_of_a_gain_is_that_of_a_mean_of_many():
    generator = torch.Generator().manual_seed(0)
    worse = torch.rand(1, 10_000, generator=generator).double() + 0.5
    better = worse + 0.1 + torch.randn(1, 10_000, generator=generator).double()
    (pair,), _ = compare({"a": list(better), "b": list(worse)}, np.arange(10_000))
    half = 1.96 * ((better - worse).std() / 100 / worse.mean()).item()  # by the normal distribution
    assert pair["ci95"] == pytest.approx([pair["gain"] - half, pair["gain"] + half], abs=0.1 * half)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_p_at_the_floor_is_printed_as_at_most(capsys, sign):
    better, worse = torch.full((400,), 0.5).double(), torch.full((400,), 0.25).double()
    values = {"a": [better], "b": [worse]} if sign > 0 else {"b": [worse], "a": [better]}
    (pair,), _ = compare(values, np.arange(400))
    assert (pair["better"], pair["p"], pair["ci95"]) == ("a", 2 / DRAWS, [1.0, 1.0])  # twice as good for everybody
    assert "p <= 0.001" in capsys.readouterr().out.replace("≤", "<=")


@pytest.mark.parametrize("flags", [["--size", "tiny"], ["--body"]])
def test_sparsity_trains_on_a_share_of_the_users_and_evaluates_everybody(ring, tmp_path, monkeypatch, flags):
    words = ["--data", str(ring), "--shares", "50", "--json", "report.json", *flags, *TINY]
    monkeypatch.setattr(sys, "argv", ["sparsity.py", *words])
    with contextlib.chdir(tmp_path):
        sparsity.main()
        runs = sorted(Path("runs/ring").glob("sparsity-*"))
        rows = json.loads(Path("report.json").read_text())["rows"]
        sparsity.main()  # again: its runs have ended, and its rows are replaced
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows
    starts = {"text", "text+cooc"} if flags == ["--body"] else {"text", "text+cooc", "cooc"}
    assert len(rows) == len(runs) == 2 and {row["item_init"] for row in rows} <= starts
    users = {line.split("\t")[0] for line in ring.read_text().splitlines()[1:]}
    lines = len(ring.read_text().splitlines()) - 1
    for run in runs:
        config, catalogue = (json.loads((tmp_path / run / f).read_text()) for f in ("config.json", "catalogue.json"))
        assert config["interactions"] == lines  # everybody's histories are asked about
        assert 0.35 * lines < sum(catalogue["counts"]) + len(users) < 0.65 * lines  # half of the users' but two items
    if flags == ["--body"]:
        first, second = (read_safetensors(tmp_path / run / "model.safetensors") for run in runs)
        name = "encoder.layers.0.feed_forward.up.weight"
        assert first[name].shape == second[name].shape and abs(first[name] - second[name]).mean() > 0.01


@pytest.mark.skipif(not (REAL / "ml-1m/ratings.dat").exists(), reason="needs ML-1M")
def test_the_released_student_has_the_figures_of_the_readme(tmp_path):
    printed = inside("evaluate.py", "--root", REAL, "--json", "o.json", cwd=tmp_path)
    row = json.loads((tmp_path / "o.json").read_text())["rows"][2]
    assert "evaluating the released student" in printed and row["name"] == "student"
    assert (round(row["NDCG@10"], 4), round(row["HR@10"], 4)) == (0.2090, 0.3483)
    assert len(row["curve"]) > 5 and max(quality for _, quality in row["curve"]) == pytest.approx(0.2160, abs=1e-4)


def test_validation_and_test_by_hand(tmp_path):
    lines = [("a", "p"), ("a", "q"), ("b", "p"), ("b", "q"), ("b", "r"), ("c", "s")]
    rows = "".join(f"{user}\t{item}\t{time}\n" for time, (user, item) in enumerate(lines))
    (tmp_path / "x.inter").write_text(HEAD + rows)
    # q followed p, so on validation it is first; nothing followed q: s is more popular than r, the rest is seen.
    # With seen items ranked, p, q and s, which were clicked more often or as often, are before r.
    for flags, expected in ((["--valid"], 1.0), ([], 1 / math.log2(3)), (["--seen", "keep"], 1 / math.log2(5))):
        inside("evaluate.py", "--data", "x.inter", "--min-count", 1, "--json", "x.json", *flags, cwd=tmp_path)
        markov = json.loads((tmp_path / "x.json").read_text())["rows"][-1]
        assert (markov["name"], markov["NDCG@10"]) == ("markov", pytest.approx(expected))
