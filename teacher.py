"""PreBERT: a pre-trained BERT learns to recommend, in a loop that can be stopped and resumed.

    python teacher.py --data ml-1m --objective next
    torchrun --nproc-per-node 8 teacher.py --data ml-1m --objective next     # on several GPUs or machines

On two CPU cores, 55 CPU minutes: test NDCG@10 0.1998 +- 0.0020, three seeds (results/ml-1m/three-seeds.json).
Without --objective next, the paper's masked items are asked for: 0.1822, with --epochs 16 0.1906, one seed each.

A share of each history is hidden, and the model is asked what stood there (Sun et al. 2019,
section 3.5; arXiv 2409.14810, section 3.2). distill.py trains students in the same loop with
another loss. In order: loss -> optimizer and schedule -> processes -> checkpoints -> `train` -> the command.

Letters: B batch (users), T sequence length, D hidden size, M asked positions of a row, I items.
"""

import argparse
import ctypes
import fcntl
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import (
    PAD, InputError, Interactions, Split, add_data_flags, batches, leave_one_out, load_dataset, mask_items, next_items,
    number, pad_left, positive, run_command, windows, write_atomic,
)  # fmt: skip
from evaluate import Popularity, evaluate, hit_rate, machine, ndcg, peak_memory_gb, step_flops
from prebert import (
    NEVER, BertConfig, PreBert, cooccurrence_vectors, encode_titles, load_bert, prebert_from_bert, set_item_table,
    write_safetensors,
)  # fmt: skip
from student import VERSION, pick_device, read_json

# What is asked in one step: tokens (B, T); positions (B, M); labels (B, M), PAD where nothing is asked; and
# entries (B, M), the place in the log of the item at each position.
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[PreBert, Batch], Tensor]
FULL_SOFTMAX = 20_000  # items: beyond, the catalogue softmax is estimated from
NEGATIVES = 8_192  # shared negatives a batch


@dataclass(frozen=True)
class Sampler:
    """Negatives for catalogues whose full softmax is too large, drawn with known probabilities."""

    chance: Tensor  # (I,) of each item at each draw
    count: int  # draws a batch, shared by all its positions

    def draw(self) -> tuple[Tensor, Tensor]:
        """Distinct columns (N,), ascending, and -log of each one's probability to be among them, (N,).

        To weigh by how often a column was drawn is as unbiased, but lets chance play with the popular ones.
        """
        columns = torch.multinomial(self.chance, self.count, replacement=True).unique()
        return columns, -torch.log(-torch.expm1(self.count * torch.log1p(-self.chance[columns])))


