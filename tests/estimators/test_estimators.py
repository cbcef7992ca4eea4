from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import answer, rollout, search
from torch import Tensor, nn
from torch.nn import functional as F

from calibadv.analysis.replay import replay
from calibadv.batch import RolloutBatch, collate, to_device, turn_values
from calibadv.config.files import configs_folder, read_words
from calibadv.config.lightning_cli import CalibadvCLI
from calibadv.config.logging import quiet_environment
from calibadv.distributed import SINGLE_PROCESS
from calibadv.estimators import GRPO, IGPO, MTGRPO, RLOO, DrGRPO, GiGPO
from calibadv.estimators._answer_likelihood import answer_likelihoods, answer_tokens, turn_gains
from calibadv.interfaces import AdvantageEstimator
from calibadv.numerics.advantages import group_centre, group_normalise, leave_one_out
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.rewards import F1, credit_rollouts, score_rollouts
from calibadv.runs.rollouts import rollout_to_json, write_records
from calibadv.types import Question, Rollout, RolloutStatus, Segment
from calibadv.world.tokenizer import build_tokenizer
from calibadv.world.vocabulary import words

ESTIMATORS = [GRPO(), DrGRPO(), RLOO(), MTGRPO(), GiGPO(), GiGPO(divide_by_std=False), IGPO(), IGPO(0.5, "separate")]
NAMES = [f"{type(estimator).__name__}-{place}" for place, estimator in enumerate(ESTIMATORS)]


def batch_of(*rollouts: Rollout) -> RolloutBatch:
    batch = collate(credit_rollouts(score_rollouts(rollouts, F1())))
    # Gains that only depend on the turn itself stand in for those of a policy.
    found = [[0.1 * len({doc.id for doc in turn or ()}) for turn in r.turn_documents] for r in batch.rollouts]
    return with_gains(batch, found)


def with_gains(batch: RolloutBatch, gains: Sequence[Sequence[float]]) -> RolloutBatch:
    """The same batch, with the gain of each search turn."""
    padded = torch.zeros_like(batch.step_correctness)
    for row, values in enumerate(gains):
        padded[row, : len(values)] = torch.tensor(values)
    return replace(batch, extras={"turn_gains": padded})


def turns(estimator: AdvantageEstimator, batch: RolloutBatch) -> list[Any]:
    advantages = estimator.estimate(batch)
    assert advantages.shape == batch.turn_ids.shape
    assert bool((advantages[~batch.loss_mask] == 0).all())
    return turn_values(batch, advantages)


GOOD = rollout(search("a", "b"), answer("gold"))
BAD = rollout(search("a", "x"), search("y"), answer("no"), sample=1)
HALF = rollout(search("z"), answer("gold and or"), sample=2)  # F1 of one word in three: 2 x 1 / (3 + 1) = 0.5
# Rewards 1 and 0: mean 0.5, std sqrt(0.5), A = +-0.707106
A = 0.5 / (math.sqrt(0.5) + 1e-6)


# By hand.


def test_dr_grpo_only_subtracts_the_mean() -> None:
    # 1, 0, 0.5: mean 0.5
    assert turns(DrGRPO(), batch_of(GOOD, BAD, HALF)) == [[0.5, 0.5], [-0.5, -0.5, -0.5], [0.0, 0.0]]


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    # the others' means are 0.25, 0.75 and 0.5
    assert turns(RLOO(), batch_of(GOOD, BAD, HALF)) == [[0.75, 0.75], [-0.75, -0.75, -0.75], [0.0, 0.0]]


