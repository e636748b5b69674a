"""Nothing lost, nothing trusted: kills, full disks, hostile files, and invariants on random inputs."""

import gc
import json
import os
import random
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors
import torch
from conftest import HEAD, ROOT, TINY, command, hand_log, inside
from hypothesis import given
from hypothesis import strategies as st
from test_prebert import container, entry

from data import (
    PAD,
    InputError,
    batches,
    leave_one_out,
    load_dataset,
    mask_items,
    pad_left,
    random_windows,
    write_atomic,
    write_json,
)
from prebert import VERSION, load_run, peak_memory_gb, read_safetensors, write_safetensors
from student import Recommender

KILLS = int(os.environ.get("KILLS", "5"))  # by hand, before a release: KILLS=50 MUTANTS=100000
MUTANTS = int(os.environ.get("MUTANTS", "10000"))


# ---------------------------------------------------------------- training


def test_kill_9_at_random_moments_loses_nothing(ring, tmp_path):
    script = [sys.executable, ROOT / "tests/kill_training.py", ring, tmp_path, str(KILLS)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "same bytes" in result.stdout
    print(result.stdout)


def test_a_full_disk_keeps_the_last_good_files(ring, tmp_path):
    flags = ["--data", ring, "--no-kd", "--size", "tiny", *TINY]
    inside("distill.py", *flags, cwd=tmp_path)
    run = tmp_path / "runs/ring/student-no-kd"
    before = (run / "model.safetensors").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    for how in (["--name", "full"], ["--overwrite"]):
        result = subprocess.run(
            [sys.executable, ROOT / "distill.py", *map(str, flags), *how],
            cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit,
        )  # fmt: skip
        assert result.returncode == 2 and "cannot write" in result.stderr and "untouched" in result.stderr
    assert (run / "metrics.json").exists()  # a training is replaced when the next one's first checkpoint is there
    assert not list((tmp_path / "runs/ring/full").glob("*.partial"))
    with pytest.raises(InputError, match="cannot write"):
        write_atomic(Path("/proc/nowhere/x"), b"")
    assert (run / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- several processes

EXACT = ["--dropout", 0, "--precision", "fp32", "--device", "cpu", *TINY]
APART = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data, distill, teacher
if os.environ["RANK"] == "1":
    os.makedirs("other-machine", exist_ok=True)
    os.chdir("other-machine")  # which has no checkpoint of its own
    if sys.argv[1] == "fails":
        def fail(*_):
            raise data.InputError("the second machine has lost its disk")
        teacher.draw_batch = fail
sys.argv[1:2] = []
data.run_command(distill.main)
"""


@pytest.fixture
def apart(tmp_path) -> Path:
    """distill.py, whose second process runs on a disk of its own."""
    (tmp_path / "apart.py").write_text(APART)
    return tmp_path / "apart.py"


def two_processes(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """A script under torchrun, as two gloo processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def start_two(*arguments: object, cwd: Path) -> list[subprocess.Popen]:
    """The same two without torchrun, so that each can be signalled and its exit code seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    return [
        subprocess.Popen(line, cwd=cwd, env={**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip


def test_processes_that_torchrun_did_not_start_are_told_so(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "LOCAL_"))}
    line = [sys.executable, str(ROOT / "teacher.py"), "--bert", "none"]
    env |= {"RANK": "0", "WORLD_SIZE": "2"}
    result = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and "start it with torchrun" in result.stderr and "Traceback" not in result.stderr


def same_curve(folder: Path, names: tuple[str, str], epochs: int) -> None:
    """Two runs' logs: the same steps, losses to rounding, and about the same validation NDCG@10 of 20 users."""
    one, two = (
        [row.split(",") for row in (folder / "runs/ring" / name / "log.csv").read_text().splitlines()[1:]]
        for name in names
    )
    assert len(one) == len(two) == epochs
    for a, b in zip(one, two, strict=True):
        assert a[:2] == b[:2]  # step and epoch
        assert float(a[3]) == pytest.approx(float(b[3]), abs=2e-3)  # loss
        assert float(a[4]) == pytest.approx(float(b[4]), abs=0.05)


def test_two_processes_give_the_loss_curve_of_one(ring, tmp_path):
    flags = ["--data", ring, "--bert", "none", *EXACT]
    inside("teacher.py", *flags, "--name", "one", cwd=tmp_path)
    result = two_processes(ROOT / "teacher.py", *flags, "--name", "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    same_curve(tmp_path, ("one", "two"), 2)


def test_two_machines_go_on_from_the_checkpoint_of_the_first(ring, tmp_path, apart):
    flags = ["--data", ring, "--no-kd", "--size", "tiny", *EXACT, "--epochs", 15, "--patience", 99]
    flags += ["--tokens", 40]  # some batches are one history, at which the second has nothing to ask
    inside("distill.py", *flags, "--name", "whole", cwd=tmp_path)
    both = start_two(apart, "works", *flags, "--name", "parts", cwd=tmp_path)
    log = tmp_path / "runs/ring/parts/log.csv"
    while both[0].poll() is None and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.05)
    for process in both:
        process.kill()
        process.communicate(timeout=60)
    assert log.read_text().count("\n") < 15  # they were stopped before the end
    assert not list((tmp_path / "other-machine").rglob("*.pt"))
    result = two_processes(apart, "works", *flags, "--name", "parts", "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    same_curve(tmp_path, ("whole", "parts"), 15)


def test_the_end_of_one_process_is_the_end_of_all(ring, tmp_path, apart):
    flags = ["--data", ring, "--no-kd", "--size", "tiny", *EXACT]
    result = two_processes(apart, "fails", *flags, cwd=tmp_path)
    assert result.returncode != 0 and "error: the second machine has lost its disk" in result.stderr


def test_histories_of_1_to_2000_items_in_one_run(tmp_path):
    chance, path = random.Random(0), tmp_path / "long.inter"
    sizes = [1, 2, 3, 2000, *(int(10 ** chance.uniform(0, 3.3)) for _ in range(60))]
    rows = [f"u{user}\ti{chance.randrange(300)}\t{when}" for user, size in enumerate(sizes) for when in range(size)]
    path.write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")
    flags = ["--data", path, "--min-count", 1, "--no-kd", "--size", "tiny", "--epochs", 1, "--max-length", 50]
    inside("distill.py", *flags, cwd=tmp_path)
    assert "student-no-kd" in inside("evaluate.py", "--data", path, "--min-count", 1, cwd=tmp_path)
    data = load_dataset(str(path), min_items=1, min_length=1)
    assert sorted(np.diff(data.offsets)) == sorted(sizes)
    part, _, _ = leave_one_out(data)
    windows, _ = random_windows(part, 50, torch.Generator().manual_seed(0))
    padded = sum(len(rows) * int(windows[rows].sizes.max()) for rows in batches(windows.sizes, 1024))
    assert int(windows.sizes.sum()) > 0.9 * padded


# ---------------------------------------------------------------- terminals and pipes


def shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    line = re.sub(r"(^|; )(\w+\.py)", lambda script: f"{script[1]}{sys.executable} {ROOT / script[2]}", line)
    return subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


def test_a_reader_that_has_enough_is_no_error(ring, tmp_path):
    result = shell(f"set -o pipefail; data.py --data {ring} | true", tmp_path)
    assert result.returncode == 141 and "rror" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("streams", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 2)]
)
def test_closed_and_full_streams_end_quietly(ring, tmp_path, streams, code):
    result = shell(f"data.py --data {ring} {streams}; exit $?", tmp_path)
    assert result.returncode == code
    assert result.stderr.count("\n") <= (streams == ">/dev/full") and "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.mark.parametrize(("end", "code"), [("data.InputError('enough')", 2), ("KeyboardInterrupt", 130)])
def test_what_was_printed_before_an_error_is_not_lost(tmp_path, end, code):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data\ndef main(): print('a table'); raise {end}\n"
    script += "data.run_command(main)"  # stdout is a pipe here, which is written in blocks
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, "a table\n")


