"""PreBERT: a pre-trained BERT learns to recommend, in a loop that can be stopped and resumed.

    python teacher.py --data ml-1m --objective next --minutes 27

On two CPU cores: test NDCG@10 0.1881, one seed (results/ml-1m/pipeline.json). Without --objective
next, the paper's masked items are asked for.

A share of each history is hidden, and the model is asked what stood there (Sun et al. 2019,
section 3.5; arXiv 2409.14810, section 3.2). distill.py trains students in the same loop with
another loss. In order: loss -> optimizer and schedule -> checkpoints -> `train` -> the command.

Letters: B batch (users), T sequence length, D hidden size, M hidden positions of a row, I items.
"""

import argparse
import csv
import ctypes
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    PAD,
    InputError,
    Interactions,
    Split,
    add_data_flags,
    batches,
    leave_one_out,
    load_dataset,
    mask_items,
    next_items,
    pad_left,
    positive,
    run_command,
    windows,
    write_atomic,
)
from evaluate import evaluate, hit_rate, machine, ndcg, peak_memory_gb
from prebert import (
    BertConfig,
    PreBert,
    cooccurrence_vectors,
    encode_titles,
    load_bert,
    prebert_from_bert,
    set_item_table,
    write_safetensors,
)
from student import pick_device, read_json

Batch = tuple[Tensor, Tensor, Tensor]  # tokens (B, T), positions (B, M), labels (B, M) with PAD where nothing is asked
Loss = Callable[[PreBert, Batch], Tensor]


