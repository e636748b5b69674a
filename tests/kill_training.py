"""Stop a training again and again: `python tests/kill_training.py mine.inter FOLDER KILLS`.

Trains a tiny student without interruption, then another that is stopped at KILLS random moments, by kill -9 and by
SIGTERM in turns; restarts it with --resume each time, and compares the weights, byte for byte. Children are forked, so
that a restart does not wait for imports; nothing here computes before the last fork.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import leave_one_out, load_dataset
from student import MiniBert
from teacher import RECIPES, add_training_flags, describe, item_loss, settle, train


def child(log_file: str, folder: Path, name: str, seconds: float | None, by: int = signal.SIGKILL) -> int:
    """Train in a forked process, stopped `seconds` after its first step by a signal; its exit status."""
    steps, tell = os.pipe()
    process = os.fork()
    if process == 0:

        def loss(model, batch):
            os.write(tell, b".")
            return item_loss(model, batch)

        os.dup2(os.open(folder / "out.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        torch.set_num_threads(1)
        parser = argparse.ArgumentParser()
        add_training_flags(parser, RECIPES)
        flags = {"objective": "masked", "lr": 1e-3, "epochs": 4, "name": name, "max_length": 16, "tokens": 24}
        parser.set_defaults(**flags, device="cpu", bert=None, eval_users=20, patience=99)
        args = parser.parse_args(["--resume"])
        data = load_dataset(log_file)
        settle(args, RECIPES, data)
        torch.manual_seed(5)
        model = MiniBert("tiny", data.num_items, 16)
        train(model, loss, data, leave_one_out(data), folder / name, args, describe(data, model, args))
        os._exit(0)
    os.close(tell)
    os.read(steps, 1)  # waits for the first step, or for the end if there is none
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, by)
    status = os.waitpid(process, 0)[1]
    os.close(steps)
    return status


def main() -> None:
    log_file, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    began = time.perf_counter()
    assert child(log_file, folder, "whole", None) == 0
    whole_seconds, chance = time.perf_counter() - began, random.Random(0)
    codes = []
    for number in range(kills):
        seconds, by = chance.uniform(0.0, whole_seconds / kills), (signal.SIGKILL, signal.SIGTERM)[number % 2]
        codes.append(os.waitstatus_to_exitcode(child(log_file, folder, "parts", seconds, by)))
    assert -15 in codes, "no SIGTERM came while a training ran, so nothing was tested; try again"
    assert child(log_file, folder, "parts", None) == 0
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    rows = [(folder / name / "log.csv").read_text().count("\n") for name in ("whole", "parts")]
    assert weights[0] == weights[1] and rows[0] == rows[1], "the killed training is not the whole one"
    print(f"stopped {kills - codes.count(0)} of {kills} times while running; same bytes, {rows[0] - 1} epochs logged")


if __name__ == "__main__":
    main()
