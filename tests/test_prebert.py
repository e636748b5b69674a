"""prebert.py against bytes written by hand, PyTorch's own encoder, and Hugging Face's BERT."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, hand_log, inside
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from data import PAD, InputError, leave_one_out
from prebert import (
    BERT_FILES,
    Bert,
    BertConfig,
    Dropout,
    Encoder,
    PreBert,
    cooccurrence_vectors,
    encode_texts,
    load_bert,
    near_identity,
    prebert_from_bert,
    read_safetensors,
    rename_bert_weights,
    set_item_table,
    text_columns,
    text_vectors,
    with_text_columns,
    write_safetensors,
)

SMALL, WORDS = BertConfig(16, 2, 4, 32, 12, hidden_dropout_prob=0.0), 30
NUMBERS = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1.0 and -2.0 in little-endian float32


def container(header: dict | bytes, content: bytes = NUMBERS) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_safetensors_written_by_hand_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(container({"__metadata__": {"format": "pt"}, "a": entry(), "empty": entry("I64", (0, 3), (8, 8))}))
    found = read_safetensors(path)
    assert found["a"].tolist() == [1.0, -2.0] and found["empty"].shape == (0, 3)
    path.write_bytes(container({"b": entry("BF16", (2, 2)), "a": entry("U8", (), (8, 9))}, NUMBERS + b"\x07"))
    found = read_safetensors(path)
    assert found["b"].tolist() == [[0.0, 1.0], [0.0, -2.0]] and found["a"].item() == 7


@pytest.mark.parametrize(
    "content",
    {
        "empty file": b"",
        "length only": b"\x08\0\0\0\0\0\0\0",
        "length past the end": (10**6).to_bytes(8, "little") + b"{}",
        "absurd length": b"\xff" * 8 + b"{}",
        "not JSON": container(b"{'a': 1}"),
        "not UTF-8": container(b'{"\xff": 1}'),
        "not an object": container(b"[]", b""),
        "deep JSON": container(b"[" * 100_000, b""),
        "duplicate key": container(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "unknown dtype": container({"a": entry("F31")}),
        "dtype not a string": container({"a": {**entry(), "dtype": ["F32"]}}),
        "extra field": container({"a": {**entry(), "x": 1}}),
        "missing field": container({"a": {"dtype": "F32", "shape": [2]}}),
        "negative offset": container({"a": entry(offsets=(-8, 0))}),
        "reversed offsets": container({"a": entry(offsets=(8, 0))}),
        "offset past the end": container({"a": entry(shape=(3,), offsets=(0, 12))}),
        "float shape": container({"a": entry(shape=(2.0,))}),
        "boolean shape": container({"a": entry("U8", (True,) * 1, (0, 1))}, b"1"),
        "overflowing shape": container({"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}),
        "shape that would repeat a text": container({"a": entry(shape=(10**15, "aaaa"), offsets=(0, 8))}),
        "long shape": container({"a": entry(shape=(2**60,) * 10_000, offsets=(0, 8))}),
        "float offsets": container({"a": entry(offsets=(0.0, 8.0))}),
        "shape against bytes": container({"a": entry(shape=(3,))}),
        "overlap": container({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}),
        "hole": container({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry("U8", (2,), (6, 8))}),
        "trailing bytes": container({"a": entry()}, NUMBERS + b"\0"),
        "metadata not strings": container({"__metadata__": {"a": 1}, "a": entry()}),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_malformed_safetensors_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "x").write_bytes(content[1])
    with pytest.raises(ValueError) as caught:
        read_safetensors(tmp_path / "x")
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)


def test_written_safetensors_come_back_for_every_dtype(tmp_path):
    tensors = {
        str(d): torch.arange(6).reshape(2, 3).to(d)
        for d in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "strided": torch.arange(6.0).reshape(2, 3).T}
    write_safetensors(tmp_path / "x", tensors)
    found = read_safetensors(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    header_size = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    assert header_size % 8 == 0


def reference_encoder(encoder: Encoder, config: BertConfig) -> nn.TransformerEncoder:
    """PyTorch's own post-LN encoder with our weights."""
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        0.0,
        "gelu",
        config.layer_norm_eps,
        batch_first=True,
    )
    reference = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
    for ours, theirs in zip(encoder.layers, reference.layers, strict=True):
        theirs.self_attn.in_proj_weight.data = ours.attention.qkv.weight.data
        theirs.self_attn.in_proj_bias.data = ours.attention.qkv.bias.data
        theirs.self_attn.out_proj.load_state_dict(ours.attention.output.state_dict())
        theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
        theirs.linear2.load_state_dict(ours.feed_forward.down.state_dict())
        theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
        theirs.norm2.load_state_dict(ours.feed_forward_norm.state_dict())
    return reference.train()  # train: the slow path, which is the plain formula; dropout is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_in_every_precision(dtype):
    torch.manual_seed(0)
    dropout, x = Dropout(0.1).train(), torch.rand(4_000_001).to(dtype)
    out = dropout(x)
    assert out.dtype == dtype and dropout.eval()(x) is x
    assert (out == 0).double().mean().item() == pytest.approx(26 / 256, abs=0.002)
    assert (out.double().sum() / x.double().sum()).item() == pytest.approx(1, abs=1e-3)  # a rounded scale is 0.3 % off


