"""Record what Hugging Face's BertModel says, for test_prebert.py. Needs `pip install transformers==5.23.0`.

    python tests/make_minilm_fixture.py ~/.cache/prebert/minilm

writes tests/minilm_hidden_states.safetensors: the word ids of three padded sentences, which of them
are real, and BertModel's last hidden states with the real all-MiniLM-L6-v2 weights, float32.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertModel

SENTENCES = ["Toy Story (1995)", "One Flew Over the Cuckoo's Nest (1975)", "the quick brown fox jumps over [MASK] dog"]

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = BertModel.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
encoded = tokenizer(SENTENCES, padding="longest", return_tensors="pt")
with torch.no_grad():
    hidden = model(**encoded).last_hidden_state
content = {"words": encoded["input_ids"], "real": encoded["attention_mask"].bool(), "hidden": hidden.contiguous()}
save_file(content, Path(__file__).parent / "minilm_hidden_states.safetensors")
