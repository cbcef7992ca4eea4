"""The order of the training questions, and the loaders as the Trainer meets them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from calibadv.data.datamodule import QuestionData, TrainingQuestions, question_at, question_order, step_positions
from calibadv.types import Question

QUESTIONS = [Question(f"q{n}", f"What is {n}?", [str(n)]) for n in range(10)]


def ids(step: list[Question]) -> list[str]:
    return [question.id for question in step]


def first_steps(count: int, per_step: int = 4, seed: int = 0, start: int = 0) -> list[list[str]]:
    return [ids(step) for step in islice(TrainingQuestions(QUESTIONS, per_step, seed, lambda: start), count)]


QUESTIONS_OF_FILE = [replace(question, data_source="train") for question in QUESTIONS]


@pytest.fixture
def question_file(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    lines = [{"id": q.id, "question": q.question, "golden_answers": q.golden_answers} for q in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@given(seed=st.integers(-(2**63), 2**64), num_questions=st.integers(1, 50), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(seed: int, num_questions: int, epoch: int) -> None:
    positions = range(epoch * num_questions, (epoch + 1) * num_questions)
    assert sorted(question_at(p, seed, num_questions) for p in positions) == list(range(num_questions))


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(question_order(seed, epoch, 20)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_in_every_version() -> None:
    # Written down from the first run: a changed order would make published runs irreproducible.
    assert question_order(0, 0, 10).tolist() == ORDER
    assert [question_at(p, 0, 10) for p in step_positions(1, 4)] == ORDER[4:8]


ORDER = [9, 8, 3, 4, 6, 7, 2, 1, 0, 5]


def test_all_places_are_equally_likely() -> None:
    counts = Counter(int(question_order(seed, 0, 4)[0]) for seed in range(4000))
    # 1000 each expected, with a standard deviation of sqrt(4000 x 1/4 x 3/4) = 27; five of them are 137.
    assert all(abs(count - 1000) < 137 for count in counts.values())


def test_two_epochs_show_every_question_twice() -> None:
    seen = [name for step in first_steps(5) for name in step]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(ids(QUESTIONS))
    assert seen[:10] != seen[10:]


@given(start=st.integers(0, 30), per_step=st.integers(1, 25))
def test_a_restart_continues_the_order(start: int, per_step: int) -> None:
    whole = first_steps(start + 3, per_step)
    assert first_steps(3, per_step, start=start) == whole[start:]


def test_seeds_differ() -> None:
    assert first_steps(2, seed=1) != first_steps(2, seed=2)


def test_a_step_may_hold_more_questions_than_there_are() -> None:
    [step] = first_steps(1, per_step=25)
    assert Counter(Counter(step).values()) == {3: 5, 2: 5}


class Recorder(LightningModule):
    """Records the questions that each loop hands over, and carries the counter that the data module reads."""

    def __init__(self, rollout_step: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rollout_step = rollout_step
        self.seen: dict[str, list[list[str]]] = {"train": [], "validate": [], "test": [], "predict": []}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    def training_step(self, questions: list[Question], batch_idx: int) -> None:
        self.seen["train"].append(ids(questions))
        self.rollout_step += 1

    def validation_step(self, questions: list[Question], batch_idx: int) -> None:
        self.seen["validate"].append(ids(questions))

    def test_step(self, questions: list[Question], batch_idx: int) -> None:
        self.seen["test"].append(ids(questions))

    def predict_step(self, questions: list[Question], batch_idx: int) -> list[str]:
        self.seen["predict"].append(ids(questions))
        return ids(questions)


def make_trainer(tmp_path: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **options,
    )


def test_fit_starts_at_the_module_s_own_step(tmp_path: Path, question_file: str) -> None:
    data = QuestionData(question_file, question_file, question_file, questions_per_step=4, seed=3)
    module = Recorder(rollout_step=2)
    make_trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=0).fit(module, data)
    assert module.seen["train"] == first_steps(5, seed=3)[2:]


def test_epochs_of_lightning_repeat_no_question(tmp_path: Path, question_file: str) -> None:
    data = QuestionData(question_file, question_file, question_file, questions_per_step=4, seed=3)
    module = Recorder(rollout_step=1)
    make_trainer(tmp_path, max_epochs=3, limit_train_batches=2, limit_val_batches=0).fit(module, data)
    assert module.seen["train"] == first_steps(7, seed=3)[1:]


def test_evaluation_is_in_file_order(tmp_path: Path, question_file: str) -> None:
    data = QuestionData(question_file, question_file, question_file, validation_questions=7)
    module = Recorder()
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert module.seen["validate"] == [ids(QUESTIONS[:7])]
    assert module.seen["test"] == module.seen["predict"] == [ids(QUESTIONS)]


def test_more_validation_questions_than_there_are(question_file: str) -> None:
    data = QuestionData(question_file, question_file, question_file, validation_questions=99)
    assert data.validation_questions == QUESTIONS_OF_FILE


def test_the_embedded_questions() -> None:
    data = QuestionData("embedded", "embedded", "embedded")
    sizes = [len(split) for split in (data.train_questions, data.validation_questions, data.test_questions)]
    assert sizes == [2000, 200, 200]
    batches = data.val_dataloader()
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]
    assert len(batches) == 4


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_every_file_is_checked_at_once(question_file: str, name: str) -> None:
    files = {"train": question_file, "validation": question_file, "test": question_file, name: "nowhere.jsonl"}
    with pytest.raises(ValueError, match=r"question file 'nowhere.jsonl' does not exist"):
        QuestionData(**files)


def test_numbers_below_one_are_refused(question_file: str) -> None:
    with pytest.raises(ValueError, match=r"data.questions_per_step is 0; it must be at least 1"):
        QuestionData(questions_per_step=0)
    with pytest.raises(ValueError, match=r"data.validation_questions is 0; it must be at least 1"):
        QuestionData(validation_questions=0)


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("validate", "validation"), ("predict", "test")])
def test_a_stage_without_questions_is_refused(stage: str, split: str) -> None:
    with pytest.raises(ValueError, match=rf"data.{split} is not set; give a question file"):
        QuestionData().setup(stage)
