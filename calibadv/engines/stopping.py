"""When a message ends, for engines that see each token as it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from calibadv.agent.protocol import STOP_TAGS
from calibadv.agent.tokenizer import AgentTokenizer
from calibadv.types import StopReason

# No tokenizer spreads a tag of nine bytes over more tokens than this.
_WINDOW = 16


def stop_reason(tokenizer: AgentTokenizer, token_ids: Sequence[int]) -> StopReason | None:
    """Whether the token drawn last ends the message.

    The tag is looked for in decoded text, since a tag may be one token, several, or share its last token with the
    white space behind it.

    Args:
        tokenizer: the policy's.
        token_ids: all tokens of this message so far, at least one; no earlier one ended it.

    Returns:
        ``StopReason.END`` or ``StopReason.TAG``, or None to go on.
    """
    last = token_ids[-1]
    if last in tokenizer.end_ids:
        return StopReason.END
    if tokenizer.may_close_tag(last):
        tail = tokenizer.decode(tokenizer.visible(token_ids)[-_WINDOW:])
        if any(tag in tail for tag in STOP_TAGS):
            return StopReason.TAG
    return None
