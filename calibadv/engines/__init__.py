"""Engines sample the policy's tokens."""

from calibadv.engines.scripted import ScriptedEngine
from calibadv.engines.transformers import TransformersEngine
from calibadv.engines.vllm import VLLMEngine
from calibadv.engines.vllm_server import VLLMServerEngine

__all__ = ["ScriptedEngine", "TransformersEngine", "VLLMEngine", "VLLMServerEngine"]