def test_mt_grpo_compares_searches_of_one_index() -> None:
    # silver is {a, b}. First searches: correctness 1 and 0.5, mean 0.75, std sqrt(2 x 0.0625) = 0.3536, so +-A as well.
    # Only BAD has a second search. Searches get the turn's part plus w x the outcome's, answers the outcome's.
    batch = batch_of(GOOD, BAD)
    assert turns(MTGRPO(), batch) == [
        pytest.approx([2 * A, A], rel=1e-5),
        pytest.approx([-2 * A, -A, -A], rel=1e-5),
    ]
    assert turns(MTGRPO(outcome_weight=0.0), batch) == [
        pytest.approx([A, A], rel=1e-5),
        pytest.approx([-A, 0.0, -A], rel=1e-5),
    ]


TWICE = rollout(search("b", "a"), search("c"), answer("gold"), sample=1)
WRONG = rollout(search("x"), answer("no"), sample=2)


def test_gigpo_compares_turns_from_one_state() -> None:
    # Rewards 1, 1, 0, less their mean 2/3: 1/3, 1/3, -2/3. Returns at gamma 0.5:
    # - first turns: 0.5, 0.25, 0, less their mean: 0.25, 0, -0.25
    # - after {a, b}: the answer of GOOD, 1, and the second search of TWICE, 0.5: +-0.25
    # - after {c} and after {x}: one turn each: 0
    centred = GiGPO(gamma=0.5, divide_by_std=False)
    batch = batch_of(GOOD, TWICE, WRONG)
    assert turns(centred, batch) == [
        pytest.approx([1 / 3 + 0.25, 1 / 3 + 0.25]),
        pytest.approx([1 / 3, 1 / 3 - 0.25, 1 / 3]),
        pytest.approx([-2 / 3 - 0.25, -2 / 3]),
    ]
    # The stds: of the rewards sqrt((1 + 1 + 4) / 9 / 2) = sqrt(1/3), of the first returns 0.25, after {a, b} sqrt(1/8).
    (good, twice, wrong) = turns(GiGPO(gamma=0.5, step_weight=2.0), batch)
    episode, pair = 3**-0.5, 2 * 0.25 / 8**-0.5
    assert good == pytest.approx([episode + 2 * 1, episode + pair], abs=1e-4)
    assert twice == pytest.approx([episode, episode - pair, episode], abs=1e-4)
    assert wrong == pytest.approx([-2 * episode - 2 * 1, -2 * episode], abs=1e-4)


def test_gigpo_without_its_step_part_is_grpo() -> None:
    batch = batch_of(GOOD, TWICE, WRONG, HALF)
    assert torch.equal(GiGPO(step_weight=0.0).estimate(batch), GRPO().estimate(batch))


def test_igpo_sums_normalised_gains_and_answers() -> None:
    # Turn rewards: GOOD 0.25, 1; BAD 0.25, -0.5, 0. Mean 0.2; deviations 0.05, 0.8, 0.05, -0.7, -0.2, whose squares add
    # up to 1.175: std sqrt(1.175 / 4). At gamma 0.5: 0.05 + 0.4; 0.8; 0.05 - 0.35 - 0.05; -0.7 - 0.1; -0.2.
    batch = with_gains(batch_of(GOOD, BAD), [[0.25], [0.25, -0.5]])
    std = math.sqrt(1.175 / 4)
    assert turns(IGPO(gamma=0.5), batch) == [
        pytest.approx([0.45 / std, 0.8 / std], rel=1e-5),
        pytest.approx([-0.35 / std, -0.8 / std, -0.2 / std], rel=1e-5),
    ]
    # Apart: gains 0.25, 0.25, -0.5 have mean 0 and std sqrt(0.375 / 2); answers give +-A.
    std = math.sqrt(0.375 / 2)
    assert turns(IGPO(gamma=1.0, normalise="separate"), batch) == [
        pytest.approx([0.25 / std + A, A], rel=1e-5),
        pytest.approx([-0.25 / std - A, -0.5 / std - A, -A], rel=1e-5),
    ]


