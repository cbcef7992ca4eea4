from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.agents import Bigram, episode
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config

from calibadv.batch import RolloutBatch, collate
from calibadv.policy.loading import load_policy
from calibadv.policy.logprobs import forward_logprobs
from calibadv.policy.lora import Lora

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)

# After token 0: 3/4 for 0 and 1/4 for 1; after token 1: 1/2 each.
TABLE = torch.tensor([[LN3, 0.0], [0.0, 0.0]])


def some_batch(vocabulary: int) -> RolloutBatch:
    """Rollouts of 20 and 9 tokens, 16 of which are trained."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (40,), generator=draw).tolist()
    return collate([episode(ids[:3], ids[3:9], ids[9:15], ids[15:20]), episode(ids[20:24], ids[24:29])])


def by_full_logits(model: nn.Module, batch: RolloutBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """The same by the book, row by row and unpadded: log-softmax of all logits."""
    logprobs, entropies = [], []
    for row in range(len(batch.rollouts)):
        length = int(batch.attention_mask[row].sum())
        ids = batch.token_ids[row : row + 1, :length]
        table = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, dim=-1)
        for place in batch.loss_mask[row].nonzero().flatten().tolist():
            logprobs.append(table[place - 1, ids[0, place]])
            entropies.append(-(table[place - 1].exp() * table[place - 1]).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def test_by_hand() -> None:
    batch = collate([episode((0,), (1, 0), (1,), (1,)), episode((1, 0), (0,))])
    with torch.no_grad():
        logprobs, entropies = forward_logprobs(Bigram(TABLE), batch, [1, 0], temperature=1.0)
    # Row 1 trains its last token, 0 after 0; row 0 the tokens 1 after 0, 0 after 1 and 1 after the observation's 1.
    torch.testing.assert_close(logprobs, torch.tensor([LN3 - LN4, -LN4, -LN2, -LN2]))
    three_to_one = LN4 - 0.75 * LN3  # 3/4 (ln 4 - ln 3) + 1/4 ln 4
    torch.testing.assert_close(entropies, torch.tensor([three_to_one, three_to_one, LN2, LN2]))


def test_logits_in_bfloat16_are_divided_in_float32() -> None:
    """1.0 / 0.7 is 1.4286, and 1.4297 in bfloat16."""
    batch = collate([episode((0,), (1, 0))])
    table = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    with torch.no_grad():
        logprobs, entropies = forward_logprobs(Bigram(table), batch, [0], temperature=0.7)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs, torch.tensor([-math.log1p(math.exp(1 / 0.7)), -LN2]))


@pytest.mark.parametrize("folder", ["qwen2_folder", "qwen3_folder", "llama_folder"])
@pytest.mark.parametrize("adapters", [False, True])
def test_equals_all_logits_at_once(folder: str, adapters: bool, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder)
    model = load_policy(str(path), Lora(rank=2) if adapters else None).model
    batch = some_batch(200)
    with torch.no_grad():
        found = forward_logprobs(model, batch, [0, 1], 0.7)
        expected = by_full_logits(model, batch, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_soft_cap_behind_the_head_is_kept() -> None:
    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=50, intermediate_size=16, final_logit_softcapping=0.5, **size)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)  # so that the cap bites
        found = forward_logprobs(model, some_batch(50), [0, 1], 1.0)
        expected = by_full_logits(model, some_batch(50), 1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("logits_at_once", [1, 2_000, 10**9])
def test_parts_change_neither_values_nor_gradients(qwen2_folder: Path, logits_at_once: int) -> None:
    policy = load_policy(str(qwen2_folder))
    batch, model = some_batch(200), policy.model
    expected, _ = by_full_logits(model, batch, 1.0)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found, _ = forward_logprobs(model, batch, [0, 1], 1.0, logits_at_once)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(gradients) > 10
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_no_more_logits_are_held_than_asked_for(qwen2_folder: Path) -> None:
    model = load_policy(str(qwen2_folder)).model
    head = model.get_output_embeddings()
    held: list[int] = []
    with head.register_forward_hook(lambda _, __, logits: held.append(logits.numel())):
        forward_logprobs(model, some_batch(200), [0, 1], 1.0, logits_at_once=3 * head.weight.shape[0])
    # Two rows' first tokens, as the model calls its head (twice, to compare); then 16 tokens, three at a time.
    assert [numel // head.weight.shape[0] for numel in held] == [2, 2, 3, 3, 3, 3, 3, 1]
