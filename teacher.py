"""PreBERT: a pre-trained BERT learns to recommend, in a loop that can be stopped and resumed.

    python teacher.py --data ml-1m
    torchrun --nproc-per-node 8 -- teacher.py --data ml-1m       # on several GPUs or machines

On two cores of an EPYC with AVX-512-BF16, 50 to 53 CPU minutes: test NDCG@10 0.2041 +- 0.0007, three seeds
(results/ml-1m/test.json); a Xeon in float32 takes 136. With --objective masked, the paper's own, and --epochs 16
--patience 16: 0.1955, one seed, 136 CPU minutes on the EPYC.

Histories become questions in data.py. distill.py trains students in the same loop with another loss. In order: loss ->
optimizer and schedule -> `train` -> checkpoints -> processes -> large catalogues -> flags and settings -> building the
teacher -> the command.

Letters: B batch (users), T sequence length, D hidden size, M asked positions of a row, Q of a batch, I items,
W windows, C candidates that are certain, N distinct negatives, V size of what BERT reads in a text.
"""

import argparse
import atexit
import ctypes
import fcntl
import io
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    PAD, SPLITS, Batch, InputError, Interactions, Parts, Spans, add_data_flags, batches, command_line, data_flags,
    fixed_windows, item_counts, load_asked, mask_items, next_items, number, pad_left, positive, random_windows,
    run_command, write_atomic, write_json,
)  # fmt: skip
from evaluate import Markov, Scorer, hit_rate, ndcg, rank_targets
from prebert import (
    ITEM_INITS, NEVER, VERSION, BertConfig, PreBert, Reader, centred, item_vectors, learning_curve, load_bert,
    load_run, machine, near_identity, peak_memory_gb, pick_device, prebert_from_bert, read_json, read_run,
    set_item_table, start_from, text_columns, text_vectors, trained_on, with_text_columns, without_seed,
    write_safetensors,
)  # fmt: skip

Loss = Callable[[PreBert, Batch], Tensor]
# Data with fewer interactions per item are sparse: item vectors may start from titles (`default_init`), texts count
# in the scores (`keep_texts`), and students start `near_identity`.
SPARSE = 100
FULL_DROPOUT_TO = 32  # interactions per item; with each doubling above, dropout is 0.1 less
TEXT_SIZE = 64  # columns of the item table for texts
TITLES_TOO, TITLES_ALONE = 0.4, 0.6  # how well titles must predict, as a share of Markov's NDCG@10

# What a kind of question needs. Next items are five times as many questions an epoch (all of them, not a MASK_RATE of
# 0.2), so a model overfits earlier: fewer epochs, more dropout, smoothed labels. With fewer interactions per item than
# near_below it starts `near_identity`, unless users come back to items. Epochs, learning rates and positions in a batch
# are for a million interactions; see `settle` for less.
BOTH = dict(lr=1e-3, body_lr=3e-4, tokens=2048, least_tokens=2048)
RECIPES: dict[str, dict] = {
    "next": dict(epochs=6, dropout=0.4, label_smoothing=0.1, near_below=math.inf, **BOTH),
    "masked": dict(epochs=10, dropout=0.1, label_smoothing=0.0, near_below=0, **BOTH),
}


def item_loss(model: PreBert, batch: Batch, label_smoothing: float = 0.0, sampler: "Sampler | None" = None) -> Tensor:
    """Mean cross entropy of the items asked for over the asked positions, a scalar; the loss of both objectives.

    -log p(item), p = softmax(head(h) E^T + b) over all items, or over the label and a sample of them, with a share
    `label_smoothing` of each label given to all items alike. The encoder's last layer and this softmax are computed
    where something is asked and nowhere else.
    """
    is_asked = batch.labels != PAD  # (B, M)
    states, columns = model(batch.tokens, batch.positions)[is_asked], batch.labels[is_asked] - 1  # (Q, D), (Q,)
    if sampler is None:
        logits = model.logits(states).float()  # (Q, I)
    else:
        negatives, correction = draw_candidates(sampler, columns[:, None])
        logits = candidate_logits(model, states, columns[:, None], negatives) + correction  # (Q, 1 + N)
        columns = torch.zeros_like(columns)  # the label is the first candidate
    # Not "mean", which is nan where a process' share of a batch asks nothing.
    return F.cross_entropy(logits, columns, label_smoothing=label_smoothing, reduction="sum") / max(1, len(columns))


# ---------------------------------------------------------------- optimizer and schedule


