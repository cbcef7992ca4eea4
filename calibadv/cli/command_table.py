"""Table of the commands of ``calibadv``: the line of each in --help, and its function."""

from __future__ import annotations

from dataclasses import dataclass

from calibadv.config.help import PLAN, PROMPT, STUDY, VERBS


@dataclass(frozen=True, slots=True)
class Command:
    """One command. Functions are import paths ``module:function``, imported when the command runs."""

    summary: str  # one line for --help
    entry: str = ""  # function that is called with the words after the command, if the command has a parser of its own
    leading: tuple[str, ...] = ()  # arguments of entry before the words
    functions: tuple[str, ...] = ()  # whose signatures are the options; several are subcommands
    loads_model: bool = False  # the notices of libraries that load models are silenced


def _typed(summary: str, *functions: str, loads_model: bool = False) -> Command:
    return Command(summary, functions=functions, loads_model=loads_model)


COMMANDS = {
    **{verb: Command(summary, "calibadv.config.verbs:run_verb", (verb,)) for verb, summary in VERBS.items()},
    "prompt": Command(PROMPT, "calibadv.cli.prompt:prompt"),
    "study": Command(STUDY, "calibadv.study.command:study"),
    "plan": Command(PLAN, "calibadv.planning.command:plan"),
    "index": _typed(
        "Build an index of a corpus, to be searched by words or by meaning; or verify one.",
        "calibadv.retrieval.index.build:index",
    ),
    "search": _typed("Search an index for one query and print what is found.", "calibadv.cli.retrieval:search"),
    "serve": _typed("Answer searches of an index over HTTP.", "calibadv.cli.retrieval:serve"),
    "audit": _typed(
        "Measure whether a corpus holds the answers to questions, and whether a search finds them.",
        "calibadv.cli.retrieval:audit",
    ),
    "demonstrate": _typed(
        "Write demonstrations for a warm start: scripted ones, or rollouts that scored well.",
        "calibadv.cli.demonstrations:demonstrate",
        loads_model=True,
    ),
    "export": _typed(
        "Write a trained policy as a Hugging Face folder.", "calibadv.export.folder:export", loads_model=True
    ),
    "ask": _typed("Ask a trained agent, on the terminal or in a browser.", "calibadv.cli.ask:ask", loads_model=True),
    "compare": _typed(
        "Compare trained runs: a report with curves, intervals and paired tests.",
        "calibadv.analysis.compare.command:compare",
    ),
    "view": _typed("Make a page to read rollouts in a browser.", "calibadv.analysis.viewer.command:view"),
    "replay": _typed(
        "Apply one or several methods to recorded rollouts, without a model, and compare their advantages.",
        "calibadv.analysis.replay.command:replay",
    ),
    "world": _typed(
        "Export the embedded world, or make its policy again from nothing.",
        "calibadv.world.command:export",
        "calibadv.sft.embedded:policy",
        loads_model=True,
    ),
}
