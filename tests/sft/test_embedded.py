"""The warm start of the tiny policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibadv.errors import UserError
from calibadv.sft.embedded import policy, rate_factor
from calibadv.world.tokenizer import build_tokenizer


def test_warm_start_writes_a_model_folder(tmp_path: Path) -> None:
    policy(tmp_path / "policy", seed=1, clean_steps=1, noisy_steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy", local_files_only=True)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_learning_rate_schedule() -> None:
    # 30 steps up, flat until step 270 of 900, then linear: half-way at step 585, 1 - 0.97 / 2 = 0.515.
    assert [rate_factor(step, 900) for step in (0, 29, 270, 585)] == pytest.approx([1 / 30, 1.0, 1.0, 0.515])
    assert rate_factor(900, 900) == pytest.approx(0.03)


def test_negative_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="noisy_steps is -1"):
        policy(tmp_path, noisy_steps=-1)
