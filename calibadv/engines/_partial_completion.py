"""A message under way, in engines that get its tokens one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from calibadv.engines._stop import stop_reason
from calibadv.errors import UserError
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, StopReason


@dataclass(slots=True)
class PartialCompletion:
    """The tokens of one message so far. Stop conditions are applied here, not by the sampler."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: StopReason | None = None

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[float], tokenizer: AgentTokenizer) -> None:
        """Append drawn tokens, up to the one that ends the message."""
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            if not math.isfinite(logprob):
                raise UserError(
                    f"the sampler drew token {token_id} with log-probability {logprob}: training has diverged; "
                    "resume from an earlier checkpoint with a lower model.learning_rate"
                )
            self.token_ids.append(token_id)
            self.logprobs.append(logprob)
            self.reason = stop_reason(tokenizer, self.token_ids)
            if self.reason is not None:
                return

    def completion(self) -> Completion:
        """The message; one without an end met the limit of tokens."""
        return Completion(tuple(self.token_ids), tuple(self.logprobs), self.reason or StopReason.LENGTH)