def draw_candidates(sampler: Sampler, certain: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for the catalogue at M positions: `certain` columns (M, C) of their own, and shared negatives.

    Returns the negatives' columns (N,) and what to add to the scores of both, (M, C + N): with it the sum of
    exponentials over the candidates is an unbiased estimate of the sum over the catalogue (Horvitz & Thompson
    1952, equation 3; for softmaxes Bengio & Senecal 2008). What stands in a row twice counts once.
    """
    columns, weights = sampler.draw()
    order = certain.argsort(dim=1, stable=True)
    ordered = certain.gather(1, order)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0)).gather(1, order.argsort(1))  # (M, C)
    place = torch.searchsorted(columns, certain).clamp(max=len(columns) - 1)
    drawn = columns[place] == certain
    correction = torch.cat([NEVER * again, weights.expand(len(certain), -1)], dim=1)  # (M, C + N)
    row, column = drawn.nonzero(as_tuple=True)
    correction[row, certain.shape[1] + place[row, column]] = NEVER
    return columns, correction


def candidate_logits(model: PreBert, states: Tensor, certain: Tensor, negatives: Tensor) -> Tensor:
    """Scores at states (M, D) of certain columns (M, C) and of shared ones (N,), (M, C + N)."""
    table = model.item_embedding.weight
    near = (F.embedding(1 + certain, table) @ states.to(table.dtype)[:, :, None])[..., 0]  # (M, C)
    far = F.linear(states, F.embedding(1 + negatives, table), model.item_bias[negatives])  # (M, N)
    return torch.cat([near + model.item_bias[certain], far.to(table.dtype)], dim=1)


def masked_item_loss(
    model: PreBert, batch: Batch, label_smoothing: float = 0.0, sampler: Sampler | None = None
) -> Tensor:
    """Mean of -log p(item | what the model may see) over the asked positions, a scalar.

    p = softmax(head(h) E^T + b) over all items, or over the label and a sample of them; the encoder's last
    layer and this softmax are computed where something is asked and nowhere else.
    """
    tokens, positions, labels, _ = batch
    asked = labels != PAD  # (B, M)
    states, columns = model(tokens, positions)[asked], labels[asked] - 1
    if sampler is None:
        logits = model.logits(states).float()  # (B * M, I)
    else:
        negatives, correction = draw_candidates(sampler, columns[:, None])
        logits = candidate_logits(model, states, columns[:, None], negatives) + correction  # (B * M, 1 + N)
        columns = torch.zeros_like(columns)
    total = F.cross_entropy(logits, columns, label_smoothing=label_smoothing, reduction="sum")
    return total / max(1, len(columns))


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


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of handing it back: a step allocates the same blocks as the last.

    Without it a fifth of a step on the CPU goes into the kernel's clearing of fresh pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter, value in ((-1, 2**31 - 1), (-2, 2**28), (-4, 0)):  # trim threshold, top pad, mmap max
            mallopt(parameter, value)


# ---------------------------------------------------------------- processes


def world() -> tuple[int, int]:
    """This process' number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun, meet the other processes: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if args.device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl")
        else:
            dist.init_process_group("gloo")


def share_of(batch: Batch) -> tuple[Batch, float]:
    """This process' rows of a batch, and the weight of their mean loss in the mean over all processes."""
    rank, size = world()
    if size == 1:
        return batch, 1.0
    tokens, positions, labels, entries = batch
    if len(tokens) > rank:
        part = (tokens[rank::size], positions[rank::size], labels[rank::size], entries[rank::size])
    else:  # a long history fills a batch alone: the others ask nothing of it
        part = (tokens[:1], positions[:1], torch.zeros_like(labels[:1]), entries[:1])
    return part, size * int((part[2] != PAD).sum()) / int((labels != PAD).sum())


def everyone(values: list[float], device: torch.device) -> list[float]:
    """Sums of numbers over all processes."""
    if world()[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


class Objective(nn.Module):
    """Model and loss as one module, so that PyTorch's DDP sees one forward pass a step."""

    def __init__(self, model: PreBert, loss_of: Loss):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor, entries: Tensor) -> Tensor:
        return self.loss_of(self.model, (tokens, positions, labels, entries))


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(run: Path, model: PreBert, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Everything that training needs to go on: run/train_state.pt.

    No random state is in it: each draw is a function of the seed and the step (see `train`).
    """
    buffer = io.BytesIO()  # torch.save into a file hides a full disk behind an error of its own
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, buffer)
    write_atomic(run / "train_state.pt", lambda path: path.write_bytes(buffer.getbuffer()))


def load_checkpoint(run: Path) -> dict:
    """Contents of run/train_state.pt, tensors and plain values only; InputError if they cannot be read."""
    try:
        return torch.load(run / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no single error for a broken file
        raise InputError(
            f"{run / 'train_state.pt'} cannot be read ({type(error).__name__}); start again with --overwrite"
        ) from error


def resume(run: Path, model: PreBert, optimizer: torch.optim.Optimizer, config: dict) -> dict:
    """Load the last checkpoint into model and optimizer and return the training state.

    Raises InputError if the run was started with other settings, and says which, or if the file does not fit.
    """
    checkpoint, before = load_checkpoint(run), read_json(run / "config.json")
    for key in ("version", "data", "model", "num_items", "settings", "seed"):
        if before.get(key) != config[key]:
            raise InputError(f"--resume {run}: {key} was {before.get(key)}, now {config[key]}; use the same flags")
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = {key: type(value)(checkpoint["state"][key]) for key, value in FRESH.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{run / 'train_state.pt'} does not fit: {reason}; start again with --overwrite") from error
    if state["step"]:  # a crash may have come between a row and its checkpoint
        write_atomic(run / "log.csv", partial(Path.write_text, data=state["log"]))
    return state


FRESH: dict = {
    "epoch": 0, "batch": 0, "step": 0, "waited": 0, "seconds": 0.0, "cpu_seconds": 0.0, "loss": 0.0, "best": -1.0,
    "log": "step,epoch,minutes,loss,valid_NDCG@10,valid_HR@10\n",
}  # fmt: skip


def start_run(run: Path, data: Interactions, config: dict, overwrite: bool) -> dict:
    """Create the run folder with config.json and catalogue.json; returns a fresh training state."""
    if (run / "config.json").exists() and not overwrite:
        raise InputError(f"{run} exists; --resume goes on with it, --overwrite starts again, --name makes another")
    for name in ("model.safetensors", "log.csv", "metrics.json", "train_state.pt"):
        (run / name).unlink(missing_ok=True)
    catalogue = {"raw_ids": data.raw_ids, "titles": data.titles}
    for name, content in (("catalogue.json", catalogue), ("config.json", config)):
        write_atomic(run / name, partial(Path.write_text, data=json.dumps(content, indent=1)))
    return dict(FRESH)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder; InputError if one is in it. The first process locks for all."""
    if world()[0]:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another training is writing to {run}; choose another --name or wait for it") from None
        yield


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag, so that training ends between two steps."""

    def __init__(self):
        self.signal = 0
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, self.remember)

    def remember(self, number_: int, _frame: object) -> None:
        if self.signal:  # a second one means it
            sys.exit(128 + number_)
        self.signal = number_


# ---------------------------------------------------------------- training


def validate(model: PreBert, split: Split, exclude_seen: bool, users: int) -> tuple[float, float]:
    """NDCG@10 and HR@10 on the validation part, for the same random `users` every time."""
    chosen = torch.randperm(len(split.targets), generator=torch.Generator().manual_seed(0))[:users]
    rank, size = world()
    mine = chosen[rank::size]
    part = Split(split.items, split.starts[mine], split.ends[mine], split.targets[mine])
    device = model.item_bias.device
    model.eval()
    ranks = evaluate(model.score_next, part, exclude_seen, max_length=model.max_length, device=device)
    model.train()
    quality, hits = everyone([ndcg(ranks, 10).sum().item(), hit_rate(ranks, 10).sum().item()], device)
    return quality / len(chosen), hits / len(chosen)


class Progress:
    """One line on the terminal, rewritten; in a log file, a line every half minute."""

    def __init__(self):
        self.tty, self.shown, self.items, self.began = sys.stderr.isatty(), 0.0, 0, time.perf_counter()

    def show(self, step: int, share: float, loss: float, left: float) -> None:
        """Print unless the last line is too young; `left` in seconds."""
        now = time.perf_counter()
        if now - self.shown < (0.5 if self.tty else 30) or world()[0]:
            return
        self.shown = now
        rate, (minutes, seconds) = self.items / (now - self.began), divmod(int(left), 60)
        line = f"step {step:>6}  {share:>4.0%}  loss {loss:6.3f}  {rate:>8,.0f} items/s  {minutes:>3}:{seconds:02} left"
        print(line, end="\r" if self.tty else "\n", file=sys.stderr, flush=True)


def seeded(seed: int, kind: str, count: int) -> torch.Generator:
    """A generator for one purpose at one moment: resuming needs the numbers, not the random state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + count) * 3 + ("windows", "batches", "masks").index(kind))


