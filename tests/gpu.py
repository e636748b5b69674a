"""All that needs a GPU, in one command of less than nine minutes: nobody has one for long.

    python tests/gpu.py --gather gpu-files       # at home, with network: what a bare machine lacks, git-ignored
    python tests/gpu.py --json gpu.json          # there, without network: this checkout with its gpu-files/
    python tests/gpu.py --dry --json dry.json    # the same on a CPU, tiny, in seconds; CI runs it, so it does not rot

It needs PyTorch with CUDA, numpy and a C++ compiler; other packages come from gpu-files/wheels where they are missing.
The JSON has a part for each question and is written after every answer. A part or mode that fails, or a part that takes
longer than its limit, leaves an `error` beside what was found, and the others go on:

    card                   what it multiplies and copies: the peak that shares are of
    torchrun, cuda tests   DDP in one process, over NCCL (dry: gloo); the tests that are skipped without CUDA
    compile ...            what the first call costs, all compiling at once; later parts find it done
    train ...              teacher.py and distill.py as users run them, with cached states of the teacher and without
    serve ...              the top 10 by number of users, in four ways, and whether it is the CPU's; Hugging Face's is
                           that of `small`
    steps ...              a training step alone, by the size of its batch, eager and compiled
    million                a step and the top 10 with a million items

Units are in the names. Shares are of what this card multiplied in bf16, and of the datasheet where it is a known one.
"""

import argparse
import contextlib
import gzip
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
FILES = ROOT / "gpu-files"
LIMIT = 64 * 2**20  # bytes that may travel, the repository's own included
PYTHON = "3.12"  # of the machine with the GPU
WHEELS = [
    "tokenizers==0.23.3", "tqdm==4.70.1", "huggingface_hub==2.4.0", "transformers==5.24.0", "safetensors==0.8.0",
    "pytest==9.2.0", "hypothesis==6.170.17", "regex", "pyyaml", "packaging", "pluggy", "iniconfig", "pygments",
    "sortedcontainers", "typer", "click", "annotated-doc", "httpx2", "httpcore2", "truststore", "anyio", "idna", "h11",
    "certifi",
]  # fmt: skip
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for CUDA must not start it before the forks
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each part, and at first several compile


def unpack_missing(wheels: Path, site: Path) -> None:
    """Put the packages that this Python lacks into `site`, and that on the path of this process and of later ones."""
    for wheel in wheels.glob("*.whl"):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            zipfile.ZipFile(wheel).extractall(site)
    if site.exists():
        sys.path.append(str(site))
        os.environ["PYTHONPATH"] = str(site)


if __name__ == "__main__" and not {"--dry", "--gather", "--worker"} & {*sys.argv}:
    unpack_missing(FILES / "wheels", FILES / "site")
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import peers  # noqa: E402
import teacher  # noqa: E402
from data import Batch, batches, dataset_name, fixed_windows, leave_one_out, load_dataset, next_items  # noqa: E402
from prebert import (  # noqa: E402
    ENCODER, BertConfig, Dropout, PreBert, find_bert, load_run, machine, peak_memory_gb, read_json, read_weights,
    write_safetensors,
)  # fmt: skip
from student import MiniBert, TopK, compile_ahead, load_package  # noqa: E402

Rows = Iterator[dict]  # what a part finds, piece by piece; merged into its part of the JSON
ITEMS = 3416  # ML-1M's
REAL = SimpleNamespace(
    dry=False, device="cuda", log=FILES / "ml-1m" / "ml-1m.inter.gz", bert=FILES / "minilm", minutes=2.0, short=0.3,
    flags=[], size="base", length=200, positions={"teacher": (2048, 16384), "student": (4096, 65536)}, items=10**6,
    users=(1, 8, 64, 256, 1024), modes=("eager", "AOT package", "compiled", "CUDA graphs"), seconds=0.3, matrix=8192,
    peak=0.0, total=530.0,
)  # fmt: skip


