"""Retrievers: what answers the policy's searches."""

from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.corpus import read_corpus
from calibadv.retrieval.memory import MemoryRetriever

__all__ = ["BM25", "MemoryRetriever", "read_corpus"]
