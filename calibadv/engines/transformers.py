"""Sample with transformers, in the training process, from the very weights that are trained.

Shapes: **N** rows that are decoded together, **W** columns of the key-value cache, **V** vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache
from typing_extensions import override

from calibadv.engines._attention import grouped_attention
from calibadv.engines._prefix_cache import KeptRows
from calibadv.engines._stop import ends_with_search, may_stop, stop_reason
from calibadv.errors import UserError
from calibadv.interfaces import Engine
from calibadv.numerics.rng import draw_tokens, uniforms
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, DrawKey, Sampling, StopReason


class TransformersEngine(Engine):
    """Sample from the policy in this process, without a copy of its weights.

    The decoding loop is our own, and not ``generate``: each draw is keyed (seed, step, question, sample, turn), its
    log-probability is kept, nothing of a folder's generation config can reach the distribution, rows that have ended
    leave the batch, equal prompts are read once, and a rollout that comes back for its next turn goes on from the keys
    and values of the last one. Only of a policy that is sharded over processes is there a whole copy.

    Args:
        batch_size: The most prompts that are decoded together; bounds the memory of the key-value cache. Where more
            are asked for at once, every turn reads its prompt from the beginning.
    """

    def __init__(self, batch_size: int = 256) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self._policy: Policy | None = None
        self._copy: nn.Module | None = None
        self._may_stop: Tensor | None = None
        self._kept = KeptRows()

    @override
    def sync(self, policy: Policy) -> None:
        self._kept.clear()
        if policy is not self._policy:
            self._policy, self._copy, self._may_stop = policy, None, None
        if any(isinstance(parameter, DTensor) for parameter in policy.model.parameters()):
            self._copy = whole_copy(policy, self._copy)

    @override
    def release(self) -> None:
        self._kept.clear()

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        assert self._policy is not None, "sync comes before generate"
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        completions: dict[int, Completion] = {}
        with _for_sampling(self._copy or self._policy.model) as model:
            for start in range(0, len(by_length), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                done = self._decode(model, [prompts[row] for row in rows], [keys[row] for row in rows], sampling)
                completions.update(zip(rows, done, strict=True))
                if len(prompts) > self.batch_size:
                    self._kept.clear()
        return [completions[row] for row in range(len(prompts))]

    def _decode(
        self, model: nn.Module, prompts: list[Sequence[int]], keys: list[DrawKey], sampling: Sampling
    ) -> list[Completion]:
        assert self._policy is not None
        tokenizer = self._policy.tokenizer
        batch = _Batch(model, prompts, *self._kept.take(model, prompts, keys), tokenizer.pad_id)
        drawn = _Drawn(keys, sampling, batch.logits.device)
        if self._may_stop is None:
            self._may_stop = may_stop(tokenizer, batch.logits.shape[-1]).to(batch.logits.device)
        for place in range(sampling.max_tokens):
            tokens = drawn.draw(batch.rows, batch.logits, place)
            for index in self._may_stop[tokens].nonzero()[:, 0].tolist():
                drawn.look_for_end(batch.numbers[index], place, tokenizer)
            going = [index for index, row in enumerate(batch.numbers) if drawn.reasons[row] is None]
            if not going or place + 1 == sampling.max_tokens:
                break
            if len(going) <= len(batch.numbers) // 2:  # selecting rows of the cache costs too much at every token
                self._keep(batch, prompts, drawn)
                batch.select(going)
                tokens = tokens[going]
            batch.read(model, tokens)
        self._keep(batch, prompts, drawn)
        return drawn.completions()

    def _keep(self, batch: _Batch, prompts: list[Sequence[int]], drawn: _Drawn) -> None:
        """Keep the rows of a batch that have ended with a search, after which another turn may come."""
        ended = [index for index, row in enumerate(batch.numbers) if drawn.searched[row]]
        rows = [batch.numbers[index] for index in ended]
        read = [(*prompts[row], *drawn.tokens_of(row)[: batch.steps]) for row in rows]
        self._kept.keep(batch.cache, batch.mask, ended, [drawn.keys[row] for row in rows], read)


class _Batch:
    """Rows that are decoded together.

    Attributes:
        numbers: which prompt each row belongs to.
        rows: the same as a tensor [N].
        cache: keys and values of all that was read.
        mask: [N, W] bool, the columns of the cache that hold a token.
        logits: [N, V] of the next token, float32.
        steps: drawn tokens that were read.

    Args:
        model: reads the prompts.
        prompts: N prompts.
        cache: with the beginnings of some of them.
        held: how many tokens of each prompt the cache holds.
        pad_id: fills the left of shorter prompts; always masked.
    """

    logits: Tensor

    def __init__(
        self, model: nn.Module, prompts: list[Sequence[int]], cache: DynamicCache, held: list[int], pad_id: int
    ) -> None:
        self.cache = cache
        self.steps = 0
        device = next(model.parameters()).device
        width = max(held)
        distinct = dict.fromkeys(map(tuple, prompts))
        once = width == 0 and len(distinct) < len(prompts)  # the rollouts of a question begin with one prompt
        new = list(distinct) if once else [prompt[n:] for prompt, n in zip(prompts, held, strict=True)]
        token_ids, mask = _pad_left(new, pad_id, device)
        if width:
            columns = torch.arange(width, device=device)
            mask = torch.cat([columns >= width - torch.tensor(held, device=device)[:, None], mask], dim=1)
        self.mask = mask
        self._positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, width:]
        self.numbers = list(range(len(new)))
        self._read(model, token_ids)
        if once:
            places = {prompt: place for place, prompt in enumerate(distinct)}
            self.select([places[tuple(prompt)] for prompt in prompts])
            self.numbers = list(range(len(prompts)))
        self.rows = torch.tensor(self.numbers, device=device)

    def select(self, indices: list[int]) -> None:
        """Go on with some rows only, or with several of one."""
        keep = torch.tensor(indices, device=self.mask.device)
        self.cache.batch_select_indices(keep)
        self.mask, self._positions, self.logits = self.mask[keep], self._positions[keep], self.logits[keep]
        self.numbers = [self.numbers[index] for index in indices]
        self.rows = torch.tensor(self.numbers, device=self.mask.device)

    def read(self, model: nn.Module, tokens: Tensor) -> None:
        """Read the tokens [N] that were drawn last."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self.steps += 1
        self._read(model, tokens[:, None])

    def _read(self, model: nn.Module, token_ids: Tensor) -> None:
        output = model(
            input_ids=token_ids,
            attention_mask=self.mask,
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1].float()


