"""The main models of every data set by one command: train what is missing, evaluate, write JSON, draw the pictures.

    make results                                              # everything, days on two cores; stop and start it at will
    python results/run.py --only beauty steam --seeds 1 2 3   # some data sets
    python results/run.py --only beauty --models student-no-kd student-no-kd-cooc --list     # what would be run

A run that has ended is skipped, an interrupted one goes on, since every command has --resume. Files are
results/<data>/test.json and validation.json, of all models that are trained by then, also with --models; each row there
has its command, seed, commit, machine and minutes. Files that no command here writes keep what they say.
Beauty is RecBole's amazon-beauty, at $PREBERT_DATA/amazon-beauty/beauty.inter, else data/amazon-beauty/beauty.inter.
For the numbers in results/, Steam and YooChoose are cut as results/README.md says; the official files are far larger.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import run_command  # noqa: E402

BEAUTY = Path(os.environ.get("PREBERT_DATA", "data")) / "amazon-beauty/beauty.inter"
DATA = {  # flags of every script
    "ml-1m": "--data ml-1m",
    "ml-1m-final": "--data ml-1m --final",  # on validation items too, for the epochs that were best in "ml-1m"
    "steam": "--data steam",
    "yoochoose": "--data yoochoose",
    "beauty": f"--data {shlex.quote(str(BEAUTY))}",
    "sessions": "--data yoochoose --split sessions --min-items 1",
    "sessions-final": "--data yoochoose --split sessions --min-items 1 --final",  # as that field trains
}
# Name, script and flags; SEED and RUNS are filled in. What stands behind others is trained after them.
MODELS = {
    "teacher": "teacher.py",
    "student": "distill.py --teacher RUNS/teacher-sSEED",
    "student-of-student": "distill.py --teacher RUNS/student-sSEED",  # a second round
    "student-of-students": "distill.py --teacher RUNS/student-s1 RUNS/student-s2 RUNS/student-s3",
    "student-of-students-14": "distill.py --epochs 14 --teacher RUNS/student-s1 RUNS/student-s2 RUNS/student-s3",
    "student-small": "distill.py --teacher RUNS/teacher-sSEED --size small",
    "student-tiny": "distill.py --teacher RUNS/teacher-sSEED --size tiny",
    "student-no-kd": "distill.py --no-kd",
    "student-no-kd-smooth": "distill.py --no-kd --label-smoothing 0.1",
    "student-no-kd-cooc": "distill.py --no-kd --item-init cooc",  # without texts, where there are any
    "student-no-kd-text": "distill.py --no-kd --item-init text",
    "student-no-kd-sum": "distill.py --no-kd --item-init text+cooc",
    "student-no-kd-random": "distill.py --no-kd --item-init random",
    "student-of-starts": "distill.py --teacher RUNS/student-no-kd-sum-sSEED RUNS/student-no-kd-cooc-sSEED "
    "RUNS/student-no-kd-text-sSEED",
    "student-of-seeds": "distill.py --teacher RUNS/student-no-kd-s1 RUNS/student-no-kd-s2 RUNS/student-no-kd-s3",
    "student-of-counts": "distill.py --counts 0.25 --teacher RUNS/student-no-kd-s1 RUNS/student-no-kd-s2 "
    "RUNS/student-no-kd-s3",
    "student-of-teachers": "distill.py --teacher RUNS/teacher-s1 RUNS/teacher-s2 RUNS/teacher-s3",
    "teacher-masked": "teacher.py --objective masked --epochs 16 --patience 16",
    "student-masked": "distill.py --teacher RUNS/teacher-masked-sSEED --epochs 40 --patience 40",
    "bert4rec": "distill.py --no-kd --objective masked --item-init cooc --epochs 60 --patience 60",
}
NEW_ITEMS = "tests/new_items.py runs/new-items --size tiny --epochs 12 --seeds 1 2 3 --json"
SPARSITY = "tests/sparsity.py --size tiny --seeds 1 2 3 --json"
STARTS = "tests/sparsity.py --size tiny --starts text text+cooc cooc --shares 5 10 25"
BODIES = "tests/sparsity.py --body --seeds 1 2 3"
WORDS = "tests/sparsity.py --words --shares 10 --seeds 1 2 3 --json"
BENCH = "evaluate.py --bench --runs RUNS/teacher-s1 RUNS/student-s1 RUNS/student-small-s1 RUNS/student-tiny-s1 --json"
STUDIES = {  # by data set, what else the READMEs report: FILE.json and its command
    "ml-1m": {"bench": BENCH, "sparsity": SPARSITY, "starts": f"{STARTS} --json",
              "bodies": f"{BODIES} --eval-users 1000 --json"},
    "steam": {"new-items": NEW_ITEMS, "starts": f"{STARTS} 50 100 --json"},
    "beauty": {"new-items": NEW_ITEMS, "sparsity": SPARSITY, "starts": f"{STARTS} 50 100 --json",
               "bodies": f"{BODIES} --json", "words": WORDS},
}
OF_SESSIONS = "--size small --epochs 6 --patience 9"  # students there: most sessions have two or three items
STARTS_OF = ("student-no-kd-text", "student-no-kd-sum", "student-no-kd-random", "student-of-starts")
ONLY_ON = {  # data sets of the models that are not trained on all
    **dict.fromkeys(STARTS_OF, ("ml-1m", "steam", "beauty")),  # where there are titles
    **dict.fromkeys(("teacher-masked", "student-masked", "student-of-students-14"), ("ml-1m",)),
    "student-of-counts": ("sessions",),
}
FINAL = {"teacher", "student", "student-no-kd", "student-of-counts"}  # also trained with --final


def models_of(data: str) -> list[str]:
    """Which models are trained on a data set."""
    split = data.removesuffix("-final")
    return [name for name in MODELS if split in ONLY_ON.get(name, DATA) and (split == data or name in FINAL)]


def folder(data: str, run: str) -> str:
    """The run folder of a model and seed."""
    split = data.removesuffix("-final")
    run = f"yoochoose/sessions-{run}" if split == "sessions" else f"{split}/{run}"
    return f"runs/{run}{data.removeprefix(split)}"


def filled_in(command: str, data: str, seed: int = 1) -> str:
    """A command of MODELS or STUDIES with its seed and folders."""
    return re.sub(r"RUNS/(\S+)", lambda run: folder(data, run[1]), command.replace("SEED", str(seed)))


def training(data: str, name: str, seed: int) -> list[str]:
    """The command that trains one run, or goes on with it."""
    flags = filled_in(MODELS[name], data, seed)
    if data.startswith("sessions"):
        flags = flags.replace("distill.py", f"distill.py {OF_SESSIONS}")  # the model's own flags come after
    shown = f"sessions-{name}" if data.startswith("sessions") else name
    words = f"{flags} {DATA[data]} --seed {seed} --name {shown}-s{seed} --resume"
    return [sys.executable, *shlex.split(words)]


def evaluation(data: str, names: list[str], seeds: list[int], part: str) -> list[str]:
    """The command that evaluates all runs of a data set on one part."""
    flags = ["--valid"] if part == "validation" else []
    folders = [folder(data, f"{name}-s{seed}") for name in names for seed in seeds]
    words = [sys.executable, "evaluate.py", *shlex.split(DATA[data]), "--json", f"results/{data}/{part}.json", *flags]
    return [*words, "--runs", *folders]


def ended(data: str, name: str, seeds: list[int]) -> bool:
    """Whether all runs of a model are trained."""
    return all((ROOT / folder(data, f"{name}-s{seed}") / "metrics.json").exists() for seed in seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, evaluate and draw what the READMEs report.")
    parser.add_argument("--only", nargs="+", choices=tuple(DATA), default=list(DATA), help="data sets (default: all)")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="models (default: all of the data set)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--parts", nargs="+", choices=("validation", "test"), default=["validation", "test"],
                        help="what to evaluate on (default: both)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    args = parser.parse_args()
    commands = []
    for data in args.only:
        names = [name for name in models_of(data) if name in (args.models or MODELS)]
        for name in [name for name in names if re.search(r"-s\d", MODELS[name]) and not {1, 2, 3} <= {*args.seeds}]:
            print(f"left out, as it learns from the seeds 1, 2 and 3: {name} of {data}")
            names.remove(name)
        commands += [training(data, name, seed) for name in names for seed in args.seeds]
        parts = [part for part in args.parts if part == "test" or not data.endswith("-final")]
        shown = [name for name in models_of(data) if name in names or ended(data, name, args.seeds)]
        commands += [evaluation(data, shown, args.seeds, part) for part in parts if names]
        for file, study in STUDIES.get(data, {}).items() if not args.models else ():
            words = f"{filled_in(study, data)} results/{data}/{file}.json {DATA[data]}"
            commands.append([sys.executable, *shlex.split(words)])
    if not args.models:
        commands.append([sys.executable, "results/plot.py"])
    for number, command in enumerate(commands, 1):
        print(f"[{number} of {len(commands)}] {shlex.join(['python', *command[1:]])}", flush=True)
        if not args.list and (code := subprocess.run(command, cwd=ROOT).returncode):
            sys.exit(code)  # its own message says why; the same command goes on from here


if __name__ == "__main__":
    run_command(main)
