"""Knowledge distillation: a small student learns from what the teacher finds likely, not just from what came.

    python distill.py                           # runs/ml-1m/teacher -> runs/ml-1m/student
    python distill.py --no-kd                   # the control: the same without a teacher

On two cores of an EPYC with AVX-512-BF16, 15 to 16 and 10 CPU minutes: test NDCG@10 0.2087 +- 0.0015 with the
teacher, 0.1995 +- 0.0010 without, three seeds (results/ml-1m/test.json). Of several: `--teacher RUN RUN RUN`;
of three such students 0.2095 +- 0.0001, for 14 epochs 0.2105 +- 0.0017.

A label says that one film came next; the teacher's distribution says which others could have
(Hinton et al. 2015; arXiv 2409.14810, section 3.3). Data, batches, loop, checkpoints: teacher.py. In order: the
loss -> what the teachers say -> building the student -> the command.

Letters: B batch, T sequence length (in the loss: temperature), M asked positions of a row, Q of a batch,
I items, N distinct negatives, D hidden size, L log entries.
"""

import argparse
import math
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from data import (
    PAD, SPLITS, Batch, InputError, Interactions, Spans, add_data_flags, at_once, batches, command_line, data_flags,
    load_asked, number, run_command,
)  # fmt: skip
from evaluate import Markov
from prebert import (
    ITEM_INITS, PreBert, Reader, item_vectors, load_bert, load_run, pick_device, principal_components,
    set_item_table, with_text_columns, without_seed,
)  # fmt: skip
from student import STUDENTS, MiniBert
from teacher import (
    SPARSE, Sampler, add_training_flags, autocast_dtype, candidate_logits, default_init, describe, draw_batch,
    draw_candidates, draw_windows, fill_in, first_weights, item_loss, join_processes, keep_texts, make_sampler, settle,
    sparse, train, world,
)  # fmt: skip

States = Callable[[Batch], list[Tensor]]  # every teacher's states where a batch asks, (Q, D) each
TEACHER_TOP = 64  # with a sampled softmax: how many of the teachers' likeliest items are always candidates
BOTH = dict(lr=3e-3, body_lr=3e-3, tokens=4096, least_tokens=512, dropout=0.5, label_smoothing=0.0)
RECIPES = {"next": dict(epochs=8, near_below=SPARSE, **BOTH), "masked": dict(epochs=20, near_below=0, **BOTH)}
CACHE_AT_MOST = 2**32  # bytes of teachers' states