class _Drawn:
    """What is drawn for N prompts.

    Attributes:
        keys: what the draws of each depend on.
        reasons: why each has ended, None for those that go on or have met ``max_tokens``.
        searched: whether each has ended with a search.

    Args:
        keys: of the N prompts.
        sampling: temperature and the most tokens to draw.
        device: of the model.
    """

    def __init__(self, keys: list[DrawKey], sampling: Sampling, device: torch.device) -> None:
        self.keys = keys
        self.reasons: list[StopReason | None] = [None] * len(keys)
        self.searched = [False] * len(keys)
        self._temperature = sampling.temperature
        self._lengths = [sampling.max_tokens] * len(keys)
        self._uniforms = torch.from_numpy(np.stack([uniforms(key, sampling.max_tokens) for key in keys])).to(device)
        self._token_ids = torch.zeros_like(self._uniforms, dtype=torch.long)
        self._logprobs = torch.zeros_like(self._uniforms)

    def draw(self, rows: Tensor, logits: Tensor, place: int) -> Tensor:
        """Draw a token of some rows; what is drawn behind the end of one is left out in the end."""
        tokens, logprobs = draw_tokens(logits, self._temperature, self._uniforms[rows, place])
        self._token_ids[rows, place] = tokens
        self._logprobs[rows, place] = logprobs
        return tokens

    def look_for_end(self, row: int, place: int, tokenizer: AgentTokenizer) -> None:
        """See whether the token of a row at ``place`` ends its message."""
        if self.reasons[row] is not None:
            return
        token_ids = self._token_ids[row, : place + 1].tolist()
        self.reasons[row] = stop_reason(tokenizer, token_ids)
        if self.reasons[row] is not None:
            self._lengths[row] = place + 1
            self.searched[row] = self.reasons[row] is StopReason.TAG and ends_with_search(tokenizer, token_ids)

    def tokens_of(self, row: int) -> list[int]:
        """The tokens of a row that has ended."""
        token_ids: list[int] = self._token_ids[row, : self._lengths[row]].tolist()
        return token_ids

    def completions(self) -> list[Completion]:
        """All rows, once none goes on."""
        columns = zip(self._token_ids.tolist(), self._logprobs.tolist(), self._lengths, self.reasons, strict=True)
        return [
            Completion(tuple(token_ids[:length]), tuple(logprobs[:length]), reason or StopReason.LENGTH)
            for token_ids, logprobs, length, reason in columns
        ]


def _pad_left(prompts: list[Any], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    token_ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)
    return token_ids, mask


@contextmanager
def _for_sampling(model: nn.Module) -> Iterator[nn.Module]:
    """Prepare a model for sampling, and leave it as it was."""
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


def whole_copy(policy: Policy, copy: nn.Module | None = None) -> nn.Module:
    """Copy a policy's model, so that one process can run it alone where the original is sharded over several."""
    original: Any = policy.model
    if copy is None:
        some = next(original.parameters())
        with torch.random.fork_rng(devices=[]), torch.device(some.device):
            made: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                original.config, dtype=some.dtype
            )
        copy = made.eval()
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in policy.weights():
            parameters.pop(name).copy_(weight)
    assert not parameters, f"the policy has no weights of {', '.join(parameters)}"
    return copy