def draw_batch(
    model: PreBert, split: Split, windows: tuple[Tensor, Tensor, Tensor], rate: float, generator: torch.Generator
) -> Batch:
    """Windows (starts, ends, last_only; (B,) each) as a batch with fresh questions, of the model's kind."""
    starts, ends, last_only = windows
    width = int((ends - starts).max())
    tokens = pad_left(split.items, starts, ends, width)  # (B, T)
    if model.config.causal:
        tokens, positions, labels = next_items(tokens, rate, generator)
    else:
        tokens, positions, labels = mask_items(tokens, last_only, model.mask_id, rate, generator)
    return tokens, positions, labels, (ends - width)[:, None] + positions


class Session:
    """What the steps of one training share. `state` holds plain numbers and is saved in every checkpoint."""

    def __init__(
        self, model: PreBert, objective: nn.Module, optimizer: torch.optim.Optimizer, run: Path,
        args: argparse.Namespace, state: dict, stop: Stop, progress: Progress,
    ):  # fmt: skip
        self.model, self.optimizer, self.run, self.args = model, optimizer, run, args
        self.state, self.stop, self.progress = state, stop, progress
        self.objective = DistributedDataParallel(objective) if world()[1] > 1 else objective
        self.dtype = autocast_dtype(model.item_bias.device, args.precision)
        self.began = time.perf_counter() - state["seconds"]  # had it not been interrupted
        self.began_cpu = time.process_time() - state["cpu_seconds"]
        self.saved = time.perf_counter()  # when the last checkpoint was written

    def read_clocks(self) -> None:
        self.state["seconds"] = time.perf_counter() - self.began
        self.state["cpu_seconds"] = time.process_time() - self.began_cpu

    def spent(self, steps_an_epoch: float) -> float:
        """Share of the budget that is used up, by the clock (--minutes) or by epochs."""
        if self.args.minutes:
            return self.state["seconds"] / (60 * self.args.minutes)
        return (self.state["epoch"] + self.state["batch"] / steps_an_epoch) / self.args.epochs

    def save(self) -> None:
        if world()[0] == 0:
            save_checkpoint(self.run, self.model, self.optimizer, self.state)
        self.saved = time.perf_counter()