def shaken(model: nn.Module) -> nn.Module:
    """Random values in every parameter, so that no weight is at a default that hides a mistake."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    return model


@pytest.mark.parametrize("causal", [False, True])
def test_encoder_equals_pytorchs(causal):
    config = BertConfig(16, 3, 4, 32, 12, hidden_dropout_prob=0.0, causal=causal)
    encoder = shaken(Encoder(config))
    x, real = torch.randn(3, 10, 16), torch.arange(10) >= torch.tensor([[0], [4], [9]])
    future = torch.ones(10, 10, dtype=torch.bool).triu(1) if causal else None
    expected = reference_encoder(encoder, config)(encoder.norm(x), mask=future, src_key_padding_mask=~real)
    assert torch.allclose(encoder(x, real)[real], expected[real], atol=1e-5)


def test_hidden_states_equal_hugging_faces_with_real_minilm_weights():
    """The fixture holds BertModel's own output; tests/make_minilm_fixture.py says how it was made."""
    bert, _ = load_bert("minilm")
    recorded = read_safetensors(Path(__file__).parent / "minilm_hidden_states.safetensors")
    real = recorded["real"]
    assert not real.all()  # padding is part of the proof
    with torch.no_grad():
        difference = (bert(recorded["words"], real) - recorded["hidden"])[real].abs().max()
    assert difference < 1e-4


