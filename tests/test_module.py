"""SearchAgentModule and QuestionData with Lightning's Trainer, without the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.agents import ANSWER, DOCUMENTS, RESULTS, SEARCH
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

import calibadv
from calibadv import QuestionData, SearchAgentModule
from calibadv.callbacks import RolloutCheckpoint
from calibadv.engines import ScriptedEngine
from calibadv.errors import UserError
from calibadv.estimators import GRPO
from calibadv.losses import PPOClip
from calibadv.protocol import SearchProtocol
from calibadv.retrieval import MemoryRetriever
from calibadv.rewards import F1

pytestmark = [
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
WRONG = "<think> b </think> <answer> Paris </answer>"


@pytest.fixture(scope="module", autouse=True)
def _policy(qwen2_folder: Path) -> Iterator[None]:
    """A policy whose tokenizer knows every word."""
    DEFAULTS["policy"] = str(qwen2_folder)
    yield
    del DEFAULTS["policy"]


DEFAULTS: dict[str, Any] = {}


def module(**settings: Any) -> SearchAgentModule:
    """Every second rollout of a question is right; a validation, which takes the first, is right for b and d."""
    right, wrong = [SEARCH, ANSWER], [SEARCH, WRONG]
    replies = {name: [right, wrong] if name in "bd" else [wrong, right] for name in "abcd"}
    defaults: dict[str, Any] = {
        **DEFAULTS,
        "engine": ScriptedEngine(replies),
        "reward": F1(),
        "estimator": GRPO(),
        "loss": PPOClip(),
        "protocol": SearchProtocol(prepend_think=False, template="short", max_searches=3),
        "retriever": MemoryRetriever(DOCUMENTS, RESULTS, top_k=2),
        "rollout_steps": 4,
        "group_size": 2,
        "learning_rate": 1e-3,
    }
    return SearchAgentModule(**{**defaults, **settings})


@pytest.fixture
def data(tmp_path: Path) -> QuestionData:
    file = tmp_path / "questions.jsonl"
    rows = [{"id": name, "question": f"what is {name} ?", "golden_answers": ["Prague"]} for name in "abcd"]
    file.write_text("\n".join(map(json.dumps, rows)))
    return QuestionData(train=str(file), validation=str(file), test=str(file), questions_per_step=2)


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, **quiet, **settings})


class Log(Callback):
    """What happens, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.asked: list[list[str]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.events.append(("step", pl_module.rollout_step))
        self.asked.append([question.id for question in batch])

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validation", pl_module.rollout_step))


STEPS = [("step", step) for step in range(1, 5)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Lightning's default is an epoch, and the training questions have no end: before the first step and at the end.
        ({}, [("validation", 0), *STEPS, ("validation", 4)]),
        ({"val_check_interval": 1.0}, [("validation", 0), *STEPS, ("validation", 4)]),
        ({"val_check_interval": 1}, [("validation", 0), *(e for s in STEPS for e in (s, ("validation", s[1])))]),
        ({"val_check_interval": 3}, [("validation", 0), *STEPS[:3], ("validation", 3), STEPS[3], ("validation", 4)]),
        ({"limit_val_batches": 0}, STEPS),
    ],
    ids=["default", "1.0", "1", "3", "no validation"],
)
def test_a_trainer_with_its_own_defaults(
    settings: dict[str, Any], expected: list[tuple[str, int]], tmp_path: Path, data: QuestionData
) -> None:
    log, trained = Log(), module()
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    trainer(tmp_path, callbacks=[log], enable_checkpointing=False, **settings).fit(trained, data)
    assert log.events == expected
    assert any(not torch.equal(p, b) for p, b in zip(trained.parameters(), before, strict=True))


@pytest.mark.parametrize("interval", [1.0, 1, 3])
def test_checkpoints_come_when_due(interval: float, tmp_path: Path, data: QuestionData) -> None:
    checkpoints = RolloutCheckpoint(every_n_rollout_steps=2, keep=0)
    trainer(tmp_path, val_check_interval=interval, callbacks=[checkpoints], enable_checkpointing=False).fit(
        module(), data
    )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "rollout-step=000002.ckpt", "rollout-step=000004.ckpt"]


