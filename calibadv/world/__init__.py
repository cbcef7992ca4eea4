"""The embedded default: a synthetic search world and a tiny policy that knows how to search in it.

Both ship inside the package, so that everything runs offline on a laptop. ``calibadv world`` exports the world's files
and trains the policy from scratch.
"""

from __future__ import annotations

from functools import lru_cache

from calibadv.policy.loading import policy_folder
from calibadv.world.world import World, build_world

__all__ = ["World", "build_world", "embedded_world", "policy_folder"]


@lru_cache(maxsize=1)
def embedded_world() -> World:
    """Return the world that ``embedded`` names, of seed 0: documents, facts and questions."""
    return build_world(0)
