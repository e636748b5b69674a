"""Knowledge distillation: a small student learns from what the teacher finds likely, not just from what came.

    python distill.py --data ml-1m --cache      # runs/ml-1m/teacher -> runs/ml-1m/student
    python distill.py --data ml-1m --no-kd      # the control: the same without a teacher

On two CPU cores, 13 to 32 CPU minutes each, three seeds: test NDCG@10 0.2065 +- 0.0025 with the teacher, 0.1915
+- 0.0011 without (results/ml-1m/alpha.json, three-seeds.json). With --alpha 0.9: 0.2011 +- 0.0015, 0.2058 +- 0.0002
from three teachers, `--teacher RUN RUN RUN`, and on masked items 0.1850 (one seed).

A label says that one film came next; the teacher's distribution says which others could have
(Hinton et al. 2015; arXiv 2409.14810, section 3.3). Data, batches, loop, checkpoints: teacher.py.

Letters: M asked positions in a batch, I items, D and S hidden sizes of teacher and student.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    PAD, InputError, Interactions, Split, add_data_flags, batches, dataset_name, leave_one_out, load_dataset, number,
    pad_left, run_command,
)  # fmt: skip
from evaluate import check_catalogue
from prebert import PreBert, cooccurrence_vectors, set_item_table
from student import STUDENTS, MiniBert, at_once, load_run, pick_device, read_json
from teacher import (
    Batch, Sampler, add_training_flags, autocast_dtype, candidate_logits, check_flags, describe, draw_candidates,
    fill_epochs, make_sampler, masked_item_loss, train, world,
)  # fmt: skip

Reader = Callable[[Batch], list[Tensor]]  # every teacher's states where a batch asks, (M, D) each
TOP = 64  # items that each teacher finds likeliest, looked at whatever is sampled besides


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, correction: Tensor | None = None
) -> Tensor:
    """(1 - alpha) CE(labels, student) + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)).

    student, teacher (M, I): logits over the full catalogue at labelled positions, or over candidates with the
    `correction` of `draw_candidates`; labels (M,): columns. Means over M. T^2 keeps the gradient's size when the
    temperature changes (Hinton et al. 2015, section 2).
    """
    assert student.shape == teacher.shape and labels.shape == student.shape[:1]

    def corrected(logits: Tensor) -> Tensor:
        return logits if correction is None else logits + correction

    student, teacher = student.float(), teacher.float()
    log_p = F.log_softmax(corrected(student / temperature), dim=-1)
    log_q = F.log_softmax(corrected(teacher / temperature), dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    cross_entropy = F.cross_entropy(corrected(student), labels, reduction="sum")
    return ((1 - alpha) * cross_entropy + alpha * temperature**2 * divergence) / max(1, len(labels))


def mean_of(logits: list[Tensor]) -> Tensor:
    """Log of the mean distribution of several teachers, (M, I); of one, its logits."""
    if len(logits) == 1:
        return logits[0]
    total = logits[0].float().log_softmax(-1)
    for other in logits[1:]:  # one after the other: a stack of all takes their number times the memory
        total = torch.logaddexp(total, other.float().log_softmax(-1))
    return total - math.log(len(logits))


@torch.no_grad()
def top_items(teacher: PreBert, states: Tensor, count: int) -> Tensor:
    """The teacher's likeliest columns at states (M, D), (M, count); over the catalogue, a few positions at a time."""
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    table, bias = teacher.item_embedding.weight[1:-1].to(dtype), teacher.item_bias.to(dtype)  # once, not a chunk
    found = torch.empty(len(states), min(count, teacher.num_items), dtype=torch.long, device=states.device)
    for rows in torch.arange(len(states), device=states.device).split(max(1, 2**26 // teacher.num_items)):
        found[rows] = F.linear(states[rows].to(dtype), table, bias).topk(found.shape[1]).indices
    return found


def student_loss(
    student: PreBert, batch: Batch, teachers: list[PreBert], read: Reader, temperature: float, alpha: float,
    sampler: Sampler | None = None,
) -> Tensor:  # fmt: skip
    """The student on a batch, against the teachers' answers to the same questions; a scalar.

    Over the full catalogue, or, with a sampler, over the label, the teachers' top items and shared negatives.
    """
    tokens, positions, labels, _ = batch
    asked = labels != PAD
    own, columns = student(tokens, positions)[asked], labels[asked] - 1
    pairs = list(zip(teachers, read(batch), strict=True))
    if sampler is None:
        with torch.no_grad():
            answers = mean_of([teacher.logits(states) for teacher, states in pairs])  # (M, I)
        return distillation_loss(student.logits(own), answers, columns, temperature, alpha)
    with torch.no_grad():
        certain = torch.cat([columns[:, None], *(top_items(*pair, TOP) for pair in pairs)], dim=1)
        negatives, correction = draw_candidates(sampler, certain)
        scores = [candidate_logits(*pair, certain, negatives) + correction for pair in pairs]
        answers = mean_of(scores) - correction  # (M, C + N)
    logits = candidate_logits(student, own, certain, negatives)
    return distillation_loss(logits, answers, torch.zeros_like(columns), temperature, alpha, correction)


# ---------------------------------------------------------------- what the teachers say


def ask(teachers: list[PreBert]) -> Reader:
    """States of the teachers on the very batch that the student sees, without dropout or gradient."""

    @torch.no_grad()
    def read(batch: Batch) -> list[Tensor]:
        tokens, positions, labels, _ = batch
        return [teacher(tokens, positions)[labels != PAD] for teacher in teachers]

    return read


@torch.no_grad()
def states_of(teacher: PreBert, split: Split, dtype: torch.dtype) -> Tensor:
    """A causal teacher's state after each item of the training part but the last, (L, D).

    Read in windows from the newest on; nothing is asked after the last item, so, as in training, the one
    before it is at the right end.
    """
    states = torch.zeros(len(split.items), teacher.config.hidden_size, dtype=dtype)
    sizes, length, device = split.ends - 1 - split.starts, teacher.max_length, teacher.item_bias.device
    counts = -(-sizes // length)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # 0 is a history's newest window
    ends = split.ends[rows] - 1 - length * place
    starts = torch.maximum(split.starts[rows], ends - length)
    positions, _ = at_once(device, teacher.num_items)
    for group in tqdm(batches(starts, ends, positions), desc="the teacher reads"):
        width = int((ends - starts)[group].max())
        tokens = pad_left(split.items, starts[group], ends[group], width)  # (B, T)
        entries = (ends[group] - width)[:, None] + torch.arange(width)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            read = teacher(tokens.to(device), torch.arange(width, device=device).expand(tokens.shape))  # (B, T, D)
        states[entries[tokens != PAD]] = read.cpu()[tokens != PAD].to(dtype)
    return states


def remember(teachers: list[PreBert], split: Split, dtype: torch.dtype) -> Reader:
    """States computed once for the whole log: what a causal teacher says after an item depends on no question.

    Takes len(log) x D x 2 bytes of memory a teacher in bf16, and saves the teacher's pass at every step.
    """
    memory = [states_of(teacher, split, dtype) for teacher in teachers]

    def read(batch: Batch) -> list[Tensor]:
        _, _, labels, entries = batch
        wanted = entries[labels != PAD].cpu()
        return [states[wanted].to(labels.device) for states in memory]

    return read


def principal_components(table: Tensor, size: int) -> Tensor:
    """Rows of (I, D) in the `size` directions in which they differ most, (I, size): PCA of the item table."""
    centred = (table - table.mean(0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    kept = directions[:, -min(size, table.shape[1]) :].flip(1)  # (D, S)
    return F.pad((centred @ kept).float(), (0, size - kept.shape[1]))


def build_student(args: argparse.Namespace, data: Interactions, teacher: PreBert | None) -> MiniBert:
    """Mini-BERT with its item table from the teacher's by PCA, from co-occurrence, or random."""
    torch.manual_seed(args.seed)
    model = MiniBert(args.size, data.num_items, args.max_length, args.objective == "next", args.dropout)
    if args.item_init == "pca" and teacher is not None:
        table = principal_components(teacher.item_embedding.weight[1:-1].detach().cpu(), model.config.hidden_size)
        set_item_table(model, table, 1.0)
    elif args.item_init == "cooc":
        train_split = leave_one_out(data)[0]
        set_item_table(model, cooccurrence_vectors(train_split, data.num_items, model.config.hidden_size), 1.0)
    return model


def causal_run(run: Path) -> bool:
    """Whether a run was trained on next items."""
    model = read_json(run / "config.json").get("model")
    return isinstance(model, dict) and bool(model.get("causal"))


def load_teacher(run: Path, args: argparse.Namespace, data: Interactions) -> PreBert:
    """The teacher's run, frozen; InputError if it was trained on other data or another kind of question."""
    teacher, config, catalogue = load_run(run)
    check_catalogue(run, catalogue, config, data)
    objective = "next" if teacher.config.causal else "masked"
    if args.objective != objective or args.max_length != teacher.max_length:
        raise InputError(
            f"{run} was trained with --objective {objective} --max-length {teacher.max_length}; pass the same, "
            f"so that both models can answer the same questions"
        )
    return teacher.requires_grad_(False).to(pick_device(args.device))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small student, with a teacher or (--no-kd) without.")
    add_data_flags(parser)
    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--teacher", nargs="+", metavar="RUN", help="run folder (default: runs/<data>/teacher); of several, the mean")
    add("--size", choices=tuple(STUDENTS), default="base", help="(default: %(default)s)")
    add("--temperature", type=number(0, math.inf), help="T in the loss (default: 1)")
    add("--alpha", type=number(-1e-9, 1 + 1e-9), help="weight of the teacher in the loss (default: 0.5)")
    add("--no-kd", action="store_true", help="labels only, no teacher: the control")
    add("--cache", action="store_true", help="next-item teachers only: read the log once and keep the states in memory")
    add("--item-init", choices=("pca", "cooc", "random"),
        help="first item embeddings (default: pca of the teacher's; cooc with --no-kd)")  # fmt: skip
    add_training_flags(parser, lr=3e-3)
    args = parser.parse_args()
    if args.no_kd and (args.cache or (args.temperature, args.alpha) != (None, None)):
        parser.error("--temperature, --alpha and --cache are of no use with --no-kd")
    if not args.no_kd and args.label_smoothing:
        parser.error("--label-smoothing is for --no-kd: the teacher's answers are smooth already")
    args.temperature, args.alpha = args.temperature or 1.0, 0.5 if args.alpha is None else args.alpha
    args.teacher = args.teacher or [str(Path("runs") / dataset_name(args.data) / "teacher")]
    if args.objective is None:
        known = not args.no_kd or (Path(args.teacher[0]) / "config.json").exists()
        args.objective = "next" if known and causal_run(Path(args.teacher[0])) else "masked"
    if args.cache and args.objective == "masked":
        parser.error("--cache is for --objective next: masked questions are redrawn at every step")
    check_flags(parser, args)
    args.name = args.name or ("student-no-kd" if args.no_kd else "student")
    args.item_init = args.item_init or ("cooc" if args.no_kd else "pca")
    distill(args, load_dataset(args.data, args.root, args.min_count, args.fraction))


def distill(args: argparse.Namespace, data: Interactions) -> None:
    """Build student and loss from the flags and train."""
    fill_epochs(args, data, 8 if args.objective == "next" else 20)
    needed = args.teacher if not args.no_kd else args.teacher[:1] if args.item_init == "pca" else []
    teachers = [load_teacher(Path(run), args, data) for run in needed]
    model = build_student(args, data, teachers[0] if teachers else None)
    sampler = make_sampler(args, data)
    if args.no_kd:
        loss = partial(masked_item_loss, label_smoothing=args.label_smoothing, sampler=sampler)
    else:
        dtype = autocast_dtype(pick_device(args.device), args.precision)
        read = remember(teachers, leave_one_out(data)[0], dtype) if args.cache else ask(teachers)
        loss = partial(student_loss, teachers=teachers, read=read, temperature=args.temperature, alpha=args.alpha,
                       sampler=sampler)  # fmt: skip
    run = Path("runs") / data.name / args.name
    train(model, loss, data, run, args, describe(data, model, args))
    if world()[0] == 0:
        print(f"the best weights are in {run}; next: python evaluate.py --data {args.data}")
        print(f'then: python student.py --run {run} "{data.titles[1]}"')


if __name__ == "__main__":
    run_command(main)
