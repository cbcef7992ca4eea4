from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from encoders import bert_folder, word_folder
from fits import fit

from calibadv.callbacks import AdvantageCalibration
from calibadv.cli.configs import config_name, configs_folder, read_words
from calibadv.cli.lightning import CalibadvCLI
from calibadv.cli.quiet import quiet_environment
from calibadv.rollout_files import read_records

# Every packaged config, and the calibrators that the recipe installs: none is plain GRPO.
CALIBRATORS: dict[str, list[tuple[str, dict[str, float]]]] = {
    "base": [],
    "quickstart": [],
    "local": [],
    "protocols/no_prepend": [],
    "calibrators/soft_penalty": [("SoftPenalty", {})],
    "calibrators/answer_rebalance": [("AnswerRebalance", {"target_ratio": 1.0})],
    "calibrators/calibadv": [("SoftPenalty", {}), ("AnswerRebalance", {"target_ratio": 1.0})],
    "calibrators/calibadv_lambda_1_5": [("SoftPenalty", {}), ("AnswerRebalance", {"target_ratio": 1.5})],
}
# What an overlay needs that a test does not have (a model of the hub, files, a service) is set beside it.
RETRIEVERS: dict[str, tuple[str, dict[str, str]]] = {
    "retrievers/bm25": ("BM25", {}),
    "retrievers/cached": ("Cached", {}),
    "retrievers/dense": ("Dense", {"encoder": "encoder"}),
    "retrievers/hybrid": ("Hybrid", {}),
    "retrievers/remote": ("Remote", {}),
    "retrievers/reranked": ("Reranked", {"model": "cross-encoder"}),
    "retrievers/search_r1": ("Dense", {"index": "flat.index", "corpus": "corpus.jsonl", "encoder": "encoder"}),
}
ENGINES = {"engines/vllm": "VLLMEngine", "engines/vllm_server": "VLLMServerEngine"}
CLUSTER = {
    "cluster/ddp": "DDPStrategy",
    "cluster/fsdp": "ModelParallelStrategy",
    "cluster/qwen2_5_3b": "ModelParallelStrategy",
    "cluster/qwen2_5_7b": "ModelParallelStrategy",
}
OURS = ["RunStart", "RolloutWriter", "Results", "RolloutCheckpoint", "Progress"]
PATHS = sorted(configs_folder().rglob("*.yaml"))


def build(*words: str) -> CalibadvCLI:
    quiet_environment()
    return CalibadvCLI("fit", read_words(words), run=False)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """A corpus and questions of one's own, as options."""
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text('{"id": "0", "contents": "\\"Prague\\"\\nPrague is a city."}\n')
    questions.write_text('{"id": "a", "question": "Which city?", "golden_answers": ["Prague"]}\n')
    files = {"model.retriever.corpus": corpus, "data.train": questions, "data.validation": questions}
    return [f"--{name}={path}" for name, path in files.items()]


