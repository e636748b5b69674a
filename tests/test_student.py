"""The serving path: the same answers compiled or not, in any batch, and clear words for bad names."""

import json
import os
import pwd
import re
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, inside

import student
from data import InputError, leave_one_out, load_dataset
from evaluate import rank_targets
from prebert import VERSION, load_run, write_safetensors
from student import STUDENTS, MiniBert, Recommender, scores_by_id


def write_run(folder: Path, raw_ids: list[str], titles: list[str], causal: bool) -> Path:
    """A run folder with a random student: serving does not care whether it has learnt anything."""
    torch.manual_seed(0)
    model = MiniBert("tiny", len(raw_ids) - 1, 40, causal)
    for parameter in model.parameters():
        parameter.data.normal_(0.05, 0.2)
    write_safetensors(folder / "model.safetensors", model.state_dict())
    config = {"version": VERSION, "model": asdict(model.config), "exclude_seen": True, "settings": {}, "seed": 0}
    config |= {"split": "last", "interactions": 0}
    (folder / "config.json").write_text(json.dumps(config))
    counts = [0, *(7 * item % 61 for item in range(1, len(raw_ids)))]
    (folder / "catalogue.json").write_text(json.dumps({"raw_ids": raw_ids, "titles": titles, "counts": counts}))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "next"])
def run(request, ring, tmp_path_factory) -> Path:
    log = load_dataset(str(ring))
    titles = [*log.titles[:-2], "Twin (1999)", "Twin (1999)"]
    return write_run(tmp_path_factory.mktemp("run"), log.raw_ids, titles, request.param)


@pytest.fixture(scope="module")
def cache(run, tmp_path_factory) -> Path:
    """A cache folder that holds the compiled graph of `run`."""
    folder, before = tmp_path_factory.mktemp("my cache"), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        assert Recommender(run, compile=True).compiled
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)
    return folder


def ids(*items: int, run: Path) -> list[str]:
    """Raw ids of internal numbers."""
    raw_ids = json.loads((run / "catalogue.json").read_text())["raw_ids"]
    return [f"id:{raw_ids[item]}" for item in items]


def test_top_k_is_the_ranking_that_evaluation_uses(run, ring):
    model, _, catalogue = load_run(run)
    _, _, test = leave_one_out(load_dataset(str(ring)))
    ranks = rank_targets(model.score_next, test, True, model.max_length)
    people = [ids(*test.items[a:b].tolist(), run=run) for a, b in zip(test.starts, test.ends, strict=True)]
    answers = Recommender(run, k=10, compile=False)(people)
    for answer, target, rank in zip(answers, test.targets.tolist(), ranks.tolist(), strict=True):
        names, wanted = [raw_id for raw_id, _, _ in answer], catalogue["raw_ids"][target]
        assert (names.index(wanted) + 1 if wanted in names else 11) == min(rank, 11)


@pytest.mark.parametrize("num_items", [1, 2, 3, 8, 9])
def test_two_halves_of_the_catalogue_are_scored_as_the_whole(num_items):
    model = MiniBert("tiny", num_items, 5).requires_grad_(False)
    model.item_bias.normal_()
    states = torch.randn(3, model.config.hidden_size)
    scores = scores_by_id(model, states)
    for item in range(1, num_items + 1):  # one item at a time: its own row of the table, its own bias
        expected = (states * model.item_embedding.weight[item]).sum(1) + model.item_bias[item - 1]
        assert torch.allclose(scores[:, item], expected, atol=1e-5)
    assert (scores[:, 0] == -torch.inf).all() and (scores[:, num_items + 1 :] == -torch.inf).all()


# ---------------------------------------------------------------- compiled


def test_compiled_equals_eager_for_any_length_and_number_of_users(run, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    histories = [ids(*items, run=run) for items in ([3], [1, 2, 3, 4, 5], range(1, 39), [*range(1, 60)] * 2)]
    (package,) = cache.glob("prebert/serving/*.pt2")
    made = package.stat().st_mtime_ns
    eager, compiled = Recommender(run, compile=False), Recommender(run, compile=True)
    assert package.stat().st_mtime_ns == made and compiled.compiled and not eager.compiled  # loaded, not compiled
    for batch in (*([history] for history in histories), histories):
        for ours, native in zip(eager(batch), compiled(batch), strict=True):
            for a, b in zip(ours, native, strict=True):
                assert a[0] == b[0] and a[2] == pytest.approx(b[2], abs=1e-4)
    assert not list(run.glob("*.pt2"))  # native code is never kept where strangers' files are
    # A service that restarts does not wait for the compiler.
    start = "import sys, student; assert student.Recommender(sys.argv[1]).compiled"
    start += "; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", start, run], check=True, cwd=ROOT)


def test_compiled_answers_are_the_same_from_eight_threads(run, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    recommender = Recommender(run)
    assert recommender.compiled  # by default, where somebody compiled it
    histories = [ids(*(1 + (7 * i + j) % 50 for j in range(1 + i % 30)), run=run) for i in range(40)]
    alone = [recommender([history]) for history in histories]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: recommender([histories[i % 40]]), range(400))) == alone * 10