def distillation_loss(
    logits: Tensor, answers: Tensor, columns: Tensor, temperature: float, alpha: float, correction: Tensor | float = 0.0
) -> Tensor:
    """(1 - alpha) CE(columns, logits) + alpha T^2 KL(softmax(answers / T) || softmax(logits / T)).

    logits of the student and answers of the teacher (Q, I): logits over the full catalogue at labelled positions, or
    over candidates with the `correction` of `draw_candidates`; columns (Q,): those of the labels, an item's is its
    id - 1. Means over Q. T^2 keeps the gradient's size when the temperature changes (Hinton et al. 2015, section 2).
    """
    assert logits.shape == answers.shape and columns.shape == logits.shape[:1]
    logits, answers = logits.float(), answers.float()
    log_p = F.log_softmax(logits + correction, dim=-1)  # with T = 1 this is log_student, too
    log_student = log_p if temperature == 1 else F.log_softmax(logits / temperature + correction, dim=-1)
    log_teacher = F.log_softmax(answers / temperature + correction, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    cross_entropy = F.nll_loss(log_p, columns, reduction="sum")
    return ((1 - alpha) * cross_entropy + alpha * temperature**2 * divergence) / max(1, len(columns))


def mean_of(logits: list[Tensor]) -> Tensor:
    """Log of the mean distribution of several teachers, (Q, I); of one, its logits, which have the same softmax."""
    if len(logits) == 1:
        return logits[0]
    # One after the other: a stack of all takes their number times the memory.
    return reduce(torch.logaddexp, (each.float().log_softmax(-1) for each in logits)) - math.log(len(logits))


def with_counts(answers: Tensor, counts: Tensor, columns: Tensor, share: float) -> Tensor:
    """Log of (1 - share) softmax(answers) + share * what followed the newest item in the training part, (Q, I).

    counts (Q, I): how often each item followed. One is this very question's, at its label's column, columns (Q,): it is
    subtracted, not to give the label away. If nothing else ever followed, the answers stay as they are.
    """
    counts = counts.scatter_add(1, columns[:, None], counts.new_full((len(columns), 1), -1))  # (Q, I)
    total = counts.sum(1, keepdim=True)  # (Q, 1)
    shares = share * (total > 0)  # (Q, 1)
    return ((1 - shares) * answers.float().softmax(-1) + shares * counts / total.clamp(min=1)).clamp(min=1e-12).log()


def student_loss(
    student: PreBert, batch: Batch, teachers: list[PreBert], states_at: States, temperature: float, alpha: float,
    sampler: Sampler | None = None, markov: Markov | None = None, share: float = 0.0,
) -> Tensor:  # fmt: skip
    """The student on a batch, against the teachers' answers to the same questions; a scalar.

    Over the full catalogue, or, with a sampler, over the label, the teachers' top items and shared negatives. markov,
    share: see `with_counts`.
    """
    is_asked = batch.labels != PAD  # (B, M)
    own, columns = student(batch.tokens, batch.positions)[is_asked], batch.labels[is_asked] - 1  # (Q, D), (Q,)
    states = states_at(batch)  # of the teachers, (Q, D) each, D of their own
    if sampler is None:
        with torch.no_grad():
            answers = mean_of([teacher.logits(said) for teacher, said in zip(teachers, states, strict=True)])  # (Q, I)
            if markov:
                newest = batch.tokens.gather(1, batch.positions)[is_asked]  # (Q,)
                answers = with_counts(answers, markov.followers(newest.cpu()).to(answers.device), columns, share)
        return distillation_loss(student.logits(own), answers, columns, temperature, alpha)
    with torch.no_grad():
        certain = torch.cat([columns[:, None], top_items(teachers, states, TEACHER_TOP)], dim=1)  # (Q, 1 + TEACHER_TOP)
        negatives, correction = draw_candidates(sampler, certain)
        pairs = zip(teachers, states, strict=True)
        scores = [candidate_logits(*pair, certain, negatives) + correction for pair in pairs]
        # A mean needs corrected scores; the loss corrects by itself.
        answers = mean_of(scores) - correction  # (Q, 1 + TEACHER_TOP + N)
    logits = candidate_logits(student, own, certain, negatives)
    return distillation_loss(logits, answers, torch.zeros_like(columns), temperature, alpha, correction)


def top_items(teachers: list[PreBert], states: list[Tensor], count: int) -> Tensor:
    """The likeliest columns of the mean teacher, (Q, count); states (Q, D) of each."""
    num_items, found = teachers[0].num_items, []
    at_most = at_once(states[0].device, num_items)[1]  # all scores of all positions may not fit
    for rows in zip(*(of_one.split(at_most) for of_one in states), strict=True):
        answers = mean_of([teacher.logits(part) for teacher, part in zip(teachers, rows, strict=True)])
        found.append(answers.topk(min(count, num_items)).indices)
    return torch.cat(found)


# ---------------------------------------------------------------- what the teachers say


@torch.no_grad()
def states_of(teacher: PreBert, part: Spans, dtype: torch.dtype) -> Tensor:
    """A causal teacher's state after each item of a training history but its last, (L, D); 0 at other entries.

    Windows and questions are those of training, so that it says here what it would say on the batch.
    """
    states = torch.zeros(len(part.items), teacher.config.hidden_size, dtype=dtype)
    device, unused = teacher.item_bias.device, Generator()  # causal windows and their questions are not drawn
    windows, last_only = draw_windows(teacher, part, unused)
    at_most, _ = at_once(device, teacher.num_items)
    for rows in tqdm(batches(windows.sizes - 1, at_most), desc="the teacher reads", disable=world()[0] > 0):
        batch = draw_batch(teacher, windows[rows], last_only[rows], unused)  # (B, T) each, T one less than a window
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            here = teacher(batch.tokens.to(device), batch.positions.to(device))  # (B, T, D)
        is_asked = batch.labels != PAD
        states[batch.entries[is_asked]] = here.cpu()[is_asked].to(dtype)
    return states


def teacher_states(teachers: list[PreBert], part: Spans, dtype: torch.dtype, cache: bool) -> States:
    """A function that gives every teacher's states where a batch asks, computed then or looked up.

    With `cache`, those of causal teachers are computed once, see `fixed_windows`, if CACHE_AT_MOST bytes can hold them.
    """
    size = sum(len(part.items) * teacher.config.hidden_size * dtype.itemsize for teacher in teachers)
    cache = cache and size <= CACHE_AT_MOST and all(teacher.config.causal for teacher in teachers)
    of_all = lru_cache(lambda: [states_of(teacher, part, dtype) for teacher in teachers])  # once, at the first batch

    @torch.no_grad()
    def states_at(batch: Batch) -> list[Tensor]:
        is_asked = batch.labels != PAD  # (B, M)
        if cache:  # not before a batch asks: --resume of an ended run reads nothing
            return [states[batch.entries[is_asked].cpu()].to(is_asked.device) for states in of_all()]
        return [teacher(batch.tokens, batch.positions)[is_asked] for teacher in teachers]

    return states_at


# ---------------------------------------------------------------- building the student


def build_student(
    args: argparse.Namespace, data: Interactions, part: Spans, teacher: PreBert | None, reader: Reader | None
) -> MiniBert:
    """Mini-BERT with its item table from the teacher's by PCA, or from `item_vectors`, as a teacher's own."""
    torch.manual_seed(args.seed)
    model = MiniBert(args.size, data.num_items, args.max_length, args.objective == "next", args.dropout)
    size = model.config.hidden_size
    if teacher and args.item_init == "pca":
        vectors: Tensor | None = principal_components(teacher.item_embedding.weight[1:-1].detach().cpu(), size)
    else:
        vectors = item_vectors(args.item_init, data, part, size, reader)
    set_item_table(model, vectors, 1.0)
    first_weights(model, args, data, part, vectors)
    return model


def load_teachers(args: argparse.Namespace, data: Interactions) -> tuple[list[PreBert], list[str], bool]:
    """The teachers, frozen, what made them, and whether texts are in the scores of one, see `teacher.keep_texts`.

    Without their text columns: a student learns what training taught. Also fills args.objective, max_length and bert.
    Raises InputError if one was trained on other data or another kind of question.
    """
    teachers, made_by, read_by, in_scores = [], [], [], False
    for run in args.teacher or []:
        teacher, config, _ = load_run(run, data)
        objective = "next" if teacher.config.causal else "masked"
        args.objective, args.max_length = args.objective or objective, args.max_length or teacher.max_length
        if args.objective != objective or args.max_length != teacher.max_length:
            flags = f"--objective {objective} --max-length {teacher.max_length}"
            raise InputError(f"{run} was trained with {flags}; the student must answer the same questions")
        in_scores |= teacher.item_embedding.embedding_dim > teacher.config.hidden_size
        teachers.append(with_text_columns(teacher).requires_grad_(False).to(pick_device(args.device)))
        made_by.append(without_seed(config))
        read_by.append(str(config.get("bert_folder") or config["settings"].get("bert") or "minilm"))
    args.bert = args.bert or next((bert for bert in read_by if bert != "none"), "none" if read_by else "minilm")
    args.objective = args.objective or "next"
    return teachers, made_by, in_scores


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small student, with a teacher or (--no-kd) without.")
    add_data_flags(parser)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", nargs="+", metavar="RUN", help="run folder (default: runs/<data>/teacher); of several, the mean")
    add("--size", choices=tuple(STUDENTS), default="base", help="(default: %(default)s)")
    add("--temperature", type=number(0, above=True), default=1.0, help="T in the loss (default: %(default)s)")
    add("--alpha", type=number(0, 1), default=0.5, help="weight of the teacher in the loss (default: %(default)s)")
    add("--counts", type=number(0, 1), default=0.0, help="weight, in the teacher's answer, of how often each "
        "item followed the newest one in the training part (default: 0)")  # fmt: skip
    add("--no-kd", action="store_true", help="labels only, no teacher: the control")
    add("--no-cache", action="store_true", help="ask a teacher of next items at every step, not once for the whole log")
    add("--item-init", choices=("pca", *ITEM_INITS),
        help="first item vectors (default: pca of the first teacher's; with --no-kd as teacher.py's)")  # fmt: skip
    add("--bert", help="reads titles, for --item-init text and new items, see teacher.py (default: as the teacher's)")
    add_training_flags(parser, RECIPES)
    args = parser.parse_args()
    of_teacher = args.teacher or args.no_cache or args.counts or args.temperature != 1 or args.alpha != 0.5
    if args.no_kd and (of_teacher or args.item_init == "pca"):
        parser.error("--no-kd is without --teacher, --temperature, --alpha, --counts, --no-cache and --item-init pca")
    if not args.no_kd and args.label_smoothing:
        parser.error("--label-smoothing is for --no-kd: the teacher's answers are smooth already")
    fill_in(args, name="student-no-kd" if args.no_kd else "student")
    join_processes(args.device)
    data = load_asked(args)
    named_bert = args.bert not in (None, "none")  # by the flag; load_teachers fills in the teacher's
    usual = f"runs/{data.name}/teacher{'-all' if args.all else '-final' if args.final else ''}"
    args.teacher = None if args.no_kd else [str(Path(run)) for run in args.teacher or [usual]]
    teachers, made_by, in_scores = load_teachers(args, data)
    kept_texts = any((Path(run) / "texts.safetensors").exists() for run in args.teacher or [])
    if (kept_texts or named_bert) and not any(data.texts):
        print("note: there are no titles for BERT to read; --titles FILE names them")
    # BERT is loaded if a flag or a teacher's run names it, for new items, or if item vectors may start from titles.
    likely = "text" if args.no_kd and sparse(data) else "pca"  # where --item-init does not say
    needed = named_bert or kept_texts or "text" in (args.item_init or likely)
    reader = load_bert(args.bert) if any(data.texts) and args.bert != "none" and needed else None
    args.item_init = args.item_init or (default_init(data, args.split, reader) if args.no_kd else "pca")
    run = settle(args, RECIPES, data)
    if run.resolve() in [Path(teacher).resolve() for teacher in args.teacher or []]:
        raise InputError(f"{run} is the teacher itself; give the student another --name")
    if args.counts and (args.negatives or args.objective == "masked"):
        raise InputError("--counts needs --objective next and the full softmax, which large catalogues do without")
    parts = SPLITS[data.split](data)
    model = build_student(args, data, parts[0], teachers[0] if teachers else None, reader)
    sampler = make_sampler(args, parts[0], data.num_items)
    if args.no_kd:
        loss = partial(item_loss, label_smoothing=args.label_smoothing, sampler=sampler)
    else:
        dtype = autocast_dtype(pick_device(args.device), args.precision)
        states_at = teacher_states(teachers, parts[0], dtype, cache=not args.no_cache)
        markov = Markov(parts[0], data.num_items) if args.counts else None
        loss = partial(student_loss, teachers=teachers, states_at=states_at, temperature=args.temperature,
                       alpha=args.alpha, sampler=sampler, markov=markov, share=args.counts)  # fmt: skip
    config = describe(data, model, args, made_by)
    files = [Path(teacher) / "model.safetensors" for teacher in args.teacher or []]
    config["teacher_sha256"] = [sha256(file.read_bytes()).hexdigest() for file in files]
    train(model, loss, data, parts, run, args, config)
    keep_texts(run, data, reader, "text" in args.item_init or (args.item_init == "pca" and in_scores))
    serve = command_line("student.py", "--run", str(run), f"id:{data.raw_ids[1]}")
    check = command_line("evaluate.py", *data_flags(args))
    print(f"the best weights are in {run}; next: " + (serve if args.all else f"{check}\nthen: {serve}"))


if __name__ == "__main__":
    run_command(main)
