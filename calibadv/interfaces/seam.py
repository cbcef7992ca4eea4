"""The base of all seams."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

from calibadv.errors import UserError


class Seam(ABC):  # noqa: B024  # its subclasses have the methods
    """Base of all seams: a class that still overrides a method under its old name is refused with the new one."""

    _renamed: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old, new in cls._renamed.items():
            if old in vars(cls):
                raise UserError(f"{cls.__name__} defines '{old}', which is now called '{new}'; rename it")
