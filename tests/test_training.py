"""The two losses against formulas, the loop against interruption, and every command."""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count as counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HEAD, TINY, command, hand_log, inside

import distill
import evaluate
import teacher
from data import PAD, Batch, InputError, Interactions, batches, leave_one_out, load_dataset, mask_items
from distill import distillation_loss, mean_of, principal_components, student_loss, teacher_states, with_counts
from evaluate import Markov, benchmark, target_ranks
from prebert import BertConfig, PreBert, read_safetensors, without_seed
from student import MiniBert
from teacher import (
    RECIPES, Sampler, add_training_flags, default_init, describe, draw_batch, draw_candidates, draw_windows, item_loss,
    locked, make_optimizer, schedule, settle, train, validate,
)  # fmt: skip

# ---------------------------------------------------------------- losses


def masked_batch(items: int, rows: int = 5, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(1, items + 1, (rows, 12), generator=generator)
    tokens, positions, labels = mask_items(whole, torch.zeros(rows, dtype=torch.bool), items + 1, generator)
    return Batch(tokens, positions, labels, positions)


def live(teachers: list[PreBert]) -> Callable:
    return teacher_states(teachers, leave_one_out(hand_log([1, 2, 3]))[0], torch.float32, cache=False)


def random_weights(*models: PreBert, std: float) -> None:
    for parameter in (parameter for model in models for parameter in model.parameters()):
        parameter.data.normal_(0.0, std)


def test_item_loss_is_the_mean_over_asked_positions():
    torch.manual_seed(0)
    model, batch = MiniBert("tiny", 30, 12).eval(), masked_batch(30)
    everywhere = torch.arange(12).expand(5, 12)
    log_p = model.logits(model(batch.tokens, everywhere)).log_softmax(-1)
    terms = [
        -log_p[b, p, label - 1]
        for b in range(5)
        for p, label in zip(batch.positions[b].tolist(), batch.labels[b].tolist(), strict=True)
        if label
    ]
    assert item_loss(model, batch).item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-5)


def test_smoothed_labels_by_hand():
    class Stub:
        def __call__(self, tokens, positions):
            return torch.tensor([[[0.0, math.log(3)]]])  # softmax: a quarter and three quarters

        def logits(self, states):
            return states

    batch = Batch(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([[2]]), torch.zeros(1, 1))
    expected = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)  # a fifth of the label for both items alike
    assert item_loss(Stub(), batch, label_smoothing=0.2).item() == pytest.approx(expected)


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


def test_teacher_gets_no_gradient():
    teacher, student = MiniBert("tiny", 30, 12).eval(), MiniBert("tiny", 30, 12).train()
    student_loss(student, masked_batch(30), [teacher], live([teacher]), 2.0, 0.5).backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.item_bias.grad is not None


def test_sampled_softmax_estimates_the_full_one():
    torch.manual_seed(0)
    model, batch = MiniBert("tiny", 30, 12).eval(), masked_batch(30)
    random_weights(model, std=0.3)
    chance = torch.arange(1.0, 31.0) / 465  # far from uniform, so that a missing correction shows
    full = item_loss(model, batch).item()
    assert item_loss(model, batch, sampler=Sampler(chance, 300_000)).item() == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("length", [7, 40])
def test_cached_answers_are_the_live_ones_in_every_window(ring, length):
    torch.manual_seed(0)
    part, _, _ = leave_one_out(load_dataset(str(ring)))
    teachers = [MiniBert("tiny", 60, length, causal=True).eval() for _ in range(2)]
    random_weights(*teachers, std=0.2)
    assert (part.sizes > 2 * 7).any() and (part.sizes < 40).all()  # histories longer and shorter than the model reads
    cached, live, asked = *(teacher_states(teachers, part, torch.float32, cache) for cache in (True, False)), []
    generator = torch.Generator().manual_seed(0)
    windows, last_only = draw_windows(teachers[0], part, generator)
    for rows in batches(windows.sizes, 100, generator=generator):
        batch = draw_batch(teachers[0], windows[rows], last_only[rows], generator)
        for kept, said in zip(cached(batch), live(batch), strict=True):
            assert kept.shape == (int((batch.labels != PAD).sum()), 64) and torch.allclose(kept, said, atol=1e-4)
        asked += batch.entries[batch.labels != PAD].tolist()
    assert len(asked) == len(set(asked)) == (part.sizes - 1).sum()  # all that can be asked was compared


@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_knows_where_its_items_stand_in_the_log(ring, causal):
    part, _, _ = leave_one_out(load_dataset(str(ring)))
    model, generator = MiniBert("tiny", 60, 7, causal), torch.Generator().manual_seed(0)
    batch = draw_batch(model, *draw_windows(model, part, generator), generator)
    asked = batch.labels != PAD
    entries = batch.entries[asked] + causal  # a causal model is asked at the item before
    assert torch.equal(part.items[entries], batch.labels[asked])


def test_several_teachers_are_averaged_as_distributions():
    teachers = [MiniBert("tiny", 60, 12).eval() for _ in range(3)]
    random_weights(*teachers, std=0.2)
    batch = masked_batch(60)
    each = [teacher.logits(teacher(batch.tokens, batch.positions)) for teacher in teachers]
    assert torch.allclose(mean_of(each).exp(), torch.stack(each).softmax(-1).mean(0), atol=1e-5)


def test_counts_have_their_share_of_an_answer_without_what_is_asked():
    answers = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3).log()
    counts = torch.tensor([[3.0, 1, 0, 0], [0, 0, 1, 0], [0, 2, 1, 3]])
    mixed = with_counts(answers, counts, torch.tensor([0, 2, 1]), 0.5).exp()
    # The label's own time is taken from [3, 1, 0, 0], all of [0, 0, 1, 0], and one of [0, 2, 1, 3].
    expected = [[0.05 + 1 / 3, 0.1 + 1 / 6, 0.15, 0.2], [0.1, 0.2, 0.3, 0.4], [0.05, 0.2, 0.25, 0.5]]
    assert torch.allclose(mixed, torch.tensor(expected), atol=1e-6)