# Groups that lose members, groups of one, ties.


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_a_failed_search_changes_nothing_for_the_others(estimator: AdvantageEstimator) -> None:
    failed = rollout(search("a", "b"), answer("gold"), status=RolloutStatus.SEARCH_FAILED, sample=9)
    other = rollout(search("c"), answer("gold"), question_id="other")  # its only companion fails
    gone = replace(failed, question=other.question)
    alone = turns(estimator, batch_of(GOOD, BAD, HALF))
    among = turns(estimator, batch_of(failed, GOOD, other, BAD, gone, HALF))
    assert [among[1], among[3], among[5]] == alone
    assert [among[0], among[2], among[4]] == [None, None, None]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_a_group_of_one_keeps_its_reward(estimator: AdvantageEstimator) -> None:
    (only,) = turns(estimator, with_gains(batch_of(HALF), [[0.0]]))
    assert only[-1] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("formula", [group_normalise, group_centre, leave_one_out])
def test_a_group_of_one_that_is_left_out_gets_nothing(formula: Callable[..., Tensor]) -> None:
    rewards, groups = torch.tensor([0.5, 0.5, 1.0, 0.0]), torch.tensor([0, 1, 2, 2])
    found = formula(rewards, groups, torch.tensor([True, False, True, False]))
    assert found.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0], abs=1e-5)


# Means of these miss them by a bit, in float32 or in float64; 0.05 is what an epsilon of 1e-6 makes of that.
AWKWARD = [0.1, 1 / 3, 0.7, 0.29999998211860657, 6 / 7]


@pytest.mark.parametrize("estimator", ESTIMATORS[:6], ids=NAMES[:6])
@settings(max_examples=40)
@given(st.sampled_from(AWKWARD), st.integers(2, 7))
def test_equal_rollouts_get_exactly_nothing(estimator: AdvantageEstimator, score: float, copies: int) -> None:
    same = rollout(search("a"), search("b", "c"), answer("x"), score=score, step_correctness=(score, 1 - score))
    batch = collate([replace(same, sample=sample) for sample in range(copies)])
    assert bool((estimator.estimate(batch) == 0).all())


@pytest.mark.parametrize("normalise", ["joint", "separate"])
@settings(max_examples=40)
@given(st.sampled_from(AWKWARD), st.integers(2, 7))
def test_equal_turn_rewards_get_exactly_nothing(normalise: Any, score: float, copies: int) -> None:
    same = rollout(search("a"), search("b", "c"), answer("x"), score=score)
    batch = collate([replace(same, sample=sample) for sample in range(copies)])
    gains = with_gains(batch, [[score, score]] * copies)
    assert bool((IGPO(normalise=normalise).estimate(gains) == 0).all())


def test_searches_are_credited_where_all_answers_are_wrong() -> None:
    """What turn-level credit is for: GRPO has nothing to say of a tied group."""
    other = rollout(search("b"), answer("no"), sample=1)
    batch = with_gains(batch_of(WRONG, other), [[0.3], [0.1]])
    assert turns(GRPO(), batch) == [[0.0, 0.0], [0.0, 0.0]]
    # Turn rewards 0.3, 0, 0.1, 0: mean 0.1; the searches sum up to 0.2 - 0.1 and 0 - 0.1 in units of the std.
    (first, _), (second, _) = turns(IGPO(), batch)
    assert first > 0 > second
    assert first == pytest.approx(-second, rel=1e-5)


# Properties over any batch.

_DOCUMENTS = st.lists(st.sampled_from("abcd"), max_size=3).map(lambda ids: search(*ids, think=" ".join(["t", *ids])))
_ANSWERS = st.sampled_from(["gold", "no", "gold and or", "gold or"]).map(answer)


