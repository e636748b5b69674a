"""Time the student beside what people would use instead: same weights, same machine, one run.

    python tests/peers.py --json results/peers.json       # 10 minutes, and 5 GB for two virtual environments

Each peer lives in a process of its own, in a virtual environment that is made on the first run
(tests/peers.txt, and RECBOLE below, whose versions clash with it). All get the weights of one untrained
Mini-BERT, 128 x 2, must name the same ten items for the same histories of 200, and are then timed in
turns, round after round; a ratio is the median over rounds of theirs / ours. Training is compared the
same way, in items a second. Serving is timed in float32, training in bf16 where the processor multiplies it.

    python tests/peers.py --accuracy --data steam --runs runs/steam/student-no-kd-s1 --json results/steam/peers.json

trains SASRec and BERT4Rec of RecTools and RecBole on our split instead, until validation no longer gains, and puts
NDCG@10 after each epoch beside that of our runs, with the minutes that it took.

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        .peers/hf/bin/python tests/peers.py --float32 --json results/float32.json

trains both in float32, here as without AVX-512, and says how much of a step the library's matrix products take.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from data import Interactions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RECBOLE = ["torch==2.13.0", "recbole==1.2.1", "numpy<2", "scipy<1.14", "pandas<3", "setuptools<81"]
ITEMS, LENGTH, HIDDEN, LAYERS, HEADS = 3416, 200, 128, 2, 4  # ML-1M's catalogue, the small student
MODELS = ["rectools-sasrec", "rectools-bert4rec", "recbole-sasrec", "recbole-bert4rec"]  # with --accuracy
ROWS, RATE, DROPOUT = 20, 0.2, 0.1  # of a training step
Call = Callable[[Tensor], tuple[Tensor, Tensor]]  # histories (B, T) -> scores and ids of the ten best (B, 10)


def histories(count: int) -> Tensor:
    """The same random full-length histories in every process, (count, LENGTH)."""
    return torch.randint(1, ITEMS + 1, (count, LENGTH), generator=torch.Generator().manual_seed(0))


def best_ten(scores: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """The ten best unseen of scores (B, 1 + ITEMS), a column an id, as any server must do it."""
    return scores.scatter(1, history, -torch.inf).index_fill(1, torch.tensor([0]), -torch.inf).topk(10, dim=1)


# ---------------------------------------------------------------- ours


def our_student(dropout: float = 0.0) -> nn.Module:
    from student import MiniBert

    return MiniBert("small", ITEMS, LENGTH, dropout=dropout)


def ours(weights: dict[str, Tensor]) -> Call:
    from student import TopK, compile_ahead

    model = our_student().eval()
    model.load_state_dict(weights)
    return compiled_top_k(model, TopK, compile_ahead)


def teacher(_: dict[str, Tensor]) -> Call:
    from prebert import BertConfig, PreBert
    from student import TopK, compile_ahead

    return compiled_top_k(PreBert(BertConfig(max_position_embeddings=LENGTH), ITEMS).eval(), TopK, compile_ahead)


def compiled_top_k(model: nn.Module, top_k: type, compile_ahead: Callable) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        graph = compile_ahead(top_k(model.requires_grad_(False), 10).eval(), Path(folder) / "peer.pt2")
    allowed = torch.ones(ITEMS + 2, dtype=torch.bool)
    return lambda history: graph(model.question(history), history, allowed)


# ---------------------------------------------------------------- Hugging Face and ONNX Runtime


class HuggingFace(nn.Module):
    """BertModel and the head that a recommender needs; ten best after [history, MASK]."""

    def __init__(self, dropout: float = 0.0):
        from transformers import BertConfig, BertModel

        super().__init__()
        shape = BertConfig(
            vocab_size=ITEMS + 2, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN, max_position_embeddings=LENGTH, type_vocab_size=1,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertModel(shape, add_pooling_layer=False)
        self.convolution = nn.Parameter(torch.zeros(3, HIDDEN))
        self.head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN, 1e-12))
        self.bias = nn.Parameter(torch.zeros(1 + ITEMS))

    def load(self, ours: dict[str, Tensor]) -> None:
        state = {"embeddings.word_embeddings": ours["item_embedding.weight"],
                 "embeddings.position_embeddings": ours["position_embedding.weight"],
                 "embeddings.token_type_embeddings": torch.zeros(1, HIDDEN)}  # fmt: skip
        state = {f"{name}.weight": tensor for name, tensor in state.items()}
        state |= {f"embeddings.LayerNorm.{kind}": ours[f"encoder.norm.{kind}"] for kind in ("weight", "bias")}
        places = {"attention.output.dense": "attention.output", "attention.output.LayerNorm": "attention_norm",
                  "intermediate.dense": "feed_forward.up", "output.dense": "feed_forward.down",
                  "output.LayerNorm": "feed_forward_norm"}  # fmt: skip
        for layer, kind in ((layer, kind) for layer in range(LAYERS) for kind in ("weight", "bias")):
            qkv = ours[f"encoder.layers.{layer}.attention.qkv.{kind}"].chunk(3)
            for part, tensor in zip(("query", "key", "value"), qkv, strict=True):
                state[f"encoder.layer.{layer}.attention.self.{part}.{kind}"] = tensor
            for theirs, our in places.items():
                state[f"encoder.layer.{layer}.{theirs}.{kind}"] = ours[f"encoder.layers.{layer}.{our}.{kind}"]
        missing, unexpected = self.bert.load_state_dict(state, strict=False)
        assert not unexpected and all("position_ids" in name or "token_type_ids" in name for name in missing), missing
        self.head.load_state_dict({name[5:]: ours[name] for name in ours if name.startswith("head.")})
        self.bias.data[1:], self.convolution.data = ours["item_bias"], ours["convolution"]

    def states(self, tokens: Tensor) -> Tensor:
        items = self.bert.embeddings.word_embeddings(tokens) * (tokens != 0)[..., None]  # (B, T, D)
        before = F.pad(items, (0, 0, 3, 0))
        read = items + sum(self.convolution[step - 1] * before[:, 3 - step : -step] for step in (1, 2, 3))
        return self.bert(inputs_embeds=read, attention_mask=(tokens != 0).long()).last_hidden_state  # (B, T, D)

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(self.head(states), self.bert.embeddings.word_embeddings.weight[: 1 + ITEMS], self.bias)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        tokens = F.pad(history[:, 1:], (0, 1), value=ITEMS + 1)
        return best_ten(self.logits(self.states(tokens)[:, -1]), history)


def hf_eager(weights: dict[str, Tensor]) -> Call:
    model = HuggingFace().eval()
    model.load(weights)
    return model


def hf_compiled(weights: dict[str, Tensor]) -> Call:
    return torch.compile(hf_eager(weights))


def onnxruntime(weights: dict[str, Tensor]) -> Call:
    import onnxruntime as runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        torch.onnx.export(hf_eager(weights), (histories(1),), path, dynamo=True, verbose=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda history: tuple(map(torch.from_numpy, session.run(None, {name: history.numpy()})))


# ---------------------------------------------------------------- RecBole


def recbole_model(dropout: float = 0.0) -> nn.Module:
    from recbole.model.sequential_recommender.bert4rec import BERT4Rec

    config = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu", "n_layers": LAYERS, "n_heads": HEADS,
        "hidden_size": HIDDEN, "inner_size": 4 * HIDDEN, "hidden_dropout_prob": dropout, "attn_dropout_prob": 0.0,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "mask_ratio": RATE, "loss_type": "CE",
        "MASK_ITEM_SEQ": "masked", "POS_ITEMS": "positive", "NEG_ITEMS": "negative", "MASK_INDEX": "index",
        "initializer_range": 0.02,
    }  # fmt: skip
    return BERT4Rec(config, SimpleNamespace(num=lambda _: 1 + ITEMS))


def recbole(weights: dict[str, Tensor]) -> Call:
    model = recbole_model().eval()
    names = {"item_embedding": "item_embedding", "position_embedding": "position_embedding",
             "encoder.norm": "LayerNorm", "head.0": "output_ffn", "head.2": "output_ln"}  # fmt: skip
    for layer in range(LAYERS):
        names |= {
            f"encoder.layers.{layer}.{our}": f"trm_encoder.layer.{layer}.{theirs}"
            for our, theirs in (
                ("attention.output", "multi_head_attention.dense"), ("feed_forward.up", "feed_forward.dense_1"),
                ("attention_norm", "multi_head_attention.LayerNorm"), ("feed_forward.down", "feed_forward.dense_2"),
                ("feed_forward_norm", "feed_forward.LayerNorm"),
            )
        }  # fmt: skip
    state = {"output_bias": F.pad(weights["item_bias"], (1, 0))}
    for name, tensor in weights.items():
        place, _, kind = name.rpartition(".")
        if place.endswith("qkv"):
            layer = place.split(".")[2]
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[f"trm_encoder.layer.{layer}.multi_head_attention.{part}.{kind}"] = piece
        elif place:  # not the convolution, which is 0
            state[f"{names[place]}.{kind}"] = tensor
    model.load_state_dict(state)

    def call(history: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.full((len(history),), LENGTH)
        return best_ten(model.full_sort_predict({"item_list": history, "length": lengths}), history)

    return call


# ---------------------------------------------------------------- training steps


def masked_rows(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One batch: tokens (ROWS, LENGTH), positions and ids of what is hidden, 40 a row, (ROWS, 40)."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, ITEMS + 1, (ROWS, LENGTH), generator=random)
    positions = torch.rand(ROWS, LENGTH, generator=random).argsort(1)[:, : int(RATE * LENGTH)].sort(1).values
    return tokens.scatter(1, positions, ITEMS + 1), positions, tokens.gather(1, positions)


def training(model: nn.Module, loss_of: Callable, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = loss_of(masked_rows(number % 50))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.train()
    return step


def train_ours(_: dict) -> Callable[[int], None]:
    from data import Batch
    from teacher import item_loss, keep_freed_memory, make_optimizer

    keep_freed_memory()
    model = our_student(DROPOUT)
    loss = lambda rows: item_loss(model, Batch(*rows, rows[1]))  # noqa: E731
    return training(model, loss, make_optimizer(model, 1e-3, 1e-3, 0.01))


def train_hf(_: dict) -> Callable[[int], None]:
    model = HuggingFace(DROPOUT)

    def loss(rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, positions, labels = rows
        asked = model.states(tokens).gather(1, positions[..., None].expand(-1, -1, HIDDEN))
        return F.cross_entropy(model.logits(asked).flatten(0, 1), labels.flatten())

    return training(model, loss, torch.optim.AdamW(model.parameters(), 1e-3))


def train_recbole(_: dict) -> Callable[[int], None]:
    model = recbole_model(DROPOUT)

    def loss(rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, positions, labels = rows
        return model.calculate_loss({"masked": tokens, "positive": labels, "negative": labels, "index": positions})

    return training(model, loss, torch.optim.Adam(model.parameters(), 1e-3))


def float32(rounds: int) -> dict:
    """Our training beside Hugging Face's in float32, in turns, and the time in matrix products of a step of ours."""
    torch.cpu._is_avx512_bf16_supported = lambda: False
    steps = {"ours": train_ours({}), "hf": train_hf({})}
    table: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        table.append({})
        for kind, step in steps.items():
            began = time.perf_counter()
            for number in range(10):
                step(number)
            table[-1][kind] = 100 * (time.perf_counter() - began)
    with torch.profiler.profile() as profile:
        for number in range(10):
            steps["ours"](number)
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    products = sum(own.get(f"aten::{name}", 0.0) for name in ("mm", "addmm", "bmm", "baddbmm")) / sum(own.values())
    ms = {kind: median([row[kind] for row in table[1:]]) for kind in steps}  # without the warm-up
    ratio = median([row["hf"] / row["ours"] for row in table[1:]])
    return {"capability": torch.backends.cpu.get_cpu_capability(), "median_ms": ms, "ratios": {"train_hf": ratio},
            "share of matrix products": products, "most that the ratio could be": ratio / products}  # fmt: skip