def test_an_item_is_read_with_shares_of_the_three_before_it():
    model = shaken(PreBert(BertConfig(8, 1, 2, 16, 12, hidden_dropout_prob=0.0), 20))
    read = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    for tokens in ([PAD, PAD, 3, 1, 7, 4, 9], [5]):  # also of histories shorter than three
        model(torch.tensor([tokens]), torch.tensor([[0]]))
        table, positions, shares = model.item_embedding.weight, model.position_embedding.weight, model.convolution
        for place, item in enumerate(tokens):
            expected = positions[12 - len(tokens) + place] + (item != PAD) * table[item]
            for step in (1, 2, 3):
                if place >= step and tokens[place - step] != PAD:
                    expected = expected + shares[step - 1] * table[tokens[place - step]]
            assert torch.allclose(read[-1][0, place], expected, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_text_columns_add_the_likeness_to_the_newest_items(causal):
    narrow = shaken(PreBert(BertConfig(8, 1, 2, 16, 12, hidden_dropout_prob=0.0, causal=causal), 20)).eval()
    columns = torch.randn(20, 5)
    wide = with_text_columns(with_text_columns(narrow, torch.randn(20, 3)), columns)  # these instead of those
    assert not wide.training
    tokens = torch.tensor([[PAD, PAD, 3, 1, 7, 4, 9], [PAD, PAD, PAD, PAD, PAD, PAD, 5]])
    positions = torch.tensor([[6, 3], [6, 6]])
    added = wide.logits(wide(tokens, positions)) - narrow.logits(narrow(tokens, positions))  # (B, M, I)
    for row, column in ((0, 0), (0, 1), (1, 0)):
        expected = torch.zeros(20)
        for item in range(20):
            for back in range(4):
                before = positions[row, column] - back
                if before >= 0 and tokens[row, before] != PAD:
                    expected[item] += 0.7**back * float(columns[tokens[row, before] - 1] @ columns[item])
        assert torch.allclose(added[row, column], expected, atol=1e-4)
    history = torch.tensor([[3, 1, 7]])
    assert torch.allclose(with_text_columns(wide).score_next(history), narrow.score_next(history))
    padded = torch.cat([torch.full((1, 6), PAD), history], dim=1)
    assert torch.allclose(wide.score_next(padded), wide.score_next(history), atol=1e-4)


def test_products_of_text_columns_are_cosines_as_far_as_they_go():
    vectors = torch.randn(50, 40) + 3
    vectors[49] = vectors[:49].mean(0)  # as of an item without a text
    columns, _ = text_columns(vectors, 64)
    middle = vectors[:49] - vectors.mean(0)
    cosines = F.cosine_similarity(middle[:, None], middle[None], dim=2)
    assert torch.allclose(columns[:49] @ columns[:49].T, cosines, atol=1e-4) and columns[49].norm() < 0.01
    many = torch.randn(300, 200) * torch.linspace(2, 0, 200)
    unit = F.normalize(many - many.mean(0), dim=1)
    wanted, best = unit @ unit.T, text_columns(many, 64)[0]
    left, sizes, right = torch.linalg.svd(wanted)
    assert best.shape[1] == 64 and torch.allclose(best @ best.T, left[:, :64] * sizes[:64] @ right[:64], atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_asked_positions_equal_the_full_computation(causal):
    model = shaken(PreBert(BertConfig(16, 2, 4, 32, 12, hidden_dropout_prob=0.0, causal=causal), 20))
    tokens = torch.randint(1, 21, (4, 9))
    tokens[1, :5] = PAD
    positions = torch.tensor([[8, 2], [5, 8], [0, 8], [7, 3]])
    everywhere = torch.arange(9).expand(4, 9)
    full = model.logits(model(tokens, everywhere))  # (B, T, I)
    for asked in (positions, positions[:, :1]):  # one query a row takes a way of its own
        some = model.logits(model(tokens, asked))
        assert torch.allclose(some, full[torch.arange(4)[:, None], asked], atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_batch_mates_change_nothing(causal):
    model = shaken(PreBert(BertConfig(16, 2, 4, 32, 12, hidden_dropout_prob=0.0, causal=causal), 20)).eval()
    history = torch.tensor([[3, 1, 7]])
    alone = model.score_next(history)
    padded = torch.cat([torch.full((1, 6), PAD), history], 1)
    mates = torch.cat([padded, torch.randint(1, 21, (5, 9))])
    assert torch.allclose(alone, model.score_next(padded), atol=1e-4)
    assert torch.allclose(alone, model.score_next(mates)[:1], atol=1e-4)
    longer = torch.cat([torch.randint(1, 21, (1, 30)), history], 1)  # only the newest are read
    assert torch.allclose(model.score_next(longer), model.score_next(longer[:, -12:]), atol=1e-4)


def test_causal_states_do_not_see_the_future():
    model = shaken(PreBert(BertConfig(16, 2, 4, 32, 12, hidden_dropout_prob=0.0, causal=True), 20))
    tokens, everywhere = torch.randint(1, 21, (2, 9)), torch.arange(9).expand(2, 9)
    changed = tokens.clone()
    changed[:, 6:] = 1 + changed[:, 6:] % 20
    before, after = model(tokens, everywhere), model(changed, everywhere)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-5) and not torch.allclose(before[:, 6:], after[:, 6:])


# ---------------------------------------------------------------- BERT folders


def hugging_face_names(bert: Bert, prefix: str = "", old: bool = False) -> dict[str, torch.Tensor]:
    """Our weights under the names that transformers gives them, written out independently of RENAMES."""
    size, theirs = bert.config.hidden_size, {}
    for table, name in (("word", "word"), ("position", "position"), ("segment", "token_type")):
        theirs[f"embeddings.{name}_embeddings.weight"] = getattr(bert, f"{table}_embedding").weight
    norms = {"embeddings": bert.encoder.norm}
    for i, layer in enumerate(bert.encoder.layers):
        base = f"encoder.layer.{i}"
        for j, part in enumerate(("query", "key", "value")):
            theirs[f"{base}.attention.self.{part}.weight"] = layer.attention.qkv.weight[j * size : (j + 1) * size]
            theirs[f"{base}.attention.self.{part}.bias"] = layer.attention.qkv.bias[j * size : (j + 1) * size]
        for name, module in (
            ("attention.output", layer.attention.output),
            ("intermediate", layer.feed_forward.up),
            ("output", layer.feed_forward.down),
        ):
            theirs[f"{base}.{name}.dense.weight"], theirs[f"{base}.{name}.dense.bias"] = module.weight, module.bias
        norms |= {f"{base}.attention.output": layer.attention_norm, f"{base}.output": layer.feed_forward_norm}
    for name, norm in norms.items():
        theirs[f"{name}.LayerNorm.{'gamma' if old else 'weight'}"] = norm.weight
        theirs[f"{name}.LayerNorm.{'beta' if old else 'bias'}"] = norm.bias
    return {prefix + name: tensor.detach().clone() for name, tensor in theirs.items()}


HEADS = ("cls.predictions.bias", "bert.pooler.dense.weight", "classifier.weight", "qa_outputs.bias",
         "embeddings.position_ids")  # fmt: skip


def write_bert(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> None:
    """A folder with these weights, the configuration of SMALL, and a tokenizer that knows five words."""
    write_safetensors(folder / "model.safetensors", tensors)
    config = {name: value for name, value in asdict(SMALL).items() if name != "causal"}
    config |= {"model_type": "bert", "vocab_size": WORDS, "type_vocab_size": 2, "unknown": 1, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, ["[PAD]", "[UNK]", "[MASK]", "toy", "story"])


def write_tokenizer(folder: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def bert_folder(folder: Path, prefix: str = "", old: bool = False, **changes: object) -> tuple[Path, Bert]:
    bert = shaken(Bert(SMALL, WORDS))
    write_bert(folder, hugging_face_names(bert, prefix, old) | {name: torch.zeros(3) for name in HEADS}, **changes)
    return folder, bert


def same_weights(folder: Path, original: Bert) -> None:
    loaded, _ = load_bert(str(folder))
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


PREFIXES = ["", "bert.", "module.bert.", "_orig_mod.bert.", "_orig_mod.module.", "0.auto_model.", "model.bert."]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_weight_of_a_bert_folder_is_consumed_or_named(tmp_path, capsys, prefix, old):
    same_weights(*bert_folder(tmp_path, prefix, old))
    said = capsys.readouterr().out
    assert all(name in said for name in HEADS) and "5 ignored" in said  # ignored aloud


def test_weights_in_shards_are_read(tmp_path):
    folder, bert = bert_folder(tmp_path)
    tensors = hugging_face_names(bert)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weight_map = {name: names[place % 2] for place, name in enumerate(tensors)}
    for file in names:
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    (folder / "model.safetensors").unlink()
    same_weights(folder, bert)
    (folder / names[1]).unlink()
    with pytest.raises(InputError, match=r"model.safetensors: "):
        load_bert(str(folder))


def test_a_bert_of_fewer_layers_than_it_says_or_of_numbers_that_are_none_is_refused(tmp_path):
    folder, bert = bert_folder(tmp_path)
    tensors = hugging_face_names(bert)
    last = f"encoder.layer.{SMALL.num_hidden_layers - 1}."
    write_bert(folder, {name: tensor for name, tensor in tensors.items() if last not in name})  # as without a shard
    with pytest.raises(InputError, match="is a file missing"):
        load_bert(str(folder))
    for name, tensor, words in (
        ("embeddings.word_embeddings.weight", torch.full((WORDS, SMALL.hidden_size), torch.nan), "not finite"),
        ("embeddings.token_type_embeddings.weight", torch.zeros(0, SMALL.hidden_size), "do not fit"),
    ):
        write_bert(folder, tensors | {name: tensor})
        with pytest.raises(InputError, match=words):
            load_bert(str(folder))


@pytest.mark.parametrize("shards", [1, 2])
def test_the_two_lines_that_convert_a_pickle_work(tmp_path, shards):
    folder, bert = bert_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    tensors = list(hugging_face_names(bert).items())
    for shard in range(shards):
        torch.save(dict(tensors[shard::shards]), folder / f"pytorch_model{f'-{shard}' if shards > 1 else ''}.bin")
    with pytest.raises(InputError, match=r"only pytorch_model.bin") as caught:
        load_bert(str(folder))
    advice = re.search("import pathlib.*", str(caught.value))[0]
    subprocess.run([sys.executable, "-c", advice], check=True, cwd=ROOT)
    same_weights(folder, bert)


def test_rename_leaves_nothing_behind_and_takes_one_encoder_only():
    tensors = hugging_face_names(Bert(SMALL, WORDS), "bert.")
    ours, ignored = rename_bert_weights(tensors | {"bert.pooler.dense.bias": torch.zeros(1)}, Path("x"))
    assert set(ours) == set(Bert(SMALL, WORDS).state_dict()) and ignored == ["bert.pooler.dense.bias"]
    with pytest.raises(InputError, match="more than one encoder"):
        rename_bert_weights(tensors | hugging_face_names(Bert(SMALL, WORDS), "other.bert."), Path("x"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta' is not supported"),
        ({"model_type": None}, "model_type None"),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "swish"}, "swish"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"num_attention_heads": 3}, "heads"),
        ({"num_attention_heads": 0}, "heads"),
        ({"num_attention_heads": True}, "heads"),
        ({"num_attention_heads": "4"}, "heads"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"hidden_dropout_prob": -1}, "dropout"),
    ],
)
def test_unsuitable_bert_folders_are_refused(tmp_path, changes, words):
    folder, _ = bert_folder(tmp_path, **changes)
    with pytest.raises(InputError, match=words):
        load_bert(str(folder))