def test_too_little_memory_ends_in_one_line(ring, tmp_path):
    for length in (10**12, 9 * 10**18):
        result = shell(f"distill.py --data {ring} --no-kd --size tiny --max-length {length}", tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: not enough memory, ask for less: ")
    result = shell(f"distill.py --data {ring} --min-count {10**400}", tmp_path)
    assert result.returncode == 2 and "must be a whole number" in result.stderr


def test_what_is_no_file_is_not_replaced(ring, tmp_path):
    (tmp_path / "all.txt").write_text("before\n")
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/stdout", "/proc/self/fd/1", "pipe", "/dev/full", "."):
        result = shell(f"evaluate.py --data {ring} --json {name} >> all.txt", tmp_path)
        assert result.returncode == 2 and "no file that can be replaced" in result.stderr
    assert (tmp_path / "all.txt").read_text() == "before\n" and (tmp_path / "pipe").is_fifo()
    for path in (tmp_path / "pipe", Path("/dev/full")):
        with pytest.raises(InputError, match="it is no file"):
            write_atomic(path, b"")


def test_a_terminal_that_knows_ascii_only(tmp_path):
    (tmp_path / "übung.inter").write_text(HEAD + "u\tp\t1\nu\tq\t2\n", "utf-8")
    (tmp_path / "übung.item").write_text("item_id\ttitle\np\tAmélie\nq\t猫\n", "utf-8")
    card = command("data.py", "--data", "übung.inter", "--min-count", 1, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert re.search(r"1  Am\?lie\n", card) and "\n      2  ?\n" in card
    text = command("data.py", "--data", "né.inter", cwd=tmp_path, expect=2, PYTHONIOENCODING="ascii")
    assert text.startswith("error: no file") and text.count("\n") == 1


def test_printed_commands_can_be_pasted(tmp_path):
    log = tmp_path / "it's a $(touch pwned) `touch pwned`.inter"
    log.write_text(HEAD + "".join(f"u{u}\ti{(u + t) % 9}\t{t}\n" for u in range(9) for t in range(7)))
    titles = "".join(f"i{n}\tFilm \"{n}\"; touch pwned $(touch pwned) `touch pwned` it's\n" for n in range(9))
    log.with_suffix(".item").write_text("item_id\ttitle\n" + titles)
    small = ["--bert", "none", *TINY, "--epochs", "1"]
    printed = inside("data.py", "--data", log, cwd=tmp_path)
    for extra in (small, ["--size", "tiny", *TINY], [], []):  # data.py names teacher.py, and so on to student.py
        following = re.findall("(?:next|then): python (.*)", printed)[-1 if "evaluate.py --" in printed else 0]
        script, *arguments = shlex.split(following)
        printed = inside(script, *arguments, *extra, cwd=tmp_path)
        seen = shell(f"printf '%s\\0' {following}", tmp_path)
        assert seen.stdout.split("\0")[:-1] == [script, *arguments]  # a shell reads what was meant
        if script == "student.py":
            break
    assert script == "student.py" and re.search(r"after Film \"\d\"; touch pwned", printed)
    assert not (tmp_path / "pwned").exists()


def test_json_is_strict_and_goes_through_links(ring, tmp_path):
    # Items of the test part that nobody was trained on: no baseline and no student finds them.
    rows = [f"u{u}\t{'z' + str(u) if t == 3 else 'i' + str(t)}\t{t}" for u in range(30) for t in range(4)]
    (tmp_path / "z.inter").write_text(HEAD + "\n".join(rows) + "\n")
    flags = ["--data", tmp_path / "z.inter", "--min-count", 1]
    for name in ("a", "b"):
        inside("distill.py", *flags, "--no-kd", "--size", "tiny", *TINY, "--epochs", 1, "--name", name, cwd=tmp_path)
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})

    def strict(text: str) -> dict:
        def fail(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(text, parse_constant=fail)

    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert "link.json is there" in inside("evaluate.py", *flags, "--json", "link.json", cwd=tmp_path, expect=2)
    (tmp_path / "real.json").write_text("")
    inside("evaluate.py", *flags, "--json", "link.json", cwd=tmp_path)
    report = strict((tmp_path / "real.json").read_text())
    assert all(row["NDCG@10"] == 0 for row in report["rows"][:2])
    assert (tmp_path / "link.json").is_symlink() and not list(tmp_path.glob(".*partial"))


# ---------------------------------------------------------------- files from strangers

GOOD = container({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", (2, 1), (8, 10))}, b"0123456789")


def test_mutated_safetensors_are_read_or_refused_but_never_worse(tmp_path):
    chance, path, refused = random.Random(0), tmp_path / "x", 0
    for _ in range(MUTANTS):
        content = bytearray(GOOD)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(content))
            match chance.randrange(4):
                case 0:
                    content[place] = chance.randrange(256)
                case 1:
                    del content[place : place + chance.randint(1, 9)]
                case 2:
                    content[place:place] = chance.choice([b"-", b"0", b"9" * 30, b"[", b"{", b'"', b"null", b"1e9"])
                case 3:
                    content[place : place + 1] = content[-chance.randrange(1, 30) :]
            content = content or bytearray(b"\0")
        path.write_bytes(content)
        try:
            read_safetensors(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
    assert refused > MUTANTS / 2
    assert peak_memory_gb() < 8


CORPUS = {
    "good": GOOD,
    "no tensors": container({}, b""),
    "spaces after the header": container(json.dumps({"a": entry()}).encode() + b"   "),
    "empty tensor": container({"a": entry("F32", (0,), (0, 0))}, b""),
    "scalar": container({"a": entry("F32", (), (0, 4))}, b"0000"),
    "length past the end": (10**6).to_bytes(8, "little") + b"{}",
    "absurd length": b"\xff" * 8,
    "bad JSON": container(b"{"),
    "unknown dtype": container({"a": entry("F31")}),
    "negative offset": container({"a": entry(offsets=(-8, 0))}),
    "out of range": container({"a": entry(offsets=(8, 16))}),
    "shape against bytes": container({"a": entry(shape=(3,))}),
    "overlap": container({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}),
    "hole": container({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry("U8", (2,), (6, 8))}),
    "trailing bytes": container({"a": entry()}, b"0" * 9),
    "not UTF-8": container(b'{"\xff": 1}'),
}


@pytest.mark.parametrize("name", CORPUS)
def test_same_verdict_as_the_safetensors_package(tmp_path, name):
    (tmp_path / "x").write_bytes(CORPUS[name])
    try:
        safetensors.deserialize(CORPUS[name])
        good = True
    except safetensors.SafetensorError:
        good = False
    if good:
        read_safetensors(tmp_path / "x")
    else:
        with pytest.raises(InputError):
            read_safetensors(tmp_path / "x")


@pytest.fixture(scope="module")
def run(ring, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    inside("distill.py", "--data", ring, "--no-kd", "--size", "tiny", *TINY, cwd=folder)
    return folder / "runs/ring/student-no-kd"


@pytest.mark.parametrize("name", ["config.json", "catalogue.json"])
def test_mutated_run_files_are_read_or_refused(run, tmp_path, name):
    for file in ("config.json", "catalogue.json", "model.safetensors"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    chance, text, refused = random.Random(1), (run / name).read_text(), 0
    values = json.loads(text)
    for _ in range(200):
        broken = json.loads(text)
        target = broken["model"] if name == "config.json" and chance.random() < 0.7 else broken
        key = chance.choice(list(target))
        target[key] = chance.choice([None, -1, 0, 10**12, "x", [], {}, 1.5, True, [1], float("inf")])
        (tmp_path / name).write_text(json.dumps(broken))
        try:
            load_run(tmp_path)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 60
    (tmp_path / name).write_text(json.dumps(values))
    load_run(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x80\x04cos\nsystem\n(S'echo pwned > /tmp/pwned'\ntR."])
def test_a_hostile_checkpoint_is_refused(ring, run, tmp_path, damage):
    folder = tmp_path / "runs/ring/student-no-kd"
    folder.mkdir(parents=True)
    for file in ("config.json", "catalogue.json"):
        (folder / file).write_bytes((run / file).read_bytes())
    (folder / "train_state.pt").write_bytes(damage)
    flags = ["--data", ring, "--no-kd", "--size", "tiny", *TINY, "--resume"]
    assert "cannot be read" in inside("distill.py", *flags, cwd=tmp_path, expect=2)
    assert not Path("/tmp/pwned").exists()


def test_runs_of_another_version_are_refused(run, tmp_path):
    for file in ("config.json", "catalogue.json", "model.safetensors"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    config = json.loads((run / "config.json").read_text())
    for version in (1, 99, None):
        assert version != VERSION
        (tmp_path / "config.json").write_text(json.dumps({**config, "version": version}))
        with pytest.raises(InputError, match=f"version {version} "):
            load_run(tmp_path)


# ---------------------------------------------------------------- serving


def test_eight_threads_get_the_answers_of_one(run):
    recommender, chance = Recommender(run, k=5, compile=False), random.Random(0)
    histories = [[chance.randint(100, 159) for _ in range(chance.choice([1, 3, 15, 40]))] for _ in range(50)]
    alone = [recommender([history]) for history in histories]
    gc.collect()
    objects, wrong = len(gc.get_objects()), []

    def ask(index: int) -> None:
        if recommender([histories[index % 50]]) != alone[index % 50]:
            wrong.append(index)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(5_000)))
    gc.collect()
    assert not wrong and len(gc.get_objects()) - objects < 1000  # fewer than one a request


# ---------------------------------------------------------------- odd data


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ("a\tp\t1\n", (1, 1)),  # one user, one item
        ("a\tp\t-5\nb\tp\t1e9\n", (2, 1)),  # users with one interaction, times before 1970
        ("\u00fc\t-7\t1\n" + "9" * 40 + "\t\u732b\t2\n", (2, 2)),  # ids are names, whatever they look like
    ],
)
def test_small_and_odd_logs_give_the_right_result(tmp_path, rows, counts):
    path = tmp_path / "x.inter"
    path.write_text(HEAD + rows)
    data = load_dataset(str(path), min_items=1, min_length=1)
    assert (data.num_users, data.num_items) == counts
    train, valid, test = leave_one_out(data)
    assert not len(valid.targets) and not len(test.targets) and len(train.starts) == counts[0]
    for script in (["teacher.py", "--bert", "none"], ["distill.py", "--no-kd"], ["evaluate.py"]):
        message = inside(*script, "--data", path, "--min-count", 1, cwd=tmp_path, expect=2)
        assert "no user has" in message and "three items" in message


# ---------------------------------------------------------------- invariants on random inputs

HISTORIES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8)


@given(HISTORIES)
def test_leave_one_out_takes_the_last_two(histories):
    train, valid, test = leave_one_out(hand_log(*histories))
    for (a, b), history in zip(zip(train.starts, train.ends, strict=True), histories, strict=True):
        assert train.items[a:b].tolist() == (history[:-2] if len(history) >= 3 else history)
    long = [history for history in histories if len(history) >= 3]
    assert valid.targets.tolist() == [h[-2] for h in long] and test.targets.tolist() == [h[-1] for h in long]
    assert [test.items[a:b].tolist() for a, b in zip(test.starts, test.ends, strict=True)] == [h[:-1] for h in long]


@given(HISTORIES, st.integers(1, 15))
def test_pad_left_is_the_newest_behind_zeros(histories, length):
    log = hand_log(*histories)
    offsets = torch.from_numpy(log.offsets)
    rows = pad_left(torch.from_numpy(log.items), offsets[:-1], offsets[1:], length).tolist()
    assert rows == [[PAD] * (length - len(h)) + h[-length:] for h in histories]


@given(HISTORIES, st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_mask_items_hides_what_it_asks_for(histories, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[PAD] * (12 - len(h)) + h for h in histories])
    last_only = torch.rand(len(tokens), generator=generator) < 0.3
    with patch("data.MASK_RATE", rate):
        masked, positions, labels = mask_items(tokens, last_only, 10, generator)
    hidden = masked == 10
    assert (hidden.sum(1) == (labels != PAD).sum(1)).all() and (hidden.sum(1) >= 1).all()
    assert torch.equal(torch.where(hidden, PAD, masked), torch.where(hidden, PAD, tokens))
    asked = labels != PAD
    assert torch.equal(tokens.gather(1, positions)[asked], labels[asked])
    assert (masked.gather(1, positions)[asked] == 10).all()
    assert (hidden[last_only].sum(1) == 1).all() and hidden[last_only][:, -1].all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200), st.integers(0, 10**6))
def test_batches_hold_every_row_once_within_the_budget(sizes, tokens, seed):
    every = torch.tensor(sizes)
    for generator, rows in ((None, sys.maxsize), (torch.Generator().manual_seed(seed), sys.maxsize), (None, 3)):
        groups = batches(every, tokens, rows, generator)
        assert sorted(torch.cat(groups).tolist()) == list(range(len(sizes)))
        assert all(len(g) == 1 or len(g) * int(every[g].max()) <= tokens for g in groups)
        assert max(map(len, groups)) <= rows


def test_written_files_are_whole_or_absent(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x", {"a": torch.ones(3)})
    before = (tmp_path / "x").read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):  # the machine ends before, or after, the bytes are on the disk
        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(os, step, fail)
            write_atomic(tmp_path / "x", b"half")
        assert (tmp_path / "x").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x"]
