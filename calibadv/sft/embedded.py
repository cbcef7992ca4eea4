"""Warm start of the tiny policy: a small Llama, trained from scratch on demonstrations of the embedded world."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typing_extensions import override

from calibadv.demonstrations.embedded import CLEAN, PER_WORLD, PROTOCOL, Noise, demonstrate
from calibadv.engines import TransformersEngine
from calibadv.errors import UserError
from calibadv.io.files import check_empty
from calibadv.io.progress_bar import progress_bar
from calibadv.retrieval import MemoryRetriever
from calibadv.rewards import F1
from calibadv.sft.data import Demonstrations
from calibadv.sft.module import SupervisedModule
from calibadv.types import Rollout
from calibadv.world.tokenizer import build_tokenizer

_BATCH = 32
_LEARNING_RATE = 3e-3
_WARM_UP_STEPS = 30
_FLAT_SHARE = 0.3
_FINAL_SHARE = 0.03
_REST_WEIGHT = 0.1
# For so narrow a model: with the usual 0.02 the same loss takes twice as many steps.
_INITIAL_SCALE = 0.06


def policy(out: Path, seed: int = 0, clean_steps: int = 250, noisy_steps: int = 400) -> None:
    """Make the tiny policy from nothing, in about two minutes on two cores: supervised on scripted demonstrations.

    The policy stays below what the world allows on purpose: it is where training starts.

    Args:
        out: Hugging Face folder to write; it must be empty or not there.
        seed: Of the initial weights and the demonstrations. The embedded world is never among their worlds.
        clean_steps: Steps on demonstrations without a mistake.
        noisy_steps: Steps on demonstrations with mistakes, after those.

    Raises:
        UserError: the folder holds something, or a number of steps is negative.
    """
    check_empty(out)
    for name, steps in (("clean_steps", clean_steps), ("noisy_steps", noisy_steps)):
        if steps < 0:
            raise UserError(f"{name} is {steps}; it must be at least 0")
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = _build_model(tokenizer)
    special = model.generation_config
    if clean_steps + noisy_steps:
        clean = islice(demonstrate(seed, CLEAN), clean_steps * _BATCH)
        noisy = islice(demonstrate(seed + 1, Noise()), noisy_steps * _BATCH)
        model = _fit(model, tokenizer, list(chain(_in_batches(clean, Random(seed)), _in_batches(noisy, Random(seed)))))
        model.generation_config = special
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _fit(model: Any, tokenizer: PreTrainedTokenizerFast, demonstrations: list[Rollout]) -> Any:
    """Fit a model to demonstrations in their order."""
    data = Demonstrations(demonstrations, _BATCH)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = SupervisedModule(
            folder,
            TransformersEngine(),
            F1(),
            PROTOCOL,
            MemoryRetriever(),
            learning_rate=_LEARNING_RATE,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: rate_factor(step, data.steps)
            ),
            rest_weight=_REST_WEIGHT,
        )
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[_Bar(data.steps)],
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    return module.model


class _Bar(Callback):
    """Shows how far the warm start is."""

    def __init__(self, steps: int) -> None:
        self._bar = progress_bar("Warm start", steps, hidden=False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._advance = self._bar.__enter__()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._advance(1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._bar.__exit__(None, None, None)


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


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step."""
    progress = max(0.0, step / max(steps, 1) - _FLAT_SHARE) / (1 - _FLAT_SHARE)
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - (1 - _FINAL_SHARE) * progress)


def _in_batches(demonstrations: Iterator[Rollout], rng: Random) -> Iterator[Rollout]:
    # Demonstrations of one world, cut into batches of similar length: a quarter less padding.
    while world := list(islice(demonstrations, PER_WORLD)):
        world.sort(key=lambda rollout: sum(len(segment.text) for segment in rollout.segments))
        batches = [world[start : start + _BATCH] for start in range(0, len(world), _BATCH)]
        rng.shuffle(batches)
        yield from chain.from_iterable(batches)