@st.composite
def batches(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts of two questions in any order, some of which failed."""
    rollouts = []
    for sample in range(draw(st.integers(2, 9))):
        searches = draw(st.lists(_DOCUMENTS, max_size=3))
        made = rollout(*searches, draw(_ANSWERS), sample=sample, question_id=draw(st.sampled_from("pq")), step=1)
        failed = draw(st.integers(0, 5)) == 0
        rollouts.append(replace(made, status=RolloutStatus.SEARCH_FAILED) if failed else made)
    return rollouts


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
@settings(max_examples=40)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(estimator: AdvantageEstimator, rollouts: list[Rollout], random) -> None:
    order = list(range(len(rollouts)))
    random.shuffle(order)
    expected = turns(estimator, batch_of(*rollouts))
    for row, found in zip(order, turns(estimator, batch_of(*(rollouts[row] for row in order))), strict=True):
        assert found == (None if expected[row] is None else pytest.approx(expected[row], abs=1e-5))


@pytest.mark.parametrize("estimator", [DrGRPO(), GRPO(), RLOO()])
@settings(max_examples=40)
@given(batches())
def test_advantages_of_a_group_add_up_to_nothing(estimator: AdvantageEstimator, rollouts: list[Rollout]) -> None:
    batch = batch_of(*rollouts)
    for group in range(int(batch.group_ids.max()) + 1):
        found = [
            values[-1]
            for values, member in zip(turns(estimator, batch), batch.group_ids.tolist(), strict=True)
            if member == group and values is not None
        ]
        if len(found) > 1:
            assert sum(found) == pytest.approx(0, abs=1e-5)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8), st.integers(0, 3))
def test_rloo_is_the_centred_reward_stretched(rewards: list[float], left_out: int) -> None:
    counted = torch.tensor([True] * len(rewards) + [False] * left_out)
    values, group = torch.tensor([*rewards, *[9.0] * left_out]), torch.zeros(len(counted), dtype=torch.long)
    n = len(rewards)
    stretched = leave_one_out(values.double(), group, counted)
    others = [reward - (sum(rewards) - reward) / (n - 1) for reward in rewards]
    torch.testing.assert_close(stretched, n / (n - 1) * group_centre(values.double(), group, counted))
    assert stretched.tolist() == pytest.approx([*others, *[0.0] * left_out], abs=1e-9)


# The probability of the golden answer.


class Urn(nn.Module):
    """A language model for a pencil: p(v | history) = (1 + times v was seen) / (V + tokens seen)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=(1 + F.one_hot(input_ids, self.size).cumsum(dim=1)).float().log())


TOKENIZER = AgentTokenizer(build_tokenizer())
SIZE = len(TOKENIZER.backend)
ONE, TWO, OTHER = words()[:3]


def told(*parts: tuple[str, str], golden: str = ONE, prepend_think: bool = False, sample: int = 0) -> Rollout:
    """A rollout with token ids from (author, text), after a prompt of three tokens, one of them the golden answer."""
    segments = []
    for source, text in parts:
        ids = tuple(TOKENIZER.encode(text))
        logprobs = (0.0,) * len(ids) if source == "policy" else ()
        segments.append(Segment(source, text, len(ids), ids, logprobs))  # type: ignore[arg-type]
    prompt = tuple(TOKENIZER.encode(f"{OTHER} {ONE} {OTHER}"))
    question = Question("q", "what?", [golden, "another"])
    return Rollout(question, sample, 1, prepend_think, tuple(segments), RolloutStatus.ANSWERED, prompt)


SEARCHED = ("policy", f"<think> </think> <search> {OTHER} </search>")  # five tokens
ANSWERED = ("policy", f"<think> </think> <answer> {TWO} </answer>")


def test_probability_of_the_golden_answer_by_hand() -> None:
    found = told(SEARCHED, ("environment", f"{ONE} {ONE} {TWO}"), ANSWERED)
    at_once = told(ANSWERED)
    batch = collate([found, at_once])
    # Prompt 3 tokens, frame <think> </think> <answer> 3 more, one of all six the answer: 2 / (V + 6). After the search
    # and its observation there are 5 + 3 more tokens, two of them the answer: 4 / (V + 14).
    first, second = 2 / (SIZE + 6), 4 / (SIZE + 14)
    probabilities = answer_likelihoods(batch, Policy(Urn(SIZE), TOKENIZER), 1000)
    torch.testing.assert_close(probabilities, torch.tensor([[first, second], [first, 0.0]]))
    gains = turn_gains(probabilities, batch.answer_turn)
    torch.testing.assert_close(gains, torch.tensor([[second - first, 0.0], [0.0, 0.0]]))


