"""The questions of a run, and their order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import count
from typing import cast

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from numpy.typing import NDArray
from typing_extensions import override

from calibadv.data.questions import read_questions
from calibadv.errors import UserError
from calibadv.types import Question

# Questions that a validation or test asks together.
EVALUATION_BATCH = 64


@lru_cache(maxsize=4)
def question_order(seed: int, epoch: int, num_questions: int) -> NDArray[np.int64]:
    """The order of the questions in one pass over them: a permutation that depends on nothing but the arguments."""
    order = _permutation(f"questions/{seed}/{epoch}", num_questions)
    order.flags.writeable = False
    return order


def _permutation(key: str, size: int) -> NDArray[np.int64]:
    digest = blake2b(key.encode(), digest_size=16).digest()
    # NumPy promises the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.
    draws = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(draws, kind="stable")


def question_at(position: int, seed: int, num_questions: int) -> int:
    """The question at one position of the endless training order."""
    epoch, place = divmod(position, num_questions)
    return int(question_order(seed, epoch, num_questions)[place])


def step_positions(step: int, questions_per_step: int) -> range:
    """The positions of one rollout step's questions."""
    return range(step * questions_per_step, (step + 1) * questions_per_step)


class TrainingQuestions:
    """The endless training order, one list of questions per rollout step.

    ``done`` gives the rollout steps already done, whenever an iteration begins.
    """

    def __init__(self, questions: list[Question], questions_per_step: int, seed: int, done: Callable[[], int]) -> None:
        self.questions = questions
        self.questions_per_step = questions_per_step
        self.seed = seed
        self.done = done

    def __iter__(self) -> Iterator[list[Question]]:
        """Yield the questions of the next rollout step, of the one after it, and so on without end."""
        for step in count(self.done()):
            positions = step_positions(step, self.questions_per_step)
            yield [self.questions[question_at(p, self.seed, len(self.questions))] for p in positions]


class EvaluationQuestions:
    """All questions once, in the order of the file, in lists of at most 64."""

    def __init__(self, questions: list[Question]) -> None:
        self.questions = questions

    def __len__(self) -> int:
        return math.ceil(len(self.questions) / EVALUATION_BATCH)

    def __iter__(self) -> Iterator[list[Question]]:
        for start in range(0, len(self.questions), EVALUATION_BATCH):
            yield self.questions[start : start + EVALUATION_BATCH]


class QuestionData(LightningDataModule):
    """Questions for training, validation and test. Prediction takes those of the test.

    Args:
        train: Question file, list of files, or ``embedded``. Without one nothing can be trained.
        validation: Question file, list of files, or ``embedded``. Without one nothing is validated.
        test: Question file, list of files, or ``embedded``; for test and predict.
        questions_per_step: Questions of one rollout step. With fewer training questions, a step repeats some.
        validation_questions: Validate on the first so many; all of them by default.
        seed: Decides the order of the training questions.

    Raises:
        UserError: a file cannot be read, or a number is below 1.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        questions_per_step: int = 16,
        validation_questions: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if questions_per_step < 1:
            raise UserError(f"data.questions_per_step is {questions_per_step}; it must be at least 1")
        if validation_questions is not None and validation_questions < 1:
            raise UserError(f"data.validation_questions is {validation_questions}; it must be at least 1, or null")
        # All files are read at once, so that a bad one stops the run before anything is written.
        self.train_questions = load_questions(train, "train")
        self.validation_questions = load_questions(validation, "validation")[:validation_questions]
        self.test_questions = load_questions(test, "test")
        self.questions_per_step = questions_per_step
        self.seed = seed

    def questions_for(self, stage: str) -> list[Question]:
        """The questions that will be asked."""
        if stage == "fit":
            return self.train_questions + self.validation_questions
        return self.validation_questions if stage == "validate" else self.test_questions

    def spare_questions(self, step: int, asked: Sequence[Question]) -> Iterator[Question]:
        """Further training questions for one rollout step, in the place of some that are dropped.

        They are drawn for that step alone. The next ones of the training order would be shorter to explain, but then
        the questions of every later step would depend on what was dropped: on the method that is trained.
        """
        known = {question.id for question in asked}
        for row in _permutation(f"spares/{self.seed}/{step}", len(self.train_questions)):
            if self.train_questions[row].id not in known:
                yield self.train_questions[row]

    @override
    def setup(self, stage: str) -> None:
        split = {"fit": "train", "validate": "validation"}.get(stage, "test")
        if not getattr(self, f"{split}_questions"):
            raise UserError(f"data.{split} is not set; give a question file, or 'embedded' with the embedded corpus")

    # The loaders are plain iterables, not torch's DataLoader: there is nothing to collate, and worker processes, whose
    # absence Lightning warns of, would only copy questions that are in memory already.

    @override
    def train_dataloader(self) -> TrainingQuestions:

        def done() -> int:
            return cast("int", self.trainer.lightning_module.rollout_step) if self.trainer else 0

        return TrainingQuestions(self.train_questions, self.questions_per_step, self.seed, done)

    @override
    def val_dataloader(self) -> EvaluationQuestions:
        return EvaluationQuestions(self.validation_questions)

    @override
    def test_dataloader(self) -> EvaluationQuestions:
        return EvaluationQuestions(self.test_questions)

    predict_dataloader = test_dataloader


def replacement_questions(trainer: Trainer, step: int, asked: Sequence[Question]) -> Iterator[Question]:
    """Yield further training questions of a rollout step, in the place of some that a filter drops."""
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, QuestionData):
        yield from data.spare_questions(step, asked)


def load_questions(source: str | list[str] | None, split: str) -> list[Question]:
    """Read the questions of a split, none without a source."""
    if source is None:
        return []
    if source == "embedded":
        from calibadv.world import embedded_world

        return list(embedded_world().questions[split])
    return read_questions(source)
