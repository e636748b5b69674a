"""The two losses against formulas, the loop against interruption, and every command by subprocess."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import hand_log

from data import InputError, leave_one_out, load_dataset, mask_items
from distill import ask, distillation_loss, mean_of, principal_components, remember, student_loss
from evaluate import target_ranks
from prebert import BertConfig, PreBert, read_safetensors
from student import MiniBert
from teacher import (
    Sampler, add_training_flags, check_flags, describe, draw_batch, draw_candidates, fill_epochs, fill_recipe, locked,
    make_optimizer, masked_item_loss, schedule, train, validate,
)  # fmt: skip

ROOT = Path(__file__).parent.parent
TINY = ["--epochs", "2", "--max-length", "16", "--tokens", "256", "--eval-users", "20"]


def command(script: str, *arguments: object, cwd: Path, expect: int = 0) -> str:
    """Run a script as a user would; returns stdout, or stderr where failure is expected."""
    result = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if expect else result.stdout


# ---------------------------------------------------------------- losses


def test_masked_item_loss_is_the_mean_over_hidden_positions():
    torch.manual_seed(0)
    model = MiniBert("tiny", 30, 12).eval()
    tokens, positions, labels = mask_items(
        torch.randint(1, 31, (5, 12)), torch.zeros(5, dtype=torch.bool), 31, 0.3, torch.Generator()
    )
    everywhere = torch.arange(12).expand(5, 12)
    log_p = model.logits(model(tokens, everywhere)).log_softmax(-1)
    terms = [
        -log_p[b, p, label - 1]
        for b in range(5)
        for p, label in zip(positions[b].tolist(), labels[b].tolist(), strict=True)
        if label
    ]
    assert masked_item_loss(model, (tokens, positions, labels, positions)).item() == pytest.approx(
        sum(terms).item() / len(terms), rel=1e-5
    )


def test_distillation_is_zero_for_equal_logits():
    logits, labels = torch.randn(6, 9), torch.arange(6)
    assert distillation_loss(logits, logits + 3.0, labels, 2.0, 1.0).abs() < 1e-6  # a shift changes no softmax
    assert distillation_loss(logits, logits, labels, 2.0, 0.0).item() == pytest.approx(
        F.cross_entropy(logits, labels).item()
    )


def test_distillation_against_a_loop():
    student, teacher, labels = torch.randn(4, 5).double(), torch.randn(4, 5).double(), [1, 0, 4, 2]
    total, t, alpha = 0.0, 2.5, 0.7
    for s, q, label in zip(student.tolist(), teacher.tolist(), labels, strict=True):
        zs, zq, z1 = (sum(math.exp(x / k) for x in row) for row, k in ((s, t), (q, t), (s, 1)))
        kl = sum(
            math.exp(b / t) / zq * (math.log(math.exp(b / t) / zq) - math.log(math.exp(a / t) / zs))
            for a, b in zip(s, q, strict=True)
        )
        total += (1 - alpha) * -math.log(math.exp(s[label]) / z1) + alpha * t * t * kl
    assert distillation_loss(student, teacher, torch.tensor(labels), t, alpha).item() == pytest.approx(
        total / 4, rel=1e-5
    )


def test_temperature_squared_keeps_the_gradients_size():
    teacher, labels = torch.randn(50, 20), torch.zeros(50, dtype=torch.long)
    start, sizes = torch.randn(50, 20), {}
    for t in (50.0, 500.0):
        student = start.clone().requires_grad_()
        distillation_loss(student, teacher, labels, t, 1.0).backward()
        sizes[t] = student.grad.norm().item()
    assert sizes[50.0] == pytest.approx(sizes[500.0], rel=0.02)


def test_distillation_gradient_by_finite_differences():
    labels, teacher = torch.tensor([1, 3]), torch.randn(2, 5)
    student = torch.randn(2, 5, requires_grad=True)
    distillation_loss(student, teacher, labels, 2.0, 0.6).backward()
    for index in ((0, 1), (1, 0)):
        step = torch.zeros(2, 5)
        step[index] = 1e-2
        up, down = (distillation_loss(student.detach() + sign * step, teacher, labels, 2.0, 0.6) for sign in (1, -1))
        assert ((up - down) / 2e-2).item() == pytest.approx(student.grad[index].item(), abs=1e-3)


def test_teacher_gets_no_gradient_and_no_dropout():
    teacher, student = MiniBert("tiny", 30, 12).eval(), MiniBert("tiny", 30, 12).train()
    batch = mask_items(torch.randint(1, 31, (5, 12)), torch.zeros(5, dtype=torch.bool), 31, 0.3, torch.Generator())
    student_loss(student, (*batch, batch[1]), [teacher], ask([teacher]), 2.0, 0.5).backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.item_bias.grad is not None


def test_sampled_softmax_estimates_the_full_one():
    torch.manual_seed(0)
    model = MiniBert("tiny", 30, 12).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    batch = mask_items(torch.randint(1, 31, (5, 12)), torch.zeros(5, dtype=torch.bool), 31, 0.3, torch.Generator())
    batch = (*batch, batch[1])
    chance = torch.arange(1.0, 31.0) / 465  # far from uniform, so that a missing correction shows
    full = masked_item_loss(model, batch).item()
    assert masked_item_loss(model, batch, sampler=Sampler(chance, 300_000)).item() == pytest.approx(full, rel=0.01)
    assert masked_item_loss(model, batch, sampler=Sampler(chance, 5)).item() > 0


def test_cached_answers_are_the_live_ones_and_several_teachers_are_averaged(ring):
    torch.manual_seed(0)
    split, _, _ = leave_one_out(load_dataset(str(ring)))
    teachers = [MiniBert("tiny", 60, 40, causal=True).eval() for _ in range(2)]
    for parameter in (p for teacher in teachers for p in teacher.parameters()):
        parameter.data.normal_(0.0, 0.2)
    rows = torch.tensor([3, 11, 20])
    windows = (split.starts[rows], split.ends[rows], torch.zeros(3, dtype=torch.bool))
    batch = draw_batch(teachers[0], split, windows, 0.7, torch.Generator().manual_seed(0))
    asked = batch[2] != 0
    for cached, live in zip(remember(teachers, split, torch.float32)(batch), ask(teachers)(batch), strict=True):
        assert cached.shape == (int(asked.sum()), 64) and torch.allclose(cached, live, atol=1e-4)
    each = [teacher.logits(teacher(batch[0], batch[1])[asked]) for teacher in teachers]
    both = (each[0].softmax(-1) + each[1].softmax(-1)) / 2
    assert torch.allclose(mean_of(each).exp(), both, atol=1e-5)


def test_distillation_over_candidates_estimates_the_full_one():
    torch.manual_seed(0)
    student, *teachers = (MiniBert("tiny", 90, 12).eval() for _ in range(3))
    for parameter in (p for model in (student, *teachers) for p in model.parameters()):
        parameter.data.normal_(0.0, 0.3)
    batch = mask_items(torch.randint(1, 91, (5, 12)), torch.zeros(5, dtype=torch.bool), 91, 0.3, torch.Generator())
    batch = (*batch, batch[1])
    chance = torch.arange(1.0, 91.0) / 4095  # far from uniform, so that a missing correction shows
    for kinds, temperature in ((teachers[:1], 1.0), (teachers, 1.0), (teachers, 3.0)):
        loss = partial(student_loss, student, batch, kinds, ask(kinds), temperature, 0.6)
        full = loss().item()
        assert loss(sampler=Sampler(chance, 300_000)).item() == pytest.approx(full, rel=0.01)
        few = sum(loss(sampler=Sampler(chance, 40)).item() for _ in range(200)) / 200
        assert few == pytest.approx(full, rel=0.1)


def test_candidates_count_every_item_once():
    certain = torch.tensor([[3, 5, 3], [7, 7, 7]])
    sampler = Sampler(torch.tensor([0, 0, 0, 0.5, 0, 0, 0.25, 0.25]), 64)
    negatives, correction = draw_candidates(sampler, certain)
    assert negatives.tolist() == [3, 6, 7]
    assert (correction < -1e8).tolist() == [
        [False, False, True, True, False, False],
        [False, True, True, False, False, True],
    ]
    assert correction[0, 4:].tolist() == pytest.approx([0, 0], abs=1e-5)  # 64 draws leave out none of these


def test_negatives_stand_for_the_whole_catalogue():
    torch.manual_seed(0)
    sampler, values = Sampler(torch.arange(1.0, 201.0) / 20_100, 100), torch.rand(200)
    draws = [sampler.draw() for _ in range(3000)]
    sums = torch.tensor([(values[columns] * weights.exp()).sum() for columns, weights in draws])
    assert sums.mean().item() == pytest.approx(values.sum().item(), rel=0.02)
    always = Sampler(torch.tensor([0.5, 0.5]), 2)  # each is there in 3 of 4 draws of two
    weights = torch.cat([always.draw()[1].exp() for _ in range(50)])
    assert torch.allclose(weights, torch.full_like(weights, 4 / 3))


def test_principal_components_keep_the_distances_of_a_flat_cloud():
    flat = torch.randn(40, 3) @ torch.randn(3, 10) + 5  # 3 dimensions in 10
    small = principal_components(flat, 4).double()
    assert torch.allclose(torch.cdist(small, small), torch.cdist(flat.double(), flat.double()), atol=1e-3)


def test_schedule_and_optimizer_groups():
    assert [schedule(p, 0.1) for p in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    model = MiniBert("tiny", 30, 12)
    rates = {
        id(p): (g["lr"], g["weight_decay"])
        for g in make_optimizer(model, 1e-2, 1e-3, 0.1).param_groups
        for p in g["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.item_embedding.weight)] == (1e-2, 0) and rates[id(model.head[0].weight)] == (1e-2, 0.1)
    assert rates[id(model.encoder.layers[0].attention.qkv.weight)] == (1e-3, 0.1) and rates[
        id(model.encoder.norm.weight)
    ] == (1e-3, 0)


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = PreBert(BertConfig(64, 2, 4, 128, 12, hidden_dropout_prob=0.0), 50)
    batch = mask_items(
        torch.randint(1, 51, (8, 12)), torch.zeros(8, dtype=torch.bool), 51, 0.3, torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        masked_item_loss(model, (*batch, batch[1])).backward()
        optimizer.step()
    asked = batch[2] > 0
    ranks = target_ranks(model.logits(model(batch[0], batch[1])[asked]), batch[2][asked])
    assert (ranks == 1).all()  # HR@1 = 1


# ---------------------------------------------------------------- the loop


def options(*arguments: str, **defaults: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_training_flags(
        parser,
        **{
            "objective": "masked",
            "lr": 1e-3,
            "epochs": 3,
            "patience": 5,
            "name": "x",
            "max_length": 16,
            "tokens": 256,
            "device": "cpu",
            **defaults,
        },
    )
    args = parser.parse_args(arguments)
    check_flags(parser, args)
    return args


class StopAt:
    """A loss that asks the process to stop, as Ctrl-C does, while step `at` is computed."""

    def __init__(self, at: int, number: int):
        self.at, self.number, self.calls = at, number, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return masked_item_loss(model, batch)


@pytest.mark.parametrize("objective", ["masked", "next"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(ring, tmp_path, objective, capsys):
    log = load_dataset(str(ring))

    def go(run: str, loss, *flags: str):
        args = options(*flags, objective=objective, epochs=3, tokens=64)  # more steps in an epoch than epochs
        torch.manual_seed(5)
        model = MiniBert("tiny", log.num_items, 16, objective == "next")
        train(model, loss, log, tmp_path / run, args, describe(log, model, args))

    go("whole", masked_item_loss)
    for at, number, code, flags in ((7, signal.SIGINT, 130, []), (4, signal.SIGTERM, 143, ["--resume"])):
        with pytest.raises(SystemExit) as stopped:
            go("parts", StopAt(at, number), *flags)
        assert stopped.value.code == code and "--resume" in capsys.readouterr().err
    go("parts", masked_item_loss, "--resume")
    whole, parts = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts
    lines = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "parts")]
    assert [len(rows) for rows in lines] == [4, 4]  # a header and a row an epoch
    assert int(lines[0][1].split(",")[0]) > 14  # steps: both interruptions were in the first epoch
    assert not (tmp_path / "parts" / "train_state.pt").exists()
    go("parts", StopAt(1, signal.SIGINT), "--resume")  # nothing is left to do, so no step is computed
    assert "has ended" in capsys.readouterr().out
    (tmp_path / "parts" / "metrics.json").unlink()  # weights alone, such as a copy of someone's: they must survive
    with pytest.raises(InputError, match="no checkpoint to go on from"):
        go("parts", masked_item_loss, "--resume")
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == parts
    with pytest.raises(InputError, match="--overwrite"):
        go("parts", masked_item_loss)


def test_two_trainings_in_one_folder_are_refused(ring, tmp_path):
    log, run = load_dataset(str(ring)), tmp_path / "run"
    args = options()
    model = MiniBert("tiny", log.num_items, 16)
    with locked(run), pytest.raises(InputError, match="another training is writing"):
        train(model, masked_item_loss, log, run, args, describe(log, model, args))


def test_resume_refuses_other_settings_and_broken_files(ring, tmp_path):
    log, run = load_dataset(str(ring)), tmp_path / "run"

    def go(loss, *flags):
        args = options(*flags)
        model = MiniBert("tiny", log.num_items, 16)
        train(model, loss, log, run, args, describe(log, model, args))

    with pytest.raises(SystemExit):
        go(StopAt(3, signal.SIGINT))
    with pytest.raises(InputError, match="settings was"):
        go(masked_item_loss, "--resume", "--lr", "0.5")
    (run / "train_state.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        go(masked_item_loss, "--resume")


def test_a_loss_that_is_not_finite_stops_with_advice(ring, tmp_path):
    log, args = load_dataset(str(ring)), options()
    model = MiniBert("tiny", log.num_items, 16)
    broken = lambda model, batch: masked_item_loss(model, batch) * math.nan  # noqa: E731
    with pytest.raises(InputError, match=r"step 0, learning rate .* try a smaller --lr"):
        train(model, broken, log, tmp_path / "run", args, describe(log, model, args))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_validation_reads_as_much_as_the_model_does():
    class Oldest(torch.nn.Module):  # recommends the oldest item that it reads
        max_length, item_bias = 300, torch.zeros(8)

        def score_next(self, history: torch.Tensor) -> torch.Tensor:
            return F.one_hot(history[:, 0], 9)[:, 1:].float()

    rows = torch.randint(1, 9, (40, 302), generator=torch.Generator().manual_seed(0))
    _, valid, _ = leave_one_out(hand_log(*rows.tolist()))
    hits = (rows[:, 0] == rows[:, 300]).float().mean().item()  # the others share the last place of 8
    assert 0 < hits < 1
    assert validate(Oldest(), valid, False, 100)[0] == pytest.approx(hits + (1 - hits) / math.log2(9))


def test_less_data_gets_more_passes_unless_told(ring):
    log = load_dataset(str(ring))
    tenth = replace(log, items=np.ones(100_000, np.int64))
    twice = replace(log, items=np.ones(2_000_000, np.int64))
    for data, given, epochs, patience in (
        (tenth, [], 32, 10), (twice, [], 10, 5), (tenth, ["--epochs", "7"], 7, 5),
        (tenth, ["--epochs", "40", "--patience", "3"], 40, 3),
    ):  # fmt: skip
        args = options(*given, epochs=None, patience=None)
        fill_epochs(args, data, 10)
        assert (args.epochs, args.patience) == (epochs, patience)


def test_a_teacher_of_next_items_gets_the_recipe_of_the_readme_unless_told(ring):
    log = replace(load_dataset(str(ring)), items=np.ones(1_000_000, np.int64))
    left = {"epochs": None, "patience": None, "dropout": None, "label_smoothing": None}
    few = Sampler(torch.ones(9) / 9, 4)
    for given, sampler, recipe in (
        ([], None, (10, 0.1, 0.0)), (["--objective", "next"], None, (6, 0.2, 0.1)),
        (["--objective", "next"], few, (6, 0.2, 0.0)),  # smoothing needs the whole catalogue
        (["--objective", "next", "--dropout", "0", "--label-smoothing", "0"], None, (6, 0.0, 0.0)),
    ):  # fmt: skip
        args = options(*given, **left)
        fill_recipe(args, log, sampler)
        assert (args.epochs, args.dropout, args.label_smoothing) == recipe


def test_minutes_budget_follows_the_clock_and_patience_ends_early(ring, tmp_path):
    log = load_dataset(str(ring))
    for flags, limit in (
        (["--minutes", "0.05", "--patience", "999"], 20),
        (["--epochs", "500", "--patience", "2", "--lr", "1e-9"], 60),
    ):
        args, began = options(*flags), time.perf_counter()
        model = MiniBert("tiny", log.num_items, 16)
        train(model, partial(masked_item_loss), log, tmp_path / flags[0], args, describe(log, model, args))
        assert time.perf_counter() - began < limit
        report = json.loads((tmp_path / flags[0] / "metrics.json").read_text())
        assert report["minutes"] >= 0.05 if "--minutes" in flags else report["epochs"] < 20


# ---------------------------------------------------------------- the commands


def test_every_command_from_data_to_recommendation(ring, tmp_path):
    card = command("data.py", "--data", ring, cwd=tmp_path)
    assert re.search(r"ring: 50 users, 60 items, [\d,]+ interactions", card) and "Film " in card
    assert "distill.py" in command("teacher.py", "--data", ring, "--bert", "none", *TINY, cwd=tmp_path)
    assert "evaluate.py" in command("distill.py", "--data", ring, "--size", "tiny", *TINY, cwd=tmp_path)
    command("distill.py", "--data", ring, "--size", "tiny", "--no-kd", *TINY, cwd=tmp_path)
    table = command("evaluate.py", "--data", ring, "--json", "out.json", cwd=tmp_path)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["popularity", "markov", "teacher", "student", "student-no-kd"]
    assert {"HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR", "ci95", "params"} <= set(
        report["rows"][2]
    )
    assert {"command", "seed", "commit", "machine", "minutes"} <= set(report["rows"][3])
    assert report["rows"][1]["NDCG@10"] > 0.9  # on a ring, the step from one film to the next is all there is
    assert "student over teacher" in table and "student over student-no-kd" in table
    text = command("evaluate.py", "--data", ring, "--sampled", "uniform", cwd=tmp_path, expect=2)
    assert "fewer than 100" in text
    answer = command(
        "student.py", "--run", "runs/ring/student", "film 3 (1953)", "Film 4 (1954)", "-k", 3, cwd=tmp_path
    )
    assert len(re.findall(r"Film \d+ \(\d+\)$", answer, re.M)) == 3 and " ms, eager" in answer
    assert "did you mean" in command(
        "student.py", "--run", "runs/ring/student", "Film 3 (1853)", cwd=tmp_path, expect=2
    )


def test_next_item_teacher_and_student(ring, tmp_path):
    command("teacher.py", "--data", ring, "--bert", "none", "--objective", "next", *TINY, cwd=tmp_path)
    command("distill.py", "--data", ring, "--size", "tiny", *TINY, cwd=tmp_path)
    model = json.loads((tmp_path / "runs/ring/student/config.json").read_text())["model"]
    assert model["causal"]
    assert "--objective next" in command(
        "distill.py",
        "--data",
        ring,
        "--size",
        "tiny",
        "--objective",
        "masked",
        "--name",
        "x",
        *TINY,
        cwd=tmp_path,
        expect=2,
    )


def test_bench_reports_every_field(ring, tmp_path):
    command("teacher.py", "--data", ring, "--bert", "none", *TINY, cwd=tmp_path)
    command("distill.py", "--data", ring, "--size", "tiny", *TINY, cwd=tmp_path)
    text = command(
        "evaluate.py", "--data", ring, "--runs", "runs/ring/student", "--bench", "--json", "b.json", cwd=tmp_path
    )
    report = json.loads((tmp_path / "b.json").read_text())
    assert "users/s" in text and report["peak_gflops"] > 0
    assert len(report["bench"]) == 2 * 4 * 2  # modes, batch sizes; 15 items, which is all it reads, and real lengths
    assert {(row["mode"], row["batch_size"]) for row in report["bench"]} == {
        (mode, size) for mode in ("eager", "compiled") for size in (1, 8, 64, 256)
    }
    picture = ElementTree.parse(tmp_path / "b-latency.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 1  # a line a fixed length
    for name, points in (("trade", 1), ("curves", 2)):  # a point a model; a point an epoch
        picture = ElementTree.parse(tmp_path / f"b-{name}.svg").getroot()
        assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == points
    fields = {
        "name",
        "mode",
        "batch_size",
        "length",
        "p50_ms",
        "p95_ms",
        "p99_ms",
        "users_per_s",
        "flops_per_user",
        "fraction_of_peak",
        "extra_memory_gb",
    }
    assert all(fields <= set(row) and row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in report["bench"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.py", "--data", "netflix"], "unknown dataset"),
        (["data.py", "--unknown"], "unrecognized"),
        (["data.py", "--min-count", "0"], "whole number"),
        (["teacher.py", "--data", "RING", "--lr", "-1"], "--lr: '-1' must be a number above 0"),
        (["teacher.py", "--data", "RING", "--bert", "none", "--item-init", "text"], "needs a BERT"),
        (["teacher.py", "--data", "RING", "--bert", "no-such-folder"], "no BERT"),
        (["teacher.py", "--data", "RING", "--bert", "none", "--device", "warp"], "--device warp"),
        (["teacher.py", "--data", "RING", "--seed", "10000000000000"], "--seed from 0"),
        (["distill.py", "--data", "RING"], "train first"),
        (["distill.py", "--data", "RING", "--temperature", "0"], "--temperature"),
        (["evaluate.py", "--data", "RING", "--runs", "nowhere"], "train first"),
        (["evaluate.py", "--data", "RING", "--bench-items", "1000"], "--bench-items is for --bench"),
        (["student.py", "--run", "nowhere", "Film 1 (1951)"], "train first"),
    ],
)
def test_bad_input_gets_one_clear_line_and_code_2(ring, tmp_path, arguments, words):
    script, *rest = [str(ring) if argument == "RING" else argument for argument in arguments]
    assert words in command(script, *rest, cwd=tmp_path, expect=2)


def test_a_run_of_another_catalogue_is_refused(ring, tmp_path):
    command("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=tmp_path)
    path = tmp_path / "runs/ring/student-no-kd/catalogue.json"
    catalogue = json.loads(path.read_text())
    path.write_text(json.dumps({**catalogue, "raw_ids": ["", *catalogue["raw_ids"][:0:-1]]}))
    text = command("evaluate.py", "--data", ring, "--runs", "runs/ring/student-no-kd", cwd=tmp_path, expect=2)
    assert "another catalogue" in text
    path.write_text(json.dumps(catalogue))
    (path.parent / "metrics.json").write_text("{")
    text = command("evaluate.py", "--data", ring, "--runs", "runs/ring/student-no-kd", cwd=tmp_path, expect=2)
    assert "metrics.json: not JSON" in text


def test_teacher_weights_are_plain_safetensors(ring, tmp_path):
    command("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=tmp_path)
    names = set(read_safetensors(tmp_path / "runs/ring/student-no-kd/model.safetensors"))
    assert names == set(MiniBert("tiny", 60, 16).state_dict())
