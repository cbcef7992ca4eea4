"""Demonstrations as training data: read, checked against the protocol, and encoded."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from calibadv.agent.episode import Agent
from calibadv.data.datamodule import EvaluationQuestions, load_questions, question_at, step_positions
from calibadv.errors import UserError
from calibadv.io.progress_bar import tracked
from calibadv.runs.rollouts import read_rollouts
from calibadv.types import Question, Rollout

log = logging.getLogger(__name__)


class Demonstrations(LightningDataModule):
    """Demonstrations in memory to train on, and questions to validate with.

    Args:
        rollouts: The demonstrations.
        batch_size: Demonstrations of one optimizer step.
        epochs: How often each demonstration is seen.
        validation: Questions.
        seed: Decides the order; None for that of ``rollouts``.
    """

    def __init__(
        self,
        rollouts: Iterable[Rollout],
        batch_size: int,
        epochs: int = 1,
        validation: Sequence[Question] = (),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.train = list(rollouts)
        self.batch_size = batch_size
        self.epochs = epochs
        self.validation_questions = list(validation)
        self.seed = seed

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs."""
        return math.ceil(len(self.train) * self.epochs / self.batch_size)

    def encode(self, agent: Agent) -> None:
        """Encode all demonstrations; those that cannot be trained on are left out, and counted in a warning."""
        encoded: list[Rollout] = []
        left_out: Counter[str] = Counter()
        for rollout in tracked(self.train, "Demonstrations", len(self.train)):
            check_protocol(rollout, agent)
            found = encode(rollout, agent)
            reason = reason_to_leave_out(found, agent)
            if reason:
                left_out[reason] += 1
            else:
                encoded.append(found)
        reasons = ", ".join(f"{number} with {reason}" for reason, number in left_out.most_common())
        if not encoded:
            raise UserError(f"no demonstration of data.train can be used: {reasons}; raise the limits, or make others")
        if not any(agent.protocol.is_valid(rollout.messages) for rollout in encoded):
            raise UserError(
                "no demonstration of data.train is valid in the language of model.protocol; make them with the same one"
            )
        if left_out:
            log.warning("%d of %d demonstrations are left out: %s", left_out.total(), len(self.train), reasons)
        self.train = encoded

    # Plain iterables, as in QuestionData: there is nothing to collate before tokens are counted.

    @override
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # records, which Lightning would take apart; their tensors are made on the device

    @override
    def train_dataloader(self) -> TrainingDemonstrations:
        def done() -> int:
            return cast("int", self.trainer.lightning_module.rollout_step) if self.trainer else 0

        return TrainingDemonstrations(self, done)

    @override
    def val_dataloader(self) -> EvaluationQuestions:
        return EvaluationQuestions(self.validation_questions)


class DemonstrationData(Demonstrations):
    """Demonstrations to train on, and questions to validate with.

    Args:
        train: Rollout file, or list of files, such as 'calibadv demonstrate' writes.
        validation: Question file, list of files, or ``embedded``. Without one nothing is validated.
        batch_size: Demonstrations of one optimizer step.
        epochs: How often each demonstration is seen.
        validation_questions: Validate on the first so many; all of them by default.
        seed: Decides the order of the demonstrations.

    Raises:
        UserError: a file cannot be read, or a number is below 1.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        batch_size: int = 24,
        epochs: int = 1,
        validation_questions: int | None = None,
        seed: int = 0,
    ) -> None:
        numbers = {"batch_size": batch_size, "epochs": epochs, "validation_questions": validation_questions}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}; it must be at least 1")
        paths = [train] if isinstance(train, str) else train
        if "embedded" in paths:
            raise UserError("data.train is 'embedded', which are questions; give demonstrations: calibadv demonstrate")
        rollouts = list(chain.from_iterable(read_rollouts(Path(path)) for path in paths))
        if not rollouts:
            raise UserError(f"data.train {' '.join(paths)} holds no demonstration; 'calibadv demonstrate' makes some")
        questions = load_questions(validation, "validation")[:validation_questions]
        super().__init__(rollouts, batch_size, epochs, questions, seed)


class TrainingDemonstrations:
    """The endless order of the demonstrations, one list per optimizer step."""

    def __init__(self, data: Demonstrations, done: Callable[[], int]) -> None:
        self._data = data
        self._done = done

    def __iter__(self) -> Iterator[list[Rollout]]:
        """Yield the demonstrations of the next optimizer step, of the one after it, and so on without end."""
        train, seed = self._data.train, self._data.seed
        for step in count(self._done()):
            positions = step_positions(step, self._data.batch_size)
            yield [train[p % len(train) if seed is None else question_at(p, seed, len(train))] for p in positions]


def check_protocol(rollout: Rollout, agent: Agent) -> None:
    """Refuse a demonstration in which another side writes ``<think>``: it would teach to write it twice or never."""
    prepends = agent.protocol.opening != ""
    if rollout.prepend_think != prepends:
        raise UserError(
            f"the demonstration of question '{rollout.question.id}' has prepend_think {rollout.prepend_think} and "
            f"model.protocol has {prepends}; make demonstrations with the protocol of the run"
        )


def encode(rollout: Rollout, agent: Agent) -> Rollout:
    """Encode a demonstration as an episode of the agent would be: prompt, and each segment by itself."""
    prompt_ids = agent.protocol.prompt_ids(rollout.question.question, agent.tokenizer, agent.environment.tools)
    token_ids = [tuple(agent.tokenizer.encode(segment.text)) for segment in rollout.segments]
    segments = [
        replace(segment, token_ids=ids, num_tokens=len(ids))
        for segment, ids in zip(rollout.segments, token_ids, strict=True)
    ]
    return replace(rollout, prompt_ids=tuple(prompt_ids), segments=tuple(segments))


def reason_to_leave_out(rollout: Rollout, agent: Agent) -> str | None:
    """Say why an encoded demonstration cannot be trained on; None if it can."""
    protocol = agent.protocol
    if len(rollout.prompt_ids) + sum(s.num_tokens for s in rollout.segments) > protocol.max_rollout_tokens:
        return f"more tokens than protocol.max_rollout_tokens ({protocol.max_rollout_tokens})"
    if max(segment.num_tokens for segment in rollout.policy_segments) > protocol.max_turn_tokens:
        return f"a message of more tokens than protocol.max_turn_tokens ({protocol.max_turn_tokens})"
    specials = set(agent.tokenizer.special_strings) - set(protocol.tags)
    if any(special in segment.text for segment in rollout.segments for special in specials):
        return "a special token of the tokenizer in its text"
    return None
