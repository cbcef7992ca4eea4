"""Stop conditions of a message, for engines that see each token as it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import StopReason

# No tokenizer spreads a tag of nine bytes over more tokens than this.
_WINDOW = 16


def stop_reason(tokenizer: AgentTokenizer, token_ids: Sequence[int]) -> StopReason | None:
    """The reason why the token drawn last ends the message, None if it does not.

    The tag is looked for in decoded text, since a tag may be one token, several, or share its last token with the
    white space behind it.
    """
    last = token_ids[-1]
    if last in tokenizer.end_ids:
        return StopReason.END
    if tokenizer.may_stop(last) and any(stop in _tail(tokenizer, token_ids) for stop in tokenizer.stop_strings):
        return StopReason.TAG
    return None


def ends_with_search(tokenizer: AgentTokenizer, token_ids: Sequence[int]) -> bool:
    """Return True if the first stop string ended the message, which is that of a call: another turn may follow."""
    return tokenizer.stop_strings[0] in _tail(tokenizer, token_ids)


def stop_candidates(tokenizer: AgentTokenizer, vocabulary: int) -> Tensor:
    """[V] bool: the tokens after which a message may end, so that ``stop_reason`` is called for few rows of a batch."""
    ends = tokenizer.end_ids
    return torch.tensor([token in ends or tokenizer.may_stop(token) for token in range(vocabulary)])


def _tail(tokenizer: AgentTokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(tokenizer.visible(token_ids)[-_WINDOW:])
