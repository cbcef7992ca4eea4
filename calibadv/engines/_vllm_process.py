"""Start vLLM inside the training process without disturbing it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from calibadv.distributed import ProcessGroup

# vLLM 0.32 on a CPU looks into every loaded module, and fails on this one of numba's, which answers to any name.
_HIDDEN = "llvmlite.binding.ffi"


@contextmanager
def vllm_environment(processes: ProcessGroup) -> Iterator[None]:
    """Import and start vLLM: in this process, where it can reach the weights, and without its dozens of notices.

    Variables of the environment that the user has set are respected. vLLM's report of the machine over the network is
    off.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if processes.size > 1:
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        wanted |= {"RANK": str(processes.rank), "LOCAL_RANK": str(device)}
    random_state = torch.get_rng_state()  # vLLM seeds the generator
    hidden = sys.modules.pop(_HIDDEN, None)
    try:
        with _environment(wanted), warnings.catch_warnings():
            # It calls what torch has deprecated; nothing that a user could change.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if hidden is not None:
            sys.modules[_HIDDEN] = hidden
        torch.set_rng_state(random_state)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def error_summary(error: Exception) -> str:
    """The one line of vLLM's error that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = lines[1] if len(lines) > 1 and "validation error" in lines[0] else lines[0]
    return cause.partition(" [type=")[0].removeprefix("Value error, ")
