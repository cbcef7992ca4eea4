"""The command ``ask``."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from rich.console import Console

from calibadv.agent.environment import Environment
from calibadv.agent.episode import Agent
from calibadv.agent.tools import SearchTool
from calibadv.ask.session import Session
from calibadv.ask.terminal import converse, show
from calibadv.ask.web import serve_page
from calibadv.cli.retrieval import open_retriever
from calibadv.engines import TransformersEngine
from calibadv.errors import UserError
from calibadv.export import load_agent


def ask(  # noqa: PLR0913  # its parameters are the options of the command
    question: str | None = None,
    model: Path | None = None,
    index: Path | None = None,
    retriever: str | None = None,
    web: bool = False,
    json: bool = False,
    port: int = 8080,
    policy: str | None = None,
) -> None:
    """Ask a trained agent, and see what it thinks, searches and reads.

    Args:
        question: What to ask; without one, questions are asked for.
        model: Exported folder, folder of a run, or checkpoint.
        index: Folder that 'calibadv index' wrote.
        retriever: In the place of an index: a YAML file as for fit, or a packaged config such as retrievers/hybrid.
        web: Serve a page to ask in a browser, on this machine only.
        json: Print the rollout as one line of JSON.
        port: Of the page; 0 for any that is free.
        policy: Folder that the run started from, if it is not at its old place any more.

    Raises:
        UserError: there is no such agent, nothing to search, or no question where one is needed.
    """
    if model is None:
        raise UserError("there is nobody to ask; give --model FOLDER, RUN or CHECKPOINT")
    if json and (web or question is None):
        raise UserError("--json prints the answer to one question; give the question, and leave --web out")
    searched = open_retriever(index, retriever)
    trained = load_agent(model, policy)
    if trained.top_k is not None:
        searched.top_k = trained.top_k
    engine = TransformersEngine()
    agent = Agent(engine, Environment([SearchTool(searched)]), trained.protocol, trained.policy.tokenizer)
    session = Session(agent, trained.policy)
    console = Console()
    if web:
        serve_page(session, port)
    elif question is None:
        converse(session, console)
    elif json:
        *_, end = session.ask(question)
        console.out(json_format.dumps(end.content), highlight=False)
    else:
        show(session.ask(question), console)
