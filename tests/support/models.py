"""Small Hugging Face folders with random weights, made on the spot: real tokenizers and architectures, no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, BertTokenizerFast, PreTrainedTokenizerFast

ModelType = Literal["qwen2", "qwen3", "llama"]

END, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words, runs of digits, runs of punctuation with the newlines after them, or white space: `>\n` can be one token.
_PIECES = r"""[ ]?\p{L}+|\p{N}|[ ]?[^\s\p{L}\p{N}]+[\r\n]*|\s+"""

TEXTS = (
    "<think> The director of the film was born in Prague. </think> <search> capital of the country </search>",
    "<information>Doc 1(Title: Prague) Prague is the capital of the Czech Republic.</information>",
    "<think> Now I know the answer to the question. </think> <answer> Prague </answer>",
    "Answer the question. You may search for what you need, think before each search, and then answer.",
)


def byte_level_folder(
    path: Path,
    model_type: ModelType = "qwen2",
    texts: Sequence[str] = TEXTS,
    *,
    pad_token: bool = True,
    chat_template: bool = False,
    merged_behind: str = "",
    generation: dict[str, Any] | None = None,
) -> Path:
    """Save a byte-level BPE tokenizer of at most 500 tokens, trained on ``texts``, with a tiny random model.

    ``merged_behind`` is a character that is one token with the closing ``>`` of a tag; ``generation`` goes into
    generation_config.json.
    """
    backend = _train_byte_level(texts)
    if merged_behind:
        backend = _add_first_merge(backend, ">", merged_behind.replace("\n", "Ċ"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD if pad_token else None,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )
    return _save(path, tokenizer, model_type, generation or {})


def wordpiece_folder(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """Save a lower-casing WordPiece tokenizer, as BERT has it, with a tiny random Llama. It takes tags apart."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text.lower() for text in texts], trainer)
    tokenizer = BertTokenizerFast(vocab=backend.get_vocab(), eos_token="[SEP]")
    return _save(path, tokenizer, "llama", {})


def _train_byte_level(texts: Sequence[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END, PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _add_first_merge(backend: Tokenizer, left: str, right: str) -> Tokenizer:
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary[left + right] = max(vocabulary.values()) + 1
    state["model"]["merges"].insert(0, [left, right])
    return Tokenizer.from_str(json.dumps(state))


def _save(path: Path, tokenizer: PreTrainedTokenizerFast, model_type: ModelType, generation: dict[str, Any]) -> Path:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if generation:
        file = path / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True, **generation}))
    return path