@pytest.mark.parametrize("name", ["num_attention_heads", "hidden_act"])
def test_what_the_weights_do_not_tell_is_not_guessed(tmp_path, name):
    folder, _ = bert_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"not supported .*{name} None"):
        load_bert(str(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("encoder.layer.1.output.dense.bias"),
        lambda tensors: tensors.pop("embeddings.word_embeddings.weight"),
        lambda tensors: tensors.pop("embeddings.position_embeddings.weight"),
        lambda tensors: tensors.pop("encoder.layer.0.attention.self.key.weight"),
        lambda tensors: tensors.update({"encoder.layer.0.crossattention.self.key.weight": torch.zeros(16, 16)}),
        lambda tensors: tensors.update({"encoder.layer.0.intermediate.dense.weight": torch.zeros(31, 16)}),
        lambda tensors: tensors.update({"embeddings.position_embeddings.weight": torch.zeros(12)}),
        lambda tensors: tensors.update({"encoder.layer.0.intermediate.dense.weight": torch.tensor(1.0)}),
        lambda tensors: tensors.update(
            {f"encoder.layer.0.attention.self.{part}.bias": torch.tensor(1.0) for part in ("query", "key", "value")}
        ),
        lambda tensors: tensors.update({"embeddings.word_embeddings.weight": torch.zeros(30, 17)}),
        lambda tensors: tensors.clear(),
    ],
)
def test_weights_that_make_no_bert_are_refused_in_a_sentence(tmp_path, damage):
    tensors = hugging_face_names(shaken(Bert(SMALL, WORDS)))
    damage(tensors)
    write_bert(tmp_path, tensors)
    with pytest.raises(InputError, match=r"model.safetensors: ") as caught:
        load_bert(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_incomplete_bert_folders_are_refused(tmp_path):
    folder, _ = bert_folder(tmp_path)
    for name in BERT_FILES:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"{")
        with pytest.raises(InputError, match=name):
            load_bert(str(folder))
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"no .*{name}|{name}: No such file"):
            load_bert(str(folder))
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="no BERT 'gpt2'"):
        load_bert("gpt2")


