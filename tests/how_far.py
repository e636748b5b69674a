"""How time and memory grow with users, items and lengths: `python tests/how_far.py FOLDER --json results/how-far.json`.

Writes random logs that differ in one thing at a time, reads each with data.py and trains a small student
on it for half a minute, teacher and distillation on the largest catalogues too: 10 minutes on two cores.
The slope of a column is the exponent p of cost ~ size^p between the first and the last row of its group.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from prebert import machine  # noqa: E402

GROUPS = {  # what differs: (users, items, items a user)
    "users": [(5_000, 10_000, 50), (80_000, 10_000, 50)],
    "items": [(20_000, 3_000, 50), (20_000, 50_000, 50), (20_000, 1_000_000, 50)],
    "length": [(20_000, 10_000, 12), (20_000, 10_000, 200)],
}
MEASURE = """
import sys, time
sys.path.insert(0, {root!r})
from data import load_dataset
from prebert import peak_memory_gb
began = time.perf_counter()
data = load_dataset({path!r}, min_items=1, min_length=1)
print(time.perf_counter() - began, peak_memory_gb(), data.num_items)
"""


def write_log(path: Path, users: int, items: int, length: int) -> None:
    """A log in which every item occurs and users walk from item to item in small steps, so that there is an order."""
    chance = np.random.default_rng(0)
    steps = chance.integers(-3, 4, (users, length))
    steps[:, 0] = chance.integers(0, items, users)
    rows = steps.cumsum(1) % items
    rows.reshape(-1)[: min(items, rows.size)] = np.arange(min(items, rows.size))
    with open(path, "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, row in enumerate(rows.tolist()):
            file.write("".join(f"{user}\t{item}\t{when}\n" for when, item in enumerate(row)))


def train(folder: Path, script: str, log: Path, name: str, *flags: str) -> dict:
    """Positions a second and peak GiB of half a minute of training; histories are equally long, so none is padding."""
    tokens = 4096 if script == "distill.py" else 2048  # in a batch, each script's default
    command = [sys.executable, str(ROOT / script), "--data", str(log), "--min-count", "1", "--minutes", "0.55",
               "--objective", "next", "--overwrite", "--name", name, "--tokens", str(tokens), *flags]  # fmt: skip
    began = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: {result.stderr}")
    run = folder / "runs" / log.stem / name
    report = json.loads((run / "metrics.json").read_text())
    steps, _, minutes, *_ = (run / "log.csv").read_text().splitlines()[-1].split(",")
    return {"items_per_s": round(int(steps) * tokens / (60 * float(minutes))), "peak_gb": report["peak_memory_gb"],
            "steps": int(steps), "wall_s": time.perf_counter() - began}  # fmt: skip


def measure(folder: Path, users: int, items: int, length: int) -> dict:
    """Reading and a student's training on one log; on the largest catalogues, the teacher and distillation too."""
    log = folder / f"u{users}-i{items}-l{length}.inter"
    if not log.exists():
        write_log(log, users, items, length)
    script = MEASURE.format(root=str(ROOT), path=str(log))
    printed = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    seconds, memory, found = map(float, printed.stdout.split())
    row = {"users": users, "items": int(found), "length": length, "read_s": seconds, "read_gb": memory}
    row["student"] = train(folder, "distill.py", log, "control", "--no-kd", "--size", "small")
    if items in (50_000, 1_000_000):
        # The default start, from co-occurrence, is an SVD of the catalogue: minutes at a million items, once a run.
        start = ("--item-init", "random") if items == 1_000_000 else ()
        row["teacher"] = train(folder, "teacher.py", log, "teacher", "--bert", "none", *start)
        row["distillation"] = train(folder, "distill.py", log, "student", "--size", "small")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where logs and runs are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report: dict = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "rows": [], "slopes": {}}
    known: dict[tuple, dict] = {}
    for place, (group, cases) in enumerate(GROUPS.items()):
        for case in cases:
            if case not in known:
                known[case] = measure(folder, *case)
                report["rows"].append(known[case])
                print(json.dumps(known[case]), flush=True)
        first, last = known[cases[0]], known[cases[-1]]
        times = math.log(cases[-1][place] / cases[0][place])
        report["slopes"][group] = {
            "reading seconds": math.log(last["read_s"] / first["read_s"]) / times,
            "reading memory": math.log(last["read_gb"] / first["read_gb"]) / times,
            "training seconds an item": math.log(first["student"]["items_per_s"] / last["student"]["items_per_s"])
            / times,
            "training memory": math.log(last["student"]["peak_gb"] / first["student"]["peak_gb"]) / times,
        }
        print(group, {name: round(slope, 2) for name, slope in report["slopes"][group].items()}, flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
