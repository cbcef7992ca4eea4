"""Small encoders for dense retrieval, made on the spot, whose vectors can be reckoned by hand or are random."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

UNKNOWN = "[UNK]"

# Three words a unit apart, the marks of a title, and the words of E5's prompts, which point elsewhere.
VECTORS = {
    "north": [4.0, 0.0, 0.0],
    "east": [0.0, 4.0, 0.0],
    "up": [0.0, 0.0, 4.0],
    '"': [0.0, 0.0, 0.0],
    "query": [0.0, 8.0, 0.0],
    "passage": [0.0, 0.0, 8.0],
}


def word_folder(
    path: Path,
    vectors: Mapping[str, Sequence[float]],
    *,
    similarity: str = "dot",
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Save a sentence-transformers folder that encodes a text as the mean of the vectors of its words.

    A word is a run of letters, digits and underscores, or of other marks. Those that have no vector count as zeros.
    """
    words = [UNKNOWN, *vectors]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    weights = np.array([[0.0] * len(next(iter(vectors.values()))), *vectors.values()], np.float32)
    save_file({"embedding.weight": weights}, path / "model.safetensors")
    module = "sentence_transformers.models.StaticEmbedding"
    write_json(path / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": module}])
    declared = {"similarity_fn_name": similarity, "prompts": dict(prompts or {})}
    write_json(path / "config_sentence_transformers.json", declared)
    return path


def bert_folder(path: Path, words: Sequence[str], *, pickled: bool = False, scores: bool = False) -> Path:
    """Save a plain transformers folder, not one of sentence-transformers: a tiny BERT with random weights.

    ``pickled`` leaves its weights in pytorch_model.bin, as old folders have them; ``scores`` makes it a cross-encoder.
    """
    tokenizer = BertTokenizerFast(
        vocab={word: number for number, word in enumerate(["[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]", *words])},
        model_max_length=64,
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config) if scores else BertModel(config)
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    if pickled:
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