def test_a_compiled_copy_that_cannot_be_loaded_costs_a_note(run, cache, monkeypatch, tmp_path, capsys):
    eager = Recommender(run, compile=False)([ids(3, run=run)])

    def serve(note: str) -> None:
        recommender = Recommender(run, compile=None)
        said = capsys.readouterr().err
        assert not recommender.compiled and recommender([ids(3, run=run)]) == eager
        assert said.count("\n") == 1 and note in said and "Traceback" not in said

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    serve("cannot be loaded")
    monkeypatch.delenv("TMPDIR")
    assert Recommender(run, compile=None).compiled
    (package,) = cache.glob("prebert/serving/*.pt2")
    (tmp_path / "prebert/serving").mkdir(parents=True)
    for content in (package.read_bytes()[:20_000], b""):
        (tmp_path / "prebert/serving" / package.name).write_bytes(content)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        serve("cannot be loaded")
        with pytest.raises(InputError, match="cannot be loaded"):
            Recommender(run, compile=None, fallback=False)
    with monkeypatch.context() as patch:  # asked to compile, it makes the broken copy anew
        found: list[bool] = []
        patch.setattr(student, "compile_ahead", lambda graph, package: found.append(package.exists()) or graph)
        assert Recommender(run, compile=True).compiled and found == [False]
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert Recommender(run, compile=None).compiled  # what was compiled is still there, and k has its own copy
    assert Recommender(run, k=3, compile=None).compiled is False and not capsys.readouterr().err
    # Without a home folder there is no place for a copy, and none is needed.
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    recommender = Recommender(run, compile=None)
    assert not recommender.compiled and recommender([ids(3, run=run)]) == eager


