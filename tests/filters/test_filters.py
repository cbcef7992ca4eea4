from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fits import curves, fit
from support.records import answer, rollout, search

from calibadv.data.datamodule import QuestionData
from calibadv.filters import DynamicSampling
from calibadv.training.sampling import refill
from calibadv.types import Group, Question, RolloutStatus

FAILED = RolloutStatus.SEARCH_FAILED


def group(name: str, *scores: float | None) -> Group:
    """One rollout per score of a question; None for one whose search failed."""
    return [
        rollout(search("d"), status=FAILED, question_id=name)
        if score is None
        else rollout(search("d"), answer("gold"), question_id=name, score=score)
        for score in scores
    ]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((0.0, 0.0, 0.0), False),
        ((1.0, 1.0, 1.0), False),
        ((0.4, 0.4), False),
        ((0.4, 0.5), True),
        ((0.0, 0.0, 1.0), True),
        ((1.0, None, 1.0), False),  # what has no reward is not another reward
        ((1.0, None, 0.0), True),
        ((None, None), False),
        ((1.0, None), False),
    ],
)
def test_groups_are_kept_whose_rewards_differ(scores: tuple[float | None, ...], kept: bool) -> None:
    assert DynamicSampling().keep(group("q", *scores)) is kept


def play(max_tries: int, spares: Sequence[str], answers: dict[str, tuple[float, float]]) -> tuple[str, list[str], str]:
    """Refill a batch of w (tied), x (split) and y (tied): whose groups it has then, who was asked, and the curves."""
    calls: list[str] = []

    def ask(questions: list[Question]) -> list[Group]:
        calls.append("".join(question.id for question in questions))
        return [group(question.id, *answers[question.id]) for question in questions]

    first = [group("w", 0, 0), group("x", 0, 1), group("y", 1, 1)]
    questions: Iterator[Question] = (Question(name, "what?", ["gold"]) for name in spares)
    groups, metrics = refill(first, DynamicSampling(max_tries), questions, ask)
    names = "".join(members[0].question.id for members in groups)
    assert list(metrics) == ["filter/asked", "filter/unreplaced"]
    return names, calls, "{} asked, {} unreplaced".format(*(int(value) for value in metrics.values()))


TIED, SPLIT = (0.0, 0.0), (0.0, 1.0)


def test_each_dropped_group_makes_room_for_the_next_one_that_is_kept() -> None:
    answers = {"a": TIED, "b": SPLIT, "c": TIED, "d": SPLIT}
    # Two are missing: a and b are asked, of which b is kept, in w's place; then c, then d, in y's.
    assert play(5, "abcd", answers) == ("bxd", ["ab", "c", "d"], "7 asked, 0 unreplaced")


def test_what_is_missing_after_the_last_try_is_filled_with_what_was_dropped() -> None:
    answers = {"a": TIED, "b": SPLIT, "c": TIED, "d": SPLIT}
    assert play(2, "abcd", answers) == ("bxy", ["ab", "c"], "6 asked, 1 unreplaced")
    assert play(5, "a", answers) == ("wxy", ["a"], "4 asked, 2 unreplaced")  # no questions are left
    assert play(5, "", answers) == ("wxy", [], "3 asked, 2 unreplaced")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> QuestionData:
    path = tmp_path_factory.mktemp("questions") / "train.jsonl"
    lines = [{"id": f"q{n}", "question": f"What is {n}?", "golden_answers": [str(n)]} for n in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return QuestionData(train=str(path), questions_per_step=4, seed=7)


@given(step=st.integers(0, 1000), asked=st.sets(st.integers(0, 9)))
def test_spare_questions_are_all_others_once(data: QuestionData, step: int, asked: set[int]) -> None:
    known = [data.train_questions[number] for number in asked]
    spares = [question.id for question in data.spare_questions(step, known)]
    assert sorted(spares) == sorted(f"q{number}" for number in range(10) if number not in asked)
    # What was asked leaves gaps, and changes nothing else: the order is that of the step.
    assert spares == [q.id for q in data.spare_questions(step, []) if q.id in spares]


def test_spare_questions_depend_on_the_step_and_the_seed(data: QuestionData) -> None:
    orders = {tuple(question.id for question in data.spare_questions(step, [])) for step in range(20)}
    assert len(orders) == 20
    first = tuple(question.id for question in data.spare_questions(0, []))
    data.seed = 8
    assert tuple(question.id for question in data.spare_questions(0, [])) != first
    data.seed = 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.group_size", "1"), "model.group_size is 1, and DynamicSampling compares the rollouts of a group"),
        (("--config", "estimators/igpo"), "IGPO also learns from groups whose rewards are equal"),
        (("--config", "estimators/mt_grpo"), "MTGRPO also learns from groups whose rewards are equal"),
        (("--model.group_filter.max_tries", "0"), "max_tries is 0; it must be at least 1"),
    ],
)
def test_filters_that_make_no_sense_are_refused(
    tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "run", "--config", "filters/dynamic_sampling", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


STEPS = ("--rollouts.every_n_rollout_steps", "1", "--data.questions_per_step", "4", "--model.group_size", "3")


def recorded(run: Path, step: int) -> list[list[tuple[str, float]]]:
    """Question and score of every rollout of a training step, by group."""
    lines = (run / "rollouts" / f"train-step-{step:06d}.jsonl").read_text().splitlines()
    rows = [(line["question_id"], line["score"]) for line in map(json.loads, lines)]
    return [rows[start : start + 3] for start in range(0, len(rows), 3)]


def test_a_run_trains_on_groups_that_teach_and_resumes_alike(tmp_path: Path) -> None:
    words = ("--config", "filters/dynamic_sampling", "--model.group_filter.max_tries", "20", *STEPS)
    assert fit(tmp_path, "plain", *STEPS, "--model.rollout_steps", "4") == 0
    assert fit(tmp_path, "whole", *words, "--model.rollout_steps", "4") == 0
    assert fit(tmp_path, "parts", *words, "--model.rollout_steps", "2") == 0
    assert fit(tmp_path, "parts", *words, "--model.rollout_steps", "4", "--ckpt_path", "last") == 0
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))

    assert curves(whole)["filter/unreplaced"] == dict.fromkeys(range(1, 5), 0.0)
    assert curves(whole)["credit/tied_groups"] == dict.fromkeys(range(1, 5), 0.0)
    tied = curves(plain)["credit/tied_groups"]
    assert any(tied.values())  # or there was nothing to drop
    for step in range(1, 5):
        assert recorded(parts, step) == recorded(whole, step)
    for step, share in tied.items():
        if step == 1:  # one policy
            pairs = list(zip(recorded(plain, 1), recorded(whole, 1), strict=True))
            assert sum(one != other for one, other in pairs) == 4 * share
            assert all((one == other) == (len({score for _, score in one}) > 1) for one, other in pairs)
        # The step's own questions are those of a run without the filter; what was dropped is not asked again later.
        places = zip(recorded(plain, step), recorded(whole, step), strict=True)
        new = [other[0][0] for one, other in places if one[0][0] != other[0][0]]
        assert len(set(new)) == len(new)
        assert not set(new) & {one[0][0] for one in recorded(plain, step)}
