"""Train search agents with GRPO and CalibAdv."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibadv.batch import RolloutBatch as RolloutBatch
    from calibadv.data.datamodule import QuestionData as QuestionData
    from calibadv.module import SearchAgentModule as SearchAgentModule

__version__ = "0.1.0"

# Where the public names are; they are imported when they are first used, for torch takes seconds.
_HOMES = {
    "SearchAgentModule": "calibadv.module",
    "QuestionData": "calibadv.data.datamodule",
    **dict.fromkeys(
        ("Engine", "Protocol", "Tool", "Retriever", "Reward", "GroupFilter", "AdvantageEstimator"),
        "calibadv.interfaces",
    ),
    **dict.fromkeys(("Calibrator", "PolicyLoss", "Regularizer", "StreamingEngine"), "calibadv.interfaces"),
    **dict.fromkeys(("Document", "Question", "Rollout", "RolloutStatus", "Segment"), "calibadv.types"),
    **dict.fromkeys(("RolloutBatch", "LossInputs", "StepOutput"), "calibadv.batch"),
    **dict.fromkeys(("UserError", "ServiceError", "RetrievalError", "ToolError"), "calibadv.errors"),
}
__all__ = ["__version__", *_HOMES]  # names, every one


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calibadv' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
