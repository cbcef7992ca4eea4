"""Loading a policy from a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from calibadv.errors import UserError
from calibadv.policy.lora import Lora, same_for_every_seed, with_adapters
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import STOP_TAGS, TAGS, AgentTokenizer, prepare_tags

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]


def policy_folder() -> Path:
    """Return the Hugging Face folder of the embedded policy, which ``calibadv world`` makes."""
    return _PACKAGE / "world" / "policy"


def check_model_folder(name: str) -> Path:
    """Find a model folder, or that of ``embedded``, before anything is loaded; a UserError if it holds no model."""
    folder = policy_folder() if name == "embedded" else Path(name)
    if not folder.is_dir():
        raise UserError(f"model.policy '{name}' is not a folder; give a Hugging Face model folder, or 'embedded'")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.policy '{name}' has no config.json; give a folder that save_pretrained wrote")
    return folder


def load_policy(
    name: str, lora: Lora | None = None, tags: Sequence[str] = TAGS, stop_strings: Sequence[str] = STOP_TAGS
) -> Policy:
    """Load model and tokenizer, in float32 and without dropout.

    The generation config of the folder is replaced by a neutral one: ``top_k``, ``top_p`` or ``repetition_penalty`` in
    it would silently make the sampled distribution another than the trained one.

    Args:
        name: a Hugging Face folder, or ``embedded``.
        lora: train adapters instead of all parameters.
        tags: strings of the protocol that the tokenizer must return unchanged.
        stop_strings: strings of the protocol that end a message.

    Returns:
        The policy.

    Raises:
        UserError: no such folder, a model or tokenizer that does not load or that do not belong together, a tokenizer
            that does not return the tags, or adapters for modules that the model does not have.
    """
    folder = check_model_folder(name)
    with _explained(folder, "config.json", "give a causal language model that transformers knows"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer, added = _read_tokenizer(folder, tags)
    model = _load_model(folder, config)
    _fit_embedding(folder, model, tokenizer)
    if added:
        log.warning(
            "%s breaks the tags %s; added them as tokens and resized the embedding to %d rows (new rows are %s)",
            type(tokenizer).__name__,
            " ".join(added),
            model.get_input_embeddings().num_embeddings,
            "untrained"
            if lora is None
            else "random and stay so, for adapters do not reach them: train without model.lora",
        )
    end = model.generation_config.eos_token_id
    end_ids = [] if end is None else [end] if isinstance(end, int) else list(end)
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    if lora is not None:
        model = with_adapters(model, lora)
    model.train()  # without dropout the same as eval(), and what Lightning expects of a module in training
    return Policy(model, AgentTokenizer(tokenizer, end_ids, stop_strings))


def load_tokenizer(name: str, tags: Sequence[str] = TAGS, stop_strings: Sequence[str] = STOP_TAGS) -> AgentTokenizer:
    """Load the tokenizer of a policy, without its model."""
    return AgentTokenizer(_read_tokenizer(check_model_folder(name), tags)[0], (), stop_strings)


def _read_tokenizer(folder: Path, tags: Sequence[str]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Read a tokenizer, and add the tags that it would break, which are returned too."""
    with _explained(folder, "tokenizer", "save one into it"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, prepare_tags(tokenizer, tags)


def _load_model(folder: Path, config: Any) -> Any:
    # Dropout would make log-probabilities of one and the same policy differ between two passes.
    overrides: dict[str, Any] = {key: 0.0 for key in config.to_dict() if key.endswith(("dropout", "pdrop"))}
    with _explained(folder, "model", "save a causal language model into it, weights included"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **overrides
        )
    model, info = loaded
    if info["missing_keys"]:  # transformers would make them up
        raise UserError(
            f"model.policy '{folder}' lacks {len(info['missing_keys'])} weights, {min(info['missing_keys'])} "
            "among them; save the whole model into it"
        )
    return model


def _fit_embedding(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Resize the embedding for tokens that were added to the tokenizer."""
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"model.policy '{folder}' has a tokenizer of {tokenizer.vocab_size} tokens and a model with {rows}; "
            "they do not belong together: save both of one model into it"
        )
    if rows > 2 * len(tokenizer):
        log.warning("the model knows %d tokens and its tokenizer %d: do they belong together?", rows, len(tokenizer))
    if len(tokenizer) > rows:
        with same_for_every_seed():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def check_positions(policy: Policy, limit: int) -> None:
    """See that the model has a position for every token of a rollout.

    Learned positions must be as many. Rotary ones go on beyond what the config names, at the cost of quality, and are
    left to the user.
    """
    config: Any = policy.model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < limit and not getattr(config, "rope_parameters", None):
        raise UserError(
            f"the policy has {positions} positions and protocol.max_rollout_tokens is {limit}; lower the limit"
        )


def enable_checkpointing(policy: Policy) -> None:
    """Compute activations again in the backward pass instead of keeping them; a UserError if the model cannot."""
    model: Any = policy.model
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise UserError(f"{type(model).__name__} cannot compute activations again; unset model.gradient_checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _explained(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises over a broken folder into one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"model.policy '{folder}' has no {what} that loads ({reason}); {remedy}") from error
