"""Sample with transformers, in the training process, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibadv.engines.stopping import stop_reason
from calibadv.interfaces import Engine
from calibadv.models import Policy
from calibadv.numerics.draws import uniforms
from calibadv.numerics.sampling import draw_tokens
from calibadv.types import Completion, DrawKey, Sampling, StopReason


class TransformersEngine(Engine):
    """Sample from the policy in this process, without a copy of its weights.

    The decoding loop is our own, and not ``generate``: each draw is keyed (seed, step, question, sample, turn), its
    log-probability is kept, nothing of a folder's generation config can reach the distribution, and rows that have
    ended leave the batch.

    Args:
        batch_size: the most prompts that are decoded together; bounds the memory of the key-value cache.
    """

    def __init__(self, batch_size: int = 256) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self._policy: Policy | None = None

    def sync(self, policy: Policy) -> None:
        """Sample from this policy from now on; its weights are shared, so later updates need no copy.

        Args:
            policy: model and tokenizer.
        """
        self._policy = policy

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        """Continue each prompt until a closing action tag, end of sequence or ``sampling.max_tokens``.

        Args:
            prompts: token ids of each prompt.
            sampling: temperature and the most tokens to draw.
            keys: what the draws of each prompt depend on.

        Returns:
            One completion per prompt, in the same order.
        """
        assert self._policy is not None, "sync comes before generate"
        model = self._policy.model
        training = model.training
        model.eval()  # gradient checkpointing, active in training mode only, would switch the cache off
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        completions: dict[int, Completion] = {}
        with torch.no_grad():
            for start in range(0, len(by_length), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                draws = np.stack([uniforms(keys[row], sampling.max_tokens) for row in rows])
                done = _decode(self._policy, [prompts[row] for row in rows], sampling, draws)
                completions.update(zip(rows, done, strict=True))
        model.train(training)
        return [completions[row] for row in range(len(prompts))]


def _decode(
    policy: Policy,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    draws: NDArray[np.float32],
) -> list[Completion]:
    device = next(policy.model.parameters()).device
    token_ids, mask = _pad_left(prompts, policy.tokenizer.pad_id, device)
    uniform = torch.from_numpy(draws).to(device)
    rows = list(range(len(prompts)))  # which prompt each row of the tensors belongs to
    drawn: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    reasons: list[StopReason | None] = [None for _ in prompts]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = None
    for place in range(sampling.max_tokens):
        output = policy.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens, token_logprobs = draw_tokens(output.logits[:, -1].float(), sampling.temperature, uniform[:, place])
        for row, token, logprob in zip(rows, tokens.tolist(), token_logprobs.tolist(), strict=True):
            if reasons[row] is None:
                drawn[row].append(token)
                logprobs[row].append(logprob)
                reasons[row] = stop_reason(policy.tokenizer, drawn[row])
        going = [index for index, row in enumerate(rows) if reasons[row] is None]
        if not going:
            break
        token_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(going) <= len(rows) // 2:  # selecting rows of the cache costs too much to do it at every token
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            token_ids, positions, mask, uniform = token_ids[keep], positions[keep], mask[keep], uniform[keep]
            rows = [rows[index] for index in going]
    return [
        Completion(tuple(ids), tuple(values), reason or StopReason.LENGTH)
        for ids, values, reason in zip(drawn, logprobs, reasons, strict=True)
    ]


def _pad_left(prompts: list[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    token_ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return token_ids, mask
