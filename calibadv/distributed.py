"""Data-parallel ranks: partitioning of work, and collectives.

Every rank samples and scores the rollouts of its own questions; groups are never split. Then all ranks hold all
rollouts: advantages, calibrators and curves are computed on each from the whole batch, by the code of one process. Only
the passes through the model are partitioned again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from calibadv.errors import ServiceError, StopRequestedError, UserError
from calibadv.types import Metrics

T = TypeVar("T")

# Errors that other processes raise as what they are; any other becomes a RuntimeError there.
_KINDS: tuple[type[Exception], ...] = (StopRequestedError, UserError, ServiceError)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """The result of one rank's share of the work, or its error."""

    result: T | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The ranks that train together, as seen from one of them; by default a single process."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> ProcessGroup:
        """Return the group that Lightning has connected; a single process before that."""
        if not (dist.is_available() and dist.is_initialized()):
            return ProcessGroup()
        return ProcessGroup(dist.get_rank(), dist.get_world_size())

    def assign_ranks(self, keys: Sequence[str]) -> list[int]:
        """Assign items to ranks in turn; items with the same key go to the same rank."""
        order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return [order[key] % self.size for key in keys]

    def gather(self, item: T) -> list[T]:
        """Gather one object of every rank on all ranks."""
        if self.size == 1:
            return [item]
        gathered: list[T] = [item] * self.size
        dist.all_gather_object(gathered, item)
        return gathered

    def attempt(self, work: Callable[[], T]) -> Attempt[T]:
        """Do this rank's share of the work; its error is kept for ``all_gather_in_order``, which tells all ranks."""
        if self.size == 1:
            return Attempt(work())
        try:
            return Attempt(work())
        except Exception as error:
            return Attempt(error=error)

    def all_gather_in_order(self, own: Attempt[list[T]], owners: Sequence[int]) -> list[T]:
        """Gather the results of all ranks, in the order of the items; if one rank failed, all raise here."""
        failure_here = own.error and (_kind(own.error), str(own.error) or type(own.error).__name__)
        gathered = self.gather((own.result, failure_here))
        for rank, (_, failure) in enumerate(gathered):
            if failure:
                kind, text = failure
                with raising_together():
                    raise own.error or (kind or RuntimeError)(f"process {rank}: {text}")
        sources = [iter(items or ()) for items, _ in gathered]
        return [next(sources[owner]) for owner in owners]

    def partition(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """Return this rank's parts, each with whether it is padding.

        All ranks get equally many, since the collectives of sharded parameters run in step: where there are too few,
        the last part is repeated as padding.
        """
        own = [(part, False) for part in parts[self.rank :: self.size]]
        return own + [(part, True) for part in parts[-1:]] * (math.ceil(len(parts) / self.size) - len(own))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_metrics(self, metrics: Metrics) -> Metrics:
        """Sum metrics over the ranks; one that a rank lacks counts as 0 there."""
        everyone = self.gather(metrics)
        return {name: sum(one.get(name, 0.0) for one in everyone) for name in sorted({n for m in everyone for n in m})}

    def all_reduce_max(self, flag: int) -> int:
        """Return the maximum of a flag over the ranks."""
        return max(self.gather(flag))


SINGLE_PROCESS = ProcessGroup()
_AGREED = "raised_by_all_processes"


def _kind(error: Exception) -> type[Exception] | None:
    return next((kind for kind in _KINDS if isinstance(error, kind)), None)


@contextmanager
def raising_together() -> Iterator[None]:
    """Mark errors of code that raises on all ranks alike, since it depends only on data that all ranks hold."""
    try:
        yield
    except Exception as error:
        setattr(error, _AGREED, True)
        raise


def raised_by_all(error: BaseException) -> bool:
    """Return True if all ranks raised this error at the same place, so that collectives still work."""
    return getattr(error, _AGREED, False)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; any other is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def apply_fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over the ranks with FSDP2: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    layers: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def longest_wait(strategy: object) -> float:
    """Return half the timeout of the process group: the seconds that one rank may keep the others waiting."""
    timeout: timedelta | None = getattr(strategy, "_timeout", None)
    return math.inf if timeout is None else timeout.total_seconds() / 2


def reshard(model: nn.Module) -> None:
    """Reshard an FSDP2 model before its parameters are updated; any other model is left alone.

    After a forward pass without backward, FSDP2 keeps the outermost parameters gathered, and would use the old ones.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
