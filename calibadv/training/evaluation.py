"""Validation, test and prediction: greedy rollouts, one per question, and their mean scores."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from calibadv.agent.diagnosis import Diagnosis, diagnose
from calibadv.agent.patience import Waiting
from calibadv.agent.rollout import Draws
from calibadv.batch import EvaluationOutput
from calibadv.distributed import ProcessGroup, longest_wait, raising_together
from calibadv.errors import UserError
from calibadv.policy.precision import float32_by_default
from calibadv.runs.folder import RunFolder
from calibadv.training.metrics import evaluation_metrics, without_result
from calibadv.training.sampling import RolloutSampler, check_searches
from calibadv.types import Metrics, Question, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Sampling of ``predict``: by default greedy, one rollout per question."""

    samples: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.temperature < 0:
            raise UserError(
                f"samples is {self.samples} and temperature {self.temperature}; give at least 1, and at least 0"
            )
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"samples is {self.samples} and temperature 0, which makes them equal; give --temperature 1"
            )


GREEDY = Prediction()


class EvaluationModule(pl.LightningModule):
    """The half of a LightningModule that evaluates a policy."""

    sampler: RolloutSampler
    seed: int  # of all draws
    rollout_step: int = 0  # rollout steps done
    validated_step: int = -1  # the rollout step of the last validation, -1 before the first
    stop_requested: bool = False  # by a signal

    def __init__(self) -> None:
        super().__init__()
        self.evaluation: Metrics = {}  # of the last validation, test or prediction
        self.statuses: Counter[str] = Counter()  # of its rollouts
        self.diagnosis: Diagnosis | None = None  # of its rollouts, or of those of the last training step
        self.prediction = Prediction()
        self._evaluated: list[Rollout] = []

    @property
    def processes(self) -> ProcessGroup:
        """The ranks that train together."""
        return ProcessGroup.current()

    @property
    def run_folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder(Path(self.trainer.default_root_dir))

    @property
    def waiting(self) -> Waiting | None:
        """In training, a retriever that is away is waited for: for less than ranks wait for each other."""
        if self.trainer.state.fn != "fit":
            return None
        cap = longest_wait(self.trainer.strategy) if self.processes.size > 1 else math.inf
        return Waiting(cap, lambda: self.stop_requested)

    @override
    def validation_step(self, questions: list[Question], batch_idx: int) -> Any:
        return EvaluationOutput(self.evaluate(questions))

    test_step = validation_step

    @override
    def predict_step(self, questions: list[Question], batch_idx: int) -> Any:
        return EvaluationOutput(self.evaluate(questions, self.prediction))

    @float32_by_default()
    def evaluate(self, questions: Sequence[Question], prediction: Prediction = GREEDY) -> list[Rollout]:
        """Answer questions, by default greedily with one rollout each, and score them."""
        draws = Draws(self.seed, self.rollout_step, prediction.samples, prediction.temperature)
        groups = self.sampler.sample_groups(questions, draws, self.processes, self.waiting, credit=False)
        rollouts = list(chain.from_iterable(groups))
        self._evaluated.extend(rollouts)
        with raising_together():
            check_searches(self._evaluated, self.rollout_step)  # of all batches: few searches say little
        return rollouts

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self._evaluated.clear()
            return
        self._log_evaluation("val")
        self.validated_step = self.rollout_step

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    @override
    def on_predict_epoch_end(self) -> None:
        self._summarize()

    def validation_is_due(self, step: int) -> bool:
        """Return True if a validation is due after a rollout step: after 0, and each that the interval divides.

        Lightning's default interval, 1.0, is an epoch, and the training questions have no end: it leaves the first.
        Lightning validates once more where training ends; a run that goes on later has no such validation.
        """
        interval = self.trainer.val_check_interval
        return self.trainer.enable_validation and (step == 0 or (isinstance(interval, int) and step % interval == 0))

    def _log_evaluation(self, prefix: str) -> None:
        self._summarize()
        if (missing := without_result(self.evaluation)) and self.trainer.is_global_zero:
            log.warning(
                "%s at step %d: %s, since their search failed; its means are over the others, and not comparable with "
                "those over all questions",
                {"val": "validation"}.get(prefix, prefix),
                self.rollout_step,
                missing,
            )
        metrics = {f"{prefix}/{name}": value for name, value in self.evaluation.items()}
        # Loggers take "step" for the position of the others. Values are equal on all ranks.
        self.log_dict({**metrics, "step": float(self.rollout_step)}, sync_dist=True)

    def _summarize(self) -> None:
        self.evaluation = evaluation_metrics(self._evaluated)
        self.statuses = Counter(str(rollout.status) for rollout in self._evaluated)
        self.diagnosis = diagnose(self._evaluated, self.sampler.agent.protocol, self.rollout_step)
        self._evaluated.clear()

    def log_at_step(self, metrics: Metrics) -> None:
        """Log metrics against the rollout step, through all loggers."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.rollout_step)
