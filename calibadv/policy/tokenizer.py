"""Between text and token ids: what the agent needs of a Hugging Face tokenizer, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from calibadv.errors import UserError

# Of the search protocol, which is the default.
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/"))
STOP_TAGS = ("</search>", "</answer>")

CUT_MARK = " [...]"
"""Ends a passage that was cut."""

_PROBE = "one {0} two{0}one"  # observations put words beside a tag without white space


class AgentTokenizer:
    """Encodes prompts and observations, decodes what the policy wrote.

    Attributes:
        backend: the wrapped tokenizer.
        end_ids: token ids that end a message.
        pad_id: token id to pad with; always masked, so tokenizers without one can use any.
        stop_strings: strings that end a message.
        special_strings: strings that become one special or added token, wherever they stand in a text.

    Args:
        backend: a tokenizer that returns the protocol's tags unchanged; ``prepare_tags`` sees to that.
        end_ids: further token ids that end a message, beside the tokenizer's own end-of-sequence token.
        stop_strings: the protocol's.
    """

    def __init__(
        self, backend: PreTrainedTokenizerBase, end_ids: Iterable[int] = (), stop_strings: Sequence[str] = STOP_TAGS
    ) -> None:
        self.backend = backend
        self.stop_strings = tuple(stop_strings)
        own_end = backend.eos_token_id
        self.end_ids = frozenset(end_ids) | (frozenset() if own_end is None else {int(own_end)})
        padding = backend.pad_token_id
        self.pad_id = int(padding) if padding is not None else min(self.end_ids, default=0)
        self._invisible = self.end_ids | (frozenset() if padding is None else {int(padding)})
        added = (token.content for token in backend.added_tokens_decoder.values())
        self.special_strings = tuple(dict.fromkeys((*added, *backend.all_special_tokens)))
        first = backend("one")["input_ids"][:1]
        self._begin = first if first == [backend.bos_token_id] else []
        self._decode_one = lru_cache(maxsize=None)(lambda token_id: self.decode((token_id,)))

    def encode(self, text: str) -> list[int]:
        """Encode text of the environment, adding no special tokens."""
        return list(self.backend.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode what the policy wrote, special tokens shown, end-of-sequence and padding left out."""
        shown = self.visible(token_ids)
        return str(self.backend.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode_message(self, token_ids: Sequence[int]) -> str:
        """Decode a policy message up to the stop string that its last token completes.

        A token may carry more than the end of a tag, as ``>.`` does. The policy could not have ended the message
        before, so what follows the tag within that token is not held against it, and left out of the text.
        """
        text = self.decode(token_ids)
        shown = self.visible(token_ids)
        if shown and self.may_stop(shown[-1]):
            before = len(self.decode(shown[:-1]))
            for stop in self.stop_strings:
                end = text.find(stop, max(0, before - len(stop) + 1)) + len(stop)
                if end > max(before, len(stop) - 1) and text[end:].strip():
                    return text[:end]
        return text

    def cut(self, text: str, max_tokens: int) -> str:
        """Shorten a text to so many tokens, with a mark where it was cut."""
        token_ids = self.encode(text)
        if len(token_ids) <= max_tokens:
            return text
        return self.decode(token_ids[:max_tokens]).rstrip("\ufffd ") + CUT_MARK

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        """Leave out end-of-sequence and padding."""
        return [token_id for token_id in token_ids if token_id not in self._invisible]

    def may_stop(self, token_id: int) -> bool:
        """Return True if a stop string can end within this token, so that a decoder need not look at all others."""
        return any(stop[-1] in self._decode_one(token_id) for stop in self.stop_strings)

    def encode_prompt(self, text: str, chat: bool, opening: str) -> list[int]:
        """Encode a prompt: chat template where there is one, begin-of-sequence, and what stands before a message."""
        if chat and self.backend.chat_template:
            messages = [{"role": "user", "content": text.strip()}]
            text = str(self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            return self.encode(text + opening)
        return self._begin + self.encode(text + opening)


def prepare_tags(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str] = TAGS) -> list[str]:
    """Make a tokenizer return the tags unchanged, adding those that it would break as ordinary tokens."""

    def find_broken() -> list[str]:
        return [tag for tag in tags if _tags_of(tokenizer, _PROBE.format(tag), tags) != [tag, tag]]

    broken = find_broken()
    if broken:
        tokenizer.add_tokens(broken)
    lost = find_broken()
    if lost:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) does not return {lost[0]} as it was written, even as an added "
            f"token; add the {len(tags)} tags to its vocabulary as non-special tokens and save it in the model folder"
        )
    return broken


def _tags_of(tokenizer: PreTrainedTokenizerBase, text: str, tags: Sequence[str]) -> list[str]:
    """The tags of a text after encoding and decoding it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return re.findall("|".join(map(re.escape, tags)), decoded)
