"""Draw the pictures from the numbers beside them. Needs matplotlib, which tests/requirements.txt asks for.

    python results/plot.py                   # results/ml-1m: bench-latency.png, bench-trade.png, curves.png
    python results/plot.py bench.json        # of your own `evaluate.py --bench --json bench.json`: the first two
    python results/plot.py runs/ml-1m/*      # of your own runs: runs/ml-1m/curves.png
    python results/plot.py sparsity.json     # of tests/sparsity.py; or peers.json of tests/peers.py --accuracy

Runs whose config.json differs in the seed alone are one model: one colour, a line through the mean, and a band
from the lowest to the highest seed.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import InputError, run_command
from prebert import read_json

RESULTS = Path(__file__).parent / "ml-1m"
# Models of RESULTS/bench.json: what the picture calls them, and the file and name that hold their mean over seeds.
REPORTED = {
    "teacher-s1": ("teacher", "test.json", "teacher-s1"),
    "student-s1": ("student", "test.json", "student-s1"),
    "student-small-s1": ("small student (one seed)", "", ""),
    "student-tiny-s1": ("tiny student", "test.json", "student-tiny-s1"),
}
# Curves of peers.json, by the name of a run without its seed, or of a peer.
CURVES = {
    "teacher": "PreBERT", "student": "its student, after PreBERT's minutes",
    "student-no-kd": "Mini-BERT without a teacher", "student-no-kd-cooc": "Mini-BERT, no teacher, no titles",
    "rectools-sasrec": "RecTools' SASRec", "rectools-bert4rec": "RecTools' BERT4Rec",
    "recbole-sasrec": "RecBole's SASRec", "recbole-bert4rec": "RecBole's BERT4Rec",
}  # fmt: skip
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130})


def new_picture(title: str, x: str, y: str) -> Axes:
    axes = plt.subplots(figsize=(6.2, 3.8), layout="constrained")[1]
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return axes


def log_axis(axis, steps: tuple[int, ...]) -> None:
    """Ticks at these multiples of powers of ten, written out."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def accuracy(name: str, report: dict, reported: dict) -> tuple[str, float, float | None]:
    """A model's label, its NDCG@10 and the standard deviation over seeds, None where it has one."""
    label, file, key = reported.get(name, (name, "", ""))
    if file:
        seeds = json.loads((RESULTS / file).read_text())["seeds"][key]
        return label, seeds["mean"], seeds["std"]
    return label, next(row["NDCG@10"] for row in report["rows"] if row["name"] == name), None


def bench(file: Path, reported: dict) -> None:
    """Latency by batch size, and accuracy against the latency of one user."""
    report = json.loads(file.read_text())
    models: dict[str, dict[int, float]] = {row["name"]: {} for row in report["rows"] if "params" in row}
    for cell in report["bench"]:
        if cell["name"] in models and cell["mode"] == "compiled" and cell["length"] != "real":  # 20, then 200
            models[cell["name"]][cell["batch_size"]] = cell["p50_ms"]
    speed = new_picture("top 10 after 200 items, compiled", "users at once", "median ms")
    title = "accuracy against speed" + "; bars: standard deviation over three seeds" * bool(reported)
    trade = new_picture(title, "median ms for one user of 200 items, compiled", "NDCG@10")
    for color, (name, times) in zip(COLORS * len(models), models.items(), strict=False):
        label, mean, std = accuracy(name, report, reported)
        beside = {"xytext": (8, -3), "textcoords": "offset points", "color": color}
        speed.plot([*times], [*times.values()], "o-", color=color, markersize=4)
        speed.annotate(label.partition(" (")[0], (max(times), times[max(times)]), **beside)
        trade.errorbar(times[1], mean, yerr=std, fmt="o", color=color, capsize=3)
        below = {} if std else {"xytext": (4, -20)}  # clear of its neighbour's bar
        trade.annotate(label, (times[1], mean), **beside | below)
    speed.set(xscale="log", yscale="log")
    trade.set_xscale("log")
    log_axis(speed.xaxis, (1,))
    log_axis(speed.yaxis, (1,))
    log_axis(trade.xaxis, (1, 2, 5))
    speed.set_xlim(right=4 * speed.get_xlim()[1])  # room for the names
    speed.set_xticks(sorted({size for times in models.values() for size in times}))
    trade.set_xlim(right=2.5 * trade.get_xlim()[1])
    speed.figure.savefig(file.with_name(file.stem + "-latency.png"))
    trade.figure.savefig(file.with_name(file.stem + "-trade.png"))


