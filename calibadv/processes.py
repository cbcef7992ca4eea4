"""The processes that train together, and the few things that they tell each other.

Every process samples the rollouts of its own questions; then all of them hold all rollouts, so that scores, silver
documents, advantages, calibrators and curves are computed everywhere from the whole batch, by the code of one process.
What is dealt out again are the micro-batches: the passes through the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from calibadv.interfaces import Metrics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Processes:
        """Those that a launcher started, once Lightning has connected them.

        Returns:
            This process among them.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Processes()
        return Processes(dist.get_rank(), dist.get_world_size())

    def owns(self, place: int) -> bool:
        """Whether the item at a place of a list that all processes hold is this one's.

        Args:
            place: from 0.

        Returns:
            True for every ``size``-th place from ``rank`` on.
        """
        return place % self.size == self.rank

    def interleave(self, own: list[T]) -> list[T]:
        """Put together what the processes made of the places that they own.

        Args:
            own: one item per owned place, in order.

        Returns:
            The items of all places, on every process.
        """
        if self.size == 1:
            return own
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, own)
        total = sum(map(len, gathered))
        return [gathered[place % self.size][place // self.size] for place in range(total)]

    def deal(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """Deal micro-batches out, as many to each process: sharded parameters are gathered in step, pass by pass.

        Args:
            parts: of all processes, the largest first.

        Returns:
            Those of this process, and whether each counts: one that only keeps the others company does not.
        """
        own = [(part, True) for part in parts[self.rank :: self.size]]
        return own + [(part, False) for part in parts[-1:]] * (math.ceil(len(parts) / self.size) - len(own))

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place.

        Args:
            tensor: of one shape on all of them.

        Returns:
            The same tensor.
        """
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, metrics: Metrics) -> Metrics:
        """Add up metrics over the processes.

        Args:
            metrics: sums of this process.

        Returns:
            Sums of all.
        """
        everyone = self.interleave([metrics])
        return {name: sum(one.get(name, 0.0) for one in everyone) for name in sorted({n for m in everyone for n in m})}

    def any(self, flag: int) -> int:
        """Agree on a flag.

        Args:
            flag: 0, or what was seen here.

        Returns:
            The largest of all processes.
        """
        return max(self.interleave([flag]))


ALONE = Processes()


def whole(tensor: Tensor) -> Tensor:
    """Put a sharded tensor together.

    Args:
        tensor: a parameter or what was computed of parameters; sharded ones must be put together on all processes.

    Returns:
        All of it, on every process.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over processes (FSDP2): layer by layer, then what is left.

    Args:
        model: a transformers model, perhaps with adapters; changed in place.
        mesh: Lightning's, with the dimension ``data_parallel``.
    """
    from torch.distributed.fsdp import fully_shard

    layers: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def drop_gathered(model: nn.Module) -> None:
    """Drop what a forward pass without backward has left gathered of sharded parameters, before they are updated.

    FSDP2 keeps the outermost parameters whole until the next backward pass, and would go on with the old ones.

    Args:
        model: of ``shard``; any other is left alone.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