def make_optimizer(model: PreBert, lr: float, body_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with two learning rates: `body_lr` for encoder and positions, `lr` for item table, convolution and head.

    Weight decay is for what multiplies, matrices and the convolution; tables, norms and biases are left alone.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        body = name.startswith(("encoder.", "position_embedding."))
        decay = weight_decay if parameter.ndim == 2 and "embedding" not in name else 0.0
        groups.setdefault((body_lr if body else lr, decay), []).append(parameter)
    settings = [dict(params=params, lr=rate, peak=rate, weight_decay=decay) for (rate, decay), params in groups.items()]
    return torch.optim.AdamW(settings, fused=True)


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: a line up over `warmup`, a line down to 0."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, 1 - progress) / (1 - warmup)


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (`auto`), else float32; bf16 without hardware is slower."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    bf16 = on_gpu or on_cpu if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of handing it back: a step allocates the same blocks as the last.

    Without it a fifth of a step on the CPU goes into the kernel's clearing of fresh pages.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for parameter, value in ((-1, 2**31 - 1), (-2, 2**28), (-4, 0)):  # trim threshold, top pad, mmap max
            mallopt(parameter, value)


# ---------------------------------------------------------------- training


def seeded(seed: int, kind: str, count: int) -> Generator:
    """A generator for one purpose at one moment, so that resuming needs seed and count, and no saved random state."""
    return Generator().manual_seed((seed * 1_000_003 + count) * 3 + ("windows", "batches", "masks").index(kind))


def draw_windows(model: PreBert, part: Spans, generator: Generator) -> tuple[Spans, Tensor]:
    """The W windows of an epoch, as the model's kind of question needs them, and last_only (W,)."""
    if not model.config.causal:
        return random_windows(part, model.max_length, generator)
    windows = fixed_windows(part, model.max_length)
    return windows, torch.zeros(len(windows.starts), dtype=torch.bool)


def draw_batch(model: PreBert, windows: Spans, last_only: Tensor, generator: Generator) -> Batch:
    """B windows as a batch with questions of the model's kind, masked items drawn anew; last_only (B,)."""
    width = int(windows.sizes.max())
    tokens = pad_left(windows.items, windows.starts, windows.ends, width)  # (B, T)
    asked = next_items(tokens) if model.config.causal else mask_items(tokens, last_only, model.mask_id, generator)
    tokens, positions, labels = asked  # (B, T) or, of next items, (B, T - 1); (B, M), (B, M)
    return Batch(tokens, positions, labels, entries=(windows.ends - width)[:, None] + positions)


def some_targets(valid: Spans, count: int) -> Tensor:
    """Row numbers of at most `count` validation targets, drawn at random, the same every time."""
    return torch.randperm(len(valid.targets), generator=Generator().manual_seed(0))[:count]


def validate(model: PreBert, valid: Spans, exclude_seen: bool, count: int) -> tuple[float, float]:
    """NDCG@10 and HR@10 on the validation part, at `some_targets`."""
    chosen, (process, processes) = some_targets(valid, count), world()
    device = model.item_bias.device
    model.eval()
    ranks = rank_targets(model.score_next, valid[chosen[process::processes]], exclude_seen, model.max_length, device)
    model.train()
    quality, hits = gathered([ndcg(ranks, 10).sum().item(), hit_rate(ranks, 10).sum().item()], device).sum(0).tolist()
    return quality / len(chosen), hits / len(chosen)


class ModelWithLoss(nn.Module):
    """Model and loss as one module, so that PyTorch's DDP sees one forward pass a step."""

    def __init__(self, model: PreBert, loss_of: Loss):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss_of(self.model, Batch(*batch))


def train(
    model: PreBert, loss_of: Loss, data: Interactions, parts: Parts, run: Path, args: argparse.Namespace, config: dict,
) -> None:  # fmt: skip
    """Train until the budget (--epochs or --minutes) or the patience is used up; leaves a run folder.

    The best weights by validation NDCG@10 are in model.safetensors at any time; from train_state.pt --resume goes on
    with the epoch that was interrupted, bit for bit (with --minutes the clock decides), since every random draw is a
    function of the seed and its step or epoch. Raises InputError when there is nothing to ask, the folder is taken, or
    the loss is not finite.
    """
    train_part, valid_part, _ = parts
    has_valid = len(valid_part.targets) > 0  # not with --all and --final, where the last epoch's weights are the best
    windows, _ = draw_windows(model, train_part, seeded(args.seed, "windows", 0))
    if not len(windows.starts) or (data.split in ("last", "sessions") and not has_valid):
        raise InputError(f"{data.name}: no user has three items (four for next items; one less with --final, "
                         "two less with --all), no session two")  # fmt: skip
    if data.num_items <= FULL_SOFTMAX:  # with huge catalogues, keeping freed blocks fragments memory
        keep_freed_memory()
    device, seed, (process, processes) = pick_device(args.device), args.seed, world()
    dtype = autocast_dtype(device, args.precision)
    optimizer = make_optimizer(model.train().to(device), args.lr, args.body_lr, args.weight_decay)
    with locked(run):
        state = open_run(run, model, optimizer, data, train_part, args, config)
        if state is None:
            return
        with_loss: nn.Module = ModelWithLoss(model, loss_of)
        with_loss = DistributedDataParallel(with_loss) if processes > 1 else with_loss
        if args.start and state["step"] == 0 and has_valid:
            state["best"], hits = validate(model, valid_part, data.exclude_seen, args.eval_users)
            print(f"before training: validation NDCG@10 {state['best']:.4f}  HR@10 {hits:.4f}", flush=True)
        # When training would have begun, had it not been interrupted.
        began, began_cpu = time.perf_counter() - state["seconds"], time.process_time() - state["cpu_seconds"]

        def spent(of_epoch: float = 0.0) -> float:
            """Share of the budget used up; of_epoch: how much of this epoch is done, unless --minutes decides."""
            if args.minutes:
                return state["seconds"] / (60 * args.minutes)
            return (state["epoch"] + of_epoch) / args.epochs if args.epochs else 1.0

        while spent() < 1 and state["waited"] < args.patience:
            # An epoch: fresh batches of similar length; of masked items, fresh windows and questions, too.
            epoch = state["epoch"]
            windows, last_only = draw_windows(model, train_part, seeded(seed, "windows", epoch))
            sizes = windows.sizes  # (W,)
            plan = batches(sizes, args.tokens, generator=seeded(seed, "batches", epoch))
            bar = tqdm(total=int(sizes.sum()), desc=f"epoch {epoch + 1}", unit=" items", leave=False, unit_scale=True,
                       mininterval=0.5 if sys.stderr.isatty() else 30, disable=process > 0)  # fmt: skip
            mean_loss = 0.0
            for done, rows in enumerate(plan):
                share = schedule(spent((done + 0.5) / len(plan)), args.warmup)  # in the middle of the step
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * share
                batch = draw_batch(model, windows[rows], last_only[rows], seeded(seed, "masks", state["step"]))
                own, weight = share_of(batch)
                torch.manual_seed(seed * 1_000_003 + state["step"] * processes + process)  # for dropout, negatives
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = with_loss(*(tensor.to(device) for tensor in own)) * weight
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
                # The clock is shared, so that all processes stop together.
                losses, seconds = gathered([loss.item(), time.perf_counter() - began], device).T.tolist()
                value, state["seconds"] = sum(losses) / processes, seconds[0]
                check_finite({"the loss": value, "the gradient's norm": norm}, run, state["step"])
                optimizer.step()
                mean_loss += (value - mean_loss) / (done + 1)  # of the epoch so far
                state["step"] += 1
                bar.set_postfix_str(f"loss {mean_loss:.3f}", refresh=False)
                bar.update(int(sizes[rows].sum()))
                if spent() >= 1:  # of the minutes; epochs are counted when they end
                    break
            bar.close()
            check_finite({name: p.detach().sum().item() for name, p in model.named_parameters()}, run, state["step"])
            # Evaluate on validation users, keep the weights if they are the best so far, log, checkpoint.
            state["epoch"] += 1
            quality, hits = validate(model, valid_part, data.exclude_seen, args.eval_users) if has_valid else (0.0, 0.0)
            improved = not has_valid or quality > state["best"]
            state["best"], state["waited"] = max(quality, state["best"]), 0 if improved else state["waited"] + 1
            state["cpu_seconds"] = time.process_time() - began_cpu
            minutes = state["seconds"] / 60
            state["log"] += f"{state['step']},{epoch + 1},{minutes:.3f},{mean_loss:.5f},{quality:.8f},{hits:.5f}\n"
            if improved and process == 0:
                write_safetensors(run / "model.safetensors", model.state_dict())
            line = f"epoch {epoch + 1:>3}  {minutes:6.1f} min  loss {mean_loss:.3f}"
            if has_valid:
                line += f"  validation NDCG@10 {quality:.4f}  HR@10 {hits:.4f}{'  best' if improved else ''}"
            print(line, flush=True)
            save_state(run, model, optimizer, state)
        if process == 0:
            costs = {"minutes": (time.perf_counter() - began) / 60, "cpu_minutes": state["cpu_seconds"] / 60}
            ended = {"valid_NDCG@10": state["best"] if has_valid else None, "peak_memory_gb": peak_memory_gb()}
            write_json(run / "metrics.json", {**ended, "steps": state["step"], "epochs": state["epoch"], **costs})
            (run / "train_state.pt").unlink(missing_ok=True)


def check_finite(numbers: dict[str, float], run: Path, step: int) -> None:
    """InputError where a training has diverged."""
    if bad := [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]:
        words = ", ".join(bad[:2])
        raise InputError(f"{words} at step {step}; {run} keeps the last good weights, if any; try a smaller --lr")


# ---------------------------------------------------------------- checkpoints

FRESH: dict = {
    "epoch": 0, "step": 0, "waited": 0, "seconds": 0.0, "cpu_seconds": 0.0, "best": -1.0,
    "log": "step,epoch,minutes,loss,valid_NDCG@10,valid_HR@10\n",
}  # fmt: skip


def save_state(run: Path, model: PreBert, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Everything that training needs to go on: run/train_state.pt, written by the first process."""
    if world()[0] == 0:
        write_atomic(run / "log.csv", state["log"].encode())  # first: after a crash, its last row is written again
        buffer = io.BytesIO()  # torch.save into a file hides a full disk behind an error of its own
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, buffer)
        write_atomic(run / "train_state.pt", buffer.getvalue())


def load_state(content: bytes, run: Path, model: PreBert, optimizer: torch.optim.Optimizer) -> dict:
    """Put a checkpoint into model and optimizer and return the state; reading it makes tensors and plain values only.

    Raises InputError if it cannot be read or does not fit.
    """
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return {key: type(value)(checkpoint["state"][key]) for key, value in FRESH.items()}
    except Exception as error:  # torch.load has no single error for a broken file
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        raise InputError(f"{run / 'train_state.pt'} cannot be read ({reason}); start again with --overwrite") from error


def find_state(run: Path, data: Interactions, args: argparse.Namespace, config: dict) -> tuple[str, bytes]:
    """Whether a training is "fresh", "interrupted" or "ended"; of an interrupted one, the checkpoint's bytes.

    InputError where a run is there and neither --resume nor --overwrite, or where --resume comes with other settings or
    interactions than the run has; names the first that differs.
    """
    made = (run / "model.safetensors").exists()
    begun = (run / "config.json").exists() and (run / "catalogue.json").exists()
    if args.overwrite or not (begun or made):
        return "fresh", b""
    if not args.resume:
        raise InputError(f"{run} exists; --resume goes on with it, --overwrite starts again, --name makes another")
    before, _ = read_run(run, data)
    beside = ("teachers", "model", "exclude_seen")
    then, now = (c["settings"] | {key: c.get(key) for key in beside} for c in (before, config))
    for key in now:
        if then.get(key) != now[key] and key != "name":  # a run may have been renamed
            was, is_now = str(then.get(key))[:40], str(now[key])[:40]
            raise InputError(f"--resume {run}: {key} was {was}, now {is_now}; use the same, or --overwrite")
    if before.get("teacher_sha256") != config.get("teacher_sha256"):
        raise InputError(f"--resume {run}: its teacher has been trained anew; --overwrite starts again")
    if (run / "train_state.pt").exists():
        return "interrupted", (run / "train_state.pt").read_bytes()
    if made and not (run / "metrics.json").exists():
        raise InputError(f"{run} has weights but no checkpoint to go on from; --overwrite starts again")
    return "ended" if made else "fresh", b""


def open_run(
    run: Path, model: PreBert, optimizer: torch.optim.Optimizer, data: Interactions, part: Spans,
    args: argparse.Namespace, config: dict,
) -> dict | None:  # fmt: skip
    """The state to start or to go on from, or None if the run has ended; the files of a fresh run are written here.

    The first process decides for all.
    """
    process, processes = world()
    box: list = [find_state(run, data, args, config) if process == 0 else None]
    if processes > 1:
        dist.broadcast_object_list(box)
    kind, checkpoint = box[0]
    if kind == "ended":
        print(f"the training of {run} has ended; --overwrite starts it again")
        return None
    state = load_state(checkpoint, run, model, optimizer) if kind == "interrupted" else dict(FRESH)
    if process == 0 and state["step"] == 0:
        # First the checkpoint, the sign of "unfinished": old weights of --start may not fit this config.json.
        save_state(run, model, optimizer, state)
        for name in ("metrics.json", "texts.safetensors", "model.safetensors"):
            if not (args.start and name == "model.safetensors"):  # its own start: they stay until others replace them
                (run / name).unlink(missing_ok=True)
        counts = [0, *item_counts(part, data.num_items).tolist()]
        write_json(run / "config.json", config)
        write_json(run / "catalogue.json", {"raw_ids": data.raw_ids, "titles": data.titles, "counts": counts})
        counted, most = torch.ones(data.num_items + 1, dtype=torch.bool), torch.from_numpy(data.offsets).diff()
        write_safetensors(run / "users.safetensors", {"trained_on": trained_on(data, part, counted, most)})
        if args.start:
            write_safetensors(run / "model.safetensors", model.state_dict())
    params = sum(parameter.numel() for parameter in model.parameters())
    where = f"{autocast_dtype(model.item_bias.device, args.precision)} on {model.item_bias.device}"
    where += f" x {processes}" if processes > 1 else ""
    start = ", begins near the identity" if args.near_identity and not args.start else ""
    print(f"training {run}: {params:,} parameters, dropout {args.dropout:g}{start}, {where}", flush=True)
    return state


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder; InputError if one is in it. The first process locks for all."""
    if world()[0]:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another training is writing to {run}; choose another --name or wait for it") from None
        yield


# ---------------------------------------------------------------- processes


def world() -> tuple[int, int]:
    """This process' number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device: str) -> None:
    """Under torchrun, meet the other processes: NCCL between GPUs, gloo between CPUs. The first one prints."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        if not {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise InputError("RANK and WORLD_SIZE are set, but not all that torchrun sets; start it with torchrun")
        if device in ("auto", "cuda") and torch.cuda.is_available():
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise InputError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl")
        else:
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # one process speaks for all


def share_of(batch: Batch) -> tuple[Batch, float]:
    """This process' rows of a batch, and a weight for their loss that makes DDP's mean the batch's."""
    process, processes = world()
    own = Batch(*(tensor[process::processes] for tensor in batch))
    if not len(own.tokens):  # a long history fills a batch alone: the others ask nothing of it
        own = Batch(*(tensor[:1] for tensor in batch))._replace(labels=torch.zeros_like(batch.labels[:1]))
    return own, processes * int((own.labels != PAD).sum()) / max(1, int((batch.labels != PAD).sum()))


def gathered(values: list[float], device: torch.device) -> Tensor:
    """Numbers of all processes, one row per process, (processes, len(values))."""
    own = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64)
    if world()[1] == 1:
        return own[None]
    rows = [torch.empty_like(own, device=device) for _ in range(world()[1])]
    dist.all_gather(rows, own.to(device))
    return torch.stack(rows).cpu()


# ---------------------------------------------------------------- an aside: large catalogues

FULL_SOFTMAX = 20_000  # items; above this the softmax is estimated from a sample
NEGATIVES = 8_192  # drawn for a batch, shared by all its positions


class Sampler(NamedTuple):
    """Negatives for catalogues whose full softmax is too large, drawn with known probabilities."""

    chance: Tensor  # (I,) of each item at each draw
    draws: int  # per batch, shared by all its positions


def draw_candidates(sampler: Sampler, certain: Tensor) -> tuple[Tensor, Tensor]:
    """Draw negatives, and say how scores are to be corrected so that a softmax over few items estimates one over all.

    certain (Q, C): the columns that each position looks at whatever is drawn, its label first. Returns the columns of
    the negatives (N,), which all positions share, and what to add to the scores, (Q, C + N): 0 for certain columns; for
    negatives log(times drawn / times expected), with which the sum of exponentials estimates that over the catalogue
    without bias (Bengio & Senecal 2008); NEVER for a column that the row holds already.
    """
    drawn = torch.multinomial(sampler.chance, sampler.draws, replacement=True)
    columns, times = drawn.unique(return_counts=True)  # ascending
    weights = torch.log(times / (sampler.draws * sampler.chance[columns]))
    again = F.pad(certain[:, 1:] == certain[:, :1], (1, 0))  # (Q, C) the label among the teacher's top items
    correction = torch.cat([NEVER * again, weights.expand(len(certain), -1)], dim=1)  # (Q, C + N)
    # A negative that is among the certain counts there alone.
    place = torch.searchsorted(columns, certain).clamp(max=len(columns) - 1)
    row, column = (columns[place] == certain).nonzero(as_tuple=True)
    correction[row, certain.shape[1] + place[row, column]] = NEVER
    return columns, correction


def candidate_logits(model: PreBert, states: Tensor, certain: Tensor, negatives: Tensor) -> Tensor:
    """Scores at states (Q, D) of certain columns (Q, C) and of shared ones (N,), (Q, C + N)."""
    table = model.item_embedding.weight
    of_certain = (F.embedding(1 + certain, table) @ states.to(table.dtype)[:, :, None])[..., 0]  # (Q, C)
    of_negatives = F.linear(states, F.embedding(1 + negatives, table), model.item_bias[negatives])  # (Q, N)
    return torch.cat([of_certain + model.item_bias[certain], of_negatives.to(table.dtype)], dim=1)


def make_sampler(args: argparse.Namespace, train_part: Spans, num_items: int) -> Sampler | None:
    """None for the full softmax; else negatives are drawn half uniformly, half by popularity in the training part."""
    if args.negatives is None:
        return None
    print(f"sampled softmax: {args.negatives:,} shared negatives per batch instead of all {num_items:,} items")
    counts = item_counts(train_part, num_items).double()
    chance = 0.5 / num_items + 0.5 * counts / counts.sum()
    return Sampler(chance.float().to(pick_device(args.device)), args.negatives)


# ---------------------------------------------------------------- flags and settings


def add_training_flags(parser: argparse.ArgumentParser, recipes: dict[str, dict]) -> None:
    """The flags of both training scripts; what a recipe decides is None until `settle`."""
    group = parser.add_argument_group("training")
    add = group.add_argument

    def by_recipe(key: str) -> str:
        return f"(default: {', '.join(f'{recipe[key]:g} {kind}' for kind, recipe in recipes.items())})"

    add("--name", help="run folder runs/<data>/<name> (default: teacher, student or student-no-kd)")
    add("--start", metavar="RUN", help="begin from a run on older data, in a fifth of the epochs; --epochs 0: as it is")
    add("--objective", choices=tuple(recipes), help="predict each next item, or fill in blanks, the paper's own")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=number(0, kind=int), help=f"passes, more on small data {by_recipe('epochs')}")
    budget.add_argument("--minutes", type=number(0, above=True), help="budget by the clock instead of --epochs")
    add("--tokens", type=positive, help=f"positions in a batch, over all processes {by_recipe('tokens')}; "
        f"on small data down to {recipes['next']['least_tokens']}")  # fmt: skip
    add("--lr", type=number(0, above=True), help=f"peak learning rate; less with fewer --tokens {by_recipe('lr')}")
    add("--body-lr", type=number(0, above=True), help=f"the same for encoder and positions {by_recipe('body_lr')}")
    add("--dropout", type=number(0, 0.9), help=f"share of activations zeroed {by_recipe('dropout')}, less with more "
        "interactions per item, with repeats and in tiny students, see settle in teacher.py")  # fmt: skip
    add("--label-smoothing", type=number(0, 0.9), help=f"share of labels for all items {by_recipe('label_smoothing')}")
    add("--near-identity", action=argparse.BooleanOptionalAction, help="body and head start near the identity "
        f"(default: next items without repeats, of a student below {SPARSE} interactions per item)")  # fmt: skip
    add("--warmup", type=number(0, 0.99), default=0.05, help="share of the budget that the rate rises (default: 0.05)")
    add("--weight-decay", type=number(0), default=0.01, help="(default: %(default)s)")
    add("--max-length", type=number(3, kind=int), help="items the model reads, a masked model's [MASK] included "
        "(default: 200; a student as its teacher)")  # fmt: skip
    add("--negatives", type=number(1, 2**20, kind=int), help="sampled softmax with this many shared negatives, no "
        f"smoothing (default: the full catalogue up to {FULL_SOFTMAX:,} items, then {NEGATIVES:,})")  # fmt: skip
    add("--patience", type=positive, help="epochs without improvement before stopping (default: a third, at least 5; "
        "none with --minutes)")  # fmt: skip
    add("--eval-users", type=positive, default=10_000, help="validation targets after an epoch (default: %(default)s)")
    add("--seed", type=number(0, 2**32 - 1, kind=int), default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--final", action="store_true", help="hold out the test part alone: runs <name>-final, "
        "trained on validation too, for as many epochs as were best for <name>")  # fmt: skip
    held_out.add_argument("--all", action="store_true", help="hold out nothing: runs <name>-all, not to be evaluated")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted run, or start it")
    again.add_argument("--overwrite", action="store_true", help="start again in an existing run folder")