def masked_item_loss(model: PreBert, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -log p(item | everything around it) over the hidden positions, a scalar.

    p = softmax(head(h) E^T + b) over all items; the encoder's last layer and this softmax are
    computed where something is hidden and nowhere else.
    """
    tokens, positions, labels = batch
    asked = labels != PAD  # (B, M)
    logits = model.logits(model(tokens, positions)[asked])  # (B * M, I)
    return F.cross_entropy(logits.float(), labels[asked] - 1, label_smoothing=label_smoothing)


# ---------------------------------------------------------------- optimizer and schedule


def make_optimizer(model: PreBert, lr: float, body_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with two learning rates: `body_lr` for encoder and positions, `lr` for item table and head.

    Weight decay is for matrices that multiply; tables, norms and biases are left alone.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        body = name.startswith(("encoder.", "position_embedding."))
        decay = weight_decay if parameter.ndim == 2 and "embedding" not in name else 0.0
        groups.setdefault((body_lr if body else lr, decay), []).append(parameter)
    settings = [
        {"params": params, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), params in groups.items()
    ]
    return torch.optim.AdamW(settings, fused=True)


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: a line up over `warmup`, a line down to 0."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, 1 - progress) / (1 - warmup)


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (`auto`), else float32; bf16 without hardware is slower."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    supported = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.cpu._is_avx512_bf16_supported}
    return torch.bfloat16 if supported.get(device.type, bool)() else torch.float32


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(run: Path, model: PreBert, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Everything that training needs to go on: run/train_state.pt.

    No random state is in it: each draw is a function of the seed and the step (see `train`).
    """
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    write_atomic(run / "train_state.pt", lambda path: torch.save(content, path))


def load_checkpoint(run: Path) -> dict:
    """Contents of run/train_state.pt, tensors and plain values only; InputError if there is none."""
    try:
        return torch.load(run / "train_state.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"nothing to resume in {run}: no train_state.pt; start without --resume") from None
    except Exception as error:  # torch.load has no single error for a broken file
        raise InputError(
            f"{run / 'train_state.pt'} cannot be read ({type(error).__name__}); start again with --overwrite"
        ) from error


def resume(run: Path, model: PreBert, optimizer: torch.optim.Optimizer, config: dict) -> dict:
    """Load the last checkpoint into model and optimizer and return the training state.

    Raises InputError if the run was started with other settings, and says which.
    """
    checkpoint, before = load_checkpoint(run), read_json(run / "config.json")
    for key in ("data", "model", "num_items", "settings", "seed"):
        if before.get(key) != config[key]:
            raise InputError(f"--resume {run}: {key} was {before.get(key)}, now {config[key]}; use the same flags")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["state"]


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of handing it back: a step allocates the same blocks as the last.

    Without it a fifth of a step on the CPU goes into the kernel's clearing of fresh pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter, value in ((-1, 2**31 - 1), (-2, 2**28), (-4, 0)):  # trim threshold, top pad, mmap max
            mallopt(parameter, value)


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag, so that training ends between two steps."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number: int, _frame: object) -> None:
        if self.signal:  # a second one means it
            sys.exit(128 + number)
        self.signal = number


# ---------------------------------------------------------------- training


def validate(model: PreBert, split: Split, exclude_seen: bool, users: int) -> tuple[float, float]:
    """NDCG@10 and HR@10 on the validation part, for the same random `users` every time."""
    chosen = torch.randperm(len(split.targets), generator=torch.Generator().manual_seed(0))[:users]
    part = Split(split.items, split.starts[chosen], split.ends[chosen], split.targets[chosen])
    model.eval()
    ranks = evaluate(model.score_next, part, exclude_seen, device=model.item_bias.device)
    model.train()
    return ndcg(ranks, 10).mean().item(), hit_rate(ranks, 10).mean().item()


class Progress:
    """One line on the terminal, rewritten; in a log file, a line every half minute."""

    def __init__(self):
        self.tty, self.shown, self.items, self.began = sys.stderr.isatty(), 0.0, 0, time.perf_counter()

    def show(self, step: int, share: float, loss: float, left: float) -> None:
        """Print unless the last line is too young; `left` in seconds."""
        now = time.perf_counter()
        if now - self.shown < (0.5 if self.tty else 30):
            return
        self.shown = now
        rate = self.items / (now - self.began)
        minutes, seconds = divmod(int(left), 60)
        line = f"step {step:>6}  {share:>4.0%}  loss {loss:6.3f}  {rate:>8,.0f} items/s  {minutes:>3}:{seconds:02} left"
        print(line, end="\r" if self.tty else "\n", file=sys.stderr, flush=True)


def append_log(run: Path, row: dict) -> None:
    """Add an evaluation to run/log.csv."""
    new = not (run / "log.csv").exists()
    with open(run / "log.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def seeded(seed: int, kind: str, number: int) -> torch.Generator:
    """A generator for one purpose at one moment: resuming needs the numbers, not the random state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 3 + ("windows", "batches", "masks").index(kind))


def draw_batch(
    model: PreBert,
    split: Split,
    starts: Tensor,
    ends: Tensor,
    last_only: Tensor,
    rate: float,
    generator: torch.Generator,
) -> Batch:
    """Windows (B,) of the log as a batch with fresh questions, masked or next-item as the model asks."""
    tokens = pad_left(split.items, starts, ends, int((ends - starts).max()))  # (B, T)
    if model.config.causal:
        return next_items(tokens, rate, generator)
    return mask_items(tokens, last_only, model.mask_id, rate, generator)


def start_run(run: Path, data: Interactions, config: dict, overwrite: bool) -> dict:
    """Create the run folder with config.json and catalogue.json; returns a fresh training state."""
    if (run / "config.json").exists() and not overwrite:
        raise InputError(f"{run} exists; --resume goes on with it, --overwrite starts again, --name makes another")
    for name in ("model.safetensors", "log.csv", "metrics.json", "train_state.pt"):
        (run / name).unlink(missing_ok=True)
    catalogue = {"raw_ids": data.raw_ids, "titles": data.titles}
    for name, content in (("config.json", config), ("catalogue.json", catalogue)):
        write_atomic(run / name, lambda path, content=content: path.write_text(json.dumps(content, indent=1)))
    counts = dict.fromkeys(("epoch", "batch", "step", "waited"), 0)
    return counts | dict.fromkeys(("seconds", "cpu_seconds", "loss"), 0.0) | {"best": -1.0}


@dataclass
class Session:
    """What the steps of one training share."""

    model: PreBert
    loss_of: Loss
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    run: Path
    args: argparse.Namespace
    state: dict  # plain numbers, saved in every checkpoint
    stop: Stop
    progress: Progress
    began: float = 0.0  # when training would have begun had it not been interrupted, wall and CPU clock
    began_cpu: float = 0.0

    def read_clocks(self) -> None:
        self.state["seconds"] = time.perf_counter() - self.began
        self.state["cpu_seconds"] = time.process_time() - self.began_cpu

    def spent(self, steps_an_epoch: int) -> float:
        """Share of the budget that is used up, by the clock (--minutes) or by epochs."""
        if self.args.minutes:
            return self.state["seconds"] / (60 * self.args.minutes)
        return (self.state["epoch"] + self.state["batch"] / steps_an_epoch) / self.args.epochs


def take_step(session: Session, batch: Batch, seed: int) -> float:
    """One optimizer step; returns the loss. Dropout depends on `seed` alone."""
    model, device = session.model, session.model.item_bias.device
    torch.manual_seed(seed)
    with torch.autocast(device.type, session.dtype, enabled=session.dtype != torch.float32):
        loss = session.loss_of(model, tuple(part.to(device) for part in batch))
    session.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    value = loss.item()
    if math.isfinite(value):  # else the caller stops, with the weights as they were
        session.optimizer.step()
    return value


def train_epoch(session: Session, split: Split) -> None:
    """What is left of one pass over the training part: fresh windows, fresh questions.

    Raises InputError when the loss is not finite; leaves the program with code 130 or 143 after
    Ctrl-C or SIGTERM, with everything saved.
    """
    model, args, state, seed = session.model, session.args, session.state, session.args.seed
    longest = model.max_length + model.config.causal  # of n + 1 items, n are read and n are asked for
    starts, ends, last_only = windows(split, longest, args.last_share, seeded(seed, "windows", state["epoch"]))
    plan = batches(starts, ends, args.tokens, seeded(seed, "batches", state["epoch"]))
    for rows in plan[state["batch"] :]:
        share = session.spent(len(plan))
        rate = schedule(share, args.warmup)
        for group in session.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        generator = seeded(seed, "masks", state["step"])
        batch = draw_batch(model, split, starts[rows], ends[rows], last_only[rows], args.mask_rate, generator)
        loss = take_step(session, batch, seed * 1_000_003 + state["step"])
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {state['step']}, learning rate {args.lr * rate:.1e}; "
                f"{session.run} keeps the last good weights; try a smaller --lr or --precision fp32"
            )
        state["loss"] = loss if state["step"] == 0 else 0.99 * state["loss"] + 0.01 * loss
        state["step"], state["batch"] = state["step"] + 1, state["batch"] + 1
        session.read_clocks()
        session.progress.items += int((batch[0] != PAD).sum())
        session.progress.show(state["step"], share, state["loss"], state["seconds"] * (1 / max(share, 1e-3) - 1))
        if session.stop.signal:
            save_checkpoint(session.run, model, session.optimizer, state)
            print(f"\nstopped at step {state['step']}, saved; the same command with --resume goes on", file=sys.stderr)
            sys.exit(128 + session.stop.signal)
        if args.minutes and session.spent(len(plan)) >= 1:
            break
    state["epoch"], state["batch"] = state["epoch"] + 1, 0


def end_epoch(session: Session, valid: Split, exclude_seen: bool) -> None:
    """Evaluate on validation users, keep the weights if they are the best so far, log, checkpoint."""
    model, run, state = session.model, session.run, session.state
    quality, hits = validate(model, valid, exclude_seen, session.args.eval_users)
    state["waited"] = 0 if quality > state["best"] else state["waited"] + 1
    if quality > state["best"]:
        state["best"] = quality
        write_safetensors(run / "model.safetensors", model.state_dict())
    session.read_clocks()
    row = {"step": state["step"], "epoch": state["epoch"], "minutes": round(state["seconds"] / 60, 3)}
    row |= {"loss": round(state["loss"], 5), "valid_NDCG@10": round(quality, 5), "valid_HR@10": round(hits, 5)}
    append_log(run, row)
    save_checkpoint(run, model, session.optimizer, state)
    print(
        f"epoch {row['epoch']:>3}  {row['minutes']:6.1f} min  loss {row['loss']:.3f}  "
        f"validation NDCG@10 {quality:.4f}  HR@10 {hits:.4f}  {'' if state['waited'] else 'best':<12}"
    )


def train(model: PreBert, loss_of: Loss, data: Interactions, run: Path, args: argparse.Namespace, config: dict) -> None:
    """Train until the budget (--epochs or --minutes) or the patience is used up; leaves a run folder.

    The best weights by validation NDCG@10 are in model.safetensors at any time. train_state.pt, from
    which --resume goes on bit for bit, is removed when training has ended. Every random draw is a
    function of the seed and the number of its step or epoch, so there is no random state to save.
    Raises InputError when nobody can be evaluated or the loss is not finite.
    """
    keep_freed_memory()
    split, valid, _ = leave_one_out(data)
    if not len(valid.targets):
        raise InputError(f"{data.name}: no user has the three items that training and evaluation need")
    model.train().to(pick_device(args.device))
    dtype = autocast_dtype(model.item_bias.device, args.precision)
    optimizer = make_optimizer(model, args.lr, args.body_lr or args.lr, args.weight_decay)
    state = resume(run, model, optimizer, config) if args.resume else start_run(run, data, config, args.overwrite)
    session = Session(model, loss_of, optimizer, dtype, run, args, state, Stop(), Progress())
    session.began = time.perf_counter() - state["seconds"]
    session.began_cpu = time.process_time() - state["cpu_seconds"]
    params = sum(parameter.numel() for parameter in model.parameters())
    print(f"training {run}: {params:,} parameters, {dtype} on {model.item_bias.device}, {data.num_items:,} items")
    while session.spent(1) < 1 and state["waited"] < args.patience:
        train_epoch(session, split)
        end_epoch(session, valid, not data.repeats)
    report = {"valid_NDCG@10": state["best"], "steps": state["step"], "epochs": state["epoch"]}
    report |= {"minutes": state["seconds"] / 60, "cpu_minutes": state["cpu_seconds"] / 60}
    report["peak_memory_gb"] = peak_memory_gb()
    write_atomic(run / "metrics.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    (run / "train_state.pt").unlink()


# ---------------------------------------------------------------- the command


def add_training_flags(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """The flags of both training scripts, with each script's own defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("--name", help="run folder runs/<data>/<name> (default: teacher, student or student-no-kd)")
    group.add_argument("--epochs", type=positive, help="passes over the data (default: %(default)s)")
    group.add_argument("--minutes", type=float, help="budget by the clock instead of --epochs; the schedule follows it")
    group.add_argument("--lr", type=float, help="peak learning rate (default: %(default)s)")
    group.add_argument(
        "--body-lr", type=float, help="the same for encoder and positions (default: %(default)s; None: --lr)"
    )
    group.add_argument("--warmup", type=float, default=0.05, help="share of the budget in which the rate rises")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--tokens", type=positive, default=4096, help="positions in a batch (default: %(default)s)")
    group.add_argument("--max-length", type=positive, default=200, help="items the model reads (default: %(default)s)")
    group.add_argument(
        "--objective",
        choices=("masked", "next"),
        help="fill in blanks, or predict each next item (default: masked, or as the teacher)",
    )
    group.add_argument("--mask-rate", type=float, help="share of items asked for (default: 0.2 masked, 1 next)")
    group.add_argument(
        "--last-share", type=float, help="masked: share of windows with just the last one hidden (default: 0.1)"
    )
    group.add_argument("--dropout", type=float, default=0.1, help="share of activations zeroed (default: %(default)s)")
    group.add_argument("--label-smoothing", type=float, default=0.0)
    group.add_argument("--patience", type=positive, default=5, help="evaluations without improvement before stopping")
    group.add_argument("--eval-users", type=positive, default=1000, help="validation users asked after an epoch")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    group.add_argument("--overwrite", action="store_true", help="start again in an existing run folder")
    parser.set_defaults(**defaults)


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with argparse's message and code 2 for numbers that make no sense."""
    if args.mask_rate is None:
        args.mask_rate = 0.2 if args.objective == "masked" else 1.0
    if args.objective == "next" and args.last_share:
        parser.error("--last-share is for --objective masked; next asks at every position")
    if args.last_share is None:
        args.last_share = 0.1 if args.objective == "masked" else 0.0
    for name in ("mask_rate", "last_share", "warmup", "dropout", "label_smoothing"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be between 0 and 1")
    for name in ("lr", "body_lr", "minutes"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.mask_rate == 0 or args.warmup == 1 or args.dropout > 0.99 or args.max_length < 2 or args.seed < 0:
        parser.error("--mask-rate must be above 0, --warmup and --dropout below 1, --max-length 2 or more, --seed 0 or more")


def describe(data: Interactions, model: PreBert, args: argparse.Namespace) -> dict:
    """config.json: all that is needed to rebuild the model, to repeat the run and to trust its figures."""
    script = Path(sys.argv[0])
    commit = ""
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    settings = {key: value for key, value in vars(args).items() if key not in ("resume", "overwrite", "device", "root")}
    return {
        "version": 1, "data": data.name, "num_items": data.num_items, "exclude_seen": not data.repeats,
        "model": asdict(model.config), "seed": args.seed, "settings": settings, "protocol": data.protocol,
        "command": shlex.join(["python", script.name, *sys.argv[1:]]),
        "commit": commit or "unknown", "machine": machine(),
    }  # fmt: skip


def build_teacher(args: argparse.Namespace, data: Interactions) -> PreBert:
    """PreBERT with its item table: BERT's body, or (--bert none) the same shape with random weights.

    Raises InputError for --item-init text where there are no titles or no BERT to read them.
    """
    torch.manual_seed(args.seed)
    causal = args.objective == "next"
    if args.item_init == "text" and (args.bert == "none" or not data.has_titles):
        raise InputError("--item-init text needs a BERT and item titles; use --item-init cooc")
    if args.bert == "none":
        shape = BertConfig(max_position_embeddings=args.max_length, hidden_dropout_prob=args.dropout, causal=causal)
        model, bert, norm = PreBert(shape, data.num_items), None, 1.0
    else:
        bert, tokenizer = load_bert(args.bert)
        model = prebert_from_bert(bert, tokenizer, data.num_items, args.max_length, causal, args.dropout)
        norm = bert.word_embedding.weight.norm(dim=1).mean().item()
    if args.item_init == "text":
        set_item_table(model, encode_titles(bert, tokenizer, data.titles[1:]), norm)
    elif args.item_init == "cooc":
        table = cooccurrence_vectors(leave_one_out(data)[0], data.num_items, model.config.hidden_size)
        set_item_table(model, table, norm)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pre-trained BERT into a recommender.")
    add_data_flags(parser)
    parser.add_argument("--bert", default="minilm", help="minilm, bert-base-uncased, a folder, or none: random weights")
    parser.add_argument(
        "--item-init",
        choices=("cooc", "text", "random"),
        default="cooc",
        help="first item embeddings (default: %(default)s)",
    )
    add_training_flags(parser, name="teacher", objective="masked", epochs=10, lr=1e-3, body_lr=3e-4, tokens=2048)
    args = parser.parse_args()
    check_flags(parser, args)
    data = load_dataset(args.data, args.root, args.min_count, args.fraction)
    model = build_teacher(args, data)
    run = Path("runs") / data.name / args.name
    loss = partial(masked_item_loss, label_smoothing=args.label_smoothing)
    train(model, loss, data, run, args, describe(data, model, args))
    print(f"the best weights are in {run}; next: python distill.py --data {args.data}")


if __name__ == "__main__":
    run_command(main)
