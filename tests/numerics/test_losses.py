from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from calibadv.batch import LossInputs
from calibadv.losses import PPOClip
from calibadv.numerics.losses import active_clips, clipped_surrogate

RATIO = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])


def test_clipped_surrogate_by_hand() -> None:
    # min(1.5, 1.2); min(-1.5, -1.2); min(0.5, 0.8); min(-0.5, -0.8); 1.1 x 2
    surrogate = clipped_surrogate(RATIO, ADVANTAGES, clip_low=0.2, clip_high=0.2)
    assert_close(surrogate, torch.tensor([1.2, -1.5, 0.5, -0.8, 2.2]))


def test_active_clips_are_where_the_clipped_term_is_the_smaller_one() -> None:
    low, high = active_clips(RATIO, ADVANTAGES, clip_low=0.2, clip_high=0.2)
    assert low.tolist() == [False, False, False, True, False]
    assert high.tolist() == [True, False, False, False, False]


def test_the_two_sides_clip_apart() -> None:
    # DAPO's 0.2 / 0.28: 1.25 is not clipped, 0.75 is
    low, high = active_clips(torch.tensor([1.25, 0.75]), torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.28)
    assert (low.tolist(), high.tolist()) == ([False, True], [False, False])


def ppo_inputs(logprobs: torch.Tensor, rows: slice, denominator: float) -> LossInputs:
    ids = torch.arange(5)[rows]  # rollouts of one token
    return LossInputs(logprobs[rows], torch.zeros(5)[rows], None, ADVANTAGES[rows], denominator, ids, 0 * ids, 5)


def test_ppo_clip_loss_metrics_and_gradient() -> None:
    logprobs = RATIO.log().requires_grad_()
    loss, metrics = PPOClip().compute(ppo_inputs(logprobs, slice(None), 10.0))
    loss.backward()
    # -(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 10; the gradient of a token is -r A / 10 unless it is clipped
    assert loss.item() == pytest.approx(-0.16)
    assert_close(logprobs.grad, torch.tensor([0.0, 0.15, -0.05, 0.0, -0.22]))
    assert metrics == pytest.approx({"clip_low": 0.1, "clip_high": 0.1})


def test_ppo_clip_adds_up_over_micro_batches() -> None:
    logprobs = RATIO.log()
    whole, metrics = PPOClip().compute(ppo_inputs(logprobs, slice(None), 5.0))
    parts = [PPOClip().compute(ppo_inputs(logprobs, rows, 5.0)) for rows in (slice(0, 2), slice(2, 5))]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item())
    for name, value in metrics.items():
        assert sum(part[name] for _, part in parts) == pytest.approx(value)


@pytest.mark.parametrize("arguments", [{"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": -0.1}])
def test_ppo_clip_refuses_ranges_without_meaning(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"clip_(low|high) is .*; it must"):
        PPOClip(**arguments)
