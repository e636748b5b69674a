"""Knowledge distillation: a small student learns from what the teacher finds likely, not just from what came.

    python distill.py                           # runs/ml-1m/teacher -> runs/ml-1m/student
    python distill.py --no-kd                   # the control: the same without a teacher

On two CPU cores, 13 to 32 CPU minutes each, three seeds: test NDCG@10 0.2065 +- 0.0025 with the teacher, 0.1915
+- 0.0011 without (results/ml-1m/alpha.json, three-seeds.json). Several teachers: `--teacher RUN RUN RUN`.

A label says that one film came next; the teacher's distribution says which others could have
(Hinton et al. 2015; arXiv 2409.14810, section 3.3). Data, batches, loop, checkpoints: teacher.py. In order: the
loss -> what the teachers say -> building the student -> the command.

Letters: B batch, T sequence length, M asked positions in a batch, I items, D and S hidden sizes of teacher and student.
"""

import argparse
import math
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    PAD, Batch, InputError, Interactions, Spans, add_data_flags, at_once, batches, grid_windows, leave_one_out,
    load_asked, pad_left, run_command,
)  # fmt: skip
from evaluate import recipe
from prebert import PreBert, check_catalogue, cooccurrence_vectors, load_run, pick_device, set_item_table
from student import STUDENTS, MiniBert
from teacher import (
    Sampler, add_training_flags, autocast_dtype, candidate_logits, describe, draw_candidates, item_loss, join_processes,
    make_sampler, number, settle, train, world,
)  # fmt: skip

