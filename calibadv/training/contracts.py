"""What parts return, held against the contracts of ``interfaces.py``: a part that breaks one is refused by its name."""

from __future__ import annotations

from typing import Any

from calibadv.errors import UserError, is_number, shown
from calibadv.interfaces import Calibrator, PolicyLoss, Regularizer
from calibadv.types import Metrics


def checked_pair(returned: Any, part: Calibrator | PolicyLoss | Regularizer) -> tuple[Any, Metrics]:
    """See that a part returned something and metrics."""
    name = type(part).__name__
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(f"{name} returned {shown(returned)}; it returns a tensor and a dictionary of metrics")
    for metric, value in returned[1].items():
        if not is_number(value):
            raise UserError(f"{name} reported {shown(value)} as '{metric}'; a metric is a number, as of .item()")
    return returned