def take_step(session: Session, batch: Batch, seed: int) -> float:
    """One optimizer step on the whole batch, all processes together; returns the loss, or the step's nan or inf.

    Dropout depends on `seed` alone. The clock and Ctrl-C are shared too, so that all processes stop together.
    """
    model, state = session.model, session.state
    device = model.item_bias.device
    torch.manual_seed(seed + world()[0])
    part, weight = share_of(batch)
    with torch.autocast(device.type, session.dtype, enabled=session.dtype != torch.float32):
        loss = session.objective(*(tensor.to(device) for tensor in part)) * weight
    session.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    session.read_clocks()
    rank, size = world()
    clock = 0.0 if rank else state["seconds"]
    value, state["seconds"], stop = everyone([loss.item() / size, clock, session.stop.signal / size], device)
    session.stop.signal = math.ceil(stop)
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
        batch = draw_batch(model, split, (starts[rows], ends[rows], last_only[rows]), args.mask_rate, generator)
        loss = take_step(session, batch, seed * 1_000_003 + state["step"])
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {state['step']}, learning rate {args.lr * rate:.1e}; "
                f"{session.run} keeps the last good weights; try a smaller --lr or --precision fp32"
            )
        state["loss"] = loss if state["step"] == 0 else 0.99 * state["loss"] + 0.01 * loss
        state["step"], state["batch"] = state["step"] + 1, state["batch"] + 1
        session.progress.items += int((batch[0] != PAD).sum())
        session.progress.show(state["step"], share, state["loss"], state["seconds"] * (1 / max(share, 1e-3) - 1))
        if session.stop.signal or time.perf_counter() - session.saved > 600:
            session.save()
        if session.stop.signal:
            if world()[0] == 0:
                print(f"\nstopped at step {state['step']}; the same command with --resume goes on", file=sys.stderr)
            sys.exit(128 + session.stop.signal)
        if args.minutes and session.spent(len(plan)) >= 1:
            break
    state["epoch"], state["batch"] = state["epoch"] + 1, 0


