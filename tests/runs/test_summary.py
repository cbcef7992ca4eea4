"""Outcome measures against runs small enough to sum up by eye."""

from __future__ import annotations

import pytest

from calibadv.runs.summary import summarize_run


def run(*scores: float, valid: float = 1.0) -> list[dict[str, float]]:
    return [{"step": 10 * place, "f1": score, "format_valid": valid} for place, score in enumerate(scores)]


def test_a_healthy_run() -> None:
    result = summarize_run(run(0.5, 0.8, 0.9, 0.8, 0.85))
    assert result["final_f1"] == pytest.approx(0.85)  # (0.9 + 0.8 + 0.85) / 3
    assert (result["best_f1"], result["collapsed"], result["step_of_collapse"]) == (0.9, False, None)


def test_a_run_that_breaks_down_for_good() -> None:
    # From step 20 on F1 stays 0.2 below the best so far, 0.9; final (0.3 + 0.4 + 0.2) / 3 = 0.3.
    result = summarize_run(run(0.5, 0.9, 0.3, 0.4, 0.2))
    assert result["final_f1"] == pytest.approx(0.3)
    assert (result["collapsed"], result["step_of_collapse"]) == (True, 20)


def test_a_dip_that_recovers_is_no_collapse() -> None:
    result = summarize_run(run(0.5, 0.9, 0.3, 0.85, 0.9, 0.9))
    assert (result["collapsed"], result["step_of_collapse"]) == (False, None)


@pytest.mark.parametrize("best", [0.8, 0.85, 0.9, 0.95])
def test_a_fall_of_exactly_the_limit_is_a_collapse_whatever_floats_make_of_it(best: float) -> None:
    fallen = round(best - 0.2, 2)
    result = summarize_run(run(0.5, best, fallen, fallen, fallen))
    assert (result["collapsed"], result["step_of_collapse"]) == (True, 20)


def test_the_untrained_policy_is_not_part_of_the_final_f1_of_a_short_run() -> None:
    # One validation after training, 0.85: a mean with the 0.4 before training would be a "collapse" of a run that rose.
    rising = summarize_run(run(0.4, 0.85))
    assert (rising["final_f1"], rising["collapsed"]) == (0.85, False)
    # And a run that fell to 0 at once would keep half of what it started with.
    assert summarize_run(run(0.4, 0.0))["final_f1"] == 0.0
    assert summarize_run(run(0.4))["final_f1"] == 0.4


def test_broken_format_at_the_end_is_a_collapse() -> None:
    assert summarize_run(run(0.5, 0.5, valid=0.4))["collapsed"] is True


def test_without_a_validation() -> None:
    assert summarize_run([]) == {}
    assert summarize_run([{"step": 0, "search_failed": 3.0}]) == {}