States = Callable[[Batch], list[Tensor]]  # every teacher's states where a batch asks, (M, D) each
TOP = 64  # items that the teachers find likeliest, looked at whatever is sampled besides
RECIPES: dict[str, dict[str, float]] = {
    "next": dict(epochs=8, lr=3e-3, body_lr=3e-3, tokens=4096, dropout=0.1, label_smoothing=0.0, mask_rate=1.0,
                 last_share=0.0),
    "masked": dict(epochs=20, lr=3e-3, body_lr=3e-3, tokens=4096, dropout=0.1, label_smoothing=0.0, mask_rate=0.2,
                   last_share=0.1),
}  # fmt: skip


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, correction: Tensor | None = None
) -> Tensor:
    """(1 - alpha) CE(labels, student) + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)).

    student, teacher (M, I): logits over the full catalogue at labelled positions, or over candidates with the
    `correction` of `draw_candidates`; labels (M,): columns. Means over M. T^2 keeps the gradient's size when the
    temperature changes (Hinton et al. 2015, section 2).
    """
    assert student.shape == teacher.shape and labels.shape == student.shape[:1]
    correction = torch.zeros(()) if correction is None else correction
    student, teacher, correction = student.float(), teacher.float(), correction.to(student.device)
    log_p = F.log_softmax(student / temperature + correction, dim=-1)
    log_q = F.log_softmax(teacher / temperature + correction, dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    cross_entropy = F.cross_entropy(student + correction, labels, reduction="sum")
    return ((1 - alpha) * cross_entropy + alpha * temperature**2 * divergence) / max(1, len(labels))


def mean_of(logits: list[Tensor]) -> Tensor:
    """Log of the mean distribution of several teachers, (M, I); of one, its logits."""
    if len(logits) == 1:
        return logits[0]
    total = logits[0].float().log_softmax(-1)
    for other in logits[1:]:  # one after the other: a stack of all takes their number times the memory
        total = torch.logaddexp(total, other.float().log_softmax(-1))
    return total - math.log(len(logits))


def student_loss(
    student: PreBert, batch: Batch, teachers: list[PreBert], states_at: States, temperature: float, alpha: float,
    sampler: Sampler | None = None,
) -> Tensor:  # fmt: skip
    """The student on a batch, against the teachers' answers to the same questions; a scalar.

    Over the full catalogue, or, with a sampler, over the label, the teachers' top items and shared negatives.
    """
    asked = batch.labels != PAD
    own, columns = student(batch.tokens, batch.positions)[asked], batch.labels[asked] - 1  # (M, S), (M,)
    pairs = list(zip(teachers, states_at(batch), strict=True))
    if sampler is None:
        with torch.no_grad():
            answers = mean_of([teacher.logits(states) for teacher, states in pairs])  # (M, I)
        return distillation_loss(student.logits(own), answers, columns, temperature, alpha)
    with torch.no_grad():
        certain = torch.cat([columns[:, None], top_items(pairs, TOP)], dim=1)  # (M, 1 + TOP)
        negatives, correction = draw_candidates(sampler, certain)
        scores = [candidate_logits(*pair, certain, negatives) + correction for pair in pairs]
        answers = mean_of(scores) - correction  # (M, 1 + TOP + N)
    logits = candidate_logits(student, own, certain, negatives)
    return distillation_loss(logits, answers, torch.zeros_like(columns), temperature, alpha, correction)


@torch.no_grad()
def top_items(pairs: list[tuple[PreBert, Tensor]], count: int) -> Tensor:
    """The likeliest columns of the mean teacher at states (M, D) of each, (M, count); a few positions at a time."""
    num_items, positions = pairs[0][0].num_items, len(pairs[0][1])
    found = []
    for rows in torch.arange(positions).split(max(1, 2**26 // num_items)):
        answers = mean_of([teacher.logits(states[rows.to(states.device)]) for teacher, states in pairs])
        found.append(answers.topk(min(count, num_items)).indices)
    return torch.cat(found)


# ---------------------------------------------------------------- what the teachers say


def ask(teachers: list[PreBert]) -> States:
    """States of the teachers on the very batch that the student sees, without dropout or gradient."""

    @torch.no_grad()
    def states_at(batch: Batch) -> list[Tensor]:
        return [teacher(batch.tokens, batch.positions)[batch.labels != PAD] for teacher in teachers]

    return states_at


@torch.no_grad()
def states_of(teacher: PreBert, part: Spans, dtype: torch.dtype) -> Tensor:
    """A causal teacher's state after each item of the training part but the last, (L, D).

    Windows are those of training, so that it says here what it would say on the batch.
    """
    states = torch.zeros(len(part.items), teacher.config.hidden_size, dtype=dtype)
    starts, ends = grid_windows(part, teacher.max_length)
    ends, device = ends - 1, teacher.item_bias.device  # nothing is asked after a window's last item
    for rows in tqdm(batches(ends - starts, *at_once(device, teacher.num_items)), desc="the teacher reads"):
        width = int((ends - starts)[rows].max())
        tokens = pad_left(part.items, starts[rows], ends[rows], width)  # (B, T)
        entries = (ends[rows] - width)[:, None] + torch.arange(width)  # (B, T)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            read = teacher(tokens.to(device), torch.arange(width, device=device).expand(tokens.shape))  # (B, T, D)
        states[entries[tokens != PAD]] = read.cpu()[tokens != PAD].to(dtype)
    return states


def remember(teachers: list[PreBert], part: Spans, dtype: torch.dtype) -> States:
    """States computed once for the whole log: what a causal teacher says after an item depends on no question.

    Takes L x D x 2 bytes of memory a teacher in bf16, and saves the teacher's pass at every step.
    """
    memory = [states_of(teacher, part, dtype) for teacher in teachers]

    def states_at(batch: Batch) -> list[Tensor]:
        wanted = batch.entries[batch.labels != PAD].cpu()
        return [states[wanted].to(batch.labels.device) for states in memory]

    return states_at


CACHE_AT_MOST = 2**32  # bytes of cached states


def answers_of(teachers: list[PreBert], part: Spans, args: argparse.Namespace) -> States:
    """From memory where that is exact (a causal teacher) and fits, else asked at every step."""
    dtype = autocast_dtype(pick_device(args.device), args.precision)
    size = sum(len(part.items) * teacher.config.hidden_size * dtype.itemsize for teacher in teachers)
    if args.objective == "next" and not args.no_cache and size <= CACHE_AT_MOST:
        return remember(teachers, part, dtype)
    return ask(teachers)


# ---------------------------------------------------------------- building the student


def principal_components(table: Tensor, size: int) -> Tensor:
    """Rows of (I, D) in the `size` directions in which they differ most, (I, size): PCA of the item table."""
    centred = (table - table.mean(0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    kept = directions[:, -min(size, table.shape[1]) :].flip(1)  # (D, S)
    return F.pad((centred @ kept).float(), (0, size - kept.shape[1]))


def build_student(args: argparse.Namespace, data: Interactions, part: Spans, teacher: PreBert | None) -> MiniBert:
    """Mini-BERT with its item table from the teacher's by PCA, from co-occurrence, or random."""
    torch.manual_seed(args.seed)
    model = MiniBert(args.size, data.num_items, args.max_length, args.objective == "next", args.dropout)
    if args.item_init == "pca" and teacher is not None:
        table = principal_components(teacher.item_embedding.weight[1:-1].detach().cpu(), model.config.hidden_size)
        set_item_table(model, table, 1.0)
    elif args.item_init == "cooc":
        set_item_table(model, cooccurrence_vectors(part, data.num_items, model.config.hidden_size), 1.0)
    return model


def load_teachers(args: argparse.Namespace, data: Interactions) -> tuple[list[PreBert], list[str]]:
    """The teachers' runs, frozen, and what made them; the student takes objective and length from the first.

    Raises InputError if one was trained on other data or another kind of question.
    """
    teachers, recipes = [], []
    for run in args.teacher if not args.no_kd else args.teacher[:1] if args.item_init == "pca" else []:
        teacher, config, catalogue = load_run(run)
        check_catalogue(Path(run), config, catalogue, data)
        objective = "next" if teacher.config.causal else "masked"
        args.objective, args.max_length = args.objective or objective, args.max_length or teacher.max_length
        if args.objective != objective or args.max_length != teacher.max_length:
            raise InputError(
                f"{run} was trained with --objective {objective} --max-length {teacher.max_length}; the student must "
                f"answer the same questions"
            )
        teachers.append(teacher.requires_grad_(False).to(pick_device(args.device)))
        recipes.append(recipe(config))
    args.objective = args.objective or "next"
    return teachers, recipes


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small student, with a teacher or (--no-kd) without.")
    add_data_flags(parser)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", nargs="+", metavar="RUN", help="run folder (default: runs/<data>/teacher); of several, the mean")
    add("--size", choices=tuple(STUDENTS), default="base", help="(default: %(default)s)")
    add("--temperature", type=number(0, above=True), help="T in the loss (default: 1)")
    add("--alpha", type=number(0, 1), help="weight of the teacher in the loss (default: 0.5)")
    add("--no-kd", action="store_true", help="labels only, no teacher: the control")
    add("--no-cache", action="store_true", help="ask a teacher of next items at every step, not once for the whole log")
    add("--item-init", choices=("pca", "cooc", "random"),
        help="first item embeddings (default: pca of the teacher's; cooc with --no-kd)")  # fmt: skip
    add_training_flags(parser, RECIPES)
    args = parser.parse_args()
    if args.no_kd and (args.no_cache or (args.temperature, args.alpha) != (None, None)):
        parser.error("--temperature, --alpha and --no-cache say nothing with --no-kd")
    if not args.no_kd and args.label_smoothing:
        parser.error("--label-smoothing is for --no-kd: the teacher's answers are smooth already")
    args.temperature, args.alpha = args.temperature or 1.0, 0.5 if args.alpha is None else args.alpha
    args.name = args.name or ("student-no-kd" if args.no_kd else "student")
    args.item_init = args.item_init or ("cooc" if args.no_kd else "pca")
    join_processes(args.device)
    data = load_asked(args)
    args.teacher = [str(Path(run)) for run in args.teacher or [f"runs/{data.name}/teacher"]]
    teachers, recipes = load_teachers(args, data)
    settle(args, RECIPES, data)
    parts = leave_one_out(data)
    model = build_student(args, data, parts[0], teachers[0] if teachers else None)
    sampler = make_sampler(args, parts[0], data.num_items)
    if args.no_kd:
        loss = partial(item_loss, label_smoothing=args.label_smoothing, sampler=sampler)
    else:
        states_at = answers_of(teachers, parts[0], args)
        loss = partial(student_loss, teachers=teachers, states_at=states_at, temperature=args.temperature,
                       alpha=args.alpha, sampler=sampler)  # fmt: skip
    run = Path("runs") / data.name / args.name
    train(model, loss, data, parts, run, args, describe(data, model, args, recipes))
    if world()[0] == 0:
        print(f"the best weights are in {run}; next: {shlex.join(['python', 'evaluate.py', '--data', args.data])}")
        print(f"then: {shlex.join(['python', 'student.py', '--run', str(run), data.titles[1]])}")


if __name__ == "__main__":
    run_command(main)