def test_counts_are_those_after_the_item_that_is_read():
    torch.manual_seed(0)
    log = hand_log([1, 2, 3, 1, 2, 4, 9, 9], [2, 3, 1, 4, 9, 9], [5, 1, 2, 3, 9, 9])
    part, num_items = leave_one_out(log)[0], log.num_items
    student, teacher_model = (MiniBert("tiny", num_items, 12, True).eval() for _ in range(2))
    random_weights(student, teacher_model, std=0.2)
    generator = torch.Generator().manual_seed(0)
    batch = draw_batch(student, *draw_windows(student, part, generator), generator)
    loss = student_loss(student, batch, [teacher_model], live([teacher_model]), 1.0, 1.0, None,
                        Markov(part, num_items), 0.3)  # fmt: skip
    histories = [part.items[a:b].tolist() for a, b in zip(part.starts, part.ends, strict=True)]
    pairs = [pair for history in histories for pair in pairwise(history)]
    terms = []
    for history in histories:
        tokens = torch.tensor([history])
        for place in range(len(history) - 1):
            at = torch.tensor([[place]])
            log_q = student.logits(student(tokens[:, :-1], at))[0, 0].log_softmax(-1)
            p = teacher_model.logits(teacher_model(tokens[:, :-1], at))[0, 0].softmax(-1)
            others = list(pairs)
            others.remove((history[place], history[place + 1]))
            after = [b for a, b in others if a == history[place]]
            if after:
                share = torch.tensor([after.count(item) / len(after) for item in range(1, num_items + 1)])
                p = 0.7 * p + 0.3 * share
            terms.append((p * (p.log() - log_q)).nan_to_num().sum().item())
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_distillation_over_candidates_estimates_the_full_one():
    torch.manual_seed(0)
    student, *teachers = (MiniBert("tiny", 90, 12).eval() for _ in range(3))
    random_weights(student, *teachers, std=0.3)
    batch = masked_batch(90)
    chance = torch.arange(1.0, 91.0) / 4095  # far from uniform, so that a missing correction shows
    for kinds, temperature in ((teachers[:1], 1.0), (teachers, 1.0), (teachers, 3.0)):
        loss = partial(student_loss, student, batch, kinds, live(kinds), temperature, 0.6)
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
    three, six, seven = 32 * correction[1, 3].exp(), 16 * correction[0, 4].exp(), 16 * correction[0, 5].exp()
    assert (three + six + seven).item() == pytest.approx(64)  # times drawn over times expected


