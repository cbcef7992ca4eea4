"""Retrievers, which answer the policy's searches."""

from calibadv.retrieval.bm25 import BM25
from calibadv.retrieval.cached import Cached
from calibadv.retrieval.corpus.base import Corpus
from calibadv.retrieval.dense import Dense
from calibadv.retrieval.hybrid import Hybrid
from calibadv.retrieval.index.open import open_corpus
from calibadv.retrieval.memory import MemoryRetriever
from calibadv.retrieval.remote import Remote
from calibadv.retrieval.reranked import Reranked

__all__ = ["BM25", "Cached", "Corpus", "Dense", "Hybrid", "MemoryRetriever", "Remote", "Reranked", "open_corpus"]