def test_a_tokenizer_with_more_words_than_the_weights_is_refused(tmp_path):
    folder, _ = bert_folder(tmp_path)
    write_tokenizer(folder, ["[UNK]", "[MASK]", *(f"w{n}" for n in range(WORDS - 2))])
    load_bert(str(folder))
    write_tokenizer(folder, ["[UNK]", "[MASK]", *(f"w{n}" for n in range(WORDS - 1))])
    with pytest.raises(InputError, match=r"tokenizer.json knows 31 words, the weights.* 30"):
        load_bert(str(folder))


def test_prebert_keeps_berts_body_mask_and_positions(tmp_path):
    bert, tokenizer = load_bert(str(bert_folder(tmp_path)[0]))
    model = prebert_from_bert(bert, tokenizer, 20, 10)
    assert torch.equal(model.item_embedding.weight[21], bert.word_embedding.weight[2])  # [MASK] is word 2
    for name, tensor in bert.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)
    # The sum that BERT feeds its encoder for word, position and segment is what ours feeds it.
    assert torch.allclose(
        model.position_embedding.weight, bert.position_embedding.weight[:10] + bert.segment_embedding.weight[0]
    )
    with pytest.raises(InputError, match="12 positions"):
        prebert_from_bert(bert, tokenizer, 20, 13)


