"""The seams. Each is swapped by ``class_path`` in a config; each has one idea.

To add a part, subclass one of these in an importable module, give its constructor typed parameters and a Google-style
docstring (that is what ``--help`` prints), and name it in a config. See docs/extending.md.
"""

from calibadv.interfaces.environment import Engine, Protocol, Retriever, StreamingEngine, Tool
from calibadv.interfaces.method import AdvantageEstimator, Calibrator, GroupFilter, PolicyLoss, Regularizer, Reward

__all__ = [
    "AdvantageEstimator",
    "Calibrator",
    "Engine",
    "GroupFilter",
    "PolicyLoss",
    "Protocol",
    "Regularizer",
    "Retriever",
    "Reward",
    "StreamingEngine",
    "Tool",
]
