"""Agents of any size with random weights, for benchmarks: nothing is downloaded, and every message searches.

Models are given by the numbers of their configs; those of Qwen2.5 are of its published config.json files.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.tools import SearchTool
from calibadv.interfaces import Engine
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval import MemoryRetriever
from calibadv.types import Document, Question, Rollout, RolloutStatus, Segment
from calibadv.world import policy_folder

# Width, layers, heads, key-value heads, feed-forward, vocabulary, tied output layer.
SHAPES = {
    "mini": (64, 2, 4, 2, 256, 4096, True),
    "tiny": (128, 4, 4, 2, 512, 1024, True),
    "small": (256, 8, 8, 2, 1024, 16384, True),
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
# Messages are cut at so many times their mean length: one in 150.
_LONGEST = 5
_SEARCH = "<think> so </think> <search> it </search>"

_WORDS = [f"word{number}" for number in range(3000)]


def shape_config(name: str) -> Any:
    """The transformers config of a shape, of the kind of Qwen2."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[name]
    return AutoConfig.for_model(
        "qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


class _Searching(AgentTokenizer):
    """Takes every so manieth token for the end of a search, so that messages have so many tokens on average."""

    def __init__(self, mean: int) -> None:
        super().__init__(AutoTokenizer.from_pretrained(policy_folder(), local_files_only=True))
        self._mean = mean
        self.end_ids = frozenset()

    def may_stop(self, token_id: int) -> bool:
        """Whether it is one of these."""
        return token_id % self._mean == 0

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, of which only the end matters."""
        return _SEARCH if any(self.may_stop(token_id) for token_id in token_ids) else "so"


@dataclass(frozen=True)
class Episodes:
    """How long rollouts are: in tokens on average, of a message, of an observation and of the prompt."""

    turns: int = 4
    message: int = 24
    observation: int = 60
    prompt: int = 60

    @property
    def tokens(self) -> int:
        """Mean tokens of a rollout."""
        return self.prompt + self.turns * self.message + (self.turns - 1) * self.observation


def random_agent(shape: str, episodes: Episodes, engine: Engine, device: str) -> tuple[Policy, Agent]:
    """A policy with random weights, and an agent that searches in every message."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.float32).train()
    policy = Policy(model, _Searching(episodes.message))
    document = Document("d", "it", "so " * (episodes.observation - 12))
    protocol = SearchProtocol(
        False,
        "short",
        "never",
        max_searches=episodes.turns - 1,
        max_turn_tokens=_LONGEST * episodes.message,
        max_rollout_tokens=episodes.prompt + episodes.turns * (_LONGEST * episodes.message + episodes.observation),
    )
    return policy, Agent(
        engine,
        Environment([SearchTool(MemoryRetriever([document], {"it": ["d"]}, top_k=1))]),
        protocol,
        policy.tokenizer,
    )


def random_questions(count: int, episodes: Episodes) -> list[Question]:
    """Questions whose prompts have about as many tokens as asked for."""
    return [Question(f"q{place}", "so " * max(1, episodes.prompt - 20), ["it"]) for place in range(count)]


def graded(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same rollouts as if every second one had answered right, so that advantages are not 0."""
    valid = RolloutStatus.ANSWERED
    return [replace(rollout, status=valid, score=float(place % 2)) for place, rollout in enumerate(rollouts)]


def written_rollouts(groups: int, size: int, episodes: Episodes, vocabulary: int, think: int = 100) -> list[Rollout]:
    """Rollouts that no model has sampled: random tokens, thinks of so many words, three documents per search."""
    rng = random.Random(0)
    rollouts = []
    for group in range(groups):
        question = Question(f"q{group}", "who?", ["gold"])
        pool = [Document(f"{group}-{number}", "title", "text") for number in range(12)]
        prompt = tuple(rng.choices(range(vocabulary), k=episodes.prompt))
        for sample in range(size):
            segments: list[Segment] = []
            for turn in range(episodes.turns):
                is_last = turn + 1 == episodes.turns
                action = f"<answer>{rng.choice(['gold', 'tin'])}</answer>" if is_last else "<search>query</search>"
                words = " ".join(rng.choices(_WORDS, k=think))
                text = f"<think>{words}</think>{action}"
                segments.append(_segment("policy", text, episodes.message, vocabulary, rng))
                if not is_last:
                    seen = _segment("environment", "<information>", episodes.observation, vocabulary, rng)
                    segments.append(replace(seen, documents=tuple(rng.sample(pool, 3))))
            answered = RolloutStatus.ANSWERED
            messages = SearchProtocol(prepend_think=False).messages(segments)
            rollouts.append(Rollout(question, sample, 0, False, tuple(segments), answered, prompt, messages))
    return rollouts


def _segment(source: Any, text: str, tokens: int, vocabulary: int, rng: random.Random) -> Segment:
    ids = tuple(rng.choices(range(vocabulary), k=tokens))
    return Segment(source, text, tokens, ids, (-1.0,) * tokens if source == "policy" else ())


class PeakMemory:
    """The most memory that is held inside the ``with`` block: of the GPU, or resident on a CPU.

    On a CPU this is the peak resident set since the block began: VmHWM of Linux, which writing 5 to clear_refs sets
    back.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.before = 0
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            with suppress(OSError, AttributeError):  # of glibc: give back what is free
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self.peak = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux":
            self.peak = _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
