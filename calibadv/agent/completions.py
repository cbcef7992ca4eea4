"""Checks of an engine's completions: a wrong one would train the policy on nonsense."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from calibadv.engines._stop import stop_reason
from calibadv.errors import UserError, is_number, shown
from calibadv.interfaces import Engine, StreamingEngine
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, Question

# A logit minus the logsumexp of all of them, in half precision, may round to just above 0 where a token is certain.
_ROUNDING = 1e-3


def check_count(given: Collection[Any], engine: Engine, questions: Sequence[Question]) -> None:
    """Refuse a number of answers, or of request numbers, that is not that of the prompts."""
    if not isinstance(given, Collection) or len(given) != len(questions):
        what = f"{len(given)} answers" if isinstance(given, Collection) else shown(given)
        first = f", of question '{questions[0].id}' first" if questions else ""
        raise UserError(f"{type(engine).__name__} gave {what} to {len(questions)} prompts{first}; it gives one to each")


def collect(engine: StreamingEngine, in_flight: Mapping[int, Question]) -> dict[int, Completion]:
    """Collect the finished requests of an engine."""
    done = engine.collect()
    unknown = done.keys() - in_flight.keys() if isinstance(done, dict) else {shown(done)}
    if unknown:
        raise UserError(
            f"{type(engine).__name__} collected {min(map(str, unknown))}, which is no request under way (there are "
            f"{len(in_flight)}, that of question '{next(iter(in_flight.values())).id}' first); collect gives a "
            "dictionary from the numbers of submit, each once, to completions"
        )
    return done


def fault_of(completion: Any, tokenizer: AgentTokenizer, most: int) -> str | None:
    """Describe what is wrong with a completion, None if nothing is.

    It is wrong where its tokens and log-probabilities are not as many, or more than ``most``, a log-probability is not
    finite or above 0, or tokens follow the one that ends the message.
    """
    if not isinstance(completion, Completion):
        return f"{shown(completion)}; it gives a calibadv.types.Completion"
    token_ids, logprobs = completion.token_ids, completion.logprobs
    for name, values in (("token_ids", token_ids), ("logprobs", logprobs)):
        if not isinstance(values, Sequence):
            return f"{shown(values)} as {name}; they are a tuple"
    if len(logprobs) != len(token_ids):
        return f"{len(logprobs)} log-probabilities for {len(token_ids)} tokens; it gives one for each"
    if len(token_ids) > most:
        return f"{len(token_ids)} tokens; at most {most} were asked for (sampling.max_tokens)"
    for place, value in enumerate(logprobs, 1):
        if not (is_number(value) and -math.inf < value <= _ROUNDING):
            return (
                f"the log-probability {shown(value)} for token {place} of {len(token_ids)}; it is finite and at most "
                "0, unless the engine is wrong or training has diverged"
            )
    end = _early_end(tokenizer, token_ids)
    if end:
        text = tokenizer.backend.decode(list(token_ids[max(0, end - 8) : end]))
        return f"{len(token_ids) - end} tokens behind the one that ends the message ({text!r}); it gives none"
    return None


def _early_end(tokenizer: AgentTokenizer, token_ids: Sequence[int]) -> int | None:
    """Count the tokens of the message by our rules, where more were given."""
    for place, token in enumerate(token_ids[:-1], 1):
        # Most tokens can end nothing, which is cheap to see; only for the others is text decoded.
        may_end = token in tokenizer.end_ids or tokenizer.may_stop(token)
        if may_end and stop_reason(tokenizer, token_ids[:place]) is not None:
            return place
    return None
