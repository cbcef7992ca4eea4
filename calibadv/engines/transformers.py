"""Sample with transformers, in the training process, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from typing_extensions import override

from calibadv.engines._attention import grouped_attention
from calibadv.engines._decoding import DecodingBatch, SampledTokens
from calibadv.engines._prefix_cache import PrefixCache
from calibadv.engines._stop import stop_candidates
from calibadv.errors import UserError
from calibadv.interfaces import Engine
from calibadv.policy.policy import Policy
from calibadv.types import Completion, DrawKey, Sampling


class TransformersEngine(Engine):
    """Sample from the policy in this process, without a copy of its weights.

    The decoding loop is our own, and not ``generate``: each draw is keyed (seed, step, question, sample, turn), its
    log-probability is kept, nothing of a folder's generation config can reach the distribution, rows that have ended
    leave the batch, equal prompts are read once, and the next turn of a rollout reuses the keys and values of the last
    one. Only a policy that is sharded over processes is copied.

    Args:
        batch_size: The most prompts that are decoded together; bounds the memory of the key-value cache. Where more
            are asked for at once, every turn reads its whole prompt.
    """

    def __init__(self, batch_size: int = 256) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self._policy: Policy | None = None
        self._copy: nn.Module | None = None
        self._stop_candidates: Tensor | None = None
        self._prefix_cache = PrefixCache()

    @override
    def sync(self, policy: Policy) -> None:
        self._prefix_cache.clear()
        if policy is not self._policy:
            self._policy, self._copy, self._stop_candidates = policy, None, None
        if any(isinstance(parameter, DTensor) for parameter in policy.model.parameters()):
            self._copy = unsharded_copy(policy, self._copy)

    @override
    def release(self) -> None:
        self._prefix_cache.clear()

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        assert self._policy is not None, "sync comes before generate"
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        completions: dict[int, Completion] = {}
        with _sampling_mode(self._copy or self._policy.model) as model:
            for start in range(0, len(by_length), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                done = self._decode(model, [prompts[row] for row in rows], [keys[row] for row in rows], sampling)
                completions.update(zip(rows, done, strict=True))
                if len(prompts) > self.batch_size:
                    self._prefix_cache.clear()
        return [completions[row] for row in range(len(prompts))]

    def stream(self, prompt: Sequence[int], sampling: Sampling, key: DrawKey) -> Iterator[int]:
        """Yield the tokens of one message, as ``generate`` draws them."""
        assert self._policy is not None, "sync comes before stream"
        tokenizer = self._policy.tokenizer
        with _sampling_mode(self._copy or self._policy.model) as model:
            batch = DecodingBatch(model, [prompt], *self._prefix_cache.load(model, [prompt], [key]), tokenizer.pad_id)
            sampled = SampledTokens([key], sampling, batch.logits.device)
            for position in range(sampling.max_tokens):
                tokens = sampled.draw(batch.rows, batch.logits, position)
                yield int(tokens.item())
                sampled.check_stop(0, position, tokenizer)
                if sampled.reasons[0] is not None:
                    break
                batch.decode_step(model, tokens)
            self._store(batch, [prompt], sampled)

    def _decode(
        self, model: nn.Module, prompts: list[Sequence[int]], keys: list[DrawKey], sampling: Sampling
    ) -> list[Completion]:
        assert self._policy is not None
        tokenizer = self._policy.tokenizer
        batch = DecodingBatch(model, prompts, *self._prefix_cache.load(model, prompts, keys), tokenizer.pad_id)
        sampled = SampledTokens(keys, sampling, batch.logits.device)
        if self._stop_candidates is None:
            self._stop_candidates = stop_candidates(tokenizer, batch.logits.shape[-1]).to(batch.logits.device)
        for position in range(sampling.max_tokens):
            tokens = sampled.draw(batch.rows, batch.logits, position)
            for index in self._stop_candidates[tokens].nonzero()[:, 0].tolist():
                sampled.check_stop(batch.prompt_indices[index], position, tokenizer)
            unfinished = [index for index, row in enumerate(batch.prompt_indices) if sampled.reasons[row] is None]
            if not unfinished or position + 1 == sampling.max_tokens:
                break
            if len(unfinished) <= len(batch.prompt_indices) // 2:  # selecting rows of the cache at every token is slow
                self._store(batch, prompts, sampled)
                batch.select(unfinished)
                tokens = tokens[unfinished]
            batch.decode_step(model, tokens)
        self._store(batch, prompts, sampled)
        return sampled.completions()

    def _store(self, batch: DecodingBatch, prompts: list[Sequence[int]], sampled: SampledTokens) -> None:
        """Store the rows of a batch that have ended with a search, after which another turn may follow."""
        ended = [index for index, row in enumerate(batch.prompt_indices) if sampled.searched[row]]
        rows = [batch.prompt_indices[index] for index in ended]
        token_ids = [(*prompts[row], *sampled.message(row)[: batch.steps]) for row in rows]
        self._prefix_cache.store(batch.cache, batch.mask, ended, [sampled.keys[row] for row in rows], token_ids)


@contextmanager
def _sampling_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Set a model to evaluation mode, without gradients and with fast attention; restore it at the end."""
    training = model.training
    device = next(model.parameters()).device.type
    model.eval()  # gradient checkpointing, active in training mode only, would switch the cache off
    try:
        with torch.no_grad(), grouped_attention(model):
            if not torch.is_autocast_enabled(device):
                yield model
                return
            # Lightning has autocast convert the weights at every use; here once per call is enough, for none changes.
            with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=True):
                yield model
            torch.clear_autocast_cache()
    finally:
        model.train(training)


def unsharded_copy(policy: Policy, copy: nn.Module | None = None) -> nn.Module:
    """Copy a policy's model, so that one process can run it alone where the original is sharded over several."""
    original: Any = policy.model
    if copy is None:
        parameter = next(original.parameters())
        with torch.random.fork_rng(devices=[]), torch.device(parameter.device):
            created: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                original.config, dtype=parameter.dtype
            )
        copy = created.eval()
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in policy.weights():
            parameters.pop(name).copy_(weight)
    assert not parameters, f"the policy has no weights of {', '.join(parameters)}"
    return copy
