"""A folder of text files as a corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibadv.cli.main import main
from calibadv.errors import UserError
from calibadv.retrieval import BM25
from calibadv.retrieval.corpus.text_folder import PassageSize, cut_passages, read_text_folder


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def test_titles_and_ids(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path, b_md="# The  Title #\n\nAbout Oslo.\n\n## More\n", a_txt="\ufeffplain", c_html="<p>no</p>")
    write(tmp_path / "below", d_TXT="lower words")
    found = read_text_folder(tmp_path, PassageSize())
    assert [(d.id, d.title, d.text) for d in found] == [
        ("a.txt", "a", "plain"),
        ("b.md", "The  Title", "About Oslo. ## More"),
        ("below/d.TXT", "d", "lower words"),
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (4, [(0, 4)]),
        (5, [(0, 4), (3, 5)]),
        (7, [(0, 4), (3, 7)]),
        (8, [(0, 4), (3, 7), (6, 8)]),
    ],
)
def test_passages_overlap(count: int, expected: list[tuple[int, int]]) -> None:
    words = [f"w{n}" for n in range(count)]
    assert list(cut_passages(" ".join(words), PassageSize(4, 1))) == [" ".join(words[a:b]) for a, b in expected]


def test_an_index_of_a_folder(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    write(texts, long_txt=" ".join(f"word{n}" for n in range(20)), a_md="# Oslo\nA city.")
    options = ("--backend", "bm25", "--passage_words", "8", "--passage_overlap", "2")
    assert main(["index", "--corpus", str(texts), "--out", str(tmp_path / "index"), *options]) == 0
    [hits] = BM25(index=str(tmp_path / "index")).search(["word19"], 3)
    assert [(hit.document.id, hit.document.text) for hit in hits] == [
        ("long.txt#3", "word12 word13 word14 word15 word16 word17 word18 word19")
    ]
    [hits] = BM25(corpus=str(texts)).search(["oslo"], 1)  # wherever a corpus is asked for
    assert hits[0].document.text == "A city."


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"and holds no \.txt or \.md file; give another folder"):
        BM25(corpus=str(tmp_path))
    write(tmp_path, a_txt=" \n")
    with pytest.raises(UserError, match="only empty text files"):
        BM25(corpus=str(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"b\.txt' is not UTF-8 \(byte 3\)"):
        BM25(corpus=str(tmp_path))
    with pytest.raises(UserError, match="passage_words is 3 and passage_overlap 3"):
        PassageSize(3, 3)
