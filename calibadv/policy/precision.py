"""The accepted values of ``trainer.precision``, and what stays in float32.

Lightning converts the whole module, and makes its type torch's default while a step runs. Only the model's weights and
passes are meant by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calibadv.errors import UserError

_ACCEPTED = ("32-true", "bf16-mixed", "bf16-true", "64-true")
PRECISIONS = f"{', '.join(_ACCEPTED[:-1])} or {_ACCEPTED[-1]}"
_ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "64": "64-true"}
# Numbers in bfloat16 lie 1.2e-4 apart at 0.02: a whole step of AdamW is more than half of that from here on.
LOWEST_RATE = 1e-4


def check_precision(name: Any) -> str:
    """See that a precision is one that training works in."""
    chosen = _ALIASES.get(str(name), str(name))
    if chosen in _ACCEPTED:
        return chosen
    because = "; float16 needs scaled gradients, which model.clip_norm would clip as they are" if "16" in chosen else ""
    raise UserError(f"trainer.precision is {name}{because}: give {PRECISIONS}")


def check_rate(precision: Any, adapters: bool, rate: float) -> None:
    """Refuse to train where rounding swallows the updates."""
    if check_precision(precision) == "bf16-true" and not adapters and rate < LOWEST_RATE:
        raise UserError(
            f"trainer.precision is bf16-true and model.learning_rate is {rate}: numbers in bfloat16 lie 1.2e-4 apart "
            "at a weight of 0.02, and most updates would be rounded away; give bf16-mixed, model.lora, or a rate of "
            f"at least {LOWEST_RATE}"
        )


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make tensors in float32 that ask for nothing else, whatever Lightning has set for the step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exactly(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keep a conversion from rounding adapters, and what a model has computed: the angles of rotary positions.

    The angle of a position is a multiple of a frequency, and so is its rounding: in bfloat16 some angles at position
    2,000 are off by more than a radian. Engines that load a model in bfloat16 compute them in float32 too. Adapters are
    few, and take their updates in float32 as in peft.
    """
    computed = (module._buffers[name] for module in model.modules() for name in module._non_persistent_buffers_set)
    adapters = (parameter for name, parameter in model.named_parameters() if ".lora_" in name)
    kept = {id(tensor) for tensor in (*computed, *adapters)}

    def moved(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        shorter = converted.dtype.itemsize < tensor.dtype.itemsize
        return tensor.to(converted.device) if shorter and id(tensor) in kept else converted

    return moved
