"""State of a batch of prompts that is decoded token by token.

Shapes: **B** prompts, **N** of them that are still decoded, **W** columns of the key-value cache, **V** vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from calibadv.engines._stop import ends_with_search, stop_reason
from calibadv.numerics.rng import draw_tokens, keyed_uniforms
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, DrawKey, Sampling, StopReason


class DecodingBatch:
    """Rows that are decoded together.

    The cache holds the first tokens of some of the prompts, of each as many as ``cached`` says. Shorter prompts are
    padded on the left, and padding is always masked.
    """

    logits: Tensor  # [N, V] of the next token, float32

    def __init__(
        self, model: nn.Module, prompts: list[Sequence[int]], cache: DynamicCache, cached: list[int], pad_id: int
    ) -> None:
        self.cache = cache
        self.steps = 0  # drawn tokens that the model has read
        device = next(model.parameters()).device
        width = max(cached)
        distinct = dict.fromkeys(map(tuple, prompts))
        once = width == 0 and len(distinct) < len(prompts)  # the rollouts of a question begin with one prompt
        new = list(distinct) if once else [prompt[n:] for prompt, n in zip(prompts, cached, strict=True)]
        token_ids, mask = _pad_left(new, pad_id, device)
        if width:
            columns = torch.arange(width, device=device)
            mask = torch.cat([columns >= width - torch.tensor(cached, device=device)[:, None], mask], dim=1)
        self.mask = mask  # [N, W] bool, the columns of the cache that hold a token
        self._positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, width:]
        self.prompt_indices = list(range(len(new)))  # of each row; ``rows`` is the same as a tensor [N]
        self._forward(model, token_ids)
        if once:
            index = {prompt: row for row, prompt in enumerate(distinct)}
            self.select([index[tuple(prompt)] for prompt in prompts])
            self.prompt_indices = list(range(len(prompts)))
        self.rows = torch.tensor(self.prompt_indices, device=device)

    def select(self, indices: list[int]) -> None:
        """Keep the rows with these indices; an index that is repeated duplicates its row."""
        keep = torch.tensor(indices, device=self.mask.device)
        self.cache.batch_select_indices(keep)
        self.mask, self._positions, self.logits = self.mask[keep], self._positions[keep], self.logits[keep]
        self.prompt_indices = [self.prompt_indices[index] for index in indices]
        self.rows = torch.tensor(self.prompt_indices, device=self.mask.device)

    def decode_step(self, model: nn.Module, tokens: Tensor) -> None:
        """Compute the next logits from the tokens [N] that were drawn last."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self.steps += 1
        self._forward(model, tokens[:, None])

    def _forward(self, model: nn.Module, token_ids: Tensor) -> None:
        output = model(
            input_ids=token_ids,
            attention_mask=self.mask,
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1].float()


class SampledTokens:
    """The tokens drawn for B prompts."""

    def __init__(self, keys: list[DrawKey], sampling: Sampling, device: torch.device) -> None:
        self.keys = keys  # of the draws of each prompt
        self.reasons: list[StopReason | None] = [None] * len(keys)  # None also for those that met ``max_tokens``
        self.searched = [False] * len(keys)  # True for those that have ended with a search
        self._temperature = sampling.temperature
        self._lengths = [sampling.max_tokens] * len(keys)
        uniforms = np.stack([keyed_uniforms(key, sampling.max_tokens) for key in keys])
        self._uniforms = torch.from_numpy(uniforms).to(device)
        self._token_ids = torch.zeros_like(self._uniforms, dtype=torch.long)
        self._logprobs = torch.zeros_like(self._uniforms)

    def draw(self, rows: Tensor, logits: Tensor, position: int) -> Tensor:
        """Draw the token at a position of some rows; ``completions`` leaves out what is drawn after the end of one."""
        tokens, logprobs = draw_tokens(logits, self._temperature, self._uniforms[rows, position])
        self._token_ids[rows, position] = tokens
        self._logprobs[rows, position] = logprobs
        return tokens

    def check_stop(self, row: int, position: int, tokenizer: AgentTokenizer) -> None:
        """Set the stop reason of a row if its token at a position ends the message."""
        if self.reasons[row] is not None:
            return
        token_ids = self._token_ids[row, : position + 1].tolist()
        self.reasons[row] = stop_reason(tokenizer, token_ids)
        if self.reasons[row] is not None:
            self._lengths[row] = position + 1
            self.searched[row] = self.reasons[row] is StopReason.TAG and ends_with_search(tokenizer, token_ids)

    def message(self, row: int) -> list[int]:
        """The tokens of a row that has ended."""
        token_ids: list[int] = self._token_ids[row, : self._lengths[row]].tolist()
        return token_ids

    def completions(self) -> list[Completion]:
        """All rows, after the last token."""
        columns = zip(self._token_ids.tolist(), self._logprobs.tolist(), self._lengths, self.reasons, strict=True)
        return [
            Completion(tuple(token_ids[:length]), tuple(logprobs[:length]), reason or StopReason.LENGTH)
            for token_ids, logprobs, length, reason in columns
        ]


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    token_ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)
    return token_ids, mask
