"""Metrics against loops, baselines against counting by hand."""

import math
from xml.etree import ElementTree

import pytest
import torch
from test_data import hand_log

from data import leave_one_out, pad_left
from evaluate import (
    Markov, Popularity, bootstrap, compare, evaluate, hit_rate, metrics, ndcg, paired_p, plot_svg, sample_negatives,
    step_flops, target_ranks,
)  # fmt: skip
from student import MiniBert


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
    for k in (1, 5, 10, 20):
        assert hit_rate(ranks, k).mean().item() == pytest.approx(sum(r <= k for r in expected) / 300)
        gains = [1 / math.log2(r + 1) if r <= k else 0 for r in expected]
        assert ndcg(ranks, k).mean().item() == pytest.approx(sum(gains) / 300)
    assert metrics(ranks)["MRR"] == pytest.approx(sum(1 / r for r in expected) / 300)


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


def test_evaluate_gives_each_user_the_rank_of_the_whole_history():
    log = hand_log(*[[(u + t) % 40 + 1 for t in range(3 + u % 20)] for u in range(60)])
    _, _, test = leave_one_out(log)
    scores = torch.randn(41, 40, generator=torch.Generator().manual_seed(0))
    score = lambda history: scores[history[:, -1]]  # noqa: E731
    ranks = evaluate(score, test, True, max_length=4)  # the model reads 4 items, the exclusion all of them
    for row in range(len(test.targets)):
        history = test.items[test.starts[row] : test.ends[row]]
        expected = loop_rank(scores[history[-1]].tolist(), int(test.targets[row]), set(history.tolist()))
        assert ranks[row] == expected


def test_popularity_and_transitions_by_hand():
    train, _, _ = leave_one_out(hand_log([1, 2, 1, 2, 3, 9, 9], [2, 3, 9, 9], [4, 2], [5]))
    # training part: 1 2 1 2 3 | 2 3 | 4 2 | 5
    history = torch.tensor([[0, 2], [0, 9], [2, 1]])
    assert Popularity(train, 9)(history)[0].tolist() == [2, 4, 2, 1, 1, 0, 0, 0, 0]
    scores = Markov(train, 9)(history)
    assert scores.long().tolist() == [[1, 0, 2, 0, 0, 0, 0, 0, 0], [0] * 9, [0, 2, 0, 0, 0, 0, 0, 0, 0]]
    assert scores[1].argmax() == 1  # 9 was held out and has no successor: popularity decides


def test_sampled_negatives_are_unseen_distinct_and_follow_the_weights():
    weights = torch.ones(50)
    weights[:10] = 20.0
    draw = sample_negatives(weights, 20, seed=1)
    seen = pad_left(torch.arange(1, 12), torch.tensor([0] * 500), torch.tensor([5] * 500), 6)
    sample = draw(torch.full((500,), 50), seen)
    assert sample.shape == (500, 20) and all(len(set(row)) == 20 for row in sample.tolist())
    assert not torch.isin(sample, torch.tensor([0, 1, 2, 3, 4, 5, 50])).any()
    counts = torch.bincount(sample.flatten(), minlength=51).float()
    assert counts[6:11].min() > 1.5 * counts[11:50].max()  # the popular ones come more often


def test_bootstrap_interval_is_the_normal_one():
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)).double()
    means = bootstrap(values)
    assert means.std() == pytest.approx(values.std().item() / 4000**0.5, rel=0.1)
    assert paired_p(values, values) == 1.0 and paired_p(values + 0.1, values) <= 0.001


def test_students_are_compared_with_teachers_and_their_equals_seeds_being_averaged(capsys):
    places = {"teacher": [1, 3], "student-s1": [1, 1], "student-s2": [3, 11], "student-tiny": [1, 1],
              "student-long": [3, 1], "student-no-kd": [1, 20]}  # fmt: skip
    rows = [{"name": name, "params": 5 if name == "student-tiny" else 9} for name in places]
    found, seeds = compare({name: torch.tensor(ranks) for name, ranks in places.items()}, rows)
    gains = {(pair["better"], pair["worse"]): pair["gain"] for pair in found}
    # NDCG@10 is 1 at place 1, 1/2 at place 3, 0 beyond 10: teacher 0.75, student (1 + 0.25) / 2, control 0.5
    assert gains == pytest.approx({
        ("teacher", "student-no-kd"): 0.5, ("student", "teacher"): -1 / 6, ("student-tiny", "teacher"): 1 / 3,
        ("student-long", "teacher"): 0, ("student", "student-no-kd"): 0.25, ("student-long", "student-no-kd"): 0.5,
        ("student", "student-long"): -1 / 6,
    })  # fmt: skip
    assert seeds == {"student": {"seeds": 2, "mean": pytest.approx(0.625), "std": pytest.approx(0.75 / 2**0.5)}}
    assert "student over student-long: -16.67% NDCG@10" in capsys.readouterr().out


def test_a_steps_flops_are_those_counted_by_hand():
    size, length, items, batch = 64, 16, 100, 3
    model = MiniBert("tiny", items, length, causal=True)
    layer = 2 * length * size * (3 + 1 + 4 + 4) * size + 4 * length**2 * size  # projections, then attention
    forward = 2 * layer + 2 * length * size**2 + 2 * length * size * items  # two layers, head, catalogue
    assert step_flops(model, batch * length, 1.0, None) == pytest.approx(3 * batch * forward)


def test_a_picture_puts_points_where_they_belong_and_draws_seeds_alike():
    lines = {f"run<{i}>-s{seed}": [(1.0, 0.0), (10.0, seed), (100.0, 4.0)] for i in range(9) for seed in (1, 2)}
    picture = ElementTree.fromstring(plot_svg(lines, "picture", "x", "y", log_y=False))
    drawn = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert drawn[0].get("points") == "70.0,330.0 270.0,262.5 470.0,60.0"  # x: two decades; y: 0 to 4
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in drawn]
    assert looks[0::2] == looks[1::2] and len(set(looks)) == 9
    names = [text.text for text in picture.findall("{http://www.w3.org/2000/svg}text")]
    assert [name for name in names if name and name.startswith("run")] == [f"run<{i}>" for i in range(9)]
