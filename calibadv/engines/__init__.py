"""Engines: what samples the policy's tokens."""

from calibadv.engines.scripted import ScriptedEngine
from calibadv.engines.transformers import TransformersEngine

__all__ = ["ScriptedEngine", "TransformersEngine"]
