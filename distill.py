"""Knowledge distillation: a small student learns from what the teacher finds likely, not just from what came.

    python distill.py --data ml-1m --mask-rate 0.5 --minutes 16        # runs/ml-1m/teacher -> runs/ml-1m/student
    python distill.py --data ml-1m --mask-rate 0.5 --epochs 4 --no-kd  # the control: the same without a teacher

On two CPU cores: test NDCG@10 0.1882 and 0.1884, one seed (results/ml-1m/pipeline.json), so the
teacher has not yet been shown to help.

A label says that one film came next; the teacher's distribution says which others could have
(Hinton et al. 2015; arXiv 2409.14810, section 3.3). Data, batches, loop, checkpoints: teacher.py.

Letters: M asked positions in a batch, I items, D and S hidden sizes of teacher and student.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PAD, InputError, Interactions, add_data_flags, dataset_name, leave_one_out, load_dataset, run_command
from evaluate import check_catalogue
from prebert import PreBert, cooccurrence_vectors, set_item_table
from student import STUDENTS, MiniBert, load_run, pick_device, read_json
from teacher import Batch, add_training_flags, check_flags, describe, masked_item_loss, train


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """(1 - alpha) CE(labels, student) + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)).

    student, teacher (M, I): logits over the full catalogue at labelled positions; labels (M,): columns.
    Means over M. T^2 keeps the gradient's size when the temperature changes (Hinton et al. 2015, section 2).
    """
    assert student.shape == teacher.shape and labels.shape == student.shape[:1]
    student, teacher = student.float(), teacher.float()
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * temperature**2 * divergence


def student_loss(student: PreBert, batch: Batch, teacher: PreBert, temperature: float, alpha: float) -> Tensor:
    """The same masked batch through both models, the teacher without dropout or gradient; a scalar."""
    tokens, positions, labels = batch
    asked = labels != PAD
    with torch.no_grad():
        targets = teacher.logits(teacher(tokens, positions)[asked])  # (M, I)
    logits = student.logits(student(tokens, positions)[asked])  # (M, I)
    return distillation_loss(logits, targets, labels[asked] - 1, temperature, alpha)


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
    if args.item_init == "pca":
        table = principal_components(teacher.item_embedding.weight[1:-1].detach().cpu(), model.config.hidden_size)
        set_item_table(model, table, 1.0)
    elif args.item_init == "cooc":
        train_split = leave_one_out(data)[0]
        set_item_table(model, cooccurrence_vectors(train_split, data.num_items, model.config.hidden_size), 1.0)
    return model


def teacher_objective(args: argparse.Namespace) -> str:
    """What the teacher was asked in training; `masked` for a student without one."""
    if args.no_kd and not (Path(args.teacher) / "config.json").exists():
        return "masked"
    model = read_json(Path(args.teacher) / "config.json").get("model")
    return "next" if isinstance(model, dict) and model.get("causal") else "masked"


def load_teacher(args: argparse.Namespace, data: Interactions) -> PreBert:
    """The teacher's run, frozen; InputError if it was trained on other data or another kind of question."""
    run = Path(args.teacher)
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
    group.add_argument("--teacher", help="the teacher's run folder (default: runs/<data>/teacher)")
    group.add_argument("--size", choices=tuple(STUDENTS), default="base", help="(default: %(default)s)")
    group.add_argument("--temperature", type=float, help="T in the loss (default: 1)")
    group.add_argument("--alpha", type=float, help="weight of the teacher in the loss (default: 0.9)")
    group.add_argument("--no-kd", action="store_true", help="labels only, no teacher: the control")
    first = "first item embeddings (default: pca of the teacher's; cooc with --no-kd)"
    group.add_argument("--item-init", choices=("pca", "cooc", "random"), help=first)
    add_training_flags(parser, epochs=20, lr=3e-3)
    args = parser.parse_args()
    if args.no_kd and (args.temperature, args.alpha) != (None, None):
        parser.error("--temperature and --alpha are of no use with --no-kd")
    if not args.no_kd and args.label_smoothing:
        parser.error("--label-smoothing is for --no-kd: the teacher's distribution takes its place")
    args.temperature = 1.0 if args.temperature is None else args.temperature
    args.alpha = 0.9 if args.alpha is None else args.alpha
    if args.temperature <= 0 or not 0 <= args.alpha <= 1:
        parser.error("--temperature must be above 0, --alpha between 0 and 1")
    args.teacher = args.teacher or str(Path("runs") / dataset_name(args.data) / "teacher")
    args.objective = args.objective or teacher_objective(args)
    check_flags(parser, args)
    args.name = args.name or ("student-no-kd" if args.no_kd else "student")
    args.item_init = args.item_init or ("cooc" if args.no_kd else "pca")
    data = load_dataset(args.data, args.root, args.min_count, args.fraction)
    teacher = None if args.no_kd and args.item_init != "pca" else load_teacher(args, data)
    model = build_student(args, data, teacher)
    loss = partial(masked_item_loss, label_smoothing=args.label_smoothing)
    if not args.no_kd:
        loss = partial(student_loss, teacher=teacher, temperature=args.temperature, alpha=args.alpha)
    run = Path("runs") / data.name / args.name
    train(model, loss, data, run, args, describe(data, model, args))
    print(f"the best weights are in {run}; next: python evaluate.py --data {args.data}")
    print(f'then: python student.py --run {run} "{data.titles[1]}"')


if __name__ == "__main__":
    run_command(main)