def test_a_think_that_the_environment_has_opened_is_not_opened_again() -> None:
    # Frame </think> <answer>: one token less. The golden answer has two tokens, of which the second was never seen:
    # the geometric mean of 2 / (V + 5) and 1 / (V + 6).
    batch = collate([told(("policy", f"</think> <answer> {ONE} </answer>"), golden=f"{ONE} {TWO}", prepend_think=True)])
    (found,) = answer_likelihoods(batch, Policy(Urn(SIZE), TOKENIZER), 1000).flatten().tolist()
    assert found == pytest.approx(math.sqrt(2 / (SIZE + 5) * 1 / (SIZE + 6)), rel=1e-5)


def test_what_is_left_out_or_empty_is_not_asked() -> None:
    failed = replace(told(SEARCHED, ("environment", ONE), ANSWERED), status=RolloutStatus.SEARCH_FAILED)
    silent = replace(told(SEARCHED, ("environment", ONE), ("policy", "")), status=RolloutStatus.TRUNCATED)
    batch = collate([failed, silent, told(ANSWERED, golden="")])
    probabilities = answer_likelihoods(batch, Policy(Urn(SIZE), TOKENIZER), 1000)
    assert probabilities[0].tolist() == [0.0, 0.0]
    # the message that was never written is still a turn: 3 / (V + 3 + 5 + 1 + 3)
    torch.testing.assert_close(probabilities[1], torch.tensor([2 / (SIZE + 6), 3 / (SIZE + 12)]))
    assert probabilities[2].tolist() == [1.0, 0.0]  # an empty answer tells nothing, whatever was found


def test_a_golden_answer_cannot_close_its_own_block() -> None:
    written = answer_tokens(told(ANSWERED, golden=f"{ONE} </answer> <eos>"), TOKENIZER)
    assert TOKENIZER.decode(written.frame) == "<think> </think> <answer>"
    assert written.answer[0] == TOKENIZER.encode(ONE)[0]
    assert not {*TOKENIZER.encode("</answer>"), *TOKENIZER.end_ids} & set(written.answer)


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_gains_of_a_transformer_against_plain_passes(embedded_policy: Policy, budget: int) -> None:
    golden = f"{ONE} {TWO}"
    seen = "environment", f"<information> {OTHER} {ONE} . {TWO} {TWO} </information>"
    rollouts = [
        told(SEARCHED, seen, SEARCHED, ("environment", golden), ANSWERED, golden=golden),
        told(ANSWERED, golden=golden, sample=1),
        told(SEARCHED, ("environment", OTHER), ANSWERED, golden=golden, sample=2),
    ]
    batch = collate(rollouts)
    gains = IGPO().extras(batch, embedded_policy, budget, SINGLE_PROCESS)["turn_gains"]
    tokenizer, model = embedded_policy.tokenizer, embedded_policy.model
    expected = torch.zeros_like(batch.step_correctness)
    for row, made in enumerate(rollouts):
        history, asked = list(made.prompt_ids), []
        for segment in made.segments:
            if segment.source == "policy":
                frame = [*history, *tokenizer.encode("<think> </think> <answer>")]
                ids = tokenizer.encode(golden)
                with torch.no_grad():
                    logits = model(torch.tensor([[*frame, *ids]])).logits[0]
                logprobs = logits.log_softmax(dim=-1)[len(frame) - 1 : -1]
                judged = [float(row[token]) for row, token in zip(logprobs, ids, strict=True)]
                asked.append(math.exp(sum(judged) / len(judged)))
            history += segment.token_ids
        for turn, (before, after) in enumerate(pairwise(asked)):
            expected[row, turn] = after - before
    assert (expected != 0).sum() == 3
    torch.testing.assert_close(gains, expected, rtol=1e-3, atol=1e-6)