def dry(folder: Path) -> SimpleNamespace:
    """The same questions, tiny: made-up data, a BERT of two layers, milliseconds, one thread."""
    import torch._dynamo  # every optimizer imports it, which takes a second: here once for all forks
    from conftest import write_ring
    from test_prebert import bert_folder

    torch.set_num_threads(1)
    (folder / "whole").mkdir()
    cut_bert(bert_folder(folder / "whole")[0], folder / "minilm")
    tiny = dict(dry=True, device="cpu", log=write_ring(folder), bert=folder / "minilm", minutes=0.01, short=0.01)
    tiny |= dict(size="tiny", length=12, users=(1, 3), modes=("eager",), seconds=0.0, matrix=128, items=5000, total=300)
    tiny |= dict(positions={"teacher": (60,), "student": (60,)})
    tiny |= dict(flags=["--tokens", 256, "--eval-users", 20, "--max-length", 12])
    return SimpleNamespace(**vars(REAL) | tiny)


# ---------------------------------------------------------------- parts


def timed(call: Callable[[], object], device: str, seconds: float, least: int = 3) -> float:
    """Median seconds of a call, over `seconds` and at least so many calls; each ends when the device has finished."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def attempt(work: Callable[[], dict]) -> dict:
    """What it finds, or why it could not: one mode that fails does not cost its part the others."""
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}; cause: {error.__cause__}"[:2000]}


def card(s: SimpleNamespace) -> Rows:
    yield {"machine": machine(), "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    left, right = torch.randn(2, s.matrix, s.matrix, device=s.device, dtype=torch.bfloat16)
    yield {"bf16_tflops": 2e-12 * s.matrix**3 / timed(lambda: left @ right, s.device, 2 * s.seconds, 5)}
    blob, copy = torch.ones(2, 8 * s.matrix**2, device=s.device)  # float32
    yield {"copied_gb_per_s": 8e-9 * blob.numel() / timed(lambda: copy.copy_(blob), s.device, s.seconds, 5)}


def speed(s: SimpleNamespace, model: PreBert, items_per_s: float) -> dict:
    """What training does of the card's peak, counting 6 operations an item for each weight, the table's in the softmax.

    Attention's scores, the optimizer and a teacher's answers do not count as work.
    """
    operations = 6 * sum(parameter.numel() for parameter in model.parameters()) * items_per_s
    known = any(name in (machine()["gpu"] or "") for name in ("H100", "H200"))  # SXM, dense: 989e12 a second
    peaks = {"measured": s.peak, "datasheet": 989e12 * known}
    return {"items_per_s": items_per_s} | {f"share_of_{n}_peak": operations / peak for n, peak in peaks.items() if peak}


def cuda_tests(s: SimpleNamespace) -> Rows:
    """Every test whose name says cuda, and no other."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run([*command, "--continue-on-collection-errors"], cwd=ROOT, capture_output=True, text=True)
    yield {"summary": result.stdout.strip().rpartition("\n")[2]}
    if result.returncode:
        raise RuntimeError((result.stdout + result.stderr)[-2500:])


def torchrun(s: SimpleNamespace) -> Rows:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run([*launch, __file__, "--worker", s.device], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-2500:])
    yield json.loads(result.stdout.strip().rpartition("\n")[2])


def worker(device: str) -> None:
    """Under torchrun: what teacher.py asks of several processes, asked of one: gradients, numbers, objects."""
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    model = MiniBert("tiny", 100, 16, causal=True, dropout=0.0).to(device)
    objective, batch, found = teacher.ModelWithLoss(model, teacher.item_loss), made_up(model, 64, device), []
    for module in (objective, nn.parallel.DistributedDataParallel(objective)):
        model.zero_grad()
        module(*batch).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    own, box = torch.ones(2, dtype=torch.float64, device=device), [b"a checkpoint"]
    rows = [torch.zeros_like(own)]
    dist.all_gather(rows, own)
    dist.broadcast_object_list(box)
    same = torch.allclose(*found, atol=1e-6) and rows[0].equal(own) and box == [b"a checkpoint"]
    print(json.dumps({"backend": dist.get_backend(), "processes": dist.get_world_size(), "same": same}))
    dist.destroy_process_group()


