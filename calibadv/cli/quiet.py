"""Users see our own lines: start-up notices of libraries are lowered here, one by one, each with its reason."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Lower what libraries say without being asked. Warnings that a user can act on stay."""
    # Progress bars of loading weights, and advice on how to load faster.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # TensorBoard tells at import that TensorFlow, which it does not need here, is missing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Lightning announces devices, seeds and its paid products.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="calibadv: %(message)s", level=logging.WARNING)
    # Lightning asks for worker processes; our questions are in memory already.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning calls what torch has renamed; its next version will not.
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
    # Without a GPU in use Lightning points out that there is one: the config said which device to take.
    warnings.filterwarnings("ignore", message="GPU available but not used.*")
