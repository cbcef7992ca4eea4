from __future__ import annotations

import pytest
import torch

from calibadv.numerics.masked import check_shapes, group_sum, turn_means


def test_check_shapes_names_the_tensor_that_differs() -> None:
    check_shapes("B T, B, B K", torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"tensor 1 of \[B T, B\] has shape \[3\]; known sizes are .*'B': 2"):
        check_shapes("B T, B", torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"tensor 0 of \[N\] has shape \[2, 3\]"):
        check_shapes("N", torch.zeros(2, 3))


def test_group_sum() -> None:
    assert group_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1])).tolist() == [2.0, 5.0]


def test_turn_means_skip_tokens_of_no_turn() -> None:
    values = torch.tensor([[9.0, 1.0, 3.0, 9.0, 5.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    turns = torch.tensor([[-1, 0, 0, -1, 2], [-1, -1, -1, -1, -1]])
    # turn 0: (1 + 3) / 2; turn 1 has no token; turn 2: 5
    assert turn_means(values, turns, num_turns=3).tolist() == [[2.0, 0.0, 5.0], [0.0, 0.0, 0.0]]
