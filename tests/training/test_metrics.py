from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.records import answer, rollout, search

from calibadv.batch import collate
from calibadv.estimators import GRPO, IGPO
from calibadv.rewards import F1, credit_rollouts, score_rollouts
from calibadv.training.metrics import evaluation_metrics, rollout_metrics, without_result
from calibadv.types import Metrics, Rollout, RolloutStatus, Segment


def metrics_of(*rollouts: Rollout, calibrated_by: float = 1.0) -> Metrics:
    batch = collate(credit_rollouts(score_rollouts(rollouts, F1())))
    estimated = GRPO().estimate(batch)
    return rollout_metrics(batch, estimated, estimated * calibrated_by)


GOOD = rollout(search("a", "b"), answer("gold", tokens=2))
BAD = rollout(search("a", "x"), search("y"), answer("no", tokens=4))
FAILED = rollout(search("a"), answer("gold"), status=RolloutStatus.SEARCH_FAILED)


def test_reward_curves() -> None:
    without_search = rollout(answer("gold gold"))  # invalid, yet F1 2 * 1 / (2 + 1)
    values = metrics_of(GOOD, BAD, without_search, FAILED)
    # over the three that have a reward
    assert values["reward/score"] == values["reward/f1"] == values["reward/em"] == pytest.approx(1 / 3)
    assert values["reward/answer_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert values["reward/format_valid"] == pytest.approx(2 / 3)


def test_rollout_curves() -> None:
    cut = rollout(search("a", tokens=5), [Segment("policy", "<think>", 7)], status=RolloutStatus.TRUNCATED)
    endless = rollout(search("a"), search("b"), [search("c")[0]], status=RolloutStatus.OUT_OF_TURNS)
    values = metrics_of(GOOD, cut, endless, FAILED)
    assert values["rollout/turns"] == (2 + 2 + 3 + 2) / 4
    assert values["rollout/searches"] == (1 + 1 + 2 + 1) / 4
    assert values["rollout/policy_tokens"] == (5 + 12 + 9 + 5) / 4
    for name in ("truncated", "out_of_turns", "search_failed"):
        assert values[f"rollout/{name}"] == 0.25
    assert values["rollout/invalid"] == 0.0


def test_advantage_curves() -> None:
    # A = +-0.707106. Search tokens: 3 of GOOD, 6 of BAD; answer tokens: 2 and 4; two rollouts
    values = metrics_of(GOOD, BAD, calibrated_by=2.0)
    a = 0.7071058
    assert values["advantage/estimated/search/positive_mass"] == pytest.approx(3 * a / 2)
    assert values["advantage/estimated/search/negative_mass"] == pytest.approx(6 * a / 2)
    assert values["advantage/estimated/search/ratio"] == pytest.approx(0.5)
    assert values["advantage/estimated/answer/positive_mass"] == pytest.approx(2 * a / 2)
    assert values["advantage/calibrated/answer/negative_mass"] == pytest.approx(2 * 4 * a / 2)
    assert values["advantage/calibrated/answer/ratio"] == pytest.approx(0.5)


def test_a_ratio_without_negative_side_is_left_out() -> None:
    values = metrics_of(GOOD)  # a group of one: its advantage is positive
    assert values["advantage/estimated/search/negative_mass"] == 0.0
    assert "advantage/estimated/search/ratio" not in values


def test_credit_curves() -> None:
    other = {"question_id": "other"}
    nothing = [rollout(search("z"), answer("no"), **other), rollout(search("y"), answer("no"), **other)]
    values = metrics_of(GOOD, BAD, *nothing)
    # silver documents are a and b, and none; GOOD has correctness 1, BAD 0.5 and 0, the two others 0
    assert values["credit/silver_size"] == 1.0
    assert values["credit/empty_silver"] == 0.5
    assert values["credit/tied_groups"] == 0.5
    assert values["credit/step_correctness"] == pytest.approx(1.5 / 5)
    assert values["credit/mispenalised"] == 0.5  # BAD's two searches are punished, the tied group's are not
    assert "credit/true_mispenalised" not in values


def test_the_gain_of_turns_is_averaged_over_searches_where_it_is_known() -> None:
    batch = collate(credit_rollouts(score_rollouts([GOOD, BAD], F1())))
    # GOOD searches once and BAD twice; what stands at other turns is none of a search
    gains = torch.tensor([[0.5, 9.0, 9.0], [0.25, -0.15, 9.0]])
    metrics = IGPO().metrics(replace(batch, extras={"turn_gains": gains}))
    assert metrics["credit/turn_gain"] == pytest.approx(0.2)


def test_true_mispenalised_uses_the_labels() -> None:
    labels = {"metadata": {"supporting_ids": ["x", "y"]}}
    # by gold both of BAD's searches found something new: x of {a, x}, then y
    punished = rollout(search("a", "x"), search("y"), answer("no"), **labels)
    values = metrics_of(replace(GOOD, question=punished.question), punished)
    assert values["credit/mispenalised"] == 0.5
    assert values["credit/true_mispenalised"] == 1.0


def test_groups_that_are_left_out_are_in_no_credit_curve() -> None:
    lonely = rollout(search("c"), answer("gold"), question_id="other")
    lost = rollout(search("c"), answer("gold"), question_id="other", status=RolloutStatus.SEARCH_FAILED)
    expected = {name: value for name, value in metrics_of(GOOD, BAD).items() if name.startswith("credit/")}
    values = metrics_of(GOOD, BAD, lonely, lost)
    assert {name: value for name, value in values.items() if name.startswith("credit/")} == expected


def test_a_batch_in_which_every_search_failed_has_only_counts() -> None:
    values = metrics_of(FAILED, FAILED)
    assert values["rollout/search_failed"] == 1.0
    assert not [name for name in values if name.startswith(("reward/", "credit/"))]


def test_all_curves_are_plain_numbers() -> None:
    values = metrics_of(GOOD, BAD)
    assert all(type(value) is float for value in values.values())
    assert torch.tensor(list(values.values())).isfinite().all()


def test_evaluation_overall_and_per_source() -> None:
    rollouts = score_rollouts(
        [
            replace(GOOD, question=replace(GOOD.question, data_source="hotpotqa")),
            replace(BAD, question=replace(BAD.question, data_source="hotpotqa")),
            rollout(search("a"), answer("old gold"), data_source="nq"),
            replace(FAILED, question=replace(FAILED.question, data_source="nq")),
        ],
        F1(),
    )
    values = evaluation_metrics(rollouts)
    assert values["f1"] == values["score"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert (values["em"], values["cover_em"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert values["searches"] == pytest.approx(4 / 3)
    assert values["format_valid"] == 1.0
    assert (values["count"], values["search_failed"]) == (3.0, 1.0)
    assert (values["hotpotqa/f1"], values["hotpotqa/searches"], values["hotpotqa/count"]) == (0.5, 1.5, 2.0)
    assert (values["nq/f1"], values["nq/count"]) == (pytest.approx(2 / 3), 1.0)


def test_evaluation_without_a_source_or_a_result() -> None:
    assert not [name for name in evaluation_metrics([GOOD]) if "/" in name]
    assert evaluation_metrics([FAILED]) == {"count": 0.0, "search_failed": 1.0}


def test_what_an_evaluation_misses_is_said() -> None:
    assert without_result(evaluation_metrics([GOOD, FAILED, BAD])) == "1 of 3 questions have no result"
    assert without_result(evaluation_metrics([GOOD])) == ""
