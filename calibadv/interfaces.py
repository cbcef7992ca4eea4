"""The seams, on one page. Each is swapped by ``class_path`` in a config; each has one idea.

To add a part, subclass one of these in an importable module, give its constructor typed parameters and a Google-style
docstring (that is what ``--help`` prints), and name it in a config. See docs/extending.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.errors import ServiceError
from calibadv.types import Completion, Document, DrawKey, Metrics, Question, Rollout, Sampling, ScoredDocument

if TYPE_CHECKING:
    from calibadv.distributed import ProcessGroup
    from calibadv.policy.policy import Policy


class Engine(ABC):
    """Samples tokens from the policy.

    Attributes:
        max_model_len: the most tokens of a prompt and its continuation together; None where there is no limit.
    """

    max_model_len: int | None = None

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        """Continue each prompt until ``</search>``, ``</answer>``, end of sequence or ``sampling.max_tokens``.

        Args:
            prompts: token ids of each prompt.
            sampling: temperature and the most tokens to draw.
            keys: what the draws of each prompt depend on.

        Returns:
            One completion per prompt, in the same order.
        """

    def check(self) -> None:  # noqa: B027  # most engines need nothing
        """See that sampling can be started. Called before a run writes its first file.

        Raises:
            UserError: something that the engine needs is missing; the message names it and the remedy.
            ServiceError: what it needs does not answer.
        """

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Sample from ``policy`` as it is now. Called before the first rollout and after every update.

        Args:
            policy: model and tokenizer.
        """

    def rest(self) -> None:  # noqa: B027  # most engines have nothing to free
        """Sampling is over for now, also after an error: drop what is under way, and free what only sampling needs."""


class StreamingEngine(Engine):
    """An engine that batches continuously: requests join and leave while others are under way.

    Rollouts then go on one by one, as soon as their searches come back, and none waits for the slowest.
    """

    @abstractmethod
    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]) -> list[int]:
        """Ask for a continuation of each prompt, as ``generate`` does, without waiting for it.

        Args:
            prompts: token ids of each prompt.
            sampling: temperature and the most tokens to draw.
            keys: what the draws of each prompt depend on.

        Returns:
            One number per prompt, by which ``collect`` names it.
        """

    @abstractmethod
    def collect(self) -> dict[int, Completion]:
        """Sample on for a moment.

        Returns:
            The requests that ended meanwhile, by number; often none.
        """

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]
    ) -> list[Completion]:
        numbers = self.submit(prompts, sampling, keys)
        done: dict[int, Completion] = {}
        while len(done) < len(numbers):
            done.update(self.collect())
        return [done[number] for number in numbers]


class RetrievalError(ServiceError):
    """A search that failed. The rollouts that waited for it end as ``search_failed`` and are not trained on."""


class OutageError(RetrievalError):
    """The service behind a retriever is away, and may come back: a run in training waits for it.

    Args:
        message: what does not answer, and the remedy.
        patience: the seconds that the caller may wait and ask again; 0 for not at all.
    """

    def __init__(self, message: str, patience: float = 0.0) -> None:
        super().__init__(message)
        self.patience = patience


class PartialRetrievalError(RetrievalError):
    """Some queries of a search failed; what the others found is kept.

    Args:
        results: one entry per query: its documents, or why it failed.
    """

    def __init__(self, results: Sequence[list[ScoredDocument] | RetrievalError]) -> None:
        errors = [result for result in results if isinstance(result, RetrievalError)]
        reason = f"{errors[0]} " if errors else ""
        super().__init__(f"{reason}({len(errors)} of {len(results)} searches failed)")
        self.results = results


class Retriever(ABC):
    """Finds documents.

    Attributes:
        top_k: documents that an episode asks for per search.
        corpus: the documents that it searches, in the order that breaks ties; None where they are out of reach.
    """

    top_k: int
    corpus: Sequence[Document] | None = None

    @abstractmethod
    def search(self, queries: Sequence[str], top_k: int) -> list[list[ScoredDocument]]:
        """Find the best documents of each query, best first, ties in the order of the corpus.

        Args:
            queries: texts to search for. An empty one finds nothing.
            top_k: the most documents per query. Documents with score 0 are left out, so there may be fewer or none.

        Returns:
            One list per query, in the same order.

        Raises:
            RetrievalError: the search could not be made; as PartialRetrievalError where only some queries failed, as
                OutageError where it is worth waiting. An empty list means that nothing matches, never a failure.
        """

    def metrics(self) -> Metrics:
        """What is worth plotting since the last call, such as the hit rate of a cache.

        Returns:
            Values by name; none by default.
        """
        return {}


