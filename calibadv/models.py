"""Load the policy from an ordinary Hugging Face folder, and make its reference."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from calibadv.agent.tokenizer import AgentTokenizer, prepare_tags
from calibadv.errors import UserError
from calibadv.precision import exactly
from calibadv.processes import whole
from calibadv.world import EMBEDDED, policy_folder

log = logging.getLogger(__name__)


@dataclass
class Lora:
    """Low-rank adapters in the place of full fine-tuning; the reference is then the policy without them."""

    rank: int = 16
    """Rank of the adapters."""
    alpha: int = 32
    """Scale: adapters are multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, or ``all-linear``."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"model.lora.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model and its tokenizer."""

    model: nn.Module
    tokenizer: AgentTokenizer

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Give the weights as an engine with a copy of its own needs them: whole, and with the adapters merged in.

        The model itself is left alone: merging in place and taking back would round its weights at every update.
        Where parameters are sharded over processes, all processes must iterate together.

        Yields:
            Names as in the model's folder, and tensors without gradient; a tied one under each of its names, for the
            copy may not tie what the policy ties.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                owner, within, _ = name.partition(".base_layer.weight")
                if ".lora_" in name:
                    continue
                value = parameter.detach()
                if within:
                    adapted: Any = self.model.get_submodule(owner)
                    value = value + adapted.get_delta_weight("default")
                yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), whole(value)


@dataclass(frozen=True, slots=True)
class Reference:
    """The policy as it was before training.

    ``frozen`` is a copy of the model, or None where the policy's adapters can be switched off instead. The copy is kept
    out of the module tree (in a list), so that checkpoints do not hold it twice. ``digest`` is that of the copy as it
    was made.
    """

    frozen: list[nn.Module] = field(default_factory=list)
    digest: str = ""

    @contextmanager
    def model(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Give the reference model for a forward pass without gradient.

        Args:
            policy: the model in training, used with its adapters off when there is no frozen copy.

        Yields:
            The reference.
        """
        with torch.no_grad():
            if self.frozen:
                yield self.frozen[0]
            else:
                with policy.disable_adapter():  # type: ignore[operator]  # a PeftModel, by construction
                    yield policy

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and convert the frozen copy, which Lightning does not see.

        Args:
            device: of the policy.
            dtype: of the policy's weights.
        """
        for model in self.frozen:
            convert = exactly(model, lambda some: some.to(device, dtype if some.is_floating_point() else None))
            model._apply(convert)  # type: ignore[no-untyped-call]

    def checksum(self) -> str:
        """Tell one reference from another.

        Returns:
            A digest of the weights as they were loaded, before a precision rounded them; empty where the reference is
            the policy without adapters.
        """
        return self.digest


def check_model_folder(name: str) -> Path:
    """Find a model folder, before anything is loaded.

    Args:
        name: a folder, or ``embedded``.

    Returns:
        The folder.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    folder = policy_folder() if name == EMBEDDED else Path(name)
    if not folder.is_dir():
        raise UserError(f"model.policy '{name}' is not a folder; give a Hugging Face model folder, or 'embedded'")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.policy '{name}' has no config.json; give a folder that save_pretrained wrote")
    return folder


def load_policy(name: str, lora: Lora | None = None) -> Policy:
    """Load model and tokenizer, in float32 and without dropout.

    The generation config of the folder is replaced by a neutral one: ``top_k``, ``top_p`` or ``repetition_penalty`` in
    it would silently make the sampled distribution another than the trained one.

    Args:
        name: a Hugging Face folder, or ``embedded``.
        lora: train adapters instead of all parameters.

    Returns:
        The policy.

    Raises:
        UserError: no such folder, a model or tokenizer that does not load or that do not belong together, a tokenizer
            that does not return the tags, or adapters for modules that the model does not have.
    """
    folder = check_model_folder(name)
    with _explained(folder, "config.json", "give a causal language model that transformers knows"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with _explained(folder, "tokenizer", "save one into it"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    added = prepare_tags(tokenizer)
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
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"model.policy '{folder}' has a tokenizer of {tokenizer.vocab_size} tokens and a model with {rows}; "
            "they do not belong together: save both of one model into it"
        )
    if rows > 2 * len(tokenizer):
        log.warning("the model knows %d tokens and its tokenizer %d: do they belong together?", rows, len(tokenizer))
    if len(tokenizer) > rows:
        with _same_for_every_seed():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
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
    return Policy(model, AgentTokenizer(tokenizer, end_ids))


def check_positions(policy: Policy, limit: int) -> None:
    """See that the model has a position for every token of a rollout.

    Rotary positions go on beyond what the config names, at the cost of quality, and are left to the user.

    Args:
        policy: as loaded.
        limit: the most tokens of a rollout.

    Raises:
        UserError: it has learned positions, and fewer of them.
    """
    config: Any = policy.model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < limit and not getattr(config, "rope_parameters", None):
        raise UserError(
            f"the policy has {positions} positions and protocol.max_rollout_tokens is {limit}; lower the limit"
        )


def enable_checkpointing(policy: Policy) -> None:
    """Compute activations again in the backward pass instead of keeping them.

    Args:
        policy: as loaded.

    Raises:
        UserError: its model cannot.
    """
    model: Any = policy.model
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise UserError(f"{type(model).__name__} cannot compute activations again; unset model.gradient_checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_reference(policy: Policy, lora: Lora | None) -> Reference:
    """Make the reference of a policy that has not been trained yet.

    Args:
        policy: as loaded.
        lora: what ``load_policy`` was given.

    Returns:
        The adapters-off view with LoRA, else a frozen copy.
    """
    if lora is not None:
        return Reference()
    frozen = copy.deepcopy(policy.model).requires_grad_(False)
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(frozen.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Reference([frozen], digest.hexdigest())


@contextmanager
def _explained(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises over a broken folder into one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"model.policy '{folder}' has no {what} that loads ({reason}); {remedy}") from error


@contextmanager
def _same_for_every_seed() -> Iterator[None]:
    """Draw new parameters alike for every seed of a run, since all start from one policy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def with_adapters(model: Any, lora: Lora) -> Any:
    """Put adapters on a model, the same ones for every seed of a run.

    Args:
        model: of transformers, changed in place.
        lora: rank, scale and modules.

    Returns:
        The model with adapters, which alone are trained.

    Raises:
        UserError: the model has no such modules, or ties them.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        with _same_for_every_seed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # we refuse these
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.lora.target_modules is {lora.target_modules}; name modules to adapt ({reason})"
        ) from error
    if model.config.get_text_config().tie_word_embeddings and any(
        isinstance(layer, BaseTunerLayer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ):
        raise UserError(
            f"model.lora.target_modules is {lora.target_modules}, and the policy ties its output layer to its "
            "embedding: an adapter of one would untie them; leave both out"
        )
    return adapted
