"""The commands and examples of the README and the documentation, taken from the pages themselves."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fits import fit
from torch.utils.tensorboard import SummaryWriter

from calibadv.cli.command_table import COMMANDS
from calibadv.cli.commands import command_parser
from calibadv.cli.main import main
from calibadv.config.files import read_words
from calibadv.config.help import VERBS
from calibadv.config.lightning_cli import CalibadvCLI
from calibadv.config.logging import quiet_environment
from calibadv.study.command import read_study
from calibadv.world import policy_folder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# Code within a line, with an option; --help is tested elsewhere.
INLINE = re.compile(r"`(calibadv [^`]*--(?!help)[^`]*)`")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, without the indent of the fence."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(body) for _, name, body in found if name == language]


def words_of(line: str) -> list[str]:
    """What `calibadv` is given by a line of shell; nothing if it is another program's line."""
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:
        del words[0]
    return words[1:] if words and Path(words[0]).name == "calibadv" else []


def commands() -> Iterator[Any]:
    """Every command of every page, once."""
    seen = set()
    for page in PAGES:
        scripts = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        inline = [" ".join(code.split()) for code in INLINE.findall(text)]
        for line in [*scripts.splitlines(), *inline]:
            words = tuple(words_of(line))
            if words and words not in seen:
                seen.add(words)
                yield pytest.param(words, id=f"{page.name}: {' '.join(words)}")


DOCUMENTED = list(commands())
# What builds the index that a page's other commands search.
INDEXING = [words for (words,) in (command.values for command in DOCUMENTED) if words[0] == "index"]
BUILDERS = {words[words.index("--out") + 1]: words for words in INDEXING if "--out" in words}