def test_a_resume_goes_on_with_the_next_questions(tmp_path: Path, data: QuestionData) -> None:
    whole, first, second = Log(), Log(), Log()
    trainer(tmp_path, callbacks=[whole], enable_checkpointing=False).fit(module(), data)
    half = trainer(tmp_path, callbacks=[first], enable_checkpointing=False)
    half.fit(module(rollout_steps=2), data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    trainer(tmp_path, callbacks=[second], enable_checkpointing=False).fit(
        resumed, data, ckpt_path=tmp_path / "half.ckpt"
    )
    assert first.asked + second.asked == whole.asked
    assert resumed.rollout_step == 4


def test_metrics_are_returned_and_rollouts_predicted(tmp_path: Path, data: QuestionData) -> None:
    evaluated = module()
    (validated,) = trainer(tmp_path).validate(evaluated, data, verbose=False)
    (tested,) = trainer(tmp_path).test(evaluated, data, verbose=False)
    assert (validated["val/f1"], validated["val/count"], tested["test/f1"]) == (0.5, 4, 0.5)
    predicted: Any = trainer(tmp_path).predict(evaluated, data)
    answers = [(r.question.id, r.answer) for output in predicted for r in output.rollouts]
    assert answers == [("a", "Paris"), ("b", "Prague"), ("c", "Paris"), ("d", "Prague")]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_callbacks_of_lightning_monitor_curves(tmp_path: Path, data: QuestionData) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val/f1", mode="max")
    every = ModelCheckpoint(tmp_path / "every", monitor="reward/score", every_n_train_steps=1, save_top_k=-1)
    patient = EarlyStopping(
        "reward/score", patience=2, check_on_train_epoch_end=False, strict=False
    )  # it never changes
    run = trainer(tmp_path, val_check_interval=1, callbacks=[best, every, patient])
    trained = module(rollout_steps=20)
    run.fit(trained, data)
    assert best.best_model_score == 0.5
    assert len(list((tmp_path / "every").iterdir())) == trained.rollout_step
    assert trained.rollout_step == 3  # the first value, and two without a better one


def test_a_csv_logger_gets_curves_by_rollout_step(tmp_path: Path, data: QuestionData) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, enable_checkpointing=False).fit(module(rollout_steps=2), data)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert {row["step"] for row in rows if row["reward/score"]} == {"1", "2"}
    assert {row["step"] for row in rows if row["val/f1"]} == {"0", "2"}


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"precision": "bf16-mixed", "limit_val_batches": 1}])
def test_short_and_mixed_runs(settings: dict[str, Any], tmp_path: Path, data: QuestionData) -> None:
    trained = module(rollout_steps=2)
    trainer(tmp_path, enable_checkpointing=False, **settings).fit(trained, data)
    assert trained.rollout_step == (1 if "fast_dev_run" in settings else 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 5}, "max_steps is 5, which counts optimizer steps; .* set model.rollout_steps"),
        ({"overfit_batches": 2}, "overfit_batches repeats batches"),
    ],
)
def test_what_cannot_work_is_refused(
    settings: dict[str, Any], expected: str, tmp_path: Path, data: QuestionData
) -> None:
    with pytest.raises(UserError, match=expected):
        trainer(tmp_path, enable_checkpointing=False, **settings).fit(module(), data)


def test_tools_or_a_retriever() -> None:
    with pytest.raises(UserError, match="retriever is missing; give it"):
        module(retriever=None)
    with pytest.raises(UserError, match="both set; give one"):
        module(tools=[])
    with pytest.raises(UserError, match="tools is empty; give at least one"):
        module(retriever=None, tools=[])


# Optimizers and schedulers of torch.


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def halving(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=1, gamma=0.5)


