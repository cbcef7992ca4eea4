from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.agents import ANSWER, SEARCH, agent_of, play, protocol, scripted_agent
from support.models import byte_level_folder
from tokenizers import Tokenizer, decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from calibadv.batch import RolloutBatch, collate
from calibadv.engines import TransformersEngine
from calibadv.numerics.kl import k3
from calibadv.policy.loading import load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.policy.reference import Reference, make_reference
from calibadv.policy.tokenizer import TAGS
from calibadv.training.logprobs import compute_logprobs

LORA = Lora(rank=2, alpha=4)


def batch_of(policy: Policy) -> RolloutBatch:
    agent = scripted_agent(policy.tokenizer, {"a": [[SEARCH, ANSWER], ["so"]]})
    return collate(play(agent, "a", samples=2))


def logprobs(model: torch.nn.Module, batch: RolloutBatch) -> torch.Tensor:
    return compute_logprobs(model, batch, token_budget=10_000, temperature=1.0).logprobs


def take_steps(policy: Policy, batch: RolloutBatch, steps: int = 3) -> None:
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.model(input_ids=batch.token_ids, labels=batch.token_ids).loss.backward()
        optimizer.step()


# Folders.


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.mark.parametrize("name", ["qwen2_folder", "qwen3_folder", "llama_folder", "newline_folder", "no_pad_folder"])
def test_ordinary_folders_are_loaded_as_they_are(
    name: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    path = request.getfixturevalue(name)
    policy = load_policy(str(path))
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert {key: value.shape for key, value in policy.model.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), expected.parameters(), strict=True))
    assert policy.tokenizer.decode(policy.tokenizer.encode(SEARCH)) == SEARCH
    assert not caplog.records
    sampled = play(agent_of(policy, TransformersEngine(), max_turn_tokens=4), "a", samples=3)
    assert max(rollout.segments[0].num_tokens for rollout in sampled) == 4


def test_the_embedded_policy_is_loaded(embedded_policy: Policy) -> None:
    prompt = protocol().prompt_ids("what is the capital of the country ?", embedded_policy.tokenizer)
    assert embedded_policy.tokenizer.decode(embedded_policy.tokenizer.encode(SEARCH)).split()[0] == "<think>"
    assert max(prompt) < embedded_policy.model.get_input_embeddings().num_embeddings


def test_half_precision_is_trained_in_float32(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in load_policy(str(folder)).model.parameters()} == {torch.float32}


def test_nothing_of_the_generation_config_is_left(opinionated_folder: Path) -> None:
    settings = load_policy(str(opinionated_folder)).model.generation_config
    assert (settings.repetition_penalty, settings.top_p, settings.top_k) == (None, None, None)


@pytest.mark.parametrize("value", [2, [0, 2, 3]])
def test_end_ids_of_the_generation_config_count_too(folder: Path, value: int | list[int]) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=value)
    assert load_policy(str(folder)).tokenizer.end_ids == {0} | ({value} if isinstance(value, int) else set(value))


def test_dropout_is_switched_off(folder: Path) -> None:
    edit_json(folder / "config.json", attention_dropout=0.5)
    policy = load_policy(str(folder))
    assert policy.model.training
    batch = batch_of(policy)
    assert torch.equal(logprobs(policy.model, batch), logprobs(policy.model, batch))
    assert torch.equal(logprobs(policy.model, batch), logprobs(copy.deepcopy(policy.model).eval(), batch))
    # The same folder without our loader does drop.
    plain = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(logprobs(plain, batch), logprobs(plain, batch))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("nowhere", None, "'.*nowhere' is not a folder; give a Hugging Face model folder, or 'embedded'"),
        ("model", "config.json", "'.*model' has no config.json; give a folder that save_pretrained wrote"),
        ("model", "tokenizer*", "'.*model' has no tokenizer that loads .*; save one into it"),
    ],
)
def test_folders_that_hold_no_policy(folder: Path, name: str, file: str | None, message: str) -> None:
    for found in folder.glob(file) if file else ():
        found.unlink()
    with pytest.raises(ValueError, match=message) as error:
        load_policy(str(folder.parent / name))
    assert "\n" not in str(error.value)


# Tags.


def test_wordpiece_gets_the_tags_and_rows_for_them(wordpiece: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = AutoModelForCausalLM.from_pretrained(wordpiece).get_input_embeddings().weight
    with caplog.at_level(logging.WARNING, "calibadv"):
        policy = load_policy(str(wordpiece))
    (record,) = caplog.records
    assert "BertTokenizer" in record.message
    assert "</answer>" in record.message
    assert f"resized the embedding to {len(plain) + len(TAGS)} rows" in record.message
    weight = policy.model.get_input_embeddings().weight
    assert torch.equal(weight[: len(plain)], plain)
    assert len(policy.model.get_output_embeddings().weight) == len(weight) == len(plain) + len(TAGS)
    tokenizer = policy.tokenizer
    assert [tokenizer.decode([i]) for i in tokenizer.encode("".join(TAGS))] == list(TAGS)
    assert play(scripted_agent(tokenizer, {"a": [[SEARCH, ANSWER]]}), "a")[0].format_valid


def test_new_rows_do_not_depend_on_the_seed_of_the_run(wordpiece: Path) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(load_policy(str(wordpiece)).model.get_input_embeddings().weight)
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))  # and loading leaves the generator as it was
    assert torch.equal(*weights)


