"""The embedded default: a synthetic search world and a tiny policy that knows how to search in it.

Both ship inside the package, so that everything runs offline on a laptop. ``calibadv world`` exports the world's files
and trains the policy from scratch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from calibadv.world.world import World, build_world

__all__ = ["EMBEDDED", "World", "build_world", "embedded_world", "policy_folder"]

EMBEDDED = "embedded"
"""Name in a config, instead of that of a file or a folder, of the data and the policy that the package ships."""


@lru_cache(maxsize=1)
def embedded_world() -> World:
    """The world that ``embedded`` names: seed 0.

    Returns:
        Its documents, facts and questions; the same object at every call.
    """
    return build_world(0)


def policy_folder() -> Path:
    """The Hugging Face folder of the tiny policy.

    Returns:
        A folder inside the package.
    """
    return Path(__file__).parent / "policy"