def rates(tmp_path: Path, data: QuestionData, **settings: Any) -> list[float]:
    class Rates(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            found.append(outputs["output"].metrics["update/learning_rate"])

    found: list[float] = []
    trainer(tmp_path, callbacks=[Rates()], enable_checkpointing=False).fit(module(**settings), data)
    return found


def test_another_optimizer_and_scheduler(tmp_path: Path, data: QuestionData) -> None:
    own = {"learning_rate": 1e-6}
    assert rates(tmp_path, data, optimizer=sgd, **own) == [0.5, 0.5, 0.5, 0.5]
    assert rates(tmp_path, data, optimizer=sgd, schedule="cosine", warmup_steps=1, **own)[:2] == [0.5, 0.5]
    assert rates(tmp_path, data, optimizer=sgd, lr_scheduler=halving, **own) == [0.5, 0.25, 0.125, 0.0625]
    assert rates(tmp_path, data, lr_scheduler=halving) == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_a_guard_slows_any_schedule(tmp_path: Path, data: QuestionData) -> None:
    class Slow(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.lr_factor = 0.1 if pl_module.rollout_step == 2 else 1.0

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            found.append(outputs["output"].metrics["update/learning_rate"])

    found: list[float] = []
    slowed = module(optimizer=sgd, lr_scheduler=halving, learning_rate=1e-6)
    trainer(tmp_path, callbacks=[Slow()], enable_checkpointing=False).fit(slowed, data)
    assert found == pytest.approx([0.5, 0.25, 0.0125, 0.0625])  # the scheduler goes on from its own rates


def test_the_schedule_of_torch_survives_a_resume(tmp_path: Path, data: QuestionData) -> None:
    settings: dict[str, Any] = {"optimizer": sgd, "lr_scheduler": halving, "learning_rate": 1e-6}
    half = trainer(tmp_path, enable_checkpointing=False)
    half.fit(module(rollout_steps=2, **settings), data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = trainer(tmp_path, enable_checkpointing=False)
    rest.fit(module(**settings), data, ckpt_path=tmp_path / "half.ckpt")
    assert rest.optimizers[0].param_groups[0]["lr"] == 0.5 / 2**4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optimizer": sgd}, "learning_rate is 0.001 and model.optimizer is set, which replaces it"),
        ({"optimizer": sgd, "learning_rate": 1e-6, "weight_decay": 0.1}, "model.weight_decay is 0.1"),
        ({"lr_scheduler": halving, "schedule": "cosine"}, "schedule is cosine and model.lr_scheduler is set"),
        ({"lr_scheduler": halving, "warmup_steps": 2}, "model.warmup_steps is 2"),
    ],
)
def test_settings_that_are_replaced_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        module(**settings)


def test_a_scheduler_that_needs_a_metric_is_refused(tmp_path: Path, data: QuestionData) -> None:
    with pytest.raises(UserError, match="ReduceLROnPlateau, which needs a metric"):
        trainer(tmp_path, enable_checkpointing=False).fit(module(lr_scheduler=ReduceLROnPlateau), data)


# Checkpoints.


def test_a_module_is_built_from_its_checkpoint(tmp_path: Path, data: QuestionData) -> None:
    run, trained = trainer(tmp_path, enable_checkpointing=False), module(rollout_steps=1)
    run.fit(trained, data)
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UserError, match="holds no config, since its module was built in Python"):
        SearchAgentModule.load_from_checkpoint(tmp_path / "one.ckpt")
    arguments: dict[str, Any] = {**DEFAULTS, "engine": ScriptedEngine({}), "reward": F1()}
    arguments |= {"estimator": GRPO(), "loss": PPOClip(), "retriever": MemoryRetriever()}
    loaded = SearchAgentModule.load_from_checkpoint(tmp_path / "one.ckpt", **arguments)
    assert loaded.rollout_step == 1
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in loaded.state_dict().items())


# The front door.


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, calibadv; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    assert calibadv.__version__
    assert all(getattr(calibadv, name) is not None for name in calibadv.__all__)
    with pytest.raises(AttributeError, match="module 'calibadv' has no attribute 'nothing'"):
        _ = calibadv.nothing