def test_near_the_identity_models_name_the_items_whose_rows_are_like_the_newest_ones():
    torch.manual_seed(0)
    model = PreBert(BertConfig(64, 4, 4, 256, 10, hidden_dropout_prob=0.0, causal=True), 60)
    for layer in model.encoder.layers:  # a body that says something, as BERT's does
        for linear in (layer.attention.qkv, layer.attention.output, layer.feed_forward.up, layer.feed_forward.down):
            nn.init.normal_(linear.weight, std=0.15)
    kinds = torch.randn(6, 64).repeat_interleave(10, 0)  # ten items of each of six kinds
    set_item_table(model, kinds + 0.5 * torch.randn(60, 64), 1.0)
    history = torch.randint(1, 61, (40, 5))

    def same_kind() -> float:
        best = model.eval().score_next(history).argmax(1)  # (B,) item - 1
        return (best // 10 == (history[:, -1] - 1) // 10).double().mean().item()

    before = model.encoder.layers[0].attention.output.weight.clone()
    assert same_kind() < 0.5
    near_identity(model)
    assert same_kind() > 0.9
    assert torch.allclose(model.encoder.layers[0].attention.output.weight, 0.2 * before)


class Hub(SimpleHTTPRequestHandler):
    """What huggingface_hub asks for: commit and files of a repository, and /ORG/NAME/resolve/REVISION/FILE."""

    def answer(self, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        commit, files = "0123456789abcdef0123456789abcdef01234567", sorted(Path(self.directory).iterdir())
        if self.path.startswith("/api/models/some-org/bert_tiny.v2/revision/"):
            about = {"id": "some-org/bert_tiny.v2", "sha": commit, "siblings": [{"rfilename": f.name} for f in files]}
            return self.answer(json.dumps(about).encode())
        if self.path.startswith("/api/models/some-org/bert_tiny.v2/tree/"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            return self.answer(json.dumps(tree).encode())
        path = Path(self.directory) / self.path.partition("?")[0].rpartition("/")[2]
        if "/resolve/" not in self.path or not self.path.startswith("/some-org/bert_tiny.v2/") or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, "application/octet-stream", ETag=tag, X_Repo_Commit=commit)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("shards", [False, True])
def test_any_bert_of_the_hub_can_be_named(tmp_path, shards):
    (tmp_path / "hub").mkdir()
    folder, _ = bert_folder(tmp_path / "hub", "bert.")
    if shards:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    script = "import sys, prebert; prebert.load_bert(sys.argv[1])"

    def load(name: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-c", script, name]
        return subprocess.run(line, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)

    result = load("some-org/bert_tiny.v2")
    assert result.returncode == 0 and re.search("BERT: 29 weights from .*; 5 ignored", result.stdout), result.stderr
    result = load("some-org/other")
    assert "InputError: no some-org/other from http://127.0.0.1" in result.stderr
    server.shutdown()
    server.server_close()
    assert load("some-org/bert_tiny.v2").returncode == 0  # without the hub, from the cache


# ---------------------------------------------------------------- item tables


def test_item_table_has_the_norm_that_is_asked_for():
    model = PreBert(SMALL, 20)
    mask = model.item_embedding.weight[21].clone()
    set_item_table(model, 5 + torch.randn(20, 16), 1.4)
    rows = model.item_embedding.weight[1:-1]
    assert rows.pow(2).sum(1).mean().sqrt().item() == pytest.approx(1.4, rel=1e-5)
    assert rows.mean(0).abs().max() < 1e-6 and torch.equal(model.item_embedding.weight[21], mask)


def test_title_vectors_are_means_over_words_whatever_their_neighbours(tmp_path):
    bert, tokenizer = load_bert(str(bert_folder(tmp_path)[0]))
    texts = ["toy", "", "toy story", "story " * 40, "toy", " "]
    vectors = encode_texts(bert, tokenizer, texts)
    assert vectors.shape == (6, 16)
    for row, words in ((0, [3]), (2, [3, 4]), (3, [4] * 12), (4, [3])):  # BERT reads 12 words at most
        tokens = torch.tensor([words])
        assert torch.allclose(vectors[row], bert(tokens, tokens > 0)[0].mean(0), atol=1e-5)
    mean = vectors[[0, 2, 3, 4]].mean(0)  # a title without words says nothing
    assert torch.allclose(vectors[1], mean, atol=1e-5) and torch.allclose(vectors[5], mean, atol=1e-5)
    assert encode_texts(bert, tokenizer, ["", ""]).tolist() == [[0.0] * 16] * 2


def test_a_title_without_words_gets_the_mean_whatever_the_tokenizer_adds(tmp_path):
    bert, tokenizer = load_bert(str(bert_folder(tmp_path)[0]))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    ids = [(word, tokenizer.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    vectors = encode_texts(bert, tokenizer, ["toy", "", "toy story"])
    assert torch.allclose(vectors[1], vectors[[0, 2]].mean(0), atol=1e-5)


def test_title_vectors_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bert, tokenizer = load_bert(str(bert_folder(tmp_path)[0]))
    texts = ["toy", "", "toy story"]
    first = text_vectors(bert, tokenizer, texts)
    assert torch.allclose(first, encode_texts(bert, tokenizer, texts))
    with monkeypatch.context() as patch:
        patch.setattr(Bert, "forward", lambda *_: pytest.fail("BERT was asked again"))
        assert torch.equal(text_vectors(*load_bert(str(tmp_path)), texts), first)
    assert not torch.equal(text_vectors(*load_bert(str(tmp_path)), ["story", *texts[1:]])[0], first[0])


def test_a_teacher_starts_from_titles_one_of_which_has_no_words(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing that was read before
    (tmp_path / "bert").mkdir()
    bert_folder(tmp_path / "bert", "bert.")
    rows = [f"u{u}\ti{(u + t) % 9}\t{t}" for u in range(9) for t in range(6)]
    (tmp_path / "x.inter").write_text("user_id\titem_id\ttimestamp\n" + "\n".join(rows))
    titles = [f"i{n}\t{'!!!' if n == 4 else 'toy ' * n}" for n in range(9)]
    (tmp_path / "x.item").write_text("item_id\ttitle\n" + "\n".join(titles))
    flags = [*TINY, "--max-length", 12, "--bert", tmp_path / "bert", "--item-init", "text"]
    assert "classifier.weight" in inside("teacher.py", "--data", tmp_path / "x.inter", *flags, cwd=tmp_path)
    weights = read_safetensors(tmp_path / "runs/x/teacher/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_cooccurrence_factors_give_the_ppmi_matrix_back():
    log = hand_log([1, 2, 3, 1, 5, 4], [2, 3, 2, 4, 5])  # the last two of each are held out
    train, _, _ = leave_one_out(log)
    counts = torch.zeros(5, 5)
    for row in ([1, 2, 3, 1], [2, 3, 2]):
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                if i != j and abs(i - j) <= 2:
                    counts[a - 1, b - 1] += 1
    total = counts.sum(1)
    expected = torch.where(
        counts > 0, (counts * counts.sum() / (total[:, None] * total)).log().clamp(min=0), 0.0
    ).nan_to_num()
    vectors = cooccurrence_vectors(train, 5, 5, window=2)
    left = vectors @ vectors.T  # (U sqrt(S)) (U sqrt(S))^T = U S U^T = |A| for a symmetric matrix A
    values, basis = torch.linalg.eigh(expected)
    assert torch.allclose(left, basis @ values.abs().diag() @ basis.T, atol=1e-4)
    assert vectors[4].abs().max() < 1e-4  # item 5 was held out: nothing of it may leak
