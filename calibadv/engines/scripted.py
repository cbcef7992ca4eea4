"""An engine that plays scripted messages, for tests, tutorials and demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from calibadv.engines._partial_completion import PartialCompletion
from calibadv.errors import UserError
from calibadv.interfaces import Engine
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, DrawKey, Sampling


class ScriptedEngine(Engine):
    """Play scripted messages through the policy's tokenizer, with log-probability 0.

    Like a policy's, a message ends with the token that completes a closing action tag; one without such a tag ends with
    the end-of-sequence token.

    Args:
        replies: for each question id, for each sample, its messages in order; samples beyond the list start it again.
        default: samples for question ids that ``replies`` does not name.
    """

    def __init__(
        self, replies: dict[str, list[list[str]]] | None = None, default: list[list[str]] | None = None
    ) -> None:
        self._requests = replies or {}
        self._default = default or []
        self._tokenizer: AgentTokenizer | None = None

    @override
    def sync(self, policy: Policy) -> None:
        self._tokenizer = policy.tokenizer

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        return [self._play(key, sampling.max_tokens) for key in keys]

    def _play(self, key: DrawKey, max_tokens: int) -> Completion:
        samples = self._requests.get(key.question_id, self._default)
        messages = samples[key.sample % len(samples)] if samples else []
        if key.turn >= len(messages):
            raise UserError(
                f"the script of question '{key.question_id}', sample {key.sample} has {len(messages)} messages, "
                f"and message {key.turn + 1} was asked for; script it, or end with an answer"
            )
        assert self._tokenizer is not None, "sync comes before generate"
        script = [*self._tokenizer.encode(messages[key.turn]), *sorted(self._tokenizer.end_ids)[:1]][:max_tokens]
        message = PartialCompletion()
        message.extend(script, [0.0] * len(script), self._tokenizer)
        return message.completion()