def test_igpo_prepares_what_it_estimates_from_and_the_others_need_nothing() -> None:
    found = told(SEARCHED, ("environment", f"{ONE} {ONE} {TWO}"), ANSWERED)
    missed = replace(told(SEARCHED, ("environment", f"{TWO} {TWO} {TWO}"), ANSWERED), sample=1)
    batch = collate([found, missed])
    policy = Policy(Urn(SIZE), TOKENIZER)
    (better, _), (worse, _) = turns(IGPO(), replace(batch, extras=IGPO().extras(batch, policy, 1000, SINGLE_PROCESS)))
    assert better > worse
    assert not any(type(e)().extras(batch, policy, 1000, SINGLE_PROCESS) for e in ESTIMATORS[:6])


def test_gains_move_with_the_batch() -> None:
    batch = batch_of(GOOD, BAD)
    moved = to_device(batch, torch.device("meta"))
    assert (moved.extras["turn_gains"].device.type, moved.rewards.device.type) == ("meta", "meta")


# What is refused.


def test_igpo_cannot_replay(tmp_path: Path) -> None:
    write_records(tmp_path / "in.jsonl", [rollout_to_json(GOOD), rollout_to_json(BAD)])
    with pytest.raises(ValueError, match=r"IGPO needs the policy's probability .*; train with it .*, or take another"):
        replay([tmp_path / "in.jsonl"], tmp_path / "out.jsonl", ["estimators/igpo"])
    assert not (tmp_path / "out.jsonl").exists()


def test_other_estimators_replay(tmp_path: Path) -> None:
    write_records(tmp_path / "in.jsonl", [rollout_to_json(GOOD), rollout_to_json(BAD)])
    for name in ("dr_grpo", "rloo", "mt_grpo", "gigpo"):
        replay([tmp_path / "in.jsonl"], tmp_path / f"{name}.jsonl", [f"estimators/{name}"])
        assert (tmp_path / f"{name}.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("estimator", [GiGPO, IGPO])
def test_gamma_is_a_discount(estimator: Callable[..., Any], gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma is .*; it must be above 0 and at most 1"):
        estimator(gamma=gamma)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(("estimator", "name"), [(GiGPO, "step_weight"), (MTGRPO, "outcome_weight")])
def test_weights_are_not_negative(estimator: Callable[..., Any], name: str, weight: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be a number of at least 0"):
        estimator(**{name: weight})


# Overlays.

OVERLAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dr_grpo": ("DrGRPO", {}),
    "gigpo": ("GiGPO", {"step_weight": 1.0, "gamma": 0.95, "divide_by_std": True}),
    "igpo": ("IGPO", {"gamma": 1.0, "normalise": "joint"}),
    "mt_grpo": ("MTGRPO", {"outcome_weight": 1.0}),
    "rloo": ("RLOO", {}),
}


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("before", ["base", "estimators/gigpo"])
def test_an_overlay_replaces_the_estimator_with_its_options(name: str, before: str) -> None:
    quiet_environment()
    names = ["quickstart", *([before] if before != "base" and not before.endswith(name) else []), f"estimators/{name}"]
    words_ = [word for config in names for word in ("--config", config)]
    estimator = CalibadvCLI("fit", read_words(words_)).model.estimator
    assert (type(estimator).__name__, vars(estimator)) == OVERLAYS[name]


def test_every_overlay_is_expected_here() -> None:
    assert sorted(OVERLAYS) == sorted(path.stem for path in (configs_folder() / "estimators").glob("*.yaml"))
