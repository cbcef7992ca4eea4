"""Mistakes: one line on standard error, exit status 2, and nothing written."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.fits import SMALL, fit
from support.records import answer, rollout, search
from tokenizers import Tokenizer, decoders
from transformers import AutoModelForCausalLM, GPT2Config

from calibadv.cli.main import main
from calibadv.config.user_errors import user_message
from calibadv.data.questions import read_questions
from calibadv.errors import UserError
from calibadv.runs.folder import RunFolder
from calibadv.runs.rollouts import rollout_to_json

QUICKSTART = ("fit", "--config", "quickstart", *SMALL)
INSTALL = "--trainer.callbacks+=AdvantageCalibration"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of all kinds; run folders would appear in it as runs/."""
    monkeypatch.chdir(tmp_path)
    question = '{"id": 1, "question": "q?", "golden_answers": ["a"]}\n'
    texts = {
        "empty.jsonl": "",
        "list.jsonl": f"{question}\n[1]\n",
        "unanswered.jsonl": question.replace('["a"]', "[]"),
        "ok.jsonl": question,
        "corpus.jsonl": '{"id": "0", "title": "Prague", "text": "Prague is a city."}',
        "text.ckpt": "not a checkpoint",
        "broken.yaml": "model: [",
        "list.yaml": "- model",
        "misspelt.yaml": "model: {polic: x}",
        "first.yaml": "model: {rollout_steps: 3}",
        "empty_model/readme": "",
        "unknown/config.json": '{"model_type": "abacus"}',
        "cut/config.json": '{"model_type": ',
        "calibrator.yaml": "trainer: {callbacks+: [{class_path: AdvantageCalibration, init_args: "
        "{calibrators: [Soft]}}]}",
        "ratio.yaml": "trainer: {callbacks+: [{class_path: AdvantageCalibration, init_args: {calibrators: "
        "[{class_path: AnswerRebalance, init_args: {target: 2}}]}}]}",
        "reward.yaml": "model: {reward: calibadv.rewards.F2}",
        "rollouts.jsonl": json.dumps(rollout_to_json(rollout(search("a"), answer("gold")))),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    return tmp_path


# What is typed behind QUICKSTART, and what the line must say: the value, the limit, the remedy.
OPTIONS: dict[str, tuple[str, str]] = {
    "model folder missing": ("--model.policy nowhere", r"model.policy 'nowhere' is not a folder; give a Hugging Face"),
    "model folder empty": ("--model.policy empty_model", r"'empty_model' has no config.json; give a folder that"),
    "model type unknown": ("--model.policy unknown", r"'unknown' has no config.json that loads \(.*abacus.*\); give a"),
    "model config cut off": ("--model.policy cut", r"'cut' has no config.json that loads \(.*JSON.*\); give a causal"),
    "adapters of rank 0": ("--model.lora.rank 0", r"model.lora.rank is 0; it must be at least 1"),
    "adapters without scale": ("--model.lora.alpha 0", r"model.lora.alpha is 0; it must be at least 1"),
    "adapters of no module": (
        "--model.lora.target_modules nowhere",
        r"model.lora.target_modules is nowhere; name modules to adapt \(",
    ),
    "rollouts shown": ("--rollouts.shown=-1", r"rollouts.shown is -1; it must be at least 0"),
    "questions missing": ("--data.train no.jsonl", r"question file 'no.jsonl' does not exist; give a .jsonl"),
    "questions empty": ("--data.validation empty.jsonl", r"question file 'empty.jsonl' is empty; it must hold"),
    "line of a question": ("--data.train list.jsonl", r"list.jsonl:3 is not a JSON object but list; write one object"),
    "no golden answer": (
        "--data.train unanswered.jsonl",
        r"unanswered.jsonl:1: question '1' has no golden answers; give",
    ),
    "corpus missing": (
        "--model.retriever.corpus no.jsonl",
        r"corpus 'no.jsonl' does not exist; give a JSON-lines file",
    ),
    "calibrator misspelt": (
        f"{INSTALL} --trainer.callbacks.calibrators+=SoftPenalti",
        r"no class is called 'SoftPenalti'; give a known name \(AnswerRebalance, .*SoftPenalty\)",
    ),
    "calibrator misspelt in its module": (
        f"{INSTALL} --trainer.callbacks.calibrators+=calibadv.calibrators.SoftPenalti",
        r"'SoftPenalti' is not in calibadv.calibrators; it has .*SoftPenalty",
    ),
    "class of no module": ("--model.estimator a.b.C", r"model.estimator: 'a.b.C' cannot be imported \(No module named"),
    "engine misspelt": ("--model.engine Transformer", r"'Transformer'; give a known name \(ScriptedEngine, Transform"),
    "option of a class": ("--model.retriever.topk 3", r"option 'topk' is not accepted by BM25; it takes corpus, top_k"),
    "option of a calibrator": (
        "--config calibrators/calibadv --trainer.callbacks.calibrators.target=2",
        r"option 'target' is not accepted by AnswerRebalance; it takes target_ratio",
    ),
    "two overlays": (
        "--config calibrators/calibadv --config calibrators/soft_penalty",
        r"'calibrators/calibadv' and 'calibrators/soft_penalty' each install an AdvantageCalibration; give one",
    ),
    "an overlay and an option": (
        f"--config calibrators/calibadv {INSTALL} --trainer.callbacks.calibrators+=SoftPenalty",
        r"'calibrators/calibadv' and '--trainer.callbacks\+' each install an AdvantageCalibration; give one",
    ),
    "two options": (
        f"{INSTALL} --trainer.callbacks.calibrators+=SoftPenalty {INSTALL}",
        r"each install an AdvantageCalibration; give one overlay",
    ),
    "abbreviation": ("--model.rollout 3", r"--model.rollout is not accepted; did you mean --model.rollout_steps\?"),
    "abbreviated seed": ("--seed 3", r"option --seed is not accepted; did you mean --seed_everything\?"),
    "calibration of lone rollouts": (
        "--config calibrators/calibadv --model.group_size 1",
        r"model.group_size is 1, and SoftPenalty needs the other rollouts of a group; give at least 2",
    ),
    "misspelling": ("--model.groupsize=3", r"--model.groupsize is not accepted; did you mean --model.group_size\?"),
    "misspelling in a file": (
        "--config misspelt.yaml",
        r"option --model.polic is not accepted; did you mean --model.policy\?",
    ),
    "unknown config": (
        "--config quickstar",
        r"config 'quickstar' is neither a file nor a packaged config; did you mean quickstart\?$",
    ),
    "config without value": (
        "--config",
        r"--config has no value; name a packaged config such as quickstart, or a file",
    ),
    "config before an option": ("--config --model.group_size 3", r"--config has no value"),
    "config is no YAML": ("--config broken.yaml", r"config 'broken.yaml' is not YAML: .*line 1"),
    "config is a list": ("--config list.yaml", r"config 'list.yaml' holds list; write 'key: value' lines"),
    "option without value": ("--model.group_size", r"--model.group_size has no value; give it one"),
    "whole number": ("--model.group_size six", r"model.group_size: 'six' is not accepted; it must be a whole number"),
    "number": ("--model.learning_rate fast", r"model.learning_rate: 'fast' is not accepted; it must be a number"),
    "choice": (
        "--model.schedule linear",
        r"model.schedule: 'linear' is not accepted; choose one of 'constant', 'cosine'",
    ),
    "below the limit": ("--model.group_size 0", r"model.group_size is 0; it must be at least 1"),
    "seed of the model": ("--model.seed 3", r"model.seed is set by --seed_everything only; give that"),
    "random seed": ("--seed_everything true", r"seed_everything: '[Tt]rue' is not accepted; it must be a whole number"),
    "budget": ("--model.protocol.max_rollout_tokens 8", r"has \d+ tokens and protocol.max_rollout_tokens is 8; raise"),
    "template": (
        "--model.protocol.template no.txt",
        r"template 'no.txt' is neither 'instruct', 'short' nor a text file",
    ),
    "max_steps": (
        "--trainer.max_steps 3",
        r"trainer.max_steps is 3; it must stay -1: model.rollout_steps says how long",
    ),
    "max_epochs": ("--trainer.max_epochs 1", r"trainer.max_epochs is 1; it must stay -1: model.rollout_steps says"),
    "clipping": (
        "--trainer.gradient_clip_val 1",
        r"trainer.gradient_clip_val is 1.0; it must stay null: model.clip_norm",
    ),
    "scaled gradients": (
        "--trainer.precision 16-mixed",
        r"trainer.precision is 16-mixed; float16 .*: give 32-true, bf16-mixed, bf16-true or 64-true$",
    ),
    "half precision": ("--trainer.precision 16-true", r"trainer.precision is 16-true; .*: give 32-true, bf16-mixed"),
    "precision of an extension": (
        "--trainer.precision transformer-engine",
        r"trainer.precision is transformer-engine: give 32-true, bf16-mixed, bf16-true or 64-true$",
    ),
    "half precision by a plugin": (
        "--trainer.plugins+=lightning.pytorch.plugins.HalfPrecision --trainer.plugins.precision=16-true",
        r"trainer.precision is 16-true; .*: give 32-true",
    ),
    "updates that would be rounded away": (
        "--trainer.precision bf16-true --model.learning_rate 9e-5",
        r"bf16-true and model.learning_rate is 9e-05: .*; give bf16-mixed, model.lora, or a rate of at least 0.0001$",
    ),
    "least epochs": ("--trainer.min_epochs 1", r"trainer.min_epochs is 1; it must stay null: the run would go on"),
    "least steps": ("--trainer.min_steps 8", r"trainer.min_steps is 8; it must stay null: the run would go on"),
    "dry run": ("--trainer.fast_dev_run true", r"fast_dev_run is True; it must stay false: .* set model.rollout_steps"),
    "bare bones": ("--trainer.barebones true", r"trainer.barebones is True; it must stay false: it would drop"),
    "overfitting": (
        "--trainer.overfit_batches 1",
        r"trainer.overfit_batches is 1; it must stay 0: it would repeat .*; give a small data.train file",
    ),
    "sanity check": ("--trainer.num_sanity_val_steps 1", r"num_sanity_val_steps is 1; it must stay 0: the policy is"),
    "clipping by value": (
        "--trainer.gradient_clip_algorithm value",
        r"gradient_clip_algorithm is value; it must stay null: model.clip_norm clips",
    ),
    "no batches": (
        "--trainer.limit_train_batches 0",
        r"limit_train_batches is 0.0; .* whole number from 1 on, or null: set model.rollout_steps",
    ),
    "share of batches": ("--trainer.limit_train_batches 0.5", r"limit_train_batches is 0.5; the training questions"),
    "no time": ("--trainer.max_time 00:00:00:00", r"trainer.max_time is 00:00:00:00; it must be longer, or null"),
    "interval": (
        "--trainer.val_check_interval 0.5",
        r"val_check_interval is 0.5; it counts rollout steps, and must be a",
    ),
    "device": ("--trainer.accelerator abacus", r"trainer: .*abacus"),
    "last without a name": ("--ckpt_path last", r"--ckpt_path last: name the run to resume with --run.name"),
    "last without a checkpoint": (
        "--run.name r --ckpt_path last",
        r"there is no checkpoint in runs/r/checkpoints; name",
    ),
    "checkpoint missing": ("--ckpt_path no.ckpt", r"--ckpt_path no.ckpt is not a file; give a checkpoint, or 'last'"),
    "checkpoint is a text": (
        "--ckpt_path text.ckpt",
        r"text.ckpt is not a checkpoint of a calibadv run, or is damaged \(it is no whole .*; give a file of",
    ),
    "checkpoint of others": (
        "--ckpt_path foreign.ckpt",
        r"foreign.ckpt is not a checkpoint .* \(it has no 'pyt.*; give",
    ),
    "run root is a file": (
        "--run.root ok.jsonl",
        r"run folder 'ok.jsonl/.*ok.jsonl cannot be written to; choose another",
    ),
}
# Whole command lines.
COMMANDS: dict[str, tuple[str, str]] = {
    "no such command": (
        "fitt",
        r"there is no command 'fitt'; choose one of fit, sft, validate, test, predict, prompt, study, plan, index, ",
    ),
    "no config": (
        "fit",
        r"--model.policy VALUE is missing; give it, or a --config that does$",
    ),
    "no corpus": (
        "fit --config local --model.policy embedded",
        r"BM25 has nothing to search; give corpus",
    ),
    "no training questions": (
        "fit --config local --model.policy embedded --model.retriever.corpus corpus.jsonl",
        r"data.train is not set; give a question file",
    ),
    "no policy": (
        "fit --config local --model.retriever.corpus ok.jsonl",
        r"^[^;]*: --model.policy VALUE is missing; give it",
    ),
    "config without --config": (
        "fit quickstart",
        r"'quickstart' belongs to no option; a config needs --config before it",
    ),
    "overlay first": (
        "fit --config calibrators/calibadv --config quickstart",
        r"'calibrators/calibadv' has no effect: .*; leave it out, or put it after 'quickstart'",
    ),
    "overlay of a class that a later one replaces": (
        "fit --config quickstart --config losses/dual_clip --config losses/cispo",
        r"'losses/dual_clip' has no effect: .*; leave it out, or put it after 'losses/cispo'",
    ),
    "option of the last callback": (
        "fit --config quickstart --config callbacks/collapse_guard --config calibrators/calibadv "
        "--trainer.callbacks.limits.score_drop 0.1",
        r"sets an option of the last callback, which is AdvantageCalibration and takes calibrators; put",
    ),
    "wrong option of the last callback": (
        "fit --config quickstart --config callbacks/collapse_guard --trainer.callbacks.action halt",
        r"trainer.callbacks.action: 'halt' is not accepted; choose one of 'warn', 'stop', 'rollback'$",
    ),
    "option of no callback": (
        "fit --config quickstart --trainer.callbacks.action stop",
        r"sets an option of the last callback, and there is none; put the overlay of one before it",
    ),
    "option before the config that sets it": (
        "fit --config quickstart --model.rollout_steps 2 --config first.yaml",
        r"'--model.rollout_steps' has no effect: .*; leave it out, or put it after 'first.yaml'",
    ),
    "validate of no checkpoint": ("validate --config quickstart --ckpt_path no.ckpt", r"no.ckpt is not a file"),
    "replay of no file": ("replay --rollouts no.jsonl --out o.jsonl", r"rollout file 'no.jsonl' does not exist; give"),
    "replay of arms into a file": (
        "replay rollouts.jsonl --arm grpo --out ok.jsonl",
        r"out 'ok.jsonl' is a file, and with --arm it must be a folder; give another --out$",
    ),
    "replay abbreviated": ("replay --roll ok.jsonl --out o", r"--roll is not accepted; did you mean --rollouts\?"),
    "replay with a calibrator misspelt": (
        "replay --rollouts rollouts.jsonl --out o --config calibrator.yaml",
        r"no class is called 'Soft'; give a known name \(AnswerRebalance, .*SoftPenalty\)",
    ),
    "replay with a reward misspelt": (
        "replay --rollouts rollouts.jsonl --out o --config reward.yaml",
        r"model.reward: 'F2' is not in calibadv.rewards; it has .*F1",
    ),
    "replay with an option of a calibrator": (
        "replay --rollouts rollouts.jsonl --out o --config ratio.yaml",
        r"option 'target' is not accepted by AnswerRebalance; it takes target_ratio",
    ),
    "replay into a folder": (
        "replay --rollouts rollouts.jsonl --out empty_model",
        r"out 'empty_model' cannot be written \(Is a directory\); give another --out",
    ),
    "replay below a file": (
        "replay --rollouts rollouts.jsonl --out ok.jsonl/o",
        r"out 'ok.jsonl/o' cannot be written \(.*\); give another --out",
    ),
    "world below a file": ("world export --out ok.jsonl/o", r"out 'ok.jsonl/o' cannot be written \(.*\); give another"),
    "replay with no config": ("replay --rollouts ok.jsonl --out o --config", r"--config has no value"),
    "world without command": ("world", r"the command is missing; choose export or policy"),
    "world with another": ("world exprt", r"there is no command 'exprt'; choose one of 'export', 'policy'"),
    "world without out": ("world export", r"--out VALUE is missing$"),
    "world abbreviated": ("world export --ou o", r"--ou is not accepted; did you mean --out\?"),
    "world into a folder": ("world export --out empty_model", r"out 'empty_model' exists and is not an empty folder"),
}


def check(words: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("calibadv: error: ")
    assert output.err.count("\n") == 1
    assert re.search(line, output.err.rstrip("\n")), output.err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("words", "line"), OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_option(words: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check([*QUICKSTART, *words.split()], line, here, capsys)


@pytest.mark.parametrize(("words", "line"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command(words: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(words.split(), line, here, capsys)


def test_a_tokenizer_that_does_not_return_the_tags(
    llama_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(llama_folder, here / "lossy"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("<", "")])
    tokenizer.save(str(folder / "tokenizer.json"))
    line = r"the tokenizer \(\w+\) does not return <think> as it was written.*; add the 8 tags to its vocabulary"
    check([*QUICKSTART, "--model.policy", str(folder)], line, here, capsys)


def test_a_run_name_that_exists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(here / "runs" / "mine")
    folder.checkpoints.mkdir(parents=True)
    folder.config(None).write_text("")
    words = [*QUICKSTART, "--run.name", "mine"]
    check(
        words,
        r"runs/mine holds a run already; it has no checkpoint: start it again with '.* --ckpt_path auto', or choose",
        here,
        capsys,
    )
    folder.last.write_text("")
    command = "calibadv fit --config runs/mine/config.yaml --run.name mine --ckpt_path last"
    resume = rf"runs/mine holds a run already; resume it with '{command}', or"
    check(words, resume, here, capsys)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_untrained_policy_in_the_folder_of_a_run(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(here / "runs" / "mine")
    folder.path.mkdir(parents=True)
    folder.config(None).write_text("")
    line = rf"runs/mine holds a run, and without a checkpoint {verb} evaluates .*; add --ckpt_path last, or choose"
    check([verb, "--config", "quickstart", "--run.name", "mine"], line, here, capsys)


def test_a_model_without_weights(llama_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(llama_folder, here / "model"))
    weights = folder / "model.safetensors"
    for text, reason in ((b"cut off", ".*"), (None, ".*no file named.*")):
        weights.unlink() if text is None else weights.write_bytes(text)
        line = rf"model.policy '.*model' has no model that loads \({reason}\); save a causal language model into it"
        check([*QUICKSTART, "--model.policy", str(folder)], line, here, capsys)


def test_a_model_with_the_tokenizer_of_another(
    llama_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(llama_folder, here / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)
    line = (
        r"model.policy '.*model' has a tokenizer of \d{3} tokens and a model with 100; .*: save both of one model into"
    )
    check([*QUICKSTART, "--model.policy", str(folder)], line, here, capsys)


def test_a_model_with_fewer_positions_than_a_rollout_may_have(
    llama_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(llama_folder, here / "model"))
    AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2, n_positions=100)
    ).save_pretrained(folder)
    line = r"the policy has 100 positions and protocol.max_rollout_tokens is 512; lower the limit"
    check([*QUICKSTART, "--model.policy", str(folder)], line, here, capsys)


def test_vllm_that_is_not_installed_or_made_for_less(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*QUICKSTART, "--config", "engines/vllm"]
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not there
    check(words, r"VLLMEngine needs vLLM, which is not installed; run: pip install 'calibadv\[vllm\]'", here, capsys)
    monkeypatch.setattr("calibadv.engines.vllm.find_spec", lambda name: name)  # as if it were
    line = r"VLLMEngine takes at most 100 tokens \(max_model_len\) and protocol.max_rollout_tokens is 512; raise"
    check([*words, "--model.engine.max_model_len", "100"], line, here, capsys)


def test_a_vllm_server_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICKSTART, "--config", "engines/vllm_server", "--model.engine.url", "http://127.0.0.1:9"]
    check(words, r"the vLLM server at http://127.0.0.1:9/v1/models does not answer .*; is it up\?", here, capsys)


def test_a_group_of_one_is_warned_of_and_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fit(tmp_path, "run", "--model.rollout_steps", "1", "--model.group_size", "1") == 0
    (warning,) = [record.getMessage() for record in caplog.records if "group_size" in record.getMessage()]
    assert warning.startswith("model.group_size is 1: the rollouts of a question are compared")


def test_only_errors_for_users_are_shown_in_one_line() -> None:
    with pytest.raises(UserError, match="the list of question files is empty") as ours:
        read_questions([])
    with pytest.raises(TypeError, match="not iterable") as bug:
        read_questions(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="invalid literal") as python:
        int("x")
    assert [user_message(error.value) for error in (ours, bug, python)] == [str(ours.value), None, None]
    python.value.__cause__ = ours.value  # as jsonargparse does, where a value fits none of several types
    assert user_message(python.value) == str(ours.value)


def test_an_error_of_the_network_is_not_one_of_the_disk() -> None:
    assert user_message(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None
    assert user_message(OSError(errno.EIO, "Input/output error")) == (
        "a file cannot be written or read: Input/output error; check the disk, or choose another folder"
    )