def test_without_a_compiler_only_compile_fails(ring, tmp_path, monkeypatch, capsys):
    log = load_dataset(str(ring))
    run = write_run(tmp_path, log.raw_ids, log.titles, True)
    env = {"CXX": "/none/g++", "XDG_CACHE_HOME": str(tmp_path)}
    said = command("student.py", "--run", run, "--compile", *ids(3, run=run), cwd=tmp_path, expect=2, **env)
    assert "C++ compiler" in said and said.strip().count("\n") == 0 and len(said) < 400
    answer = command("student.py", "--run", run, *ids(3, run=run), cwd=tmp_path, **env)
    assert "eager" in answer and answer.count("Film") > 5 and not list(tmp_path.rglob("*.pt2"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(run / "config.json"))  # a file
    assert not Recommender(run, compile=True).compiled and "cannot write" in capsys.readouterr().err

    def fail(*_: object) -> None:
        raise InputError("no compiler here")

    monkeypatch.setattr(student, "compile_ahead", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    eager = Recommender(run, compile=False)
    recommender = Recommender(run, compile=True)  # what a service asks for falls back and says so
    assert not recommender.compiled and recommender([ids(3, run=run)]) == eager([ids(3, run=run)])
    assert "no compiler here" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_answers_of_the_cpu(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    histories = [ids(*items, run=run) for items in ([3], [1, 2, 3, 4, 5], range(1, 39))]
    for compiled in (False, True):
        both = (Recommender(run, 100, device, compile=compiled, fallback=False) for device in ("cpu", "cuda"))
        cpu, cuda = (recommend(histories) for recommend in both)
        for ours, theirs in zip(cpu, cuda, strict=True):
            assert {i: s for i, _, s in ours} == pytest.approx({i: s for i, _, s in theirs}, abs=1e-2)


# ---------------------------------------------------------------- answers


def test_scores_do_not_depend_on_the_padding(run):
    recommender = Recommender(run, compile=False)
    alone = recommender([ids(3, 5, 8, run=run)])[0]
    with_long = recommender([ids(3, 5, 8, run=run), ids(*range(1, 36), run=run)])[0]
    assert [i for i, _, _ in alone] == [i for i, _, _ in with_long]
    assert [s for _, _, s in alone] == pytest.approx([s for _, _, s in with_long], abs=1e-4)


def test_seen_items_never_come_back_and_k_may_exceed_the_catalogue(run):
    answer = Recommender(run, k=1000, compile=False)([ids(3, 5, 8, run=run)])[0]
    unseen = {item.removeprefix("id:") for item in ids(*sorted({*range(1, 61)} - {3, 5, 8}), run=run)}
    assert {raw_id for raw_id, _, _ in answer} == unseen


def test_seen_items_come_back_where_the_run_was_evaluated_so(run, tmp_path):
    for name in ("config.json", "catalogue.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    config = json.loads((run / "config.json").read_text()) | {"exclude_seen": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(Recommender(tmp_path, k=1000, compile=False)([ids(3, 5, 8, run=run)])[0]) == 60


def test_items_older_than_the_model_reads_are_left_out_too(run):
    history = ids(*range(1, 61), run=run)  # the model reads 40 items at most
    assert Recommender(run, compile=False)([history]) == [[]]
    (answer,) = Recommender(run, compile=False)([history[:-1]])
    assert [f"id:{raw_id}" for raw_id, _, _ in answer] == history[-1:]


def test_an_empty_history_gets_what_is_popular(run):
    catalogue, recommender = json.loads((run / "catalogue.json").read_text()), Recommender(run, k=5, compile=False)
    best = sorted(range(1, 61), key=lambda item: -catalogue["counts"][item])[:5]
    popular = [(catalogue["raw_ids"][i], catalogue["titles"][i], catalogue["counts"][i]) for i in best]
    assert recommender([]) == [] and recommender([[]]) == [popular]
    asked = ids(3, run=run)
    assert recommender([[], asked, []]) == [popular, recommender([asked])[0], popular]
    printed = inside("student.py", "--run", run, "-k", 5, cwd=run)
    assert all(title in printed for _, title, _ in popular)


# ---------------------------------------------------------------- names


def test_a_run_without_titles_says_what_its_items_are_called():
    released = Path(__file__).parent.parent / "results/ml-1m/student"
    with pytest.raises(InputError, match=r"no item 'Toy Story.*; without titles, items are raw ids such as '3186'"):
        Recommender(released, compile=False).item("Toy Story (1995)")


def test_titles_raw_ids_and_clear_words(run):
    recommender = Recommender(run, compile=False)
    title, raw_id = recommender.titles[4], recommender.raw_ids[4]
    for name in (title, title.upper(), raw_id, f"id:{raw_id}", int(raw_id), np.int64(int(raw_id)), np.str_(raw_id)):
        assert recommender.item(name) == 4
    for name, words in (
        ("Film 1 (1950", "did you mean 'Film 1"),
        ("zzzzqqqq", "no item 'zzzzqqqq' in the catalogue$"),
        ("twin (1999)", "name of 2 items; say which: id:"),
        ("id:no", "no item"),
        (4, "no item '4'"),  # internal numbers are internal
        (0, "no item '0'"),
        ("", "no item ''"),
        (None, "no item 'None'"),
    ):
        with pytest.raises(InputError, match=words):
            recommender.item(name)
    for people in ([[raw_id, "zzzzqqqq"]], [["id:no"]], [[0]], [[61]]):
        with pytest.raises(InputError, match="no item"):
            recommender(people)
    for people in ([title], title, [4]):  # one history where a list of them belongs
        with pytest.raises(InputError, match="list of histories"):
            recommender(people)


AMELIE = "Amélie"


def test_spelling(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, AMELIE) for form in ("NFC", "NFD"))
    assert nfc != nfd
    raw_ids = ["", "1", "2", "3", "é", "E\u0301", "x", "Straße", "7", "8", "same"]
    titles = ["", nfd, "Alien", "ALIEN", "four", "five", "1", "seven", "Solo", "SAME", "ten"]
    recommender = Recommender(write_run(tmp_path, raw_ids, titles, True), compile=False)
    for name, item in (
        (nfc, 1), (nfd, 1), (nfc.upper(), 1),  # one letter or two
        ("Alien", 2), ("ALIEN", 3),  # exact spelling wins
        ("\u00e9", 4), ("e\u0301", 4), ("\u00c9", 5), ("E\u0301", 5),  # ids, too
        ("1", 1), ("same", 10), ("Straße", 7),  # raw ids come first
        ("id:1", 1), ("id:x", 6), ("sOLO", 8), ("SAME", 9),
    ):  # fmt: skip
        assert recommender.item(name) == item, name
    with pytest.raises(InputError, match="name of 2 items; say which: id:2, id:3"):
        recommender.item("alien")
    with pytest.raises(InputError) as caught:
        recommender.item("amelie")
    assert caught.value.args[0].count("did you mean") == 1
    # On the command line an unknown item is reported and skipped, unless it is the only one.
    line = [sys.executable, ROOT / "student.py", "--run", tmp_path, "-k", "2", "zzz", nfc]
    result = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0 and result.stderr.startswith("skipped: no item 'zzz'")
    assert "after " + nfd in result.stdout and "zzz" not in result.stdout
    for unknown in (["zzz"], ["zzz", "yyy"], ["alien"]):
        said = inside("student.py", "--run", tmp_path, *unknown, cwd=tmp_path, expect=2)
        assert re.search("no item '(zzz|yyy)'|say which", said)


def test_presets_are_a_tenth_of_the_teacher():
    teacher = 6 * (12 * 384**2 + 13 * 384)  # MiniLM's body, by the textbook
    for size in STUDENTS:
        model = MiniBert(size, 100, 200)
        assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("item_")) <= teacher / 10


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{}"),
        ("config.json", "["),
        ("catalogue.json", '{"raw_ids": [], "titles": [], "counts": []}'),
        ("catalogue.json", '{"raw_ids": ["", "1"], "titles": ["", "1"], "counts": [0, 1]}'),
        ("model.safetensors", ""),
    ],
)
def test_broken_run_folders_are_refused(run, tmp_path, file, content):
    for name in ("config.json", "catalogue.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError):
        Recommender(tmp_path, compile=False)
