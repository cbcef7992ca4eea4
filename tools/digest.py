"""Sum up what short runs compute, so that two versions of the code can be told apart.

    python tools/digest.py

Three rollout steps of the quickstart with one thread, under GRPO, CalibAdv, LoRA with a KL, and dynamic sampling. One
line each: digests of the rollout files, of the curves, and of the tensors of the last checkpoint. They depend on the
processor and on the version of torch: compare two versions of calibadv on one machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

VARIANTS = {
    "grpo": (),
    "calibadv": ("--config", "calibrators/calibadv"),
    "lora_kl": ("--model.lora.rank", "4", "--config", "regularizers/kl"),
    "dynamic_sampling": ("--config", "filters/dynamic_sampling"),
}
_SMALL = (
    *("--model.rollout_steps", "3", "--trainer.val_check_interval", "3", "--rollouts.every_n_rollout_steps", "1"),
    *("--data.questions_per_step", "8", "--data.validation_questions", "20"),
)
_WITHOUT = ("second",)  # curves of time and speed


def main() -> None:
    """Print one line per variant."""
    for name, words in VARIANTS.items():
        with tempfile.TemporaryDirectory() as root:
            _fit(root, *words)
            run = Path(root) / "run"
            parts = {"rollouts": rollouts(run), "curves": curves(run), "tensors": tensors(run)}
            sums = [f"{part} {_digest(items)}" for part, items in parts.items()]
        print(f"{name:<17}", *sums, sep="  ", flush=True)


def _fit(root: str, *words: str) -> None:
    command = [sys.executable, "-m", "calibadv.cli.main", "fit", "--config", "quickstart", *words, *_SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run.root", root, "--run.name", "run"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr or done.stdout)


def rollouts(run: Path) -> Iterator[bytes]:
    """Names and contents of the rollout files, which hold no times."""
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        yield path.name.encode()
        yield path.read_bytes()


def curves(run: Path) -> Iterator[bytes]:
    """Every point of every curve but those of time."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        if not any(word in tag for word in _WITHOUT):
            for event in events.Scalars(tag):
                yield f"{tag} {event.step} {event.value!r}".encode()


def tensors(run: Path) -> Iterator[bytes]:
    """Weights and optimizer state of the last checkpoint."""
    content: Any = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    yield from _tensors({name: content[name] for name in ("state_dict", "optimizer_states")}, "")


def _tensors(value: Any, name: str) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{name} {list(value.shape)} {value.dtype}".encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}")


def _digest(items: Iterator[bytes]) -> str:
    digest = blake2b(digest_size=8)
    for item in items:
        digest.update(len(item).to_bytes(8, "big") + item)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