# ---------------------------------------------------------------- accuracy


def write_split(data: "Interactions", path: Path) -> None:
    """Leave-one-out as plain arrays, users and items counted from 0, for a peer that knows nothing of our code."""
    import numpy as np

    from data import entries_of, leave_one_out

    arrays: dict = {"num_users": data.num_users, "num_items": data.num_items, "exclude_seen": data.exclude_seen}
    train, valid, test = leave_one_out(data)
    for name, part in (("train", train), ("valid", valid), ("test", test)):
        asked = np.searchsorted(data.offsets, part.starts.numpy(), side="right") - 1  # (R,) users
        known = part if name != "valid" else train  # users who are not asked are trained on, and known as well
        rows, places = entries_of(known)
        users = (np.searchsorted(data.offsets, known.starts.numpy(), side="right") - 1)[rows.numpy()]
        arrays |= {f"{name}_users": users, f"{name}_items": data.items[places.numpy()] - 1}
        if name != "train":
            arrays |= {f"{name}_asked": asked, f"{name}_targets": part.targets.numpy() - 1}
    np.savez(path, **arrays)


def curve_of(run: Path) -> list[dict]:
    """NDCG@10 on validation after each epoch of one of our runs, with its minutes, those of its teachers included."""
    config, ended = json.loads((run / "config.json").read_text()), json.loads((run / "metrics.json").read_text())
    before = 0.0
    for teacher in [] if config["settings"].get("no_kd", True) else config["settings"]["teacher"]:
        teacher_run = run.parents[2] / teacher
        before += json.loads((teacher_run / "metrics.json").read_text())["minutes"]
        before += curve_of(teacher_run)[0]["before"]
    rate = ended["cpu_minutes"] / ended["minutes"]
    lines = [line.split(",") for line in (run / "log.csv").read_text().split()[1:]]
    return [{"epoch": int(epoch), "minutes": before + float(minutes), "before": before, "valid_NDCG@10": float(ndcg),
             "cpu_minutes": rate * (before + float(minutes))} for _, epoch, minutes, _, ndcg, _ in lines]  # fmt: skip


