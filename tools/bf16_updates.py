"""Count the weights that an optimizer step changes in bfloat16, by learning rate, on the gradients of the quickstart.

    python tools/bf16_updates.py --rates 1e-6 1e-4

Eight rollout steps of the quickstart (32 optimizer steps) each, with --trainer.precision bf16-true.
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import median
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import calibadv.policy.precision
from calibadv.cli.main import main as calibadv_main

RATES = ("1e-6", "1e-5", "3e-5", "1e-4", "3e-4")


def main() -> None:
    """Print one row per learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=RATES)
    calibadv.policy.precision.LOWEST_RATE = 0.0  # what is measured here is why there is one
    table = Table("learning rate", "first step", "median of steps 5 to 32", box=MARKDOWN)
    for rate in parser.parse_args().rates:
        shares = _shares(rate)
        table.add_row(rate, f"{shares[0]:.1%}", f"{median(shares[4:]):.2%}")
    Console().print(table)


def _shares(rate: str) -> list[float]:
    """The share of all weights that each optimizer step changes."""
    before: list[Tensor] = []
    shares: list[float] = []

    def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before[:] = [parameter.detach().clone() for parameter in parameters(optimizer)]

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        changed = sum(int((old != new).sum()) for old, new in zip(before, parameters(optimizer), strict=True))
        shares.append(changed / sum(old.numel() for old in before))

    hooks = [register_optimizer_step_pre_hook(keep), register_optimizer_step_post_hook(count)]
    words = ["fit", "--config", "quickstart", "--trainer.precision", "bf16-true", "--model.learning_rate", rate]
    with tempfile.TemporaryDirectory() as root:
        small = ["--model.rollout_steps", "8", "--data.validation", "null", "--run.root", root]
        assert calibadv_main([*words, *small]) == 0
    for hook in hooks:
        hook.remove()
    return shares


if __name__ == "__main__":
    main()