def end_epoch(session: Session, valid: Split, exclude_seen: bool) -> None:
    """Evaluate on validation users, keep the weights if they are the best so far, log, checkpoint."""
    model, run, state = session.model, session.run, session.state
    quality, hits = validate(model, valid, exclude_seen, session.args.eval_users)
    state["waited"] = 0 if quality > state["best"] else state["waited"] + 1
    best, state["best"] = quality > state["best"], max(quality, state["best"])
    if world()[0]:
        return
    if best:
        write_safetensors(run / "model.safetensors", model.state_dict())
    epoch, minutes, loss = state["epoch"], state["seconds"] / 60, state["loss"]
    state["log"] += f"{state['step']},{epoch},{minutes:.3f},{loss:.5f},{quality:.5f},{hits:.5f}\n"
    write_atomic(run / "log.csv", partial(Path.write_text, data=state["log"]))
    session.save()
    print(
        f"epoch {epoch:>3}  {minutes:6.1f} min  loss {loss:.3f}  "
        f"validation NDCG@10 {quality:.4f}  HR@10 {hits:.4f}  {'best' if best else '':<12}"
    )


def train(model: PreBert, loss_of: Loss, data: Interactions, run: Path, args: argparse.Namespace, config: dict) -> None:
    """Train until the budget (--epochs or --minutes) or the patience is used up; leaves a run folder.

    The best weights by validation NDCG@10 are in model.safetensors at any time. train_state.pt, from
    which --resume goes on bit for bit, is removed when training has ended. Every random draw is a
    function of the seed and the number of its step or epoch, so there is no random state to save.
    Raises InputError when nobody can be evaluated, the run folder is taken or the loss is not finite.
    """
    if data.num_items <= FULL_SOFTMAX:  # kept blocks as large as a huge catalogue's would leave holes between them
        keep_freed_memory()
    split, valid, _ = leave_one_out(data)
    if not len(valid.targets):
        raise InputError(f"{data.name}: no user has the three items that training and evaluation need")
    model.train().to(pick_device(args.device))
    optimizer = make_optimizer(model, args.lr, args.body_lr or args.lr, args.weight_decay)
    with locked(run):
        state = begin(run, model, optimizer, data, args, config)
        if state is None:
            return
        session = Session(model, Objective(model, loss_of), optimizer, run, args, state, Stop(), Progress())
        if not state["step"]:
            session.save()  # from here on, weights without a checkpoint are no interrupted training
        while session.spent(math.inf) < 1 and state["waited"] < args.patience:  # an epoch begun does not count
            train_epoch(session, split)
            end_epoch(session, valid, not data.repeats)
        session.read_clocks()
        if world()[0] == 0:
            finish(session)


def begin(
    run: Path, model: PreBert, optimizer: torch.optim.Optimizer, data: Interactions, args: argparse.Namespace,
    config: dict,
) -> dict | None:  # fmt: skip
    """The training state to go on from, or None if the run has ended."""
    first, saved = world()[0] == 0, (run / "train_state.pt").exists()
    say = print if first else lambda *_, **__: None
    if args.resume and not saved and (run / "metrics.json").exists():
        return say(f"the training of {run} has ended; --overwrite starts it again")
    if args.resume and not saved and (run / "model.safetensors").exists():
        raise InputError(f"{run} has weights but no checkpoint to go on from; --overwrite starts again")
    if args.resume and not saved:
        say(f"nothing was saved in {run} yet: starting from the beginning")
    if args.resume and saved:
        state = resume(run, model, optimizer, config)
    else:
        state = start_run(run, data, config, args.overwrite or args.resume) if first else dict(FRESH)
    params = sum(parameter.numel() for parameter in model.parameters())
    processes = f", {world()[1]} processes" if world()[1] > 1 else ""
    dtype = autocast_dtype(model.item_bias.device, args.precision)
    say(f"training {run}: {params:,} parameters, {dtype} on {model.item_bias.device}{processes}", flush=True)
    return state