def sparse(data: Interactions) -> bool:
    """Whether items have so few interactions, SPARSE on average, that titles say more and models overfit sooner."""
    return len(data.items) < SPARSE * data.num_items


def titles_beside_counts(data: Interactions, parts: Parts, reader: Reader) -> float:
    """How well titles alone predict what comes next, as a share of how well Markov's counts do: NDCG@10, validation.

    Predicted are the items whose texts, as BERT reads them, are nearest to that of the newest item.
    """
    valid = parts[1][some_targets(parts[1], 10_000)]
    rows = F.normalize(centred(text_vectors(*reader, data.texts[1:])), dim=1)  # (I, V)

    def quality(score: Scorer) -> float:
        return ndcg(rank_targets(score, valid, data.exclude_seen, 1, title="titles or counts"), 10).sum().item()

    nearest = quality(lambda history: rows[history[:, -1] - 1] @ rows.T)  # (B, T) to (B, I)
    return nearest / max(quality(Markov(parts[0], data.num_items)), 0.1)  # sums, so 0.1 is next to nothing


def default_init(data: Interactions, split: str, reader: Reader | None) -> str:
    """How item vectors start where --item-init does not say; printed. split: that of the run without --all, --final."""
    if reader is None or not any(data.texts) or not sparse(data):
        many = f"{len(data.items) / data.num_items:.0f} interactions per item"
        print("item vectors start from cooc:", "no titles, or no BERT to read them" if sparse(data) else many)
        return "cooc"
    share = titles_beside_counts(data, SPLITS[split](data), reader)
    kind = "text" if share >= TITLES_ALONE else "text+cooc" if share >= TITLES_TOO else "cooc"
    print(f"item vectors start from {kind}: on validation, titles predict {share:.2f} times as well as Markov's counts")
    return kind


