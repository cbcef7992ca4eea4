from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from support.encoders import bert_folder, word_folder
from support.fits import fit

from calibadv.callbacks import AdvantageCalibration
from calibadv.config.files import config_name, configs_folder, read_words
from calibadv.config.lightning_cli import CalibadvCLI
from calibadv.config.logging import quiet_environment
from calibadv.runs.rollouts import read_records

# Every packaged config, and the calibrators that the recipe installs: none is plain GRPO.
CALIBRATORS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "base": [],
    "quickstart": [],
    "local": [],
    "protocols/no_prepend": [],
    "calibrators/soft_penalty": [("SoftPenalty", {})],
    "calibrators/answer_rebalance": [("AnswerRebalance", {"target_ratio": 1.0})],
    "calibrators/calibadv": [("SoftPenalty", {}), ("AnswerRebalance", {"target_ratio": 1.0})],
    "calibrators/calibadv_lambda_1_5": [("SoftPenalty", {}), ("AnswerRebalance", {"target_ratio": 1.5})],
    "calibrators/constant_penalty": [
        ("ConstantPenalty", {"correctness": "batch_mean"}),
        ("AnswerRebalance", {"target_ratio": 1.0}),
    ],
    "calibrators/shuffled_penalty": [("ShuffledPenalty", {"seed": 0}), ("AnswerRebalance", {"target_ratio": 1.0})],
    "calibrators/negative_scale": [
        ("NegativeScale", {"positive_weight": 0.1, "negative_weight": 1.0, "match": None}),
    ],
    "calibrators/negative_scale_matched": [
        ("NegativeScale", {"positive_weight": 1.0, "negative_weight": 1.0, "match": "calibadv"}),
    ],
    "calibrators/negative_clip": [("NegativeClip", {"bound": 1.0})],
}
# What each of these builds is in test_estimators.py.
ESTIMATORS = [f"estimators/{name}" for name in ("dr_grpo", "gigpo", "igpo", "mt_grpo", "rloo")]
# The loss of each overlay, and of its parameters what it is about.
LOSSES: dict[str, tuple[str, dict[str, float | None]]] = {
    "losses/clip_higher": ("PPOClip", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}),
    "losses/dual_clip": ("PPOClip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    "losses/cispo": ("CISPO", {"clip_low": 1.0, "clip_high": 4.0}),
    "losses/gspo": ("GSPO", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "losses/sequence_mean": ("PPOClip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}),
    "losses/dr_grpo": ("PPOClip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}),
}
AGGREGATIONS = {
    "losses/gspo": ("SequenceMean", {}),
    "losses/sequence_mean": ("SequenceMean", {}),
    "losses/dr_grpo": ("FixedLength", {"length": 4 * 36}),  # the most policy tokens of a rollout of the quickstart
}
REGULARIZERS = {"regularizers/llds": [("LLDS", {"coef": 0.1, "gate": "action", "tolerance": 1e-4})]}
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
# Before and behind the callbacks of the config.
BEFORE = ["RunStart", "Results", "TensorBoardPages", "RolloutWriter"]
BEHIND = ["RolloutCheckpoint", "Progress"]
# What these build is in test_guard.py, test_filters.py and here below.
MORE = ["callbacks/collapse_guard", "filters/dynamic_sampling", "regularizers/kl", "sft", "smollm2"]
PATHS = sorted(configs_folder().rglob("*.yaml"))


def build(*words: str) -> CalibadvCLI:
    quiet_environment()
    return CalibadvCLI("fit", read_words(words))


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """A corpus and questions of one's own, as options."""
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text('{"id": "0", "contents": "\\"Prague\\"\\nPrague is a city."}\n')
    questions.write_text('{"id": "a", "question": "Which city?", "golden_answers": ["Prague"]}\n')
    files = {"model.retriever.corpus": corpus, "data.train": questions, "data.validation": questions}
    return [f"--{name}={path}" for name, path in files.items()]


def test_every_config_is_expected_here() -> None:
    expected = [*CALIBRATORS, *ESTIMATORS, *LOSSES, *REGULARIZERS, *RETRIEVERS, *ENGINES, *CLUSTER, *MORE]
    assert sorted(expected) == sorted(config_name(path) for path in PATHS)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_recipe_is_built_with_its_callbacks_and_no_others(name: str, data: list[str], llama_folder: Path) -> None:
    if name == "local":
        cli = build("--config", "local", f"--model.policy={llama_folder}", *data)
    else:
        cli = build("--config", "quickstart", *(["--config", name] if name not in ("quickstart", "base") else []))
    # Lightning itself adds nothing: no checkpoints, progress bar or summary of its own.
    found = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert found == [*BEFORE, *(["AdvantageCalibration"] if CALIBRATORS[name] else []), *BEHIND]
    installed = [c for c in cli.trainer.callbacks if isinstance(c, AdvantageCalibration)]  # type: ignore[attr-defined]
    calibrators = [calibrator for callback in installed for calibrator in callback.calibrators]
    assert [(type(calibrator).__name__, vars(calibrator)) for calibrator in calibrators] == CALIBRATORS[name]
    assert cli.model.agent.protocol.prepend_think is (name != "protocols/no_prepend")


@pytest.mark.parametrize("name", [*LOSSES, *REGULARIZERS])
def test_a_loss_takes_the_place_of_the_recipes_own(name: str) -> None:
    objective = build("--config", "quickstart", "--config", name).model.objective
    settings = {name: value for name, value in vars(objective.loss).items() if name != "requires_multiple_updates"}
    aggregation = settings.pop("aggregation")
    default = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert (type(objective.loss).__name__, settings) == LOSSES.get(name, ("PPOClip", default))
    assert (type(aggregation).__name__, vars(aggregation)) == AGGREGATIONS.get(name, ("TokenMean", {}))
    found = [(type(regularizer).__name__, vars(regularizer)) for regularizer in objective.regularizers]
    assert found == REGULARIZERS.get(name, [])


def test_a_kl_comes_with_its_reference() -> None:
    model = build("--config", "quickstart", "--config", "regularizers/kl").model
    assert (model.objective.kl_coef, model.objective.kl_estimator) == (0.001, "k3")
    assert model.reference is not None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cispo", "sequence_mean"), ("CISPO", 1.0, 4.0, "SequenceMean")),
        (("clip_higher", "sequence_mean"), ("PPOClip", 0.2, 0.28, "SequenceMean")),
        (("gspo", "dr_grpo"), ("GSPO", 3e-4, 4e-4, "FixedLength")),
        (("dual_clip", "gspo"), ("GSPO", 3e-4, 4e-4, "SequenceMean")),
    ],
)
def test_losses_are_combined_as_they_are_named(names: Sequence[str], expected: tuple[object, ...]) -> None:
    words = [word for name in names for word in ("--config", f"losses/{name}")]
    loss = build("--config", "quickstart", *words).model.objective.loss
    assert (type(loss).__name__, loss.clip_low, loss.clip_high, type(loss.aggregation).__name__) == expected


def test_a_loss_is_refused_what_it_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "run", "--config", "losses/gspo", "--config", "losses/dual_clip") == 2
    assert "model.loss: option 'dual_clip' is not accepted by GSPO; it takes clip_low" in capsys.readouterr().err


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
    retriever = cli.model.agent.environment.tools[0].retriever
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
