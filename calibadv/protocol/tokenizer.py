"""Between text and token ids: what the agent needs of a Hugging Face tokenizer, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from calibadv.errors import UserError
from calibadv.protocol.search import TAGS, Protocol, disarm

_PROBE = "one {0} two{0}one"  # observations put words beside a tag without white space
_TAG = re.compile("|".join(TAGS))


class AgentTokenizer:
    """Encodes prompts and observations, decodes what the policy wrote.

    Attributes:
        backend: the wrapped tokenizer.
        end_ids: token ids that end a message.
        pad_id: token id to pad with; always masked, so tokenizers without one can use any.
        special_strings: strings that become one special or added token, wherever they stand in a text.

    Args:
        backend: a tokenizer that returns the eight tags unchanged; ``prepare_tags`` sees to that.
        end_ids: further token ids that end a message, beside the tokenizer's own end-of-sequence token.
    """

    def __init__(self, backend: PreTrainedTokenizerBase, end_ids: Iterable[int] = ()) -> None:
        self.backend = backend
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
        """Encode text of the environment, adding no special tokens.

        Args:
            text: an observation, or a message to be scripted.

        Returns:
            Its token ids.
        """
        return list(self.backend.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode what the policy wrote, special tokens shown, end-of-sequence and padding left out.

        Args:
            token_ids: sampled token ids.

        Returns:
            The text.
        """
        shown = self.visible(token_ids)
        return str(self.backend.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        """Leave out end-of-sequence and padding.

        Args:
            token_ids: sampled token ids.

        Returns:
            Those that ``decode`` shows.
        """
        return [token_id for token_id in token_ids if token_id not in self._invisible]

    def may_close_tag(self, token_id: int) -> bool:
        """Whether a tag can end within this token, so that a decoder need not look at all the others.

        Args:
            token_id: any token id.

        Returns:
            True if the token's own text contains ``>``.
        """
        return ">" in self._decode_one(token_id)

    def encode_prompt(self, question: str, protocol: Protocol) -> list[int]:
        """Encode the prompt of a question: template, chat template where there is one, begin-of-sequence.

        Args:
            question: its text; tags and special tokens in it are disarmed.
            protocol: names the template, and whether the environment writes the first ``<think>``.

        Returns:
            Token ids.
        """
        text = protocol.read_template().replace("{question}", disarm(question, self.special_strings))
        if protocol.chat_template == "auto" and self.backend.chat_template:
            messages = [{"role": "user", "content": text.strip()}]
            text = str(self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            return self.encode(text + ("<think>" if protocol.prepend_think else ""))
        return self._begin + self.encode(text + ("<think>" if protocol.prepend_think else ""))


def prepare_tags(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make a tokenizer return the eight tags unchanged, adding those that it would break as ordinary tokens.

    Args:
        tokenizer: changed in place where a tag does not survive.

    Returns:
        The tags that were added; the embedding must be resized when there are any.

    Raises:
        UserError: the tags do not survive even so.
    """
    broken = [tag for tag in TAGS if _tags_of(tokenizer, _PROBE.format(tag)) != [tag, tag]]
    if broken:
        tokenizer.add_tokens(broken)
    lost = [tag for tag in TAGS if _tags_of(tokenizer, _PROBE.format(tag)) != [tag, tag]]
    if lost:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) does not return {lost[0]} as it was written, even as an added "
            "token; add the eight tags to its vocabulary as non-special tokens and save it in the model folder"
        )
    return broken


def _tags_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The tags of a text after encoding and decoding it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return _TAG.findall(str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)))