def accuracy(name: str, runs: list[Path], models: list[str], flags: list[str], folder: Path) -> Iterator[dict]:
    """Train the peers on a dataset, beside the curves of our runs; after each, all {model: [a row an epoch]} so far."""
    from data import load_dataset

    data = load_dataset(name)
    curves = {run.name: curve_of(run) for run in runs}
    report = {"data": {"name": data.name, "users": data.num_users, "items": data.num_items}, "protocol": data.protocol}
    with tempfile.TemporaryDirectory() as temporary:
        split = Path(temporary) / "split.npz"
        write_split(data, split)
        for model in models:
            python = python_of(model.split("-")[0], folder)
            command = [python, str(ROOT / "tests/trained_peer.py"), model, str(split), *flags]
            curves[model] = []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    if line.startswith("{"):
                        curves[model].append(json.loads(line))
                        print(model, line, end="", flush=True)
            if process.returncode:
                raise SystemExit(f"{model} ended with exit code {process.returncode}")
            yield {**report, "curves": curves}


# ---------------------------------------------------------------- processes

PEERS = {"ours": "ours", "teacher": "ours", "hf_eager": "hf", "hf_compiled": "hf", "onnxruntime": "hf",
         "recbole": "recbole", "train_ours": "ours", "train_hf": "hf", "train_recbole": "recbole"}  # fmt: skip