def finish(session: Session) -> None:
    """Write metrics.json, what the training has cost; the checkpoint has served its purpose."""
    run, state, args = session.run, session.state, session.args
    report = {"valid_NDCG@10": state["best"], "steps": state["step"], "epochs": state["epoch"]}
    report |= {"minutes": state["seconds"] / 60, "cpu_minutes": state["cpu_seconds"] / 60}
    report["peak_memory_gb"] = peak_memory_gb()
    report["flops_per_step"] = step_flops(session.model, args.tokens, args.mask_rate, args.negatives)
    write_atomic(run / "metrics.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    (run / "train_state.pt").unlink(missing_ok=True)


# ---------------------------------------------------------------- the command


def add_training_flags(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """The flags of both training scripts, with each script's own defaults."""
    share, rate = number(-1e-9, 1 + 1e-9), number(0, math.inf)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--name", help="run folder runs/<data>/<name> (default: teacher, student or student-no-kd)")
    add("--epochs", type=positive, help="passes over the data (default: a teacher 10 masked, 6 next, a student 20 "
        "masked, 8 next; more on less than a million interactions)")  # fmt: skip
    add("--minutes", type=rate, help="budget by the clock instead of --epochs; the schedule follows it")
    add("--lr", type=rate, help="peak learning rate (default: %(default)s)")
    add("--body-lr", type=rate, help="the same for encoder and positions (default: %(default)s; None: --lr)")
    add("--warmup", type=number(-1e-9, 1), default=0.05, help="share of the budget in which the rate rises")
    add("--weight-decay", type=number(-1e-9, math.inf), default=0.01)
    add("--tokens", type=positive, help="positions in a batch, over all processes (default: %(default)s)")
    add("--max-length", type=positive, default=200, help="items the model reads (default: %(default)s)")
    add("--objective", choices=("masked", "next"),
        help="fill in blanks, or predict each next item (default: masked, or as the teacher)")  # fmt: skip
    add("--mask-rate", type=number(0, 1 + 1e-9), help="share of items asked for (default: 0.2 masked, 1 next)")
    add("--last-share", type=share, help="masked: share of windows with just the last one hidden (default: 0.1)")
    add("--dropout", type=number(-1e-9, 0.99), default=0.1,
        help="share of activations zeroed (default: 0.1; a teacher of next items 0.2)")  # fmt: skip
    add("--label-smoothing", type=number(-1e-9, 1), default=0.0,
        help="share of a label given to all items alike (default: 0; a teacher of next items 0.1)")  # fmt: skip
    add("--negatives", type=int, help="sampled softmax with this many shared negatives (default: the full "
        f"catalogue up to {FULL_SOFTMAX:,} items, then {NEGATIVES:,})")  # fmt: skip
    add("--patience", type=positive,
        help="epochs without improvement before stopping (default: a third of --epochs, at least 5)")  # fmt: skip
    add("--eval-users", type=positive, default=3000, help="validation users asked after an epoch")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    add("--resume", action="store_true", help="go on with an interrupted run, or start it")
    add("--overwrite", action="store_true", help="start again in an existing run folder")
    parser.set_defaults(**{"tokens": 4096, **defaults})


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on the objective; end with argparse's message and code 2 for what makes no sense."""
    masked = args.objective == "masked"
    if not masked and args.last_share:
        parser.error("--last-share is for --objective masked; next asks at every position")
    args.mask_rate = args.mask_rate or (0.2 if masked else 1.0)
    args.last_share = args.last_share if args.last_share is not None else 0.1 * masked
    if args.max_length < 3 or not 0 <= args.seed < 2**32 or (args.negatives is not None and args.negatives < 1):
        parser.error("--max-length must be 3 or more, --seed from 0 to 2^32 - 1, --negatives 1 or more")
    join_processes(args)


def fill_epochs(args: argparse.Namespace, data: Interactions, least: int) -> None:
    """Default budget: `least` epochs on a million interactions or more, on less as many more as the square root says.

    A hundredth of the data gets ten times the passes, and a tenth of the steps.
    """
    args.epochs = args.epochs or round(least * max(1.0, (1e6 / len(data.items)) ** 0.5))
    args.patience = args.patience or max(5, args.epochs // 3)


def fill_recipe(args: argparse.Namespace, data: Interactions, sampler: Sampler | None) -> None:
    """What a teacher's flags leave open, as the README's table was made.

    Next items are five times as many questions an epoch, so histories are known by heart earlier.
    """
    causal = args.objective == "next"
    fill_epochs(args, data, 6 if causal else 10)
    if args.dropout is None:
        args.dropout = 0.2 if causal else 0.1
    if args.label_smoothing is None:
        args.label_smoothing = 0.1 if causal and sampler is None else 0.0


def make_sampler(args: argparse.Namespace, data: Interactions) -> Sampler | None:
    """None where the full catalogue fits; else half uniform, half by popularity in the training part.

    Above FULL_SOFTMAX items, args.negatives becomes NEGATIVES, so that config.json tells.
    """
    if args.negatives is None and data.num_items > FULL_SOFTMAX:
        args.negatives = NEGATIVES
    if args.negatives is None:
        return None
    if args.label_smoothing:
        raise InputError("--label-smoothing needs the full softmax, which --negatives and large catalogues do without")
    if world()[0] == 0:
        print(f"sampled softmax: {args.negatives:,} shared negatives a batch instead of all {data.num_items:,} items")
    counts = Popularity(leave_one_out(data)[0], data.num_items).counts
    chance = 0.5 / data.num_items + 0.5 * counts / counts.sum()
    return Sampler(chance.float().to(pick_device(args.device)), args.negatives)


def describe(data: Interactions, model: PreBert, args: argparse.Namespace) -> dict:
    """config.json: all that is needed to rebuild the model, to repeat the run and to trust its figures."""
    script = Path(sys.argv[0])
    commit = ""
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    settings = {key: value for key, value in vars(args).items() if key not in ("resume", "overwrite", "device", "root")}
    return {
        "version": VERSION, "data": data.name, "num_items": data.num_items, "exclude_seen": not data.repeats,
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
        model, norm = PreBert(shape, data.num_items), 1.0
    else:
        bert, tokenizer = load_bert(args.bert)
        model = prebert_from_bert(bert, tokenizer, data.num_items, args.max_length, causal, args.dropout)
        norm = bert.word_embedding.weight.norm(dim=1).mean().item()
        if args.item_init == "text":
            set_item_table(model, encode_titles(bert, tokenizer, data.titles[1:]), norm)
    if args.item_init == "cooc":
        table = cooccurrence_vectors(leave_one_out(data)[0], data.num_items, model.config.hidden_size)
        set_item_table(model, table, norm)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pre-trained BERT into a recommender.")
    add_data_flags(parser)
    parser.add_argument("--bert", default="minilm", help="minilm, bert-base-uncased, a folder, or none: random weights")
    parser.add_argument("--item-init", choices=("cooc", "text", "random"), default="cooc",
                        help="first item embeddings (default: %(default)s)")  # fmt: skip
    add_training_flags(parser, name="teacher", objective="masked", lr=1e-3, body_lr=3e-4, tokens=2048,
                       dropout=None, label_smoothing=None)  # fmt: skip
    args = parser.parse_args()
    check_flags(parser, args)
    data = load_dataset(args.data, args.root, args.min_count, args.fraction)
    sampler = make_sampler(args, data)
    fill_recipe(args, data, sampler)
    model = build_teacher(args, data)
    run = Path("runs") / data.name / args.name
    loss = partial(masked_item_loss, label_smoothing=args.label_smoothing, sampler=sampler)
    train(model, loss, data, run, args, describe(data, model, args))
    if world()[0] == 0:
        flags = f"--teacher {run}" + " --cache" * (args.objective == "next")
        print(f"the best weights are in {run}; next: python distill.py --data {args.data} {flags}")


if __name__ == "__main__":
    run_command(main)