def test_negatives_stand_for_the_whole_catalogue():
    torch.manual_seed(0)
    chance, values = torch.arange(0.0, 201.0) / 20_100, torch.rand(201)
    sums = []
    for _ in range(3000):
        columns, correction = draw_candidates(Sampler(chance, 100), torch.tensor([[0]]))  # 0 is never drawn
        sums.append((values[columns] * correction[0, 1:].exp()).sum())
    assert torch.stack(sums).mean().item() == pytest.approx(values[1:].sum().item(), rel=0.02)


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
    model, batch = PreBert(BertConfig(64, 2, 4, 128, 12, hidden_dropout_prob=0.0), 50), masked_batch(50, 8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        item_loss(model, batch).backward()
        optimizer.step()
    asked = batch.labels != PAD
    ranks = target_ranks(model.logits(model(batch.tokens, batch.positions)[asked]), batch.labels[asked])
    assert (ranks == 1).all()  # HR@1 = 1


# ---------------------------------------------------------------- the loop


def options(log: Interactions, *arguments: str, **defaults: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_training_flags(parser, RECIPES)
    known = {"objective": "masked", "lr": 1e-3, "epochs": 3, "patience": 5, "name": "x", "max_length": 16,
             "tokens": 256, "device": "cpu", "bert": None}  # fmt: skip
    parser.set_defaults(**{**known, **defaults})
    args = parser.parse_args(arguments)
    settle(args, RECIPES, log)
    return args


def go(log: Interactions, run: Path, loss: Callable, *flags: str, **defaults: object) -> MiniBert:
    """Train a tiny student, from the same first weights each time."""
    args = options(log, *flags, **defaults)
    torch.manual_seed(5)
    model = MiniBert("tiny", log.num_items, 16, args.objective == "next")
    train(model, loss, log, leave_one_out(log), run, args, describe(log, model, args))
    return model


class StopAt:
    """A loss that ends the process, as Ctrl-C does, while step `at` is computed."""

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return item_loss(model, batch)


def test_training_learns(ring, tmp_path):
    go(load_dataset(str(ring)), tmp_path, item_loss, objective="next", epochs=10, lr=1e-2, body_lr=1e-2)
    losses = [float(line.split(",")[3]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert losses[0] == pytest.approx(math.log(60), rel=0.1) and losses[-1] < 0.8 * losses[0]


def test_the_best_weights_are_kept_and_patience_counts_from_them(ring, tmp_path, monkeypatch):
    for name, scores, epochs, best in (("a", [0.1, 0.9, 0.5], 3, 1), ("b", [0.9, 0.5, 0.6], 2, 0)):
        biases, left = [], iter(scores)

        def said(model, *_, biases=biases, left=left):
            biases.append(model.item_bias.detach().clone())
            return next(left), 0.0

        monkeypatch.setattr(teacher, "validate", said)
        go(load_dataset(str(ring)), tmp_path / name, item_loss, patience=2 if name == "a" else 1)
        assert torch.equal(read_safetensors(tmp_path / name / "model.safetensors")["item_bias"], biases[best])
        ended = json.loads((tmp_path / name / "metrics.json").read_text())
        assert (ended["epochs"], ended["valid_NDCG@10"]) == (epochs, 0.9) and not torch.equal(*biases[:2])


def test_every_step_trains_even_a_single_one(ring, tmp_path):
    log = load_dataset(str(ring))
    torch.manual_seed(5)
    before = MiniBert("tiny", log.num_items, 16).state_dict()
    after = go(log, tmp_path, item_loss, epochs=1, tokens=10_000).state_dict()
    assert (tmp_path / "log.csv").read_text().splitlines()[1].startswith("1,1,")
    assert not torch.equal(before["item_bias"], after["item_bias"])


def test_runs_that_read_other_titles_are_other_models(ring):
    log = load_dataset(str(ring))
    model = MiniBert("tiny", log.num_items, 16)
    a, again, b = (
        without_seed(describe(log, model, options(log, "--seed", seed, titles=file)))
        for seed, file in (("1", "a.csv"), ("2", "a.csv"), ("1", "b.csv"))
    )
    assert a == again != b


def test_the_loss_that_is_logged_is_the_mean_of_the_epochs_steps(ring, tmp_path):
    losses: list[float] = []

    def kept(model: MiniBert, batch: Batch) -> torch.Tensor:
        losses.append((loss := item_loss(model, batch)).item())
        return loss

    go(load_dataset(str(ring)), tmp_path, kept, epochs=2, tokens=64)
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    steps = [0, *(int(row[0]) for row in rows)]
    means = [sum(losses[begin:end]) / (end - begin) for begin, end in pairwise(steps)]
    assert steps[1] > 5 and [float(row[3]) for row in rows] == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize("objective", ["masked", "next"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(ring, tmp_path, objective, capsys):
    log = load_dataset(str(ring))
    same = {"objective": objective, "tokens": 64}  # more steps in an epoch than epochs
    go(log, tmp_path / "whole", item_loss, **same)
    for at, flags in ((7, []), (25, ["--resume"])):  # in the first epoch, then in the second
        with pytest.raises(KeyboardInterrupt):
            go(log, tmp_path / "parts", StopAt(at), *flags, **same)
    go(log, tmp_path / "parts", item_loss, "--resume", **same)
    whole, parts = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts
    lines = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "parts")]
    assert [len(rows) for rows in lines] == [4, 4]  # a header and a row an epoch
    assert 14 < int(lines[0][1].split(",")[0]) < 25  # steps
    assert not (tmp_path / "parts" / "train_state.pt").exists()
    go(log, tmp_path / "parts", StopAt(1), "--resume", **same)  # nothing is left, so no step is computed
    assert "has ended" in capsys.readouterr().out
    with pytest.raises(InputError, match="tokens was 64, now 32"):  # flags after the end are not ignored
        go(log, tmp_path / "parts", item_loss, "--resume", **{**same, "tokens": 32})
    with pytest.raises(InputError, match=r"warmup was 0\.05, now 0\.1"):
        go(log, tmp_path / "parts", item_loss, "--resume", "--warmup", "0.1", **same)
    (tmp_path / "parts" / "metrics.json").unlink()  # weights alone, such as a copy of someone's: they must survive
    with pytest.raises(InputError, match="no checkpoint to go on from"):
        go(log, tmp_path / "parts", item_loss, "--resume", **same)
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == parts
    with pytest.raises(InputError, match="--overwrite"):
        go(log, tmp_path / "parts", item_loss, **same)


def test_two_trainings_in_one_folder_are_refused(ring, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another training is writing"):
        go(load_dataset(str(ring)), tmp_path / "run", item_loss)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.5"], "lr was 0.001, now 0.5"),
        (["--tokens", "1024"], "tokens was 256, now 1024"),
        (["--seed", "7"], "seed was 0, now 7"),
        (["--objective", "next"], "objective was masked, now next"),
    ],
)
def test_resume_names_the_setting_that_differs(ring, tmp_path, flags, words):
    log = load_dataset(str(ring))
    with pytest.raises(KeyboardInterrupt):
        go(log, tmp_path / "run", StopAt(3))
    with pytest.raises(InputError, match=words) as caught:
        go(log, tmp_path / "run", item_loss, "--resume", *flags)
    assert len(str(caught.value)) < 200 + len(str(tmp_path)) and "\n" not in str(caught.value)
    (tmp_path / "run/train_state.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        go(log, tmp_path / "run", item_loss, "--resume")


def test_resume_refuses_another_log(ring, tmp_path):
    log, run = load_dataset(str(ring)), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(log, run, StopAt(3))
    before = {path: path.read_bytes() for path in run.iterdir()}
    last, *others = log.items[::-1].tolist()
    swapped = np.array([*others[::-1], last % 60 + 1])
    renamed = ["", *log.raw_ids[:0:-1]]
    for other, words in (
        (replace(log, raw_ids=renamed), "other interactions|another catalogue"),  # items in another order
        (replace(log, items=swapped), "other interactions .*as many, but others"),
        (replace(log, raw_ids=[*log.raw_ids[:-1], "new"]), "another catalogue.*1 of"),
    ):
        with pytest.raises(InputError, match=words):
            go(other, run, item_loss, "--resume")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    go(log, run, item_loss, "--resume")  # and the right one goes on


@pytest.mark.parametrize("at", [1, 9])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_advice_and_good_weights(ring, tmp_path, broken, at):
    calls = []

    def loss(model: PreBert, batch: Batch) -> torch.Tensor:
        calls.append(item_loss(model, batch))
        if len(calls) == at and broken == "loss":
            return calls[-1] * math.nan
        if len(calls) == at:  # the loss stays as it is
            calls[-1].register_hook(lambda gradient: gradient * math.inf)
        return calls[-1]

    log, models = load_dataset(str(ring)), []
    watched = lambda model, batch: models.append(model) or loss(model, batch)  # noqa: E731
    with pytest.raises(InputError, match=rf"step {at - 1}; .*try a smaller --lr") as caught:
        go(log, tmp_path / "run", watched)
    assert len(calls) == at and re.search("loss is nan" if broken == "loss" else "norm is (inf|nan)", str(caught.value))
    assert all(parameter.isfinite().all() for parameter in models[-1].parameters())
    state = torch.load(tmp_path / "run/train_state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_resumed_training_knows_what_was_best(ring, tmp_path, monkeypatch):
    log, run, scores = load_dataset(str(ring)), tmp_path / "run", [0.9, 0.5, 0.6]
    monkeypatch.setattr(teacher, "validate", lambda *_: (scores.pop(0), 0.0))

    def stop(model: PreBert, batch: Batch) -> torch.Tensor:
        if len(scores) < 3:  # in the second epoch
            raise KeyboardInterrupt
        return item_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        go(log, run, stop)
    best = (run / "model.safetensors").read_bytes()
    go(log, run, item_loss, "--resume")
    assert (run / "model.safetensors").read_bytes() == best and not scores
    assert json.loads((run / "metrics.json").read_text())["valid_NDCG@10"] == 0.9


def test_validation_reads_as_much_as_the_model_does():
    class Oldest(torch.nn.Module):  # recommends the oldest item that it reads
        max_length, item_bias = 300, torch.zeros(8)

        def score_next(self, history: torch.Tensor) -> torch.Tensor:
            assert not self.training  # no dropout
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
        (tenth, [], 18, 6), (twice, [], 10, 5), (tenth, ["--epochs", "7"], 7, 5),
        (tenth, ["--epochs", "40", "--patience", "3"], 40, 3), (tenth, ["--minutes", "1"], 18, sys.maxsize),
        (tenth, ["--start", "runs/x"], 3, 5),
    ):  # fmt: skip
        args = options(data, *given, epochs=None, patience=None)
        assert (args.epochs, args.patience) == (epochs, patience)


def test_recipes_fill_in_what_the_flags_left_open_and_help_shows_them(ring, tmp_path):
    log = replace(load_dataset(str(ring)), items=np.ones(1_000_000, np.int64))
    open_ = {**dict.fromkeys(RECIPES["next"]), "max_length": None, "patience": None}
    for given, recipe in (
        (["--objective", "masked"], (10, 0.1, 0.0)), (["--objective", "next"], (6, 0.2, 0.1)),
        (["--objective", "next", "--negatives", "4"], (6, 0.2, 0.0)),  # smoothing needs the whole catalogue
        (["--objective", "next", "--dropout", "0", "--label-smoothing", "0"], (6, 0.0, 0.0)),
    ):  # fmt: skip
        args = options(log, *given, **open_)
        assert (args.epochs, args.dropout, args.label_smoothing) == recipe and args.max_length == 200
    counts = (32, 64, 99, 128, 256, 600)
    per_item = {count: replace(log, items=np.ones(count * log.num_items, np.int64)) for count in counts}
    few = per_item[32]
    parser = argparse.ArgumentParser()
    add_training_flags(parser, distill.RECIPES)
    parser.set_defaults(name="student", bert=None)  # as the scripts do
    for given, data, dropout, tiny, taught in (
        ([], few, 0.5, 0.3, 0.4), ([], per_item[64], 0.4, 0.2, 0.3), ([], per_item[99], 0.3, 0.2, 0.2),
        ([], per_item[128], 0.3, 0.1, 0.2), ([], per_item[256], 0.2, 0.1, 0.1), ([], per_item[600], 0.1, 0.1, 0.1),
        (["--dropout", "0.45"], few, 0.45, 0.45, 0.45), ([], replace(few, repeats=True), 0.3, 0.3, 0.3),
        ([], replace(few, items=few.items[:10]), 0.5, 0.3, 0.5),
    ):  # fmt: skip
        kinds = ("tiny", None, tiny), ("tiny", ["runs/t"], tiny), ("base", ["runs/t"], taught), ("base", None, dropout)
        for size, of, expected in kinds:
            parser.set_defaults(size=size, teacher=of)
            args = parser.parse_args(["--objective", "next", *given])
            settle(args, distill.RECIPES, data)
            sparse = not data.repeats and len(data.items) < 100 * data.num_items
            assert args.dropout == expected and args.near_identity == sparse
    for count, dropout in ((32, 0.4), (64, 0.3), (128, 0.2), (600, 0.2)):  # a teacher's own
        own = options(per_item[count], "--objective", "next", dropout=None)
        assert own.dropout == dropout and own.near_identity
    own = options(replace(per_item[32], repeats=True), "--objective", "next", dropout=None)
    assert own.dropout == 0.2 and not own.near_identity
    own = options(per_item[600], "--objective", "next", "--no-near-identity", dropout=None)
    assert own.dropout == 0.1 and not own.near_identity
    for recipes in (RECIPES, distill.RECIPES):  # masked items ask for what is not the newest item
        args = parser.parse_args(["--objective", "masked"])
        settle(args, recipes, few)
        assert args.near_identity is False
    assert options(per_item[600], "--objective", "masked", dropout=None).dropout == 0.1
    args = parser.parse_args(["--objective", "next", "--no-near-identity"])
    settle(args, distill.RECIPES, few)
    assert args.near_identity is False
    # Half of a million interactions, half of the positions in a batch, and the root of a half of the learning rate.
    for given, size, tokens, lr in (
        ([], 999_611, 4096, 3e-3), ([], 5_000_000, 4096, 3e-3), ([], 500_000, 2048, 3e-3 / 2**0.5),
        ([], 198_502, 1024, 1.5e-3), ([], 124_150, 512, 3e-3 / 8**0.5), ([], 1_000, 512, 3e-3 / 8**0.5),
        (["--tokens", "9999"], 1_000, 9999, 3e-3), (["--lr", "0.1"], 1_000, 512, 0.1),
    ):  # fmt: skip
        args = parser.parse_args(["--objective", "next", *given])
        settle(args, distill.RECIPES, replace(log, items=np.ones(size, np.int64)))
        assert args.tokens == tokens and args.lr == pytest.approx(lr)
    # Whether seen items are ranked is a matter of evaluation, and decides nothing about training.
    args = parser.parse_args(["--objective", "next"])
    settle(args, distill.RECIPES, replace(few, exclude_seen=False))
    assert args.dropout == 0.5
    names = [str(n) for n in range(20_002)]
    assert options(replace(log, raw_ids=names[:-1])).negatives is None
    assert options(replace(log, raw_ids=names)).negatives > 1000
    with pytest.raises(InputError, match="--label-smoothing"):
        options(log, "--negatives", "4", "--label-smoothing", "0.1")
    for script, recipes in (("teacher.py", RECIPES), ("distill.py", distill.RECIPES)):
        shown = inside(script, "--help", cwd=tmp_path)
        for key in recipes["next"].keys() - {"near_below"}:  # of a flag that takes no number
            flag = "--" + key.removeprefix("least_").replace("_", "-")
            words = " ".join(re.search(rf"\n  {flag} .*?(?=\n  --|\Z)", shown, re.DOTALL)[0].split())
            for recipe in recipes.values():
                assert re.search(rf"(?<![\d.]){recipe[key]:g}(?![\d.]*\d)", words), words


def test_item_vectors_start_from_titles_as_far_as_these_predict_what_comes_next(monkeypatch, capsys):
    # Of ten users, user u goes from item 2u + 1 to 2u + 2; a second ten go there in training, so Markov knows it all.
    pairs = [(2 * user + 1, 2 * user + 2) for user in range(10)]
    log = hand_log(*[[a, b, 21] for a, b in pairs], *[[a, b, 22, 23, 24] for a, b in pairs])
    log, reader = replace(log, texts=["", *"abcdefghijklmnopqrstuvwx"]), (None, None)
    for alike, kind in ((10, "text"), (6, "text"), (5, "text+cooc"), (4, "text+cooc"), (3, "cooc"), (0, "cooc")):
        vectors = torch.eye(24)
        for a, b in pairs[:alike]:  # what comes next has the same text
            vectors[b - 1] = vectors[a - 1]
        monkeypatch.setattr("teacher.text_vectors", lambda bert, tokenizer, texts, vectors=vectors: vectors)
        monkeypatch.setattr("teacher.some_targets", lambda valid, users: torch.arange(10))
        assert default_init(log, "last", reader) == kind
        assert f"start from {kind}: " in capsys.readouterr().out
    vectors[1::2][:10] = vectors[::2][:10]
    assert default_init(log, "last", None) == default_init(replace(log, texts=[""] * 25), "last", reader) == "cooc"
    often = replace(log, items=np.concatenate([log.items, np.ones(2400, np.int64)]))
    assert default_init(often, "last", reader) == "cooc"  # a hundred interactions an item: titles are not asked


def test_minutes_budget_follows_the_clock_and_patience_ends_early(ring, tmp_path):
    log = load_dataset(str(ring))
    for flags, limit in (
        (["--minutes", "0.05", "--patience", "999"], 20),
        (["--epochs", "500", "--patience", "2", "--lr", "1e-9"], 60),
    ):
        began = time.perf_counter()
        go(log, tmp_path / flags[0], item_loss, *flags)
        assert time.perf_counter() - began < limit
        report = json.loads((tmp_path / flags[0] / "metrics.json").read_text())
        assert report["minutes"] >= 0.05 if "--minutes" in flags else report["epochs"] < 20


# ---------------------------------------------------------------- held out is held out


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_nothing_of_a_last_item_leaks_into_teacher_or_student(ring, tmp_path, objective, monkeypatch):
    log = load_dataset(str(ring))
    last, second = log.offsets[1:] - 1, log.offsets[:-1] + 1  # of each user; the second is trained on
    logs = {"one": log}
    for name, places in (("held out", last), ("trained on", second)):
        items = log.items.copy()
        items[places] = (items[places] + 29) % 60 + 1
        assert set(items.tolist()) == set(log.items.tolist())  # the catalogue is the same
        logs[name] = replace(log, items=items)
    weights: dict[str, list[bytes]] = {}
    for name, data in logs.items():
        (tmp_path / name).mkdir()
        for module in (teacher, distill):
            monkeypatch.setattr(module, "load_asked", lambda _, data=data: data)
        flags = [*TINY, "--epochs", 1, "--objective", objective]
        inside("teacher.py", "--bert", "none", *flags, cwd=tmp_path / name)
        inside("distill.py", "--size", "tiny", *flags, cwd=tmp_path / name)
        inside("distill.py", "--size", "tiny", "--no-kd", "--negatives", 20, *flags, cwd=tmp_path / name)
        runs = [tmp_path / name / "runs/ring" / run for run in ("teacher", "student", "student-no-kd")]
        weights[name] = [(run / "model.safetensors").read_bytes() for run in runs]
    assert weights["one"] == weights["held out"]
    assert all(a != b for a, b in zip(weights["one"], weights["trained on"], strict=True))


def longer(text: str) -> str:
    return text + "u3\t111\t3\t99999\n"


def shorter(text: str) -> str:
    return "\n".join(text.splitlines()[:-1]) + "\n"


def reordered(text: str) -> str:
    head, *lines = text.splitlines()
    return "\n".join([head, *lines[::-1]]) + "\n"


def other_users_first(text: str) -> str:
    """The last user's lines before those of the last but one, when all items were met: numbers of items stay."""
    head, *lines = text.splitlines()
    users = [line.split("\t")[0] for line in lines]
    tail = [line for user in (users[-1], "u48") for line, name in zip(lines, users, strict=True) if name == user]
    return "\n".join([head, *(line for line in lines if line not in tail), *tail]) + "\n"


def test_a_run_is_evaluated_on_its_own_log_only(ring, tmp_path):
    log = tmp_path / "ring.inter"
    shutil.copy(ring, log)
    for seed in (1, 2):
        inside("distill.py", "--data", log, "--no-kd", "--size", "tiny", *TINY, "--seed", seed, "--name", f"s{seed}",
               cwd=tmp_path)  # fmt: skip
    # The same file under another name, and what was written in other words, is the same log.
    assert "over 2 seeds" in inside("evaluate.py", "--data", "./ring.inter", cwd=tmp_path)
    flags = ["--no-kd", "--size", "tiny", *TINY, "--seed", 1, "--name", "s1", "--resume"]
    settings = json.loads((tmp_path / "runs/ring/s1/config.json").read_text())["settings"]
    assert settings["teacher"] is None  # none was read
    for more in ([], ["--min-count", 5], ["--min-items", 5, "--seen", "exclude"]):
        assert "has ended" in inside("distill.py", "--data", "./ring.inter", *flags, *more, cwd=tmp_path)
    words = inside("distill.py", "--data", "./ring.inter", *flags, "--seen", "keep", cwd=tmp_path, expect=2)
    assert "exclude_seen was True, now False" in words
    whole = log.read_text()
    for change in (longer, shorter, reordered, other_users_first):
        log.write_text(change(whole))
        assert log.read_text() != whole
        for script, arguments in (
            ("evaluate.py", []), ("distill.py", flags), ("distill.py", ["--teacher", "runs/ring/s1", *TINY]),
        ):  # fmt: skip
            text = inside(script, "--data", log, *arguments, cwd=tmp_path, expect=2)
            assert re.search("was trained on (other interactions|another catalogue)", text) and "\n" not in text.strip()
    log.write_text(whole.replace("\t130\t", "\t999\t"))
    assert re.search("another catalogue.*1 of", inside("evaluate.py", "--data", log, cwd=tmp_path, expect=2))


# ---------------------------------------------------------------- short histories


def short_log(folder: Path, sizes: list[int]) -> Path:
    rows = [f"u{user}\ti{(user + when) % 9}\t{when}" for user, size in enumerate(sizes) for when in range(size)]
    (folder / "short.inter").write_text(HEAD + "\n".join(rows) + "\n")
    return folder / "short.inter"


@pytest.mark.parametrize("objective", ["next", "masked"])
@pytest.mark.parametrize("sizes", [[3] * 40 + [4], [3] * 30 + [1] * 9 + [2] * 9 + [5], [3] * 40])
def test_histories_with_one_training_item_do_not_crash(tmp_path, objective, sizes):
    path = short_log(tmp_path, sizes)
    flags = ["--data", path, "--min-count", 1, "--no-kd", "--size", "tiny", *TINY, "--objective", objective]
    asks = objective == "masked" or max(sizes) > 3
    text = inside("distill.py", *flags, "--tokens", 2, cwd=tmp_path, expect=0 if asks else 2)
    assert "epoch   2" in text if asks else "three items (four for next items" in text


# ---------------------------------------------------------------- the commands


def test_every_command_from_data_to_recommendation(ring, tmp_path):
    card = command("data.py", "--data", ring, cwd=tmp_path)
    assert re.search(r"ring: 50 users, 60 items, [\d,]+ interactions", card) and "Film " in card
    assert "distill.py" in command("teacher.py", "--data", ring, "--bert", "none", *TINY, cwd=tmp_path)
    assert "evaluate.py" in command("distill.py", "--data", ring, "--size", "tiny", *TINY, cwd=tmp_path)
    inside("distill.py", "--data", ring, "--size", "tiny", "--no-kd", *TINY, cwd=tmp_path)
    inside("distill.py", "--data", ring, "--size", "tiny", *TINY, "--seed", 1, "--name", "again", cwd=tmp_path)
    table = command("evaluate.py", "--data", ring, "--json", "out.json", cwd=tmp_path)
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert [*rows][:3] == ["popularity", "markov", "teacher"]  # then the students
    assert set(rows) == {"popularity", "markov", "teacher", "student", "student-no-kd", "again"}
    assert {"HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR", "ci95", "params"} <= set(
        rows["teacher"]
    )
    assert {"command", "seed", "commit", "machine", "minutes"} <= set(rows["student"])
    assert rows["markov"]["NDCG@10"] > 0.9  # on a ring, the step from one film to the next is all there is
    # Two seeds of one recipe are one model; the teacher and the control are others.
    ((first, seeds),) = report["seeds"].items()
    assert first in ("student", "again") and seeds["seeds"] == 2 and "over 2 seeds" in table
    pairs = {frozenset((pair["better"], pair["worse"])) for pair in report["comparisons"]}
    models = (first, "teacher", "student-no-kd")
    assert pairs == {frozenset((a, b)) for a in models for b in models if a != b}
    mean = (rows["student"]["NDCG@10"] + rows["again"]["NDCG@10"]) / 2
    assert seeds["mean"] == pytest.approx(mean)
    answer = command(
        "student.py", "--run", "runs/ring/student", "film 3 (1953)", "Film 4 (1954)", "-k", 3, cwd=tmp_path
    )
    assert len(re.findall(r"Film \d+ \(\d+\)", answer)) == 2 + 3 and " ms, eager" in answer
    said = command("student.py", "--run", "runs/ring/student", "Film 3 (1853)", cwd=tmp_path, expect=2)
    assert "did you mean" in said and said.count("\n") == 1


def test_student_takes_objective_and_length_from_its_teacher(ring, tmp_path):
    for objective in ("next", "masked"):
        inside("teacher.py", "--data", ring, "--bert", "none", *TINY, "--epochs", 1, "--objective", objective, "--name",
               objective, cwd=tmp_path)  # fmt: skip
        flags = ["--data", ring, "--size", "tiny", *TINY[:2], *TINY[4:], "--teacher", f"runs/ring/{objective}"]
        inside("distill.py", *flags, "--name", "s-" + objective, cwd=tmp_path)
        model = json.loads((tmp_path / f"runs/ring/s-{objective}/config.json").read_text())["model"]
        assert model["causal"] == (objective == "next") and model["max_position_embeddings"] == 16
    other = ["--objective", "next", "--name", "x"]
    assert "--objective masked" in inside("distill.py", *flags, *other, cwd=tmp_path, expect=2)
    assert "same questions" in inside("distill.py", *flags, "--max-length", 9, cwd=tmp_path, expect=2)
    both = ["--teacher", "runs/ring/next", "runs/ring/masked"]
    assert "same questions" in inside("distill.py", *flags, *both, cwd=tmp_path, expect=2)


def test_teachers_answers_are_cached_where_that_is_exact_and_fits(ring, tmp_path, monkeypatch):
    read: list[str] = []
    states_of = distill.states_of
    monkeypatch.setattr(distill, "states_of", lambda *args: read.append("log") or states_of(*args))
    for objective in ("masked", "next"):
        first = ["--bert", "none", *TINY, "--objective", objective, "--overwrite"]
        inside("teacher.py", "--data", ring, *first, cwd=tmp_path)
        flags = ["--data", ring, "--size", "tiny", *TINY, "--precision", "fp32"]
        inside("distill.py", *flags, "--name", objective, cwd=tmp_path)
        assert read == ["log"] * (objective == "next")
        if objective == "masked":  # nothing came before what is asked
            counts = [*flags, "--name", "counts", "--counts", 0.2]
            assert "--counts needs" in inside("distill.py", *counts, cwd=tmp_path, expect=2)
    assert "--counts needs" in inside("distill.py", *counts, "--negatives", 9, cwd=tmp_path, expect=2)
    # Nothing is read for a run that is there already, or has ended.
    assert "--overwrite starts again" in inside("distill.py", *flags, "--name", "next", cwd=tmp_path, expect=2)
    assert "has ended" in inside("distill.py", *flags, "--name", "next", "--resume", cwd=tmp_path)
    assert read == ["log"]
    inside("distill.py", *flags, "--name", "live", "--no-cache", cwd=tmp_path)
    inside("distill.py", *counts, "--no-cache", cwd=tmp_path)
    monkeypatch.setattr(distill, "CACHE_AT_MOST", 100)
    inside("distill.py", *flags, "--name", "large", cwd=tmp_path)
    assert read == ["log"]
    next_, live = (read_safetensors(tmp_path / "runs/ring" / name / "model.safetensors") for name in ("next", "live"))
    assert all(torch.allclose(next_[name], live[name], atol=1e-3) for name in live)
    other = read_safetensors(tmp_path / "runs/ring/counts/model.safetensors")
    assert not torch.equal(other["item_bias"], live["item_bias"])  # as they would be without --counts


def test_flags_reach_the_losses(ring, tmp_path, monkeypatch):
    on, found = ["--data", ring, *TINY], []
    inside("teacher.py", *on, "--bert", "none", "--epochs", 1, cwd=tmp_path)
    for module in (teacher, distill):
        monkeypatch.setattr(module, "train", lambda model, loss, *_: found.append(loss.keywords))
        monkeypatch.setattr(module, "keep_texts", lambda *_: None)
    inside("teacher.py", *on, "--bert", "none", "--name", "t", cwd=tmp_path)
    inside("distill.py", *on, "--no-kd", "--item-init", "cooc", "--label-smoothing", 0.3, cwd=tmp_path)
    inside("distill.py", *on, "--alpha", 0.2, "--temperature", 3, cwd=tmp_path)
    assert [kept.get("label_smoothing") for kept in found] == [0.1, 0.3, None]
    assert (found[2]["alpha"], found[2]["temperature"]) == (0.2, 3)


def test_bench_reports_every_field(ring, tmp_path, monkeypatch):
    inside("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=tmp_path)
    compiled: list[Callable] = []  # compiling is tested with serving, and takes long
    monkeypatch.setattr(evaluate, "compile_ahead", lambda graph, _: compiled.append(graph) or graph)
    monkeypatch.setattr(evaluate, "benchmark", partial(benchmark, rounds=2))
    looks = counter()
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 100))  # 10 ms between two
    text = inside("evaluate.py", "--data", ring, "--bench", "--json", "b.json", cwd=tmp_path)
    bench = json.loads((tmp_path / "b.json").read_text())["bench"]
    assert "users/s" in text and len(bench) == 2 * 4 * 2  # modes, sizes; all 16 items that it reads, and real lengths
    assert {(row["mode"], row["batch_size"]) for row in bench} == {
        (mode, size) for mode in ("eager", "compiled") for size in (1, 8, 64, 256)
    }
    assert len(compiled) == 1  # once for all shapes
    for row in bench:
        assert [row[f"p{q}_ms"] for q in (50, 95, 99)] == pytest.approx([10] * 3) and row["name"] == "student-no-kd"
        assert row["users_per_s"] == pytest.approx(100 * row["batch_size"])
        assert (row["compile_and_load_s"] > 0) == (row["mode"] == "compiled")


def test_accuracies_are_kept_where_nothing_can_be_compiled(ring, tmp_path):
    inside("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=tmp_path)
    flags = ["--data", ring, "--bench", "--json", "b.json"]
    words = command("evaluate.py", *flags, cwd=tmp_path, expect=2, CXX="/none/g++", XDG_CACHE_HOME=str(tmp_path))
    assert "cannot compile" in words
    report = json.loads((tmp_path / "b.json").read_text())
    assert len(report["rows"]) == 3 and "bench" not in report


def test_the_released_student_is_evaluated_where_nothing_is_trained(ring, tmp_path, monkeypatch):
    inside("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=tmp_path)
    (tmp_path / "project/results/ring").mkdir(parents=True)
    (tmp_path / "runs/ring/student-no-kd").rename(tmp_path / "project/results/ring/student")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "project/evaluate.py"))
    (tmp_path / "elsewhere").mkdir()
    text = inside("evaluate.py", "--data", ring, cwd=tmp_path / "elsewhere")
    assert "released student" in text and re.search(r"\nstudent +\d", text)
    text = inside("evaluate.py", "--data", ring, "--final", cwd=tmp_path / "elsewhere")  # it was not trained like that
    assert "released student" not in text and "no runs under runs/ring yet" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.py", "--data", "netflix"], "unknown dataset"),
        (["data.py", "--unknown"], "unrecognized"),
        (["data.py", "--min-count", "0"], "whole number"),
        (["teacher.py", "--data", "RING", "--lr", "-1"], "--lr: '-1' must be a number above 0"),
        (["teacher.py", "--data", "RING", "--minutes", "inf"], "--minutes: 'inf' must be a number above 0"),
        (["teacher.py", "--data", "RING", "--minutes", "1", "--epochs", "1"], "not allowed with"),
        (["teacher.py", "--data", "RING", "--dropout", "-1"], "--dropout: '-1' must be a number at least 0"),
        (["teacher.py", "--data", "RING", "--bert", "none", "--item-init", "text"], "needs a BERT"),
        (["teacher.py", "--data", "RING", "--bert", "no-such-folder"], "no BERT"),
        (["teacher.py", "--data", "RING", "--bert", "none", "--device", "warp"], "--device warp"),
        (["teacher.py", "--data", "RING", "--seed", "10000000000000"], "at most 4,294,967,295"),
        (["teacher.py", "--data", "RING", "--max-length", "2"], "--max-length: '2' must be a whole number at least 3"),
        (["teacher.py", "--data", "RING", "--negatives", "1e9"], "--negatives: '1e9' must be a whole number"),
        (["teacher.py", "--data", "RING", "--negatives", "999999999"], "at most 1,048,576"),
        (["distill.py", "--data", "RING"], "train first"),
        (["distill.py", "--data", "RING", "--temperature", "0"], "--temperature: '0' must be a number above 0"),
        (["distill.py", "--data", "RING", "--no-kd", "--counts", "0.2"], "--no-kd is without"),
        (["distill.py", "--data", "RING", "--no-kd", "--item-init", "cooc", "--bert", "no-such-folder"], "no BERT"),
        (["distill.py", "--data", "RING", "--no-kd", "--alpha", "0.9"], "--no-kd is without"),
        (["distill.py", "--data", "RING", "--no-kd", "--item-init", "pca"], "--no-kd is without"),
        (["distill.py", "--data", "RING", "--no-kd", "--teacher", "a"], "--no-kd is without"),
        (["evaluate.py", "--data", "RING", "--runs", "nowhere"], "train first"),
        (["evaluate.py", "--data", "RING", "--sampled", "uniform"], "unrecognized"),
        (["student.py", "--run", "nowhere", "Film 1 (1951)"], "train first"),
        (["student.py", "--run", "nowhere", "--compile", "--new-items", "x.csv"], "not allowed with"),
        (["student.py", "--run", "nowhere", "--bert", "x"], "--bert reads the texts of --new-items"),
    ],
)
def test_bad_input_gets_one_clear_line_and_code_2(ring, tmp_path, arguments, words):
    script, *rest = [str(ring) if argument == "RING" else argument for argument in arguments]
    assert words in inside(script, *rest, cwd=tmp_path, expect=2)


def test_run_folders_are_plain_files(ring, tmp_path):
    inside("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=tmp_path)
    run = tmp_path / "runs/ring/student-no-kd"
    assert set(read_safetensors(run / "model.safetensors")) == set(MiniBert("tiny", 60, 16).state_dict())
    catalogue = json.loads((run / "catalogue.json").read_text())
    counts = dict(zip(catalogue["raw_ids"], catalogue["counts"], strict=True))
    lines = [line.split("\t") for line in ring.read_text().splitlines()[1:]]
    of_users = {user: [item for name, item, *_ in lines if name == user] for user, *_ in lines}
    trained = [item for items in of_users.values() for item in items[:-2]]
    assert counts == {"": 0, **{item: trained.count(item) for item in catalogue["raw_ids"][1:]}}
    whole, flags = (run / "model.safetensors").read_bytes(), ("--data", ring, "--teacher", run, "--name", run.name)
    words = inside("distill.py", *flags, "--size", "tiny", *TINY, "--overwrite", cwd=tmp_path, expect=2)
    assert "give the student another --name" in words and (run / "model.safetensors").read_bytes() == whole
    (run / "metrics.json").write_text("{")
    text = inside("evaluate.py", "--data", ring, "--runs", run, cwd=tmp_path, expect=2)
    assert "metrics.json: not JSON" in text
