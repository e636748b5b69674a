"""kill -9 a training again and again: `python tests/kill_training.py mine.inter FOLDER KILLS`.

Trains a tiny student without interruption, then another that is killed at KILLS random moments and
restarted with --resume each time, and compares the weights, byte for byte. Children are forked, so
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
from data import load_dataset
from student import MiniBert
from teacher import add_training_flags, check_flags, describe, masked_item_loss, train


def child(log_file: str, folder: Path, name: str, seconds: float | None) -> int:
    """Train in a forked process, killed after `seconds`; its exit status."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(folder / "out.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        torch.set_num_threads(1)
        parser = argparse.ArgumentParser()
        flags = {"objective": "masked", "lr": 1e-3, "epochs": 40, "name": name, "max_length": 16, "tokens": 256}
        add_training_flags(parser, **flags, device="cpu", eval_users=20, patience=99)
        args = parser.parse_args(["--resume"])
        check_flags(parser, args)
        data = load_dataset(log_file)
        torch.manual_seed(5)
        model = MiniBert("tiny", data.num_items, 16)
        train(model, masked_item_loss, data, folder / name, args, describe(data, model, args))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def main() -> None:
    log_file, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    began = time.perf_counter()
    assert child(log_file, folder, "whole", None) == 0
    whole_seconds, chance = time.perf_counter() - began, random.Random(0)
    killed = 0
    for _ in range(kills):  # most of the later ones hit the last epochs
        seconds = chance.uniform(0.0, 2 * whole_seconds / kills + 0.3)
        killed += child(log_file, folder, "parts", seconds) == signal.SIGKILL
    assert child(log_file, folder, "parts", None) == 0
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    rows = [(folder / name / "log.csv").read_text().count("\n") for name in ("whole", "parts")]
    assert weights[0] == weights[1] and rows[0] == rows[1], "the killed training is not the whole one"
    print(f"killed {killed} of {kills} times while running; same bytes, {rows[0] - 1} epochs logged")


if __name__ == "__main__":
    main()
