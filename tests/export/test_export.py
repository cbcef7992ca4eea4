"""A trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from support.fits import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibadv.cli.main import main
from calibadv.export import load_agent
from calibadv.module import SearchAgentModule
from calibadv.runs.folder import RunFolder
from calibadv.world import policy_folder

LORA = ("--model.lora.rank", "4", "--model.learning_rate", "0.01")
WORDS = ("--model.rollout_steps", "2", "--checkpoint.every_n_rollout_steps", "1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert fit(root, "full", *WORDS) == 0
    assert fit(root, "lora", *WORDS, *LORA) == 0
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(1, 40)[None]).logits
    return found


def greedy(model: Any, tokenizer: Any) -> list[int]:
    prompt = tokenizer("Question : what is the capital of Oslo ? <think>", return_tensors="pt")
    ids: list[int] = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    return ids


def trained(run: Path) -> Any:
    """The model of a run's last checkpoint."""
    return SearchAgentModule.load_from_checkpoint(RunFolder(run).last).model


def test_full_weights_are_bit_equal(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "full"), "--out", str(tmp_path / "agent")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent", dtype=torch.float32)
    assert torch.equal(logits(model), logits(trained(runs / "full")))
    before = AutoModelForCausalLM.from_pretrained(policy_folder(), dtype=torch.float32)
    assert not torch.equal(logits(model), logits(before))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "agent")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    settings = yaml.safe_load((tmp_path / "agent" / "calibadv.yaml").read_text())
    assert settings["protocol"]["init_args"]["max_turn_tokens"] == 36
    assert settings["top_k"] == 2
    card = (tmp_path / "agent" / "README.md").read_text()
    assert "| 2 | 0." in card  # the last validation
    again = load_agent(tmp_path / "agent")
    assert again.protocol == load_agent(runs / "full").protocol
    assert fit(tmp_path, "next", "--model.policy", tmp_path / "agent", "--model.rollout_steps", "1") == 0


def test_merged_adapters_answer_as_the_checkpoint(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "lora"), "--out", str(tmp_path / "agent")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent", dtype=torch.float32)
    assert not any("lora" in name for name, _ in model.named_parameters())
    expected = trained(runs / "lora")
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "agent")
    assert greedy(model, tokenizer) == greedy(expected, tokenizer)


def test_adapters_alone_are_those_of_peft(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "lora"), "--out", str(tmp_path / "adapters"), "--adapter"]) == 0
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(trained(runs / "lora")), atol=1e-5, rtol=0)


def test_one_checkpoint_of_a_run(runs: Path, tmp_path: Path) -> None:
    checkpoint = RunFolder(runs / "full").checkpoint(1)
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "agent")]) == 0
    card = (tmp_path / "agent" / "README.md").read_text()
    assert "weights after 1 steps" in card
    assert "| 2 | " not in card


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{runs}/full", "--out", "{tmp}/full"], "exists and is not an empty folder"),
        (["{runs}/full", "--out", "{tmp}/x", "--adapter"], "has no adapters, since model.lora was not set"),
        (["{runs}/none", "--out", "{tmp}/x"], "does not exist; give the folder of a run, a checkpoint"),
        (["{tmp}", "--out", "{tmp}/x"], "holds no checkpoint and no model"),
        (["{runs}/full", "--out", "{tmp}/x", "--policy", "{tmp}"], "has no config.json"),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert main(["export", *(word.format(runs=runs, tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_another_architecture(
    runs: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(runs / "full"), "--out", str(tmp_path / "x"), "--policy", str(llama_folder)]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert "and the policy has" in error
    assert error.count("\n") == 1
