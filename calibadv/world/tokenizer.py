"""The word-level tokenizer of the tiny policy: one token per word, number, punctuation mark and tag."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calibadv.policy.tokenizer import TAGS
from calibadv.world.vocabulary import words

_UNKNOWN, _PADDING, _END = "<unk>", "<pad>", "<eos>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of all worlds.

    Punctuation is split off words, else ``1(Title:`` would be unknown. The tags are added tokens but not special ones:
    special tokens vanish when text is decoded without them. Decoded words are separated by one space.
    """
    vocabulary = {word: number for number, word in enumerate([_UNKNOWN, _PADDING, _END, *words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        unk_token=_UNKNOWN,
        pad_token=_PADDING,
        eos_token=_END,
        clean_up_tokenization_spaces=False,
    )