def prepare_real_model(folder: Path) -> None:
    """What someone has who follows real-model.md, with the embedded policy in the place of a real one."""
    for name in ("DIR", "smollm2", "warm", "agent"):
        shutil.copytree(policy_folder(), folder / name)
    for name in ("warm", "rl"):
        shutil.copytree(folder / "runs" / "first", folder / "runs" / name)
    shutil.copy(folder / "world" / "validation.jsonl", folder / "validation.jsonl")
    known = [json.loads(line)["id"] for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = (folder / "world" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    findable = [q for q in questions if set(json.loads(q)["metadata"]["supporting_ids"]) <= set(known)]
    (folder / "train.jsonl").write_text("".join(findable), encoding="utf-8")
    (folder / "overlay.yaml").write_text(
        f"{{class_path: calibadv.retrieval.BM25, init_args: {{corpus: {folder / 'corpus.jsonl'}}}}}", encoding="utf-8"
    )
    asked = ("--questions", str(folder / "train.jsonl"), "--retriever", str(folder / "overlay.yaml"))
    out = folder / "runs" / "sampled" / "rollouts" / "predict-step-000000.jsonl"
    assert main(["demonstrate", *asked, "--out", str(out)]) == 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What someone has who has followed the pages: the parts and overlays of extending.md, and some rollouts."""
    folder = tmp_path_factory.mktemp("workplace")
    page = ROOT / "docs" / "extending.md"
    parts = [code for code in blocks(page, "python") if re.search(r"^class ", code, re.MULTILINE)]
    (folder / "my_parts.py").write_text("\n\n".join(parts), encoding="utf-8")
    for number, overlay in enumerate(blocks(page, "yaml")):
        name = "fixed_factor" if "FixedFactor" in overlay else f"overlay_{number}"
        (folder / f"{name}.yaml").write_text(overlay, encoding="utf-8")
    recorded = "tests/vectors/calibration.jsonl"
    for place in (recorded, "runs/NAME/rollouts/train-step-000010.jsonl", "theirs.jsonl"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / "vectors" / "calibration.jsonl", folder / place)
    named = [ROOT / "docs" / page for page in ("retrieval.md", "cluster.md")]
    for config in [block for page in named for block in blocks(page, "yaml") if block.startswith("# ")]:
        (folder / config.partition("\n")[0].removeprefix("# ")).write_text(config, encoding="utf-8")
    assert fit(folder / "runs", "first", "--model.rollout_steps", "1") == 0
    for place in ("x", "study/calibadv/seed0"):
        shutil.copytree(folder / "runs" / "first", folder / "runs" / place)
    (names,) = (block for block in blocks(ROOT / "docs" / "comparing.md", "yaml") if "names.yaml" in block)
    (folder / "names.yaml").write_text(names, encoding="utf-8")
    for number in range(2):
        with SummaryWriter(str(folder / "other" / f"run_{number}")) as writer:
            for tag in yaml.safe_load(names).values():
                writer.add_scalar(tag, 0.5, 1)
    assert main(["world", "export", "--out", str(folder / "world")]) == 0
    passages = (folder / "world" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(passages[:40]), encoding="utf-8")  # soon encoded
    shutil.copy(folder / "world" / "validation.jsonl", folder / "questions.jsonl")
    prepare_real_model(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("my_parts", None)


@pytest.fixture
def there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def test_the_pages_hold_commands() -> None:
    pages = {str(command.id).partition(":")[0] for command in DOCUMENTED}
    assert pages >= {
        "README.md",
        "configuration.md",
        "extending.md",
        "formats.md",
        "method.md",
        "quickstart.md",
        "retrieval.md",
    }
    assert {command.values[0][0] for command in DOCUMENTED} == set(COMMANDS)


def build_indexes(words: tuple[str, ...]) -> None:
    """Run the commands that build what a command searches; what is built already is left as it is."""
    named = " ".join([*words, *(Path(word).read_text(encoding="utf-8") for word in words if word.endswith(".yaml"))])
    for out, builder in BUILDERS.items():
        if re.search(rf"(?<![\w-]){out}(?![\w-])", named) and not Path(out).exists():
            assert main(builder) == 0


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("words", DOCUMENTED)
def test_a_command_is_accepted(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Typed commands run; a verb, which may need a finished run or hours, is parsed and prints its config."""
    command = words[0]
    words = tuple(
        name for word in words for name in (map(str, Path().glob(word)) if word.endswith("*.jsonl") else [word])
    )
    if command == "serve":  # it would not end
        parsed = command_parser(command).parse_args(list(words[1:]))
        assert Path(parsed.retriever).is_file() if parsed.retriever else str(parsed.index) in BUILDERS
        return
    if "--web" in words:
        return
    is_typed = bool(COMMANDS[command].functions)
    if command in ("search", "audit", "ask", "demonstrate") or "--verify" in words:
        build_indexes(words)
    if command == "prompt" or (is_typed and "--out" not in words):
        assert main(words) == 0
        assert capsys.readouterr().out
        return
    if is_typed:
        out = Path(words[words.index("--out") + 1])
        if out.is_dir():  # another command needed it before
            shutil.rmtree(out)
        assert main(words) == 0
        assert any(out.iterdir()) if out.is_dir() else out.stat().st_size
        return
    if command == "study":
        _, record = read_study(words[1:])
        assert len(record.arms) == sum(word == "--arm" for word in words)
        return
    if command == "plan":  # takes the config of a run, and options of its own behind it
        words = ("fit", *words[1 : words.index("--gpu") if "--gpu" in words else None])
    assert words[0] in VERBS
    asked = [] if "--print_config" in words else ["--print_config"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *asked])
    assert stop.value.code == 0
    assert "policy" in yaml.safe_load(capsys.readouterr().out)["model"]


def test_the_example_of_the_method_gives_the_numbers_of_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "docs" / "method.md", "python")
    exec(compile(code, "method.md", "exec"), {"__name__": "method"})
    estimated, calibrated = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    # R = 1, 0, 0: mean 1/3, std sqrt((4/9 + 1/9 + 1/9) / 2) = 0.5774, so A = 1.1547 and -0.5774.
    assert estimated == [pytest.approx(row, abs=1e-3) for row in ([1.155] * 3, [-0.577] * 3, [-0.577] * 2)]
    # The rebalance multiplies by (6 + 8) x 0.5774 / (5 x 1.1547) = 1.4.
    table = [[1.155, 1.155, 1.617], [0.0, -0.577, -0.577], [-0.289, -0.577]]
    assert calibrated == [pytest.approx(row, abs=1e-3) for row in table]


@pytest.mark.usefixtures("there")
def test_the_examples_of_extending_run() -> None:
    """Tests import the parts and are called, and the last example prints what the page says that it prints."""
    page = ROOT / "docs" / "extending.md"
    tests, printed = 0, io.StringIO()
    for code in blocks(page, "python"):
        if re.search(r"^class ", code, re.MULTILINE):
            continue
        names: dict[str, Any] = {"__name__": "extending"}
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "extending.md", "exec"), names)
        for name in [name for name in names if name.startswith("test_")]:
            names[name]()
            tests += 1
    assert tests == 1
    assert printed.getvalue() == blocks(page, "")[-1]


def overlays(page: str) -> list[str]:
    return blocks(ROOT / "docs" / page, "yaml")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("overlay", [*overlays("configuration.md"), *overlays("extending.md")])
def test_an_overlay_builds_its_part(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text(overlay, encoding="utf-8")
    quiet_environment()
    cli = CalibadvCLI("fit", read_words(["--config", "quickstart", "--config", str(tmp_path / "overlay.yaml")]))
    model = cli.model
    parts = [
        model.agent.environment.tools[0].retriever,
        model.sampler.reward,
        model.estimator,
        model.objective.loss,
        *model.objective.regularizers,
    ]
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        parts += [callback, *getattr(callback, "calibrators", [])]
    named = set(re.findall(r"(?:my_parts|calibadv\.\w+)\.(\w+)", overlay))
    assert named
    assert named <= {type(part).__name__ for part in parts}
