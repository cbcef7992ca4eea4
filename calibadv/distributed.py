"""The processes that train together, and the few things that they tell each other.

Every process samples the rollouts of its own questions, scores them and finds which searches brought evidence: groups
are never split. Then all processes hold all rollouts: advantages, calibrators and curves are computed everywhere from
the whole batch, by the code of one process. What is dealt out again are the passes through the model.
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
    """What one process has made of its share of the work, or why it could not."""

    result: T | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Processes:
        """Those that a launcher started, once Lightning has connected them."""
        if not (dist.is_available() and dist.is_initialized()):
            return Processes()
        return Processes(dist.get_rank(), dist.get_world_size())

    def owners(self, keys: Sequence[str]) -> list[int]:
        """Deal the items of a list that all processes hold: in turn, but those of one key together."""
        order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        return [order[key] % self.size for key in keys]

    def gather(self, item: T) -> list[T]:
        """Tell every process what each of them has; they wait for each other here."""
        if self.size == 1:
            return [item]
        gathered: list[T] = [item] * self.size
        dist.all_gather_object(gathered, item)
        return gathered

    def attempt(self, work: Callable[[], T]) -> Attempt[T]:
        """Do the share of this process; an error waits until ``interleave``, where the others can be told."""
        if self.size == 1:
            return Attempt(work())
        try:
            return Attempt(work())
        except Exception as error:
            return Attempt(error=error)

    def interleave(self, own: Attempt[list[T]], owners: Sequence[int]) -> list[T]:
        """Put together what the processes made of the items that they own."""
        told = own.error and (_kind(own.error), str(own.error) or type(own.error).__name__)
        gathered = self.gather((own.result, told))
        failures = [(rank, failure) for rank, (_, failure) in enumerate(gathered) if failure]
        if failures:
            rank, (kind, text) = failures[0]
            with raising_together():
                raise own.error or (kind or RuntimeError)(f"process {rank}: {text}")
        sources = [iter(items or ()) for items, _ in gathered]
        return [next(sources[owner]) for owner in owners]

    def deal(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """Deal micro-batches out, as many to each process: sharded parameters are gathered in step, pass by pass."""
        own = [(part, True) for part in parts[self.rank :: self.size]]
        return own + [(part, False) for part in parts[-1:]] * (math.ceil(len(parts) / self.size) - len(own))

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, metrics: Metrics) -> Metrics:
        """Add up metrics over the processes."""
        everyone = self.gather(metrics)
        return {name: sum(one.get(name, 0.0) for one in everyone) for name in sorted({n for m in everyone for n in m})}

    def any(self, flag: int) -> int:
        """Agree on a flag."""
        return max(self.gather(flag))


ALONE = Processes()
_AGREED = "raised_by_all_processes"


def _kind(error: Exception) -> type[Exception] | None:
    return next((kind for kind in _KINDS if isinstance(error, kind)), None)


@contextmanager
def raising_together() -> Iterator[None]:
    """Mark the errors of what depends only on data that all processes hold: if one raises, all do."""
    try:
        yield
    except Exception as error:
        setattr(error, _AGREED, True)
        raise


def raised_by_all(error: BaseException) -> bool:
    """Whether all processes of the run raise at the same place, so that they can still do something together."""
    return getattr(error, _AGREED, False)


def whole(tensor: Tensor) -> Tensor:
    """Put a sharded tensor together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over processes (FSDP2): layer by layer, then what is left."""
    from torch.distributed.fsdp import fully_shard

    layers: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def longest_wait(strategy: object) -> float:
    """Seconds for which one process may keep the others waiting, without their giving up."""
    timeout: timedelta | None = getattr(strategy, "_timeout", None)
    return math.inf if timeout is None else timeout.total_seconds() / 2


def drop_gathered(model: nn.Module) -> None:
    """Drop what a forward pass without backward has left gathered of sharded parameters, before they are updated.

    FSDP2 keeps the outermost parameters whole until the next backward pass, and would go on with the old ones.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