def fill_in(args: argparse.Namespace, **usual: object) -> None:
    """Defaults of flags that were not given."""
    for key, value in usual.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def settle(args: argparse.Namespace, recipes: dict[str, dict], data: Interactions) -> Path:
    """Fill in what the flags left open, so that config.json tells all; returns the run's folder, also <name>-all.

    Raises InputError for what makes no sense.
    """
    recipe, suffix = recipes[args.objective], "-all" if args.all else "-final" if args.final else ""
    args.start = args.start and str(Path(args.start))  # ./runs/x is runs/x
    fill_in(args, max_length=200, negatives=NEGATIVES if data.num_items > FULL_SOFTMAX else None)
    if Path(args.name).name != args.name or args.name in ("", ".."):
        raise InputError(f"--name {args.name!r}: must be a name, of a folder in runs/{data.name}")
    if args.negatives and args.label_smoothing:
        raise InputError("--label-smoothing needs the full softmax; --negatives and large catalogues do without it")
    if args.epochs == 0 and (suffix or not args.start):
        raise InputError("--epochs 0 trains nothing; it is for --start RUN without --all and --final")
    smaller = max(1.0, 1e6 / len(data.items))  # small data: smaller batches, so that an epoch has as many steps
    per_item = len(data.items) / data.num_items
    fill_in(args, near_identity=per_item < recipe["near_below"] and not data.repeats)
    # Models overfit less the more interactions an item has, where they are tiny, and where items repeat. A teacher's
    # answers are worth as much as the interactions, where models still overfit.
    less = 0.2 if getattr(args, "size", "") == "tiny" or data.repeats else 0.0
    learnt_from = per_item * (2 if getattr(args, "teacher", None) and not less else 1)
    doublings = max(0.0, math.log2(learnt_from / FULL_DROPOUT_TO))
    dropout = max(0.2 if args.near_identity else 0.1, round(recipe["dropout"] - 0.1 * doublings - less, 1))
    tokens = max(recipe["least_tokens"], recipe["tokens"] // 2 ** round(math.log2(smaller)))
    fill_in(args, tokens=tokens, dropout=dropout, label_smoothing=0.0 if args.negatives else recipe["label_smoothing"])
    scale = min(1.0, args.tokens / recipe["tokens"]) ** 0.5  # a step of fewer questions says less, and may change less
    fill_in(args, lr=recipe["lr"] * scale, body_lr=recipe["body_lr"] * scale)
    if args.epochs is None and suffix and not (args.minutes or args.start):
        args.epochs = best_epoch(args, replace(data, split=args.split))
    epochs = round(recipe["epochs"] * smaller**0.25)  # a hundredth of the data gets three times the passes
    fill_in(args, epochs=max(1, epochs // 5) if args.start else epochs)
    fill_in(args, patience=sys.maxsize if args.minutes else max(5, args.epochs // 3))  # the clock ends it
    args.name = f"{args.name}{suffix}"
    return Path("runs") / data.name / args.name


def best_epoch(args: argparse.Namespace, data: Interactions) -> int:
    """The epoch that was best for the run <name> by validation; data: as it was split for that run.

    Raises InputError where there is no such run, or where it is of another log or has other settings.
    """
    run = Path("runs") / data.name / args.name
    ended = read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
    scores = [score for _, score in learning_curve(run)] if (run / "log.csv").exists() else []
    if ended.get("valid_NDCG@10") is None or not scores:
        advice = "train without --all and --final first, or give --epochs N"
        raise InputError(f"{run} does not tell the best epoch; {advice}")
    config, _ = read_run(run, data)
    may_differ = ("name", "seed", "epochs", "minutes", "patience", "eval_users", "precision", "teacher", "all")
    for name, value in config["settings"].items():
        if name not in may_differ and vars(args).get(name, value) != value:
            flag = f"--{name.replace('_', '-')}, {str(value)[:40]}"
            raise InputError(f"{run} has another {flag}; its best epoch says nothing here; use the same or --epochs N")
    return 1 + scores.index(max(scores))


def describe(data: Interactions, model: PreBert, args: argparse.Namespace, teachers: list[str] | None = None) -> dict:
    """config.json: all that is needed to rebuild the model, to repeat the run and to trust its figures.

    teachers: what made a student's teachers, see `prebert.without_seed`.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    # Not among the settings: most flags that do not change what is learnt, or whose effect has a key of its own.
    hidden = ("resume", "overwrite", "device", "root", "data", "columns", "no_cache", "final", "seen", "min_count")
    settings = {key: value for key, value in vars(args).items() if key not in hidden}
    begun = Path("runs") / data.name / args.name  # where --start begins from the run itself, --resume finds itself
    before = args.start and (Path(args.start) / "config.json").exists()  # gone, perhaps, where --resume goes on
    started = sha256(without_seed(read_run(Path(args.start))[0]).encode()).hexdigest() if before else None
    if args.resume and args.start == str(begun) and (begun / "train_state.pt").exists():
        started = read_json(begun / "config.json").get("started")
    return {
        "version": VERSION, "data": data.name, "num_items": data.num_items, "interactions": len(data.items),
        "fingerprint": data.fingerprint, "split": data.split, "exclude_seen": data.exclude_seen,
        "item_name": data.item_name, "model": asdict(model.config), "seed": args.seed, "settings": settings,
        "teachers": teachers, "started": started, "protocol": data.protocol,
        "bert_folder": str(Path(args.bert).resolve()) if args.bert and Path(args.bert).is_dir() else None,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown", "machine": machine(),
    }  # fmt: skip


# ---------------------------------------------------------------- building the teacher


def build_teacher(args: argparse.Namespace, data: Interactions, part: Spans, reader: Reader | None) -> PreBert:
    """PreBERT with its item table: BERT's body, or (--bert none) MiniLM's shape with random weights."""
    causal = args.objective == "next"
    if reader is None:
        shape = BertConfig(max_position_embeddings=args.max_length, hidden_dropout_prob=args.dropout, causal=causal)
        model, norm = PreBert(shape, data.num_items), 1.0
    else:
        model = prebert_from_bert(*reader, data.num_items, args.max_length, causal, args.dropout)
        norm = reader[0].word_embedding.weight.norm(dim=1).mean().item()
    vectors = item_vectors(args.item_init, data, part, model.config.hidden_size, reader)
    set_item_table(model, vectors, norm)
    first_weights(model, args, data, part, vectors)
    return model


def first_weights(
    model: PreBert, args: argparse.Namespace, data: Interactions, part: Spans, vectors: Tensor | None
) -> None:
    """Weights of --start, see `start_from`, or near the identity; a checkpoint's, with --resume, replace them."""
    run = Path("runs") / data.name / args.name
    begun = all((run / name).exists() for name in ("config.json", "catalogue.json", "train_state.pt"))
    if args.start and not (args.resume and begun):
        start_from(model, args.start, data, part, vectors)
    elif args.near_identity and not args.start:
        near_identity(model)


def keep_texts(run: Path, data: Interactions, reader: Reader | None, in_scores: bool) -> None:
    """Keep with a trained run what BERT reads in its items' texts, for new items; a run that has them keeps its own.

    in_scores: with sparse data, also add them to the item table as `text_columns`: where item vectors started from
    texts, and in students of such models. Learnt in training they would gain less: there the rows alone explain what
    comes next. metrics.json and log.csv tell of the model without. By the first process alone.
    """
    if reader and any(data.texts) and world()[0] == 0 and not (run / "texts.safetensors").exists():
        vectors = text_vectors(*reader, data.texts[1:])  # (I, V)
        kept = {"texts": vectors.half()}
        with locked(run):
            if in_scores and sparse(data):
                columns, kept["directions"] = text_columns(vectors, TEXT_SIZE)
                model = with_text_columns(load_run(run)[0], columns)
                write_safetensors(run / "model.safetensors", model.state_dict())
                print("in the scores, texts now count beside what was learnt: few interactions per item", flush=True)
            write_safetensors(run / "texts.safetensors", kept)  # last: the sign that all is done


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pre-trained BERT into a recommender.")
    add_data_flags(parser)
    add = parser.add_argument_group("teacher").add_argument
    add("--bert", default="minilm", help="minilm, bert-base-uncased, ORG/NAME on the hub, a folder, or none: random "
        "weights (default: %(default)s)")  # fmt: skip
    add("--item-init", choices=ITEM_INITS, help="first item vectors: titles read by BERT, co-occurrence, their sum or "
        f"random (default: cooc; below {SPARSE} interactions per item by how well titles predict)")  # fmt: skip
    add_training_flags(parser, RECIPES)
    parser.set_defaults(name="teacher", objective="next")
    args = parser.parse_args()
    join_processes(args.device)
    data = load_asked(args)
    torch.manual_seed(args.seed)  # for first weights and co-occurrence; load_bert draws, too, before it reads
    reader = None if args.bert == "none" else load_bert(args.bert)
    args.item_init = args.item_init or default_init(data, args.split, reader)
    run = settle(args, RECIPES, data)
    parts = SPLITS[data.split](data)
    model = build_teacher(args, data, parts[0], reader)
    sampler = make_sampler(args, parts[0], data.num_items)
    loss = partial(item_loss, label_smoothing=args.label_smoothing, sampler=sampler)
    train(model, loss, data, parts, run, args, describe(data, model, args))
    keep_texts(run, data, reader, "text" in args.item_init)
    print(f"the best weights are in {run}; next:", command_line("distill.py", *data_flags(args), "--teacher", str(run)))


if __name__ == "__main__":
    run_command(main)