def test_adapters_do_not_depend_on_the_seed_of_the_run(llama_folder: Path) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = load_policy(str(llama_folder), LORA).model.state_dict()
        weights.append(torch.cat([value.flatten() for name, value in state.items() if ".lora_A" in name]))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))
    assert weights[0].any()
    assert torch.equal(*weights)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapters_of_a_tied_layer_are_refused(module: str, llama_folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"target_modules is \['q_proj', '{module}'\], and the policy ties its"):
        load_policy(str(llama_folder), Lora(rank=2, target_modules=["q_proj", module]))


def test_a_folder_whose_tokenizer_cannot_return_the_tags(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("<", "(")])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    name = type(AutoTokenizer.from_pretrained(folder)).__name__
    with pytest.raises(ValueError, match=rf"the tokenizer \({name}\) does not return <think> .* save it") as error:
        load_policy(str(folder))
    assert "\n" not in str(error.value)


# Reference and adapters.


def test_the_reference_is_the_policy_before_training(llama_folder: Path) -> None:
    policy = load_policy(str(llama_folder))
    reference = make_reference(policy, None)
    batch = batch_of(policy)
    before = logprobs(policy.model, batch)
    with reference.model(policy.model) as model:
        assert not k3(before[batch.loss_mask], logprobs(model, batch)[batch.loss_mask]).any()
    take_steps(policy, batch)
    after = logprobs(policy.model, batch)
    with reference.model(policy.model) as model:
        assert torch.equal(logprobs(model, batch), before)
    assert not torch.allclose(after, before, atol=0.1)


def test_the_frozen_copy_is_in_no_state_dict(llama_folder: Path) -> None:
    policy = load_policy(str(llama_folder))

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = policy.model
            self.reference = make_reference(policy, None)

    module = Module()
    assert set(module.state_dict()) == {f"model.{name}" for name in policy.model.state_dict()}
    assert not any(parameter.requires_grad for parameter in module.reference.frozen[0].parameters())


def test_checksum_tells_references_apart(llama_folder: Path, qwen2_folder: Path) -> None:
    first, again, other = (
        make_reference(load_policy(str(f)), None) for f in (llama_folder, llama_folder, qwen2_folder)
    )
    assert first.digest == again.digest != other.digest
    assert Reference().digest == ""


@pytest.fixture
def adapted(llama_folder: Path) -> Policy:
    return load_policy(str(llama_folder), LORA)


def test_only_adapters_are_trained(adapted: Policy) -> None:
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapted.model.named_parameters() if ".lora_" in name}
    before = {name: parameter.clone() for name, parameter in adapted.model.named_parameters()}
    take_steps(adapted, batch_of(adapted))
    changed = {name for name, parameter in adapted.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained


def test_the_reference_of_adapters_is_the_base_model(adapted: Policy, llama_folder: Path) -> None:
    batch, reference = batch_of(adapted), make_reference(adapted, LORA)
    base = logprobs(load_policy(str(llama_folder)).model, batch)
    assert torch.equal(logprobs(adapted.model, batch), base)  # fresh adapters add nothing: the KL is 0
    take_steps(adapted, batch)
    with reference.model(adapted.model) as model:
        assert torch.equal(logprobs(model, batch), base)
    assert not torch.allclose(logprobs(adapted.model, batch), base, atol=0.1)  # and they are on again
    assert reference.frozen == []


def test_adapters_are_sampled_from(adapted: Policy) -> None:
    agent = agent_of(adapted, TransformersEngine(), max_turn_tokens=8)
    take_steps(adapted, batch_of(adapted))
    (rollout,) = play(agent, "a")
    batch = collate([replace(rollout, score=1.0)])
    mask = batch.loss_mask
    torch.testing.assert_close(batch.sampled_logprobs[mask], logprobs(adapted.model, batch)[mask], atol=1e-5, rtol=0)


def test_weights_for_an_engine_have_the_adapters_in_them(adapted: Policy, llama_folder: Path) -> None:
    take_steps(adapted, batch_of(adapted))
    plain = load_policy(str(llama_folder)).model
    plain.load_state_dict(dict(adapted.weights()))  # the tied output layer under its own name too
    token_ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(token_ids).logits, adapted.model(token_ids).logits, atol=1e-5, rtol=1e-5)


def test_adapters_can_be_put_on_some_modules(llama_folder: Path) -> None:
    policy = load_policy(str(llama_folder), Lora(rank=2, alpha=2, target_modules=["q_proj"]))
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4  # two matrices in each of two layers
    assert all("q_proj" in name for name in trained)


def test_no_dropout_in_adapters(adapted: Policy) -> None:
    batch = batch_of(adapted)
    take_steps(adapted, batch)
    adapted.model.train()
    assert torch.equal(logprobs(adapted.model, batch), logprobs(adapted.model, batch))


def test_a_tokenizer_larger_than_the_embedding_gets_rows(tmp_path: Path) -> None:
    path = byte_level_folder(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(path)
    assert load_policy(str(path)).model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(llama_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, model.norm.weight among them; save the whole model"):
        load_policy(str(folder))
