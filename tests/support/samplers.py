"""What tests of engines with a copy of the weights share: models that vLLM takes, and comparisons with ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from calibadv.engines import TransformersEngine
from calibadv.interfaces import Engine
from calibadv.policy.policy import Policy
from calibadv.types import Completion, DrawKey, Sampling
from support.agents import protocol

GREEDY = Sampling(0.0, max_tokens=24)


def widen(folder: Path, **settings: object) -> Path:
    """Give a folder a model with heads as wide as vLLM needs them on a CPU, and biases that are not 0."""
    config = AutoConfig.from_pretrained(folder)
    config.head_dim, config.hidden_size = 32, 128
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.generation_config = GenerationConfig(do_sample=True, top_k=5, top_p=0.8, repetition_penalty=1.3)
    model.save_pretrained(folder)
    return folder


def own(policy: Policy) -> Policy:
    """A policy of its own, to be changed."""
    return Policy(copy.deepcopy(policy.model), policy.tokenizer)


def change(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape))


def keys(*samples: int) -> list[DrawKey]:
    return [DrawKey(seed=0, step=1, question_id="q", sample=sample, turn=0) for sample in samples]


def prompts_of(policy: Policy) -> list[list[int]]:
    return [protocol().prompt_ids(f"what is {'a ' * n}a?", policy.tokenizer) for n in range(16)]


def same(left: Sequence[Completion], right: Sequence[Completion]) -> bool:
    """Whether all tokens are equal, and log-probabilities up to 1e-3."""
    return [(c.token_ids, c.stop_reason) for c in left] == [(c.token_ids, c.stop_reason) for c in right] and all(
        np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-3) for a, b in zip(left, right, strict=True)
    )


def greedy_as_transformers(policy: Policy, engine: Engine) -> bool:
    reference = TransformersEngine()
    reference.sync(policy)
    ask = (prompts_of(policy), GREEDY, keys(*range(16)))
    return same(engine.generate(*ask), reference.generate(*ask))
