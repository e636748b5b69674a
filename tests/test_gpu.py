"""tests/gpu.py runs where nobody looks and once in a long while: here it runs tiny, on a CPU, and is made to fail."""

import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from types import SimpleNamespace

import gpu
import pytest
from conftest import ROOT, command
from test_prebert import bert_folder

from data import InputError, load_dataset
from prebert import load_bert


def numbers(value: object) -> list[float]:
    """All numbers inside nested dictionaries."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_dry_run_answers_every_question(tmp_path):
    said = command("tests/gpu.py", "--dry", "--json", tmp_path / "dry.json", cwd=tmp_path)
    assert "failed: nothing" in said and not list(tmp_path.glob("runs"))
    report = json.loads((tmp_path / "dry.json").read_text())
    assert report.pop("dry") is True and "cuda tests" in report.pop("skipped")
    training = {"train teacher", "train student", "train student without cache"}
    serving = {"serve student", "serve small", "serve teacher", "serve Hugging Face"}
    wanted = {"torchrun", "card", *training, *serving, "steps teacher", "steps student", "million", "total_s"}
    assert wanted - {"serve Hugging Face"} <= report.keys() <= wanted  # Hugging Face, where it is installed
    assert all(math.isfinite(number) and number >= 0 for number in numbers(report))
    assert report["torchrun"]["backend"] == "gloo" and report["torchrun"]["same"] is True
    assert report["card"]["bf16_tflops"] > 0 and report["card"]["machine"]["gpu"] is None
    for name in training:
        part = report[name]
        assert part["steps"] > 0 and part["items_per_s"] > 0 and part["share_of_measured_peak"] > 0
        assert 0 <= part["valid_NDCG@10"] <= 1 and part["peak_memory_gb"] > 0
    for name in serving & report.keys():
        assert report[name]["eager"]["same_top10"] == 1 and report[name]["eager"]["1"] > 0 < report[name]["eager"]["3"]
    assert report["million"]["same_top10"] == 1 and report["million"]["items_per_s"] > 0
    assert report["steps teacher"]["eager"]["60"]["items_per_s"] > 0


def test_a_part_that_fails_leaves_the_others_and_what_it_had_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the parts' logs

    def good() -> Iterator[dict]:
        yield {"first": 1}
        yield {"second": 2}

    def raising() -> Iterator[dict]:
        yield {"first": 1}
        raise ValueError("no such thing")

    def dying() -> Iterator[dict]:
        yield {"first": 1}
        os._exit(3)

    def slow() -> Iterator[dict]:
        yield {"first": 1}
        time.sleep(60)

    report: dict = {}
    began = time.monotonic()
    parts = {"good": good, "raising": raising, "dying": dying, "slow": slow}
    gpu.run(parts, 3, report, tmp_path / "gpu.json")
    assert time.monotonic() - began < 10
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert all(report[name]["first"] == 1 for name in parts)
    assert report["good"]["second"] == 2 and "error" not in report["good"]
    assert report["raising"]["error"] == "ValueError: no such thing" and "line" in report["raising"]["traceback"]
    assert report["dying"]["error"] == "ended with code 3"
    assert report["slow"]["error"] == "not finished after 3 s"


def test_a_mode_that_fails_leaves_the_others(monkeypatch):
    def refuse(*_: object) -> None:
        raise InputError("cannot compile") from RuntimeError("the length must be a multiple of eight")

    monkeypatch.setattr(gpu, "compile_ahead", refuse)
    s = SimpleNamespace(**vars(gpu.REAL) | {"device": "cpu", "users": (1,), "seconds": 0.0})
    found = list(gpu.serve(s, "small", ("AOT package", "eager")))
    assert found[0]["AOT package"]["error"].startswith("InputError: cannot compile; cause: the length")
    assert found[1]["eager"]["same_top10"] == 1 and found[1]["eager"][1] > 0


def test_a_cut_bert_is_the_same_encoder_in_half_precision(tmp_path):
    (tmp_path / "whole").mkdir()
    folder, original = bert_folder(tmp_path / "whole")
    gpu.cut_bert(folder, tmp_path / "cut")
    bert, tokenizer = load_bert(str(tmp_path / "cut"))
    for name, tensor in bert.encoder.state_dict().items():
        assert tensor.equal(original.encoder.state_dict()[name].half().float())
    assert tokenizer.get_vocab_size() == len(gpu.SPECIAL) <= len(bert.word_embedding.weight)
    mask = original.word_embedding.weight[2].half().float()  # the third word of bert_folder's tokenizer
    assert bert.word_embedding.weight[tokenizer.token_to_id("[MASK]")].equal(mask)


def test_the_gathered_log_is_the_same_log(ring, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "load_dataset", lambda name: load_dataset(str(ring) if name == "ml-1m" else name))
    gpu.write_log(tmp_path / "log")  # compares histories, ids and titles itself
    again = load_dataset(str(tmp_path / "log" / "ml-1m.inter.gz"))
    assert again.name == "ml-1m" and again.fingerprint == load_dataset(str(ring)).fingerprint


def test_only_missing_packages_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    for name in ("numpy", "no_such_package"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "here = True")
    gpu.unpack_missing(tmp_path, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["no_such_package"]
    assert sys.path[-1] == os.environ["PYTHONPATH"] == str(tmp_path / "site")
    assert __import__("no_such_package").here


def test_the_folder_of_gathered_files_is_ignored_by_git_and_never_overwritten(tmp_path):
    assert f"{gpu.FILES.name}/" in (ROOT / ".gitignore").read_text().splitlines()
    with pytest.raises(FileExistsError):
        gpu.gather(tmp_path)
