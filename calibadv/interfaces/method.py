"""Seams of the method: from answers to rewards, advantages and the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from calibadv.batch import LossInputs, RolloutBatch
from calibadv.interfaces.seam import Seam
from calibadv.types import Metrics, Question, Rollout

if TYPE_CHECKING:
    from calibadv.distributed import ProcessGroup
    from calibadv.policy.policy import Policy


class Reward(Seam):
    """Scores an answer."""

    @abstractmethod
    def score(self, answer: str, question: Question) -> float:
        """Score the text of an answer block in [0, 1]. The format is not its business: the pipeline gates by it."""


class GroupFilter(Seam):
    """Decides which groups a rollout step trains on. Those that it drops make room for other questions' groups.

    Attributes:
        max_tries: how often a step asks further questions.
    """

    max_tries: int

    @abstractmethod
    def keep(self, group: Sequence[Rollout]) -> bool:
        """Decide whether to train on all rollouts of one question, scored and with step correctness."""


class AdvantageEstimator(Seam):
    """Turns rewards into advantages.

    Attributes:
        uses_step_correctness: whether it turns step correctness into advantages, so that a calibrator which does so too
            would count it twice.
        uses_zero_variance_groups: whether it also learns from groups whose rewards are all equal, so that a filter must
            not drop these.
    """

    _renamed: ClassVar[Mapping[str, str]] = {
        "prepare": "extras",
        "credits_evidence": "uses_step_correctness",
        "learns_from_ties": "uses_zero_variance_groups",
    }
    uses_step_correctness: bool = False
    uses_zero_variance_groups: bool = False

    def extras(
        self, batch: RolloutBatch, policy: Policy, micro_batch_tokens: int, processes: ProcessGroup
    ) -> Mapping[str, Tensor]:
        """Compute what ``estimate`` needs of the policy itself, before its update; most estimators need nothing.

        Args:
            batch: B rollouts.
            policy: model and tokenizer.
            micro_batch_tokens: the most tokens, padding included, of one forward pass.
            processes: the ranks, which all hold the whole batch and call this together.

        Returns:
            Tensors by name, equal on all ranks; ``estimate`` finds them in ``batch.extras``.
        """
        return {}

    @abstractmethod
    def estimate(self, batch: RolloutBatch) -> Tensor:
        """Estimate the advantage of every token.

        Args:
            batch: the rollouts of a step, whole groups.

        Returns:
            [B, T], 0 outside ``batch.loss_mask``.
        """

    def metrics(self, batch: RolloutBatch) -> Metrics:
        """Return curves of what ``extras`` has computed; none by default."""
        return {}


class Calibrator(Seam):
    """Changes advantages before the loss. Pure: the batch is not written to, and no trainer is needed.

    Attributes:
        uses_step_correctness: whether it depends on step correctness.
        roles: what it does to advantages, such as ``search penalty``; of two calibrators that share a role, one would
            undo or repeat the other, and they are refused together.
    """

    uses_step_correctness: bool = False
    roles: frozenset[str] = frozenset()

    @abstractmethod
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Return other advantages.

        Args:
            batch: B rollouts with step correctness.
            advantages: [B, T] of the estimator or of the calibrator before, 0 outside ``batch.loss_mask``.

        Returns:
            [B, T], 0 outside ``batch.loss_mask``; and metrics to plot.
        """


class PolicyLoss(Seam):
    """The surrogate that is minimised.

    Its gradient is 0 where the advantage is 0; what pulls on every token is a ``Regularizer``.

    Attributes:
        requires_multiple_updates: whether it differs from PPOClip's defaults only where the log-probabilities have
            moved since the first update of a rollout step. Settings under which they never do get a warning.
    """

    _renamed: ClassVar[Mapping[str, str]] = {"acts_on_change": "requires_multiple_updates"}
    requires_multiple_updates: bool = False

    @abstractmethod
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Compute the part of the loss that this micro-batch contributes.

        Args:
            inputs: the trained tokens of the micro-batch, flattened.

        Returns:
            A scalar with gradient; and metrics that add up over the micro-batches of a mini-batch.
        """


class Regularizer(Seam):
    """A term that is added to the loss.

    Attributes:
        requires_multiple_updates: whether the term depends on how far the trainer's log-probabilities have moved since
            the first update of a rollout step. Settings under which that is unknown, or always 0, are refused.
    """

    _renamed: ClassVar[Mapping[str, str]] = {"acts_on_change": "requires_multiple_updates"}
    requires_multiple_updates: bool = False

    @abstractmethod
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Compute the part of the term that this micro-batch contributes, its coefficient included.

        Args:
            inputs: the trained tokens of the micro-batch, flattened.

        Returns:
            A scalar with gradient; and metrics that add up over the micro-batches of a mini-batch.
        """
