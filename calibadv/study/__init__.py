"""A study: several methods trained over seeds with everything else equal, and a report of how they compare."""

from calibadv.study.command import study

__all__ = ["study"]
