"""The serving path: the same answers compiled or not, in any bucket, and clear words for bad titles."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from data import InputError, leave_one_out, load_dataset
from evaluate import evaluate
from prebert import write_safetensors
from student import STUDENTS, MiniBert, Recommender, load_run, scores_by_id


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "next"])
def run(request, ring, tmp_path_factory):
    """A run folder with a random student: serving does not care whether it has learnt anything."""
    from dataclasses import asdict

    torch.manual_seed(0)
    folder, log = tmp_path_factory.mktemp("run"), load_dataset(str(ring))
    model = MiniBert("tiny", log.num_items, 40, request.param)
    for parameter in model.parameters():
        parameter.data.normal_(0.05, 0.2)
    write_safetensors(folder / "model.safetensors", model.state_dict())
    titles = [*log.titles[:-2], "Twin (1999)", "Twin (1999)"]
    (folder / "config.json").write_text(
        json.dumps({"version": 1, "model": asdict(model.config), "num_items": log.num_items, "exclude_seen": True})
    )
    (folder / "catalogue.json").write_text(json.dumps({"raw_ids": log.raw_ids, "titles": titles}))
    return folder


def test_top_k_is_the_ranking_that_evaluation_uses(run, ring):
    model, _, _ = load_run(run)
    _, _, test = leave_one_out(load_dataset(str(ring)))
    ranks = evaluate(model.score_next, test, True)
    answers = Recommender(run, k=10, compile=False)(
        [test.items[a:b].tolist() for a, b in zip(test.starts, test.ends, strict=True)]
    )
    for answer, target, rank in zip(answers, test.targets.tolist(), ranks.tolist(), strict=True):
        ids = [item for item, _, _ in answer]
        assert (ids.index(target) + 1 if target in ids else 11) == min(rank, 11)


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


def test_compiled_equals_eager_for_any_length_and_number_of_users(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    histories = [[3], [1, 2, 3, 4, 5], list(range(1, 39)), list(range(1, 60)) * 2]
    eager, compiled = Recommender(run, compile=False), Recommender(run, compile=True)
    for batch in (*([history] for history in histories), histories):
        for ours, native in zip(eager(batch), compiled(batch), strict=True):
            for a, b in zip(ours, native, strict=True):
                assert a[0] == b[0] and a[2] == pytest.approx(b[2], abs=1e-4)
    (package,) = tmp_path.glob("prebert/serving/*.pt2")
    made = package.stat().st_mtime_ns
    again = Recommender(run, compile=True)
    assert package.stat().st_mtime_ns == made and again([[3]]) == compiled([[3]])
    assert again.warm_up_s < compiled.warm_up_s / 2  # loaded, not compiled
    assert not list(run.glob("*.pt2"))  # native code is never kept where strangers' files are
    start = f"import sys, student; student.Recommender({str(run)!r}); assert 'torch._dynamo' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", start], check=True, cwd=Path(__file__).parents[1]
    )  # a service that restarts does not wait for the compiler


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_answers_of_the_cpu(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    histories = [[3], [1, 2, 3, 4, 5], list(range(1, 39))]
    for compiled in (False, True):
        cpu, cuda = (Recommender(run, device=device, compile=compiled)(histories) for device in ("cpu", "cuda"))
        for ours, theirs in zip(cpu, cuda, strict=True):
            assert [score for _, _, score in ours] == pytest.approx([score for _, _, score in theirs], abs=1e-2)


def test_compiled_answers_are_the_same_from_eight_threads(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recommender = Recommender(run, compile=True)
    histories = [[1 + (7 * i + j) % 50 for j in range(1 + i % 30)] for i in range(40)]
    alone = [recommender([history]) for history in histories]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: recommender([histories[i % 40]]), range(400))) == alone * 10


def test_scores_do_not_depend_on_the_padding(run):
    recommender = Recommender(run, compile=False)
    alone = recommender([[3, 5, 8]])[0]
    with_long = recommender([[3, 5, 8], list(range(1, 36))])[0]
    assert [i for i, _, _ in alone] == [i for i, _, _ in with_long]
    assert [s for _, _, s in alone] == pytest.approx([s for _, _, s in with_long], abs=1e-4)


def test_seen_items_never_come_back_and_k_may_exceed_the_catalogue(run):
    answer = Recommender(run, k=1000, compile=False)([[3, 5, 8]])[0]
    assert {item for item, _, _ in answer} == set(range(1, 61)) - {3, 5, 8}


def test_items_older_than_the_model_reads_are_left_out_too(run):
    history = list(range(1, 61))  # the model reads 40 items at most
    assert Recommender(run, compile=False)([history]) == [[]]
    (answer,) = Recommender(run, compile=False)([history[:-1]])
    assert [item for item, _, _ in answer] == [60]


def test_titles_any_case_raw_ids_and_clear_words(run):
    recommender = Recommender(run, compile=False)
    title = recommender.titles[4]
    assert recommender.item(title.upper()) == 4 == recommender.item("id:" + recommender.raw_ids[4])
    for name, words in (
        ("Film 1 (1950", "did you mean 'Film 1"),
        ("zzzzqqqq", "no item 'zzzzqqqq' in the catalogue$"),
        ("twin (1999)", "title of 2 items; say which: id:"),
        ("id:no", "no item"),
        (61, "not in the catalogue"),
        (0, "not in the catalogue"),
    ):
        with pytest.raises(InputError, match=words):
            recommender.item(name)
    for empty in ([], [[]]):
        with pytest.raises(InputError, match="at least one item"):
            recommender(empty)


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
        ("catalogue.json", '{"raw_ids": [], "titles": []}'),
        ("model.safetensors", ""),
    ],
)
def test_broken_run_folders_are_refused(run, tmp_path, file, content):
    for name in ("config.json", "catalogue.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError):
        Recommender(tmp_path, compile=False)
