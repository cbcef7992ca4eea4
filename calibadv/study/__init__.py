"""Studies: several methods trained over seeds with everything else equal, and the report that compares them."""

from calibadv.study.command import study

__all__ = ["study"]
