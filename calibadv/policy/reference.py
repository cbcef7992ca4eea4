"""The reference: the policy as it was before training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import nn

from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.policy.precision import exactly


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
        """Give the reference model for a forward pass without gradient."""
        with torch.no_grad():
            if self.frozen:
                yield self.frozen[0]
            else:
                with policy.disable_adapter():  # type: ignore[operator]  # a PeftModel, by construction
                    yield policy

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and convert the frozen copy, which Lightning does not see."""
        for model in self.frozen:
            moved = exactly(model, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))
            model._apply(moved)  # type: ignore[no-untyped-call]


def make_reference(policy: Policy, lora: Lora | None) -> Reference:
    """Make the reference of a policy that has not been trained yet."""
    if lora is not None:
        return Reference()
    frozen = copy.deepcopy(policy.model).requires_grad_(False)
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(frozen.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Reference([frozen], digest.hexdigest())
