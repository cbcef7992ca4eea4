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
        """Those that a launcher started, once Lightning has connected them.

        Returns:
            This process among them.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Processes()
        return Processes(dist.get_rank(), dist.get_world_size())

    def owners(self, keys: Sequence[str]) -> list[int]:
        """Deal the items of a list that all processes hold: in turn, but those of one key together.

        Args:
            keys: of the items, such as the question that a group of rollouts belongs to.

        Returns:
            The rank that each item belongs to.
        """
        order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        return [order[key] % self.size for key in keys]

    def gather(self, item: T) -> list[T]:
        """Tell every process what each of them has; they wait for each other here.

        Args:
            item: of this process.

        Returns:
            One item per rank.
        """
        if self.size == 1:
            return [item]
        gathered: list[T] = [item] * self.size
        dist.all_gather_object(gathered, item)
        return gathered

    def attempt(self, work: Callable[[], T]) -> Attempt[T]:
        """Do the share of this process; an error waits until ``interleave``, where the others can be told.

        Args:
            work: what may fail on some processes only.

        Returns:
            What ``interleave`` takes. In a run of one process an error is raised at once.
        """
        if self.size == 1:
            return Attempt(work())
        try:
            return Attempt(work())
        except Exception as error:
            return Attempt(error=error)

    def interleave(self, own: Attempt[list[T]], owners: Sequence[int]) -> list[T]:
        """Put together what the processes made of the items that they own.

        Args:
            own: one per item of this process, in order.
            owners: of all items, the same on every process.

        Returns:
            Those of all, on every process.

        Raises:
            Exception: the attempt of a process failed; then all processes raise, here.
        """
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
        everyone = self.gather(metrics)
        return {name: sum(one.get(name, 0.0) for one in everyone) for name in sorted({n for m in everyone for n in m})}

    def any(self, flag: int) -> int:
        """Agree on a flag.

        Args:
            flag: 0, or what was seen here.

        Returns:
            The largest of all processes.
        """
        return max(self.gather(flag))


ALONE = Processes()
_AGREED = "raised_by_all_processes"


def _kind(error: Exception) -> type[Exception] | None:
    return next((kind for kind in _KINDS if isinstance(error, kind)), None)


@contextmanager
def raising_together() -> Iterator[None]:
    """Mark the errors of what depends only on data that all processes hold: if one raises, all do.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        setattr(error, _AGREED, True)
        raise


def raised_by_all(error: BaseException) -> bool:
    """Whether all processes of the run raise at the same place, so that they can still do something together.

    Args:
        error: as caught.

    Returns:
        True for what ``Processes.interleave`` raises, and what is raised in ``raising_together``.
    """
    return getattr(error, _AGREED, False)


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


def longest_wait(strategy: object) -> float:
    """Seconds for which one process may keep the others waiting, without their giving up.

    Args:
        strategy: Lightning's, which may have a timeout of its process group.

    Returns:
        Half of that timeout, because the work itself takes time too; infinite where there is none.
    """
    timeout: timedelta | None = getattr(strategy, "_timeout", None)
    return math.inf if timeout is None else timeout.total_seconds() / 2


def drop_gathered(model: nn.Module) -> None:
    """Drop what a forward pass without backward has left gathered of sharded parameters, before they are updated.

    FSDP2 keeps the outermost parameters whole until the next backward pass, and would go on with the old ones.

    Args:
        model: of ``shard``; any other is left alone.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
