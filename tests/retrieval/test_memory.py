"""The scripted retriever."""

from __future__ import annotations

import pytest

from calibadv.errors import PartialRetrievalError, RetrievalError
from calibadv.retrieval import MemoryRetriever
from calibadv.types import Document

DOCUMENTS = [Document("a", "A", "first"), Document("b", "B", "second")]


def test_memory_retriever_answers_as_scripted() -> None:
    retriever = MemoryRetriever(DOCUMENTS, {"who": ["b", "a"]}, top_k=2)
    found = retriever.search(["who", "Who", "who"], retriever.top_k)
    assert [[hit.document.id for hit in hits] for hits in found] == [["b", "a"], [], ["b", "a"]]
    assert [hit.score for hit in found[0]] == [1.0, 0.5]
    assert [hit.document.id for hit in retriever.search(["who"], 1)[0]] == ["b"]


def test_memory_retriever_fails_as_scripted() -> None:
    retriever = MemoryRetriever(DOCUMENTS, {"who": ["a"]}, failing=["broken"])
    with pytest.raises(
        PartialRetrievalError, match=r"'broken' is scripted to fail \(1 of 2 searches failed\)"
    ) as caught:
        retriever.search(["who", "broken"], 1)
    assert caught.value.results[0] == retriever.search(["who"], 1)[0]
    with pytest.raises(RetrievalError, match=r"^the search for 'broken' is scripted to fail$"):
        retriever.search(["broken"], 1)
    assert len(retriever.search(["who"], 1)[0]) == 1


def test_memory_retriever_refuses_bad_scripts() -> None:
    with pytest.raises(ValueError, match="results names the document 'c', which is not in documents"):
        MemoryRetriever(DOCUMENTS, {"who": ["a", "c"]})
    with pytest.raises(ValueError, match="3 documents have only 2 different ids"):
        MemoryRetriever([*DOCUMENTS, DOCUMENTS[0]])


def test_memory_retriever_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    from calibadv.interfaces import Retriever

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Retriever, "retriever")
    config = """
    class_path: calibadv.retrieval.MemoryRetriever
    init_args:
      documents:
        - {id: a, title: A, text: first}
      results: {who: [a]}
      failing: [broken]
      top_k: 1
    """
    retriever = parser.instantiate(parser.parse_args([f"--retriever={config}"])).retriever
    assert retriever.search(["who"], 3)[0][0].document == DOCUMENTS[0]
