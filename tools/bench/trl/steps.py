"""The exchange between bench.py and its two sides: a line of input starts a step, a line of JSON tells its seconds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TextIO

# What libraries print must not reach the parent: it reads steps there.
_ANSWERS: TextIO = sys.stdout
sys.stdout = sys.stderr


def wait() -> None:
    """Wait for the next step; the process ends with the input."""
    if not sys.stdin.readline():
        sys.exit()


def answer(value: Any) -> None:
    """Send a line of JSON."""
    _ANSWERS.write(json.dumps(value) + "\n")
    _ANSWERS.flush()


def side_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of what both sides are told.

    Args:
        description: one line.

    Returns:
        The parser, to which a side may add its own options.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser
