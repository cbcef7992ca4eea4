"""Loading of sentence-transformers models from a folder or the hub: safetensors only, without log output."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibadv.errors import UserError, one_line

# The files of a sentence-transformers model. Weights are safetensors only: nothing is unpickled.
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Hub names are 'model' or 'owner/model'.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelKind:
    """A kind of model, for messages and look-ups on the hub."""

    option: str  # that names the model
    remedy: str  # valid values of the option
    owner: str  # of models on the hub that are named without one


def load_model(
    kind: ModelKind, name: str, device: str | None, make: Callable[..., Any], folder: Path | None = None
) -> Any:
    """Load a model. The code in its folder is never run."""
    called = f"{kind.option} '{name}'"
    folder = folder or _find_folder(kind, name, called)
    _check_files(called, folder)
    try:
        with _quiet():
            model = make(
                str(folder),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
    # A damaged folder raises errors of many types: missing files and keys, other JSON, weights of other shapes; so does
    # a device that does not exist.
    except Exception as error:
        where = "" if device is None else f" on device '{device}'"
        raise UserError(f"{called} does not load{where} ({one_line(error)}); give {kind.remedy}") from error
    # transformers makes an empty tokenizer if its files are missing.
    specials = getattr(model.tokenizer, "all_special_ids", None)
    if specials is not None and len(model.tokenizer) <= len(specials):
        raise UserError(f"{called} has a tokenizer without words; save the model's own tokenizer beside it")
    return model


def _find_folder(kind: ModelKind, name: str, called: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{called} is not a folder; give {kind.remedy}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name if "/" in name else f"{kind.owner}/{name}", allow_patterns=_HUB_FILES))
    # Errors of the hub, of the connection and of the disk have no common type.
    except Exception as error:
        raise UserError(
            f"{called} is neither a folder nor can it be fetched from the Hugging Face hub ({one_line(error)}); check "
            "the name and the connection, or give a folder"
        ) from error


def _check_files(called: str, folder: Path) -> None:
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise UserError(f"{called} has no modules.json or config.json; give a folder with a saved model")
    for weights in folder.rglob("pytorch_model*.bin"):
        if not any(weights.parent.glob("*.safetensors")):
            raise UserError(
                f"{called} has its weights in {weights.relative_to(folder)}, a pickle, which is not loaded because it "
                "may run code; save the model again with safe_serialization=True, or give one with model.safetensors"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and reports on unused weights, and restore the loggers afterwards."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("sentence_transformers")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
