"""Terms that are added to the policy loss, one per file."""

from calibadv.regularizers.llds import LLDS

__all__ = ["LLDS"]