def work(kind: str, weights_file: str, threads: int) -> None:
    """In the peer's process: say the ten best items of 8 users, then time for as many seconds as each line asks."""
    torch.set_num_threads(threads)
    call = globals()[kind](torch.load(weights_file, weights_only=True))
    trains, rows = kind.startswith("train_"), histories(64)
    with torch.inference_mode(not trains):
        answers = [] if trains else [call(row[None])[1][0].tolist() for row in rows[:8]]
        print(json.dumps(answers), flush=True)
        for line in sys.stdin:
            times, end, number = [], time.perf_counter() + float(line), 0
            while time.perf_counter() < end:
                began = time.perf_counter()
                call(number) if trains else call(rows[number % 64][None])
                times.append(1000 * (time.perf_counter() - began))
                number += 1
            print(json.dumps(sorted(times)[len(times) // 2]), flush=True)


def python_of(place: str, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made when it is not there."""
    if place == "ours":
        return sys.executable
    python = folder / place / "bin" / "python"
    done = folder / place / "installed"
    if not done.exists():
        print(f"making {folder / place}", file=sys.stderr)
        venv.create(folder / place, with_pip=True, clear=True)
        needed = {"recbole": RECBOLE, "rectools": ["rectools[torch]==0.19.0"]}.get(
            place, ["-r", str(ROOT / "tests" / "peers.txt")]
        )
        for part in (
            (needed[:1], needed) if place == "recbole" else (needed,)
        ):  # torch first: recbole would pull its own
            subprocess.run([python, "-m", "pip", "install", "-q", *part], check=True)
        done.touch()
    return str(python)


def timed(pipes: dict[str, subprocess.Popen], rounds: int, seconds: float) -> Iterator[dict[str, float]]:
    """Median milliseconds of every process, round after round, one at a time."""
    for number in range(rounds):
        row = {}
        for kind, process in pipes.items():
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            row[kind] = json.loads(process.stdout.readline())
        print(f"round {number + 1}: " + "  ".join(f"{kind} {ms:.2f} ms" for kind, ms in row.items()), flush=True)
        yield row


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def compare(folder: Path, rounds: int, threads: int) -> dict:
    """Start every peer, check that they agree, time them in turns."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        weights = f"{temporary}/weights.pt"
        model = our_student()
        for name, parameter in model.named_parameters():  # norms as they begin: others make all users alike
            if "norm" not in name and not name.startswith("head.2"):
                parameter.data.normal_(0.0, 0.1)
        model.convolution.data.zero_()  # RecBole has none
        torch.save(model.state_dict(), weights)
        pipes = {}
        for kind, place in PEERS.items():
            command = [python_of(place, folder), __file__, "--worker", kind, weights, "--threads", str(threads)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            pipes[kind] = process
            stack.callback(process.wait)
            stack.callback(process.stdin.close)
        answers = {kind: json.loads(process.stdout.readline()) for kind, process in pipes.items()}
        assert len({tuple(ids) for ids in answers["ours"]}) == 8, "users with other histories get the same items"
        for kind in ("hf_eager", "hf_compiled", "onnxruntime", "recbole"):
            same = sum(set(a) == set(b) for a, b in zip(answers[kind], answers["ours"], strict=True))
            if same < 8:
                raise SystemExit(f"{kind} names other items than ours for {8 - same} of 8 users")
        table = list(timed(pipes, rounds, 2.0))
    ms = {kind: median([row[kind] for row in table]) for kind in PEERS}
    ratios = {kind: median([row[kind] / row["ours"] for row in table]) for kind in list(PEERS)[1:6]}
    faster = [min(row["train_hf"], row["train_recbole"]) / row["train_ours"] for row in table]
    speeds = {kind: ROWS * LENGTH / ms[kind] * 1000 for kind in PEERS if kind.startswith("train_")}
    ratios["train_items_per_s"] = median(faster)
    # What we serve by default is float32, since bf16 changes which ten items come out, so both tables are one.
    return {"median_ms": ms, "train_items_per_s": speeds, "ratios": ratios, "ratios_fast": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the student beside Hugging Face, ONNX Runtime and RecBole.")
    parser.add_argument("--venvs", type=Path, default=Path(".peers"), help="where their environments are kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--accuracy", action="store_true", help="train peers on our split instead")
    parser.add_argument("--data", default="steam", help="with --accuracy")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="with --accuracy: ours, beside them")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="with --accuracy: peers")
    parser.add_argument("--length", type=int, default=50, help="with --accuracy: items that they read")
    parser.add_argument("--minutes", type=float, default=60, help="with --accuracy: at most, a peer")
    parser.add_argument("--float32", action="store_true", help="only train, in float32, in this environment")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "WEIGHTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker, args.threads)
    from prebert import machine

    command = shlex.join(["python", *sys.argv])
    if args.accuracy:
        flags = ["--length", str(args.length), "--minutes", str(args.minutes)]
        for report in accuracy(args.data, args.runs, args.models, flags, args.venvs.resolve()):
            if args.json:  # after each model: they take long
                report = {"command": command, "machine": machine(), **report}
                args.json.write_text(json.dumps(report, indent=1) + "\n")
                print(f"written to {args.json}")
        return None
    report = float32(args.rounds) if args.float32 else compare(args.venvs.resolve(), args.rounds, args.threads)
    shape = f"{HIDDEN} x {LAYERS}, length {LENGTH}"
    report = {"command": command, "machine": machine(), "threads": args.threads, "shape": shape, **report}
    for kind, ratio in report["ratios"].items():
        print(f"{kind:<20}{ratio:6.2f} x")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
