"""Warm start of the tiny policy: a small Llama, trained from scratch on scripted demonstrations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calibadv.io.progress_bar import tracked
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.world.demonstrations import CLEAN, PER_WORLD, Demonstration, Noise, demonstrate
from calibadv.world.tokenizer import build_tokenizer

_BATCH = 32
_LEARNING_RATE = 3e-3
_WARM_UP_STEPS = 30
_FLAT_SHARE = 0.3
_FINAL_SHARE = 0.03
# For so narrow a model: with the usual 0.02 the same loss takes twice as many steps.
_INITIAL_SCALE = 0.06


def make_policy(out: Path, seed: int = 0, clean_steps: int = 250, noisy_steps: int = 400) -> None:
    """Train the tiny policy on scripted demonstrations and save it as a Hugging Face folder.

    The policy stays below what the world allows on purpose: it is where training starts.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(tokenizer)
    agent_tokenizer = AgentTokenizer(tokenizer)
    steps = clean_steps + noisy_steps
    clean = islice(demonstrate(agent_tokenizer, seed, CLEAN), clean_steps * _BATCH)
    noisy = islice(demonstrate(agent_tokenizer, seed + 1, Noise()), noisy_steps * _BATCH)
    batches = (batch for demonstrations in (clean, noisy) for batch in _batched(demonstrations, Random(seed)))
    _train(model, tracked(batches, "Warm start", steps), steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: 3 layers of width 96, about 350 thousand parameters.

    Not Qwen2, for which transformers replaces the tokenizer of the folder by a byte-level one.
    """
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=_INITIAL_SCALE,
        bos_token_id=None,
        **special,
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(**special)  # type: ignore[no-untyped-call]
    return model


def _train(model: LlamaForCausalLM, batches: Iterable[list[Demonstration]], steps: int) -> None:
    """Fit a model to demonstrations, by AdamW with gradients clipped at norm 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    for batch in batches:
        loss = _weighted_loss(model, *_collate(batch))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step."""
    progress = max(0.0, step / max(steps, 1) - _FLAT_SHARE) / (1 - _FLAT_SHARE)
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - (1 - _FINAL_SHARE) * progress)


def _collate(batch: list[Demonstration]) -> tuple[Tensor, Tensor]:
    """Pad demonstrations on the right."""
    length = max(len(demonstration.token_ids) for demonstration in batch)
    token_ids = torch.zeros(len(batch), length, dtype=torch.long)
    weights = torch.zeros(len(batch), length)
    for row, demonstration in enumerate(batch):
        token_ids[row, : len(demonstration.token_ids)] = torch.tensor(demonstration.token_ids)
        weights[row, : len(demonstration.weights)] = torch.tensor(demonstration.weights)
    return token_ids, weights


def _weighted_loss(model: LlamaForCausalLM, token_ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cross-entropy of each token given those before it."""
    logits = model(input_ids=token_ids[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none")
    later = weights[:, 1:].flatten()
    return (losses * later).sum() / later.sum()


def _batched(demonstrations: Iterator[Demonstration], rng: Random) -> Iterator[list[Demonstration]]:
    # Demonstrations of one world, cut into batches of similar length: a quarter less padding.
    while world := list(islice(demonstrations, PER_WORLD)):
        world.sort(key=lambda demonstration: len(demonstration.token_ids))
        batches = [world[start : start + _BATCH] for start in range(0, len(world), _BATCH)]
        rng.shuffle(batches)
        yield from batches
