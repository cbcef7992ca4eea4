"""``calibadv view``: write rollouts into one HTML file that needs no network, for up to tens of thousands of them."""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from string import Template

from rich.console import Console
from rich.text import Text

from calibadv.analysis.viewer.data import ViewerData
from calibadv.errors import UserError
from calibadv.io.files import write_atomically
from calibadv.runs.paths import check_not_input, find_rollout_files, short_names
from calibadv.runs.rollouts import Record

_SCRIPTS = ("data.js", "filter.js", "rollout.js", "page.js")


def view(rollouts: list[Path], out: Path) -> None:
    """Make a page to read rollouts in a browser, which needs no network.

    Args:
        rollouts: One or more files of rollouts, as runs write them and calibadv replay does; or folders of runs or
            studies, which stand for the train-step-*.jsonl in them.
        out: HTML file to write, which appears when all is done.

    Raises:
        UserError: a rollout file cannot be used, or ``out`` is one of them or a folder; ``out`` then stays as it was.
    """
    paths = find_rollout_files(rollouts)
    if out.is_dir():
        raise UserError(f"out '{out}' is a folder; give a file, such as {out / 'view.html'}")
    check_not_input([out], paths)
    data = ViewerData()
    console = Console(stderr=True)
    for path, name in zip(paths, short_names(paths), strict=True):
        with console.status(Text(f"Reading {path}")) if console.is_terminal else nullcontext():
            data.add_file(path, name)
    page = render(data.as_json())
    write_atomically(out, page)
    rollouts_shown = sum(len(group["rollouts"]) for group in data.groups)
    Console().print(f"{rollouts_shown:,} rollouts, {len(page) / 1e6:.1f} MB", highlight=False)


def render(data: Record) -> str:
    """Return the page with the given data."""
    folder = files("calibadv.analysis.viewer") / "templates"
    script = "".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=script_safe(data),
    )


def script_safe(value: Record) -> str:
    r"""Return JSON that is safe inside a ``<script>`` element, whatever its texts contain.

    Without ``<`` it holds no ``</script>`` and no ``<!--``; U+2028 and U+2029 end lines in some parsers; and a lone
    surrogate, which UTF-8 cannot hold, becomes its JSON escape.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