def draw_seeds(axes: Axes, color: str, seeds: list[dict[float, float]], label: str) -> None:
    """One model: {x: y} of each seed as a line through the mean and a band from the lowest to the highest."""
    places = sorted(set.intersection(*map(set, seeds)))
    values = [[points[place] for points in seeds] for place in places]  # (places, seeds)
    label += f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
    axes.plot(places, [sum(row) / len(row) for row in values], "o-", color=color, markersize=3, label=label)
    axes.fill_between(places, [*map(min, values)], [*map(max, values)], color=color, alpha=0.2, linewidth=0)


def sparsity(file: Path) -> None:
    """Test NDCG@10 against the share of the users that a model was trained on; bodies.json beside it is drawn, too."""
    report = json.loads(file.read_text())
    rows = [row | {"model": f"tiny student {row['model']}"} for row in report["rows"]]
    if (bodies := file.with_name("bodies.json")).exists():
        of_bodies = json.loads(bodies.read_text())["rows"]
        rows += [row | {"model": f"PreBERT with texts, {row['model']}"} for row in of_bodies]
    axes = new_picture(
        f"{report['data']}: trained on a share of the users", "% of the users", "test NDCG@10 of all users"
    )
    models: dict[str, dict[int, dict[float, float]]] = {}
    for row in rows:
        models.setdefault(row["model"], {}).setdefault(row["seed"], {})[row["users"]] = row["NDCG@10"]
    for color, (name, seeds) in zip(COLORS, models.items(), strict=False):
        draw_seeds(axes, color, list(seeds.values()), name)
    axes.set_xscale("log")
    log_axis(axes.xaxis, (1,))
    axes.set_xticks(sorted({row["users"] for row in rows}))
    axes.legend(frameon=False, loc="lower right")
    axes.figure.savefig(file.with_suffix(".png"))


def peers(file: Path) -> None:
    """Validation NDCG@10 against CPU minutes, after each epoch, of others and of ours."""
    report = json.loads(file.read_text())
    axes = new_picture(f"{report['data']['name']}: accuracy over time, two cores", "CPU minutes", "validation NDCG@10")
    for color, (name, rows) in zip(COLORS, report["curves"].items(), strict=False):
        run = re.sub(r"-s\d+$", "", name)
        points = {row["cpu_minutes"]: row["valid_NDCG@10"] for row in rows}
        draw_seeds(axes, color, [points], CURVES.get(run, name))
    axes.set_xscale("log")
    log_axis(axes.xaxis, (1, 2, 5))
    axes.figure.set_figwidth(8.8)  # curves are everywhere, so the names stand beside them
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(file.with_suffix(".png"))


def curves(runs: list[Path], path: Path) -> None:
    """Validation NDCG@10 after each epoch, from log.csv."""
    names: dict[str, str] = {}  # {what decides the weights: the first run's name}
    models: dict[str, list[dict[float, float]]] = {}  # {the same: {epoch: NDCG@10} of each seed}
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        settings = {key: value for key, value in config["settings"].items() if key not in ("seed", "name", "teacher")}
        same = json.dumps([config["data"], config["model"], settings, config.get("teachers")], sort_keys=True)
        with open(run / "log.csv", newline="") as file:
            points = {float(row["epoch"]): float(row["valid_NDCG@10"]) for row in csv.DictReader(file)}
        models.setdefault(same, []).append(points)
        names.setdefault(same, re.sub(r"-s\d+$", "", run.name))
    axes = new_picture("learning curves", "epoch", "validation NDCG@10")
    for color, (same, seeds) in zip(COLORS * len(models), models.items(), strict=False):
        draw_seeds(axes, color, seeds, names[same])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
    axes.figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the READMEs, or those of some files and runs.")
    parser.add_argument("paths", nargs="*", type=Path, help="JSON files of studies, run folders (default: ours)")
    paths = parser.parse_args().paths
    if not paths:
        bench(RESULTS / "bench.json", REPORTED)
        paths = [RESULTS / "student", *RESULTS.parent.glob("*/sparsity.json"), *RESULTS.parent.glob("*/peers.json")]
    runs = [path for path in paths if (path / "log.csv").exists()]
    if runs:
        curves(runs, runs[0].parent / "curves.png")
    for file in [path for path in paths if path.suffix == ".json"]:
        report = read_json(file)
        if "curves" in report:
            peers(file)
        elif "bench" in report:
            bench(file, {})
        elif any("users" in row for row in report.get("rows", [])):
            sparsity(file)
        else:
            raise InputError(f"{file}: it holds no curves, no benchmark and no shares of users, so nothing is drawn")
    if not any(path in runs or path.suffix == ".json" for path in paths):
        raise InputError(f"{paths[0]}: neither a JSON file nor a run folder with a log.csv, so nothing is drawn")


if __name__ == "__main__":
    run_command(main)