def test_every_config_is_expected_here() -> None:
    assert sorted([*CALIBRATORS, *RETRIEVERS, *ENGINES, *CLUSTER]) == sorted(config_name(path) for path in PATHS)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_recipe_is_built_with_its_callbacks_and_no_others(name: str, data: list[str], llama_folder: Path) -> None:
    if name == "local":
        cli = build("--config", "local", f"--model.policy={llama_folder}", *data)
    else:
        cli = build("--config", "quickstart", *(["--config", name] if name not in ("quickstart", "base") else []))
    # Lightning itself adds nothing: no checkpoints, progress bar or summary of its own.
    found = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert found == (["AdvantageCalibration"] if CALIBRATORS[name] else []) + OURS
    installed = [c for c in cli.trainer.callbacks if isinstance(c, AdvantageCalibration)]  # type: ignore[attr-defined]
    calibrators = [calibrator for callback in installed for calibrator in callback.calibrators]
    assert [(type(calibrator).__name__, vars(calibrator)) for calibrator in calibrators] == CALIBRATORS[name]
    assert cli.model.agent.protocol.prepend_think is (name != "protocols/no_prepend")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a cross-encoder, a corpus of one document, and its vector as a bare FAISS file."""
    folder = tmp_path_factory.mktemp("parts")
    word_folder(folder / "encoder", {"Prague": (1.0, 0.0), "city": (0.0, 1.0)})
    bert_folder(folder / "cross-encoder", ["prague", "city"], scores=True)
    (folder / "corpus.jsonl").write_text('{"id": "0", "contents": "\\"Prague\\"\\nPrague is a city."}\n')
    index = faiss.index_factory(2, "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(np.ones((1, 2), np.float32))
    faiss.write_index(index, str(folder / "flat.index"))
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if "hybrid" in name else ()) for name in RETRIEVERS]
)
def test_a_retriever_takes_the_place_of_the_recipes_own(name: str, parts: Path) -> None:
    kind, needs = RETRIEVERS[name]
    options = [f"--model.retriever.{option}={parts / file}" for option, file in needs.items()]
    cli = build("--config", "quickstart", "--config", name, *options)
    retriever = cli.model.agent.retriever
    assert type(retriever).__name__ == kind
    assert retriever.top_k == (3 if "search_r1" in name else 2)  # that of the recipe, unless the overlay says another


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_takes_the_place_of_the_recipes_own(name: str) -> None:
    cli = build("--config", "quickstart", "--config", name)
    assert type(cli.model.agent.engine).__name__ == ENGINES[name]


@pytest.mark.parametrize("name", CLUSTER)
def test_a_cluster_is_eight_processes_a_machine(name: str, data: list[str], llama_folder: Path) -> None:
    if "qwen" in name:
        questions = [option for option in data if "corpus" not in option]
        cli = build(
            "--config", name, f"--model.policy={llama_folder}", "--model.retriever.url=http://r:8000", *questions
        )
    else:
        cli = build("--config", "quickstart", "--config", name)
    assert type(cli.trainer.strategy).__name__ == CLUSTER[name]
    assert cli.trainer.world_size == 8
    assert cli.datamodule.questions_per_step % 8 == 0


def test_calibrators_can_be_installed_on_the_command_line() -> None:
    words = ["--trainer.callbacks+=AdvantageCalibration", "--trainer.callbacks.calibrators+=AnswerRebalance"]
    cli = build("--config", "quickstart", *words, "--trainer.callbacks.calibrators.target_ratio=0.7")
    (installed,) = [c for c in cli.trainer.callbacks if isinstance(c, AdvantageCalibration)]  # type: ignore[attr-defined]
    assert [vars(calibrator) for calibrator in installed.calibrators] == [{"target_ratio": 0.7}]


def test_one_seed_reaches_the_model_and_the_data() -> None:
    cli = build("--config", "quickstart", "--seed_everything", "3")
    assert (cli.model.seed, cli.datamodule.seed) == (3, 3)


def test_arms_differ_by_what_the_calibrators_make_of_the_advantages(tmp_path: Path) -> None:
    """Same policy, same questions, same first rollouts."""
    one_step = ("--model.rollout_steps", "1", "--trainer.limit_val_batches", "0", "--model.group_size", "12")
    assert fit(tmp_path, "grpo", *one_step) == 0
    assert fit(tmp_path, "calibadv", "--config", "calibrators/calibadv", *one_step) == 0
    grpo, calibadv = (
        [record for record, _ in read_records(tmp_path / arm / "rollouts" / "train-step-000001.jsonl")]
        for arm in ("grpo", "calibadv")
    )
    assert len(grpo) == 2 * 12
    for record in grpo:
        assert record["advantages"]["calibrated"] == record["advantages"]["estimated"]
    differing = [
        (a["advantages"].pop("calibrated"), b["advantages"].pop("calibrated"))
        for a, b in zip(grpo, calibadv, strict=True)
    ]
    assert grpo == calibadv
    assert any(before != after for before, after in differing)