def trained(s: SimpleNamespace, script: ModuleType, name: str, minutes: float, *flags: object) -> Rows:
    """A training as a user starts it, through the script's own main(); items/s include its validations."""
    settings = ["--data", s.log, "--name", name, "--minutes", minutes, "--device", s.device, *s.flags, *flags]
    settings += ["--precision", "bf16", "--seed", 1, "--patience", 999]
    sys.argv = [f"{script.__name__}.py", *map(str, settings)]
    began = time.perf_counter()
    script.main()
    seconds, run = time.perf_counter() - began, Path("runs") / dataset_name(str(s.log)) / name
    made, (model, config, _) = read_json(run / "metrics.json"), load_run(run)
    sizes = fixed_windows(leave_one_out(load_dataset(str(s.log)))[0], model.max_length).sizes
    of_step = (sizes - 1).sum().item() / len(batches(sizes, int(config["settings"]["tokens"])))
    around = {"before_and_after_s": seconds - 60 * made["minutes"], "log": (run / "log.csv").read_text().splitlines()}
    yield {"command": config["command"], **made, **around}
    yield speed(s, model, of_step * made["steps"] / (60 * made["minutes"]))


def made_up(model: PreBert, positions: int, device: str) -> Batch:
    """A batch of full windows of random items, which asks at each of about so many positions."""
    rows = max(1, positions // model.max_length)
    asked = next_items(torch.randint(1, model.num_items + 1, (rows, model.max_length + 1)))
    return Batch(*(tensor.to(device) for tensor in (*asked, asked[1])))


def training_step(objective: Callable, model: PreBert, batch: Batch, device: str) -> Callable[[], None]:
    """A step as in teacher.py, on a batch that is on the device already."""
    optimizer = teacher.make_optimizer(model, 1e-4, 1e-4, 0.01)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = objective(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        loss.item()
        optimizer.step()

    return step


def plain_dropout(model: nn.Module) -> None:
    """PyTorch's own dropout instead of ours, whose Tensor.random_ torch.compile takes into no graph."""
    for module in [*model.modules()]:
        for name, part in module.named_children():
            if isinstance(part, Dropout):
                setattr(module, name, nn.Dropout(part.out_of_256 / 256))


def steps(s: SimpleNamespace, name: str, warm: bool = False) -> Rows:
    """Training steps alone; with `warm`, just what the first compiled one costs, in seconds."""
    modes = ("eager", "eager, nn.Dropout", "compiled, nn.Dropout", "compiled")
    for mode in modes[2:] if warm else modes[:2] if s.dry else modes:
        yield {mode: attempt(partial(steps_in, s, name, mode, warm))}


def steps_in(s: SimpleNamespace, name: str, mode: str, warm: bool) -> dict:
    model: PreBert = MiniBert(s.size, ITEMS, s.length, causal=True)
    if name == "teacher":
        shape = (16, 2, 2, 32, s.length) if s.dry else (384, 6, 12, 1536, s.length)
        model = PreBert(BertConfig(*shape, hidden_dropout_prob=0.2, causal=True), ITEMS)
    if "nn.Dropout" in mode:
        plain_dropout(model)
    objective: Callable = teacher.ModelWithLoss(model.to(s.device).train(), teacher.item_loss)
    if "compiled" in mode:
        torch._dynamo.reset()
        objective = torch.compile(objective, dynamic=True)
    row: dict = {}
    for positions in s.positions[name]:
        batch = made_up(model, positions, s.device)
        step = training_step(objective, model, batch, s.device)
        row.setdefault("first_s", timed(step, s.device, 0, 1))
        if not warm:
            row[positions] = speed(s, model, batch.tokens.numel() / timed(step, s.device, 4 * s.seconds))
    return row


class HuggingFace(peers.HuggingFace):
    """Their BertModel, called as `TopK` is."""

    def forward(self, tokens: Tensor, excluded: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(self.states(tokens)[:, -1])  # (B, 1 + I)
        scores = scores.masked_fill(~allowed[: scores.shape[1]], -torch.inf)
        return scores.scatter(1, excluded, -torch.inf).topk(10, dim=1)


def inputs(model: PreBert, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Histories (B, S) as `TopK` takes them, with all items allowed: padding is none."""
    allowed = torch.arange(model.num_items + 2, device=seen.device) > 0
    return model.question(seen), seen, allowed


def served(name: str) -> tuple[PreBert, nn.Module]:
    """A model, and the graph from its questions and histories to the ten best."""
    torch.manual_seed(0)
    if name == "student":
        model = load_run(ROOT / "results" / "ml-1m" / "student")[0]
    else:  # `small` asks with a [MASK], as Hugging Face's model must
        shape = BertConfig(max_position_embeddings=200, causal=True)
        model = PreBert(shape, ITEMS) if name == "teacher" else peers.our_student().eval()
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.1)
    graph: nn.Module = TopK(model.eval(), 10)
    if name == "Hugging Face":
        graph = HuggingFace()
        graph.load(model.state_dict())
    return model, graph.eval().requires_grad_(False)


def way(mode: str, graph: nn.Module, package: Path) -> Callable:
    """The graph as it is or compiled; a package that an earlier part has made is only loaded."""
    if mode == "AOT package":
        return load_package(package) if package.exists() else compile_ahead(graph, package)
    if mode == "eager":
        return graph
    torch._dynamo.reset()
    return torch.compile(graph, mode="reduce-overhead" if mode == "CUDA graphs" else None)


def serve(s: SimpleNamespace, name: str, modes: tuple[str, ...], warm: bool = False) -> Rows:
    """Median ms of the top 10 in float32 by users, whose histories are full and on the device; `warm` just compiles."""
    model, graph = served(name)
    histories = torch.randint(1, ITEMS + 1, (max(s.users), 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # our own graph, on the CPU
        expected = TopK(model, 10)(*inputs(model, histories[:64]))[1].sort().values
    graph.to(s.device)
    asked = [inputs(model, histories[:users].to(s.device)) for users in s.users]
    for mode in modes:
        make = partial(way, mode, graph, Path(f"{name}.pt2"))
        yield {mode: attempt(partial(serve_in, s, make, asked, expected, warm))}


def serve_in(s: SimpleNamespace, make: Callable, asked: list, expected: Tensor, warm: bool) -> dict:
    began, row = time.perf_counter(), {"same_top10": 1.0}
    call = make()
    for people in asked:
        with torch.inference_mode():
            same = (call(*people)[1][:64].cpu().sort().values == expected[: len(people[0])]).all(1)
            row["same_top10"] = min(row["same_top10"], same.double().mean().item())
            row.setdefault("first_s", time.perf_counter() - began)
            if not warm:
                row[len(people[0])] = 1000 * timed(partial(call, *people), s.device, s.seconds, 5)
    return row | ({"all_sizes_s": time.perf_counter() - began} if warm else {})


def million(s: SimpleNamespace) -> Rows:
    """The student's shape over a huge catalogue: ms of the top 10 of all items, and steps with a sampled softmax."""
    model = MiniBert(s.size, s.items, s.length, causal=True).eval()
    seen, graph = torch.randint(1, s.items + 1, (64, s.length)), TopK(model, 10)
    with torch.inference_mode():
        expected = graph(*inputs(model, seen[:4]))[1].sort().values
        graph, asked = graph.to(s.device), {n: inputs(model, seen[:n].to(s.device)) for n in (1, 4, 64)}
        same = (graph(*asked[4])[1].cpu().sort().values == expected).all(1).double().mean().item()
        ms = {n: 1000 * timed(partial(graph, *people), s.device, s.seconds) for n, people in asked.items()}
    yield {"items": s.items, "same_top10": same, **ms}
    sampler = teacher.Sampler(torch.full((s.items,), 1 / s.items, device=s.device), min(8192, s.items // 10))
    objective = teacher.ModelWithLoss(model.train(), partial(teacher.item_loss, sampler=sampler))
    batch = made_up(model, s.positions["student"][0], s.device)
    seconds = timed(training_step(objective, model, batch, s.device), s.device, 2 * s.seconds)
    yield {"items_per_s": batch.tokens.numel() / seconds, "negatives": sampler.draws}


# ---------------------------------------------------------------- running parts


def child(part: Callable[[], Rows], writer: Connection, log: str) -> None:
    """In a process of its own: send every row, then what the part has cost."""
    os.setsid()  # so that it can be ended with all that it starts
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    began = time.perf_counter()
    try:
        for row in part():
            writer.send(row)
    except BaseException as error:
        writer.send({"error": f"{type(error).__name__}: {error}"[:3000], "traceback": traceback.format_exc()[-2000:]})
    cost = {"seconds": time.perf_counter() - began, "peak_memory_gb": peak_memory_gb()}
    if torch.cuda.is_initialized():
        cost["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    writer.send(cost)


def run(parts: dict[str, Callable[[], Rows]], limit: float, report: dict, path: Path) -> None:
    """Parts at the same time, for `limit` seconds, each in a fork of this process, which itself never touches CUDA."""
    context, running = multiprocessing.get_context("fork"), {}
    for name, part in parts.items():
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(part, writer, f"{name}.log"))
        process.start()
        writer.close()
        running[reader], report[name] = (name, process), {}
    end = time.monotonic() + limit
    while running:
        ready = wait([*running], max(0.0, end - time.monotonic()))
        for reader in ready or [*running]:
            name, process = running[reader]
            try:
                report[name] |= reader.recv() if ready else {"error": f"not finished after {limit:.0f} s"}
                ended = not ready
            except EOFError:
                ended = True
            if ended:
                del running[reader]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
                if not {"seconds", "error"} & report[name].keys():
                    report[name]["error"] = f"ended with code {process.exitcode}"
                print(f"{name}: {json.dumps(report[name])[:500]}", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def everything(s: SimpleNamespace, path: Path) -> dict:
    """After a look at the card, all at once what measures no speed; then part after part, the dearest first."""
    began, report = time.monotonic(), {"dry": s.dry, "skipped": []}
    ours = dict.fromkeys(("student", "small", "teacher"), s.modes)
    graphs = ours | {"Hugging Face": tuple(mode for mode in s.modes if mode != "AOT package")}
    if not importlib.util.find_spec("transformers"):
        report["skipped"].append(f"serve {graphs.popitem()[0]}: transformers is not installed")
    together: dict[str, Callable[[], Rows]] = {"torchrun": partial(torchrun, s)}
    start = ("--bert", s.bert, "--item-init", "cooc")  # this BERT has no words to read titles with
    tutor = ("--size", s.size, "--teacher", Path("runs") / dataset_name(str(s.log)) / "teacher")
    train: dict[str, tuple[float, Callable[[], Rows]]] = {
        "train teacher": (60 * s.minutes + 40, partial(trained, s, teacher, "teacher", s.minutes, *start)),
        "train student": (60 * s.minutes + 50, partial(trained, s, distill, "student", s.minutes, *tutor)),
        "train student without cache":
            (60 * s.short + 30, partial(trained, s, distill, "no-cache", s.short, *tutor, "--no-cache")),
    }  # fmt: skip
    measure = {f"serve {name}": (40, partial(serve, s, name, modes)) for name, modes in graphs.items()}
    measure |= {f"steps {name}": (40, partial(steps, s, name)) for name in s.positions}
    measure["million"] = (30, partial(million, s))
    if s.dry:
        together |= {name: part for name, (_, part) in measure.items()}
        report["skipped"] += ["cuda tests", "compile", "modes but eager", "NCCL, gloo instead"]
    else:
        together["cuda tests"] = partial(cuda_tests, s)
        together |= {f"compile {n}": partial(serve, s, n, modes[1:], warm=True) for n, modes in graphs.items()}
        together |= {f"compile steps {name}": partial(steps, s, name, warm=True) for name in s.positions}
    run({"card": partial(card, s)}, 60, report, path)
    s.peak = 1e12 * report["card"].get("bf16_tflops", 0.0)
    if s.dry or report["card"].get("machine", {}).get("gpu"):  # else nothing can work
        run(together, 110, report, path)
        for name, (limit, part) in train.items() if s.dry else [*train.items(), *measure.items()]:
            run({name: part}, max(0.0, min(limit, began + s.total - time.monotonic())), report, path)
    report["total_s"] = time.monotonic() - began
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


# ---------------------------------------------------------------- gathering


def write_log(folder: Path) -> None:
    """ML-1M as it is after filtering, with places in the history for times: a third of the bytes, the same run."""
    data = load_dataset("ml-1m")
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, (begin, end) in enumerate(zip(data.offsets[:-1], data.offsets[1:], strict=True)):
        lines += [f"{user}\t{data.raw_ids[item]}\t{place}" for place, item in enumerate(data.items[begin:end])]
    films = ["item_id:token\tmovie_title:token_seq", *map("\t".join, zip(data.raw_ids, data.titles, strict=True))]
    folder.mkdir()
    (folder / "ml-1m.inter.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    (folder / "ml-1m.item").write_text("\n".join([films[0], *films[2:], ""]), "utf-8")
    again = load_dataset(str(folder / "ml-1m.inter.gz"))
    assert (again.fingerprint, again.raw_ids, again.titles) == (data.fingerprint, data.raw_ids, data.titles)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def cut_bert(source: Path, target: Path) -> None:
    """A BERT folder in half precision that knows the special words alone.

    Every 30th row of the word table stays behind theirs, since the table's mean norm sets that of the item table.
    """
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tensors = {name: tensor.half() for name, tensor in read_weights(source).items() if ENCODER.match(name)}
    for name in [name for name in tensors if name.endswith("word_embeddings.weight")]:
        rows = [tokenizer.token_to_id(word) or 0 for word in SPECIAL]
        tensors[name] = tensors[name][[*rows, *range(0, len(tensors[name]), 30)]]
    write_safetensors(target / "model.safetensors", tensors)
    words = models.WordLevel({word: row for row, word in enumerate(SPECIAL)}, "[UNK]")
    Tokenizer(words).save(str(target / "tokenizer.json"))
    (target / "config.json").write_bytes((source / "config.json").read_bytes())


def gather(folder: Path) -> None:
    """What a bare machine lacks besides this repository, into a new folder."""
    folder.mkdir(parents=True)
    write_log(folder / "ml-1m")
    cut_bert(find_bert("minilm"), folder / "minilm")
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("2014", "_2_17", "_2_28")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
    subprocess.run([*command, "--python-version", PYTHON, "--dest", folder / "wheels", *WHEELS], check=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parts = {part.name: [*part.iterdir()] for part in sorted(folder.iterdir())}
    parts["this repository"] = [ROOT / name for name in tracked.split("\0")[:-1]]
    sizes = {name: sum(file.stat().st_size for file in files) for name, files in parts.items()}
    for name, size in [*sizes.items(), ("together", sum(sizes.values()))]:
        print(f"{name:<16}{size / 2**20:6.1f} MiB")
    if sum(sizes.values()) > LIMIT:
        sys.exit(f"that is more than {LIMIT / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="All that needs a GPU, in one command of less than nine minutes.")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="(default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--gather", type=Path, metavar="FOLDER", help="collect what a bare machine lacks, and stop")
    parser.add_argument("--worker", metavar="DEVICE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker or args.gather:
        return worker(args.worker) if args.worker else gather(args.gather)
    path = args.json.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        report = everything(dry(Path(folder)) if args.dry else REAL, path)
    parts = [(name, part) for name, part in report.items() if isinstance(part, dict)]
    parts += [(f"{name}, {mode}", row) for name, part in parts for mode, row in part.items() if isinstance(row, dict)]
    failed = [name for name, part in parts if "error" in part]
    print(f"written to {path} after {report['total_s']:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