class Reward(ABC):
    """Scores an answer."""

    @abstractmethod
    def score(self, answer: str, question: Question) -> float:
        """Score one answer, not looking at the format (the pipeline multiplies by validity).

        Args:
            answer: text of the answer block.
            question: with its golden answers.

        Returns:
            A value in [0, 1].
        """


class GroupFilter(ABC):
    """Decides which groups a rollout step trains on. Those that it drops make room for other questions' groups.

    Attributes:
        max_tries: how often a step asks further questions.
    """

    max_tries: int

    @abstractmethod
    def keep(self, group: Sequence[Rollout]) -> bool:
        """Decide on one group.

        Args:
            group: all rollouts of one question, scored and with step correctness.

        Returns:
            Whether to train on it.
        """


class AdvantageEstimator(ABC):
    """Turns rewards into advantages.

    Attributes:
        uses_step_correctness: whether it turns step correctness into advantages, so that a calibrator which does so too
            would count it twice.
        uses_zero_variance_groups: whether it also learns from groups whose rewards are all equal, so that a filter must
            not drop these.
    """

    uses_step_correctness: bool = False
    uses_zero_variance_groups: bool = False

    def prepare(
        self, batch: RolloutBatch, policy: Policy, micro_batch_tokens: int, processes: ProcessGroup
    ) -> RolloutBatch:
        """Compute what ``estimate`` needs of the policy itself; most estimators need nothing.

        All processes hold the whole batch and call this together, before the policy is updated on it.

        Args:
            batch: B rollouts.
            policy: model and tokenizer.
            micro_batch_tokens: the most tokens, padding included, of one forward pass.
            processes: share the work.

        Returns:
            The batch, perhaps with more in it; equal on all processes.
        """
        return batch

    @abstractmethod
    def estimate(self, batch: RolloutBatch) -> Tensor:
        """Estimate the advantage of every token.

        Args:
            batch: B rollouts with rewards.

        Returns:
            [B, T], 0 outside ``batch.loss_mask``.
        """


class Calibrator(ABC):
    """Changes advantages before the loss. Pure: the batch is not written to, and no trainer is needed."""

    @abstractmethod
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Return other advantages.

        Args:
            batch: B rollouts with step correctness.
            advantages: [B, T] of the estimator or of the calibrator before, 0 outside ``batch.loss_mask``.

        Returns:
            [B, T], 0 outside ``batch.loss_mask``; and metrics to plot.
        """


@dataclass(frozen=True, slots=True)
class LossInputs:
    """N trained tokens of one micro-batch, flattened: what a loss or a regularizer may look at.

    A rollout is never split over micro-batches: all its trained tokens are here, or none.

    Attributes:
        logprobs: [N] of the policy now, with gradient.
        old_logprobs: [N] of the policy before the first update on this rollout batch.
        reference_logprobs: [N] of the reference, None unless the KL coefficient is set.
        advantages: [N] after calibration.
        denominator: trained tokens of the whole mini-batch over all processes; sums are divided by it, so that neither
            the size of a micro-batch nor the number of processes changes the result.
        rollout_ids: [N] row of each token's rollout in the rollout batch: equal for the tokens of one rollout.
        turn_ids: [N] turn of each token within its rollout, from 0.
        num_rollouts: rollouts with a trained token in the whole mini-batch over all processes; for means over rollouts.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    denominator: float
    rollout_ids: Tensor
    turn_ids: Tensor
    num_rollouts: int


class PolicyLoss(ABC):
    """The surrogate that is minimised.

    Its gradient is 0 where the advantage is 0; what pulls on every token is a ``Regularizer``.

    Attributes:
        requires_multiple_updates: whether it differs from PPOClip's defaults only where the log-probabilities have
            moved since the first update of a rollout step. Settings under which they never do get a warning.
    """

    requires_multiple_updates: bool = False

    @abstractmethod
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Compute the part of the loss that this micro-batch contributes.

        Args:
            inputs: N trained tokens.

        Returns:
            A scalar with gradient; and metrics that add up over the micro-batches of a mini-batch.
        """


class Regularizer(ABC):
    """A term that is added to the loss.

    Attributes:
        requires_multiple_updates: whether the term depends on how far the trainer's log-probabilities have moved since
            the first update of a rollout step. Settings under which that is unknown, or always 0, are refused.
    """

    requires_multiple_updates: bool = False

    @abstractmethod
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Compute the part of the term that this micro-batch contributes, its coefficient included.

        Args:
            inputs: N trained tokens.

        Returns:
            A scalar with gradient; and metrics that add up over the micro-batches of a mini-batch.
        """
