from __future__ import annotations

import html.parser
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.records import answer, rollout, search

from calibadv.analysis.viewer.command import render, script_safe, view
from calibadv.analysis.viewer.data import ViewerData, status_descriptions
from calibadv.runs.rollouts import rollout_to_json, write_records
from calibadv.types import Rollout, RolloutStatus

HOSTILE = (
    "</script><!--<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">\u2028&lt;"
)
MINUS = "\N{MINUS SIGN}"
GOLD = {"supporting_ids": ["a", "z"]}
GOOD = rollout(search("a", "b"), answer("gold"), score=1.0, answer_score=1.0, step_correctness=(1.0,), metadata=GOLD)
BAD = rollout(search("a", "x"), answer("no"), sample=1, step_correctness=(0.5,), answer_score=0.0, metadata=GOLD)
GROUP = [rollout_to_json(GOOD, [0.7, 0.7], [0.7, 1.4]), rollout_to_json(BAD, [-0.7, -0.7], [-0.35, -0.7])]


def of_question(number: int, record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return record | {"question_id": f"q{number}", "question": f"what is number {number}?"} | changes


def data_of(folder: Path, records: list[dict[str, Any]], name: str = "train.jsonl") -> dict[str, Any]:
    write_records(folder / name, records)
    data = ViewerData()
    data.add_file(folder / name, name)
    return data.as_json()


# --- what the page holds


def test_a_group_with_its_evidence(tmp_path: Path) -> None:
    data = data_of(tmp_path, GROUP)
    [group] = data["groups"]
    assert [document[0] for document in data["documents"]] == ["a", "b", "x"]  # a, seen twice, stands once
    assert group["silver"] == [0, 1]  # those of the rollout with score 1
    assert group["gold"] == [["a", [0]], ["z", []]]
    good, bad = group["rollouts"]
    assert [turn[2] for turn in good["turns"]] == [[0, 1], None]
    assert (bad["turns"][0][2], bad["correctness"]) == ([0, 2], [0.5])
    assert (good["answer"], good["f1"], bad["answer"], bad["f1"]) == ("gold", 1.0, "no", 0.0)
    assert (bad["estimated"], bad["calibrated"]) == ([-0.7, -0.7], [-0.35, -0.7])


def test_gold_documents_may_be_named_by_title(tmp_path: Path) -> None:
    [group] = data_of(tmp_path, [GROUP[0] | {"metadata": {"supporting_titles": ["T b"]}}])["groups"]
    assert group["gold"] == [["T b", [1]]]


def test_the_scale_ends_where_99_of_100_advantages_do(tmp_path: Path) -> None:
    records = [rollout_to_json(GOOD, [1.0, 1.0], [-1.0, 3.0])]
    # sizes 1 1 1 3: the quantile lies at 0.99 x 3 = 2.97, which is 1 + 0.97 x (3 - 1)
    assert data_of(tmp_path, records)["limit"] == pytest.approx(2.94)


def test_groups_are_those_of_one_step_of_one_file(tmp_path: Path) -> None:
    write_records(tmp_path / "one.jsonl", [*GROUP, GROUP[0] | {"step": 1}])
    write_records(tmp_path / "two.jsonl", GROUP)
    data = ViewerData()
    for name in ("one", "two"):
        data.add_file(tmp_path / f"{name}.jsonl", name)
    groups = data.as_json()["groups"]
    assert [(g["file"], g["step"], len(g["rollouts"])) for g in groups] == [(0, 0, 2), (0, 1, 1), (1, 0, 2)]
    assert groups[2]["rollouts"][0]["turns"][0][2] == [0, 1]  # the same documents


def test_validation_has_neither_evidence_nor_advantages(tmp_path: Path) -> None:
    data = data_of(tmp_path, [rollout_to_json(replace(GOOD, step_correctness=()))])
    [group] = data["groups"]
    assert (group["silver"], group["rollouts"][0]["correctness"], data["limit"]) == ([], [], None)
    assert data["notes"] == ["train.jsonl holds no advantages: calibadv replay computes them."]


def test_what_is_not_recorded_is_computed(tmp_path: Path) -> None:
    computed = ("score", "answer_score", "step_correctness", "status", "advantages")
    bare = [{key: value for key, value in record.items() if key not in computed} for record in GROUP]
    data = data_of(tmp_path, bare)
    assert [r["score"] for r in data["groups"][0]["rollouts"]] == [1.0, 0.0]
    assert [r["correctness"] for r in data["groups"][0]["rollouts"]] == [[1.0], [0.5]]
    assert "scored here by F1" in data["notes"][0]


def test_a_recorded_score_stays(tmp_path: Path) -> None:
    [group] = data_of(tmp_path, [GROUP[0] | {"score": 0.25}])["groups"]
    assert (group["rollouts"][0]["score"], group["rollouts"][0]["f1"]) == (0.25, 1.0)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    data = data_of(tmp_path, [rollout_to_json(GOOD, [float("nan"), 1.0], [float("inf"), 1.0])])
    [shown] = data["groups"][0]["rollouts"]
    assert (shown["estimated"], shown["calibrated"], data["limit"]) == (["nan", 1.0], ["inf", 1.0], 1.0)
    assert json.loads(script_safe(data)) == data


@pytest.mark.parametrize("status", RolloutStatus)
def test_every_status_is_explained(status: RolloutStatus) -> None:
    assert re.fullmatch(r"[A-Z][^`]+\.", status_descriptions()[status])


# --- texts of strangers


@given(st.text(st.characters(exclude_categories=())), st.sampled_from(["", "</script>", "<!--", "\u2029", "\ud800"]))
def test_no_text_ends_the_element(text: str, hostile: str) -> None:
    value = {"text": f"{text}{hostile}{text}"}
    written = script_safe(value)
    assert not set("<\u2028\u2029") & set(written)
    assert json.loads(written.encode("utf-8")) == value


def test_the_page_loads_nothing() -> None:
    page = render(ViewerData().as_json())
    assert not re.search(r"\b(?:src|href)=|url\(|https?:|innerHTML|insertAdjacentHTML", page)


# --- mistakes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"train\.jsonl' is empty; it needs at least one rollout"),
        ("[1]\n", "is not a JSON object but list"),
        ('{"question_id": "q"}\n', "line 1: prepend_think is missing"),
        (json.dumps(GROUP[0] | {"advantages": [1]}), "question 'q', sample 0, step 0: advantages is not an object"),
        (json.dumps(rollout_to_json(GOOD, [1.0])), "estimated must be one number for each of the 2 policy segments"),
        (json.dumps(GROUP[0] | {"advantages": {"calibrated": [1, "2"]}}), "calibrated must be one number for each"),
        (json.dumps(GROUP[0] | {"step_correctness": [0, 0]}), "has 2 values and the rollout 1 search turns"),
    ],
)
def test_bad_input_leaves_the_page_as_it_was(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "view.html").write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        view([tmp_path / "train.jsonl"], tmp_path / "view.html")
    assert (tmp_path / "view.html").read_text(encoding="utf-8") == "old"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' does not exist"):
        view([tmp_path / "nowhere.jsonl"], tmp_path / "view.html")
    with pytest.raises(ValueError, match="names no file; give at least one"):
        view([], tmp_path / "view.html")
    assert not any(tmp_path.iterdir())


def test_out_is_neither_a_folder_nor_a_rollout_file(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", GROUP)
    with pytest.raises(ValueError, match=r"is a folder; give a file, such as .*view\.html"):
        view([tmp_path / "train.jsonl"], tmp_path)
    with pytest.raises(ValueError, match="is one of the rollout files"):
        view([tmp_path / "train.jsonl"], tmp_path / "." / "train.jsonl")
    assert len((tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", GROUP)
    (tmp_path / "view.html").write_text("old", encoding="utf-8")
    (tmp_path / "view.html.partial").mkdir()  # where it would be written first
    with pytest.raises(OSError, match="partial"):
        view([tmp_path / "train.jsonl"], tmp_path / "view.html")
    assert (tmp_path / "view.html").read_text(encoding="utf-8") == "old"


# --- in a browser


@dataclass
class Element:
    """An element of the document that the browser made."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, name: str) -> list[Element]:
        """Those below with this tag or class."""
        return [e for e in self.walk() if name == e.tag or name in (e.attributes.get("class") or "").split()]

    def texts(self, name: str) -> list[str]:
        return [element.text for element in self.all(name)]

    def by_id(self, name: str) -> Element:
        return next(element for element in self.walk() if element.attributes.get("id") == name)


class Tree(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Element("", {})]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


Browse = Callable[..., Element]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Browse:
    """Open a page of records at an address.

    ``then`` is JavaScript that runs afterwards; unless ``guarded``, without the page's policy, which would forbid it.
    """

    def opened(
        files: dict[str, list[dict[str, Any]]], address: str = "", then: str = "", guarded: bool = False
    ) -> Element:
        folder = tmp_path_factory.mktemp("page")
        for name, records in files.items():
            write_records(folder / name, records)
        page = folder / "view.html"
        view([folder / name for name in files], page)
        text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{then}</script></body>")
        if then and not guarded:
            text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        page.write_text(text, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        command = [chromium, *options, f"{page.as_uri()}#{address}"]
        shown = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode("utf-8")
        return Tree(shown).open[0]

    return opened


def numbered(count: int) -> list[dict[str, Any]]:
    return [of_question(number, record) for number in range(count) for record in GROUP]


def test_a_group_is_shown_side_by_side(browse: Browse) -> None:
    page = browse({"train.jsonl": GROUP})
    good, bad = page.all("rollout")
    assert page.by_id("count").text == "2 rollouts of 2 in 1 group"
    assert "golden answer gold" in page.all("facts")[0].text
    assert "gold documents T a (found by 2), z (found by 0)" in page.all("facts")[0].text
    assert "#0answeredscore 1.00F1 1.00EM 1answer gold" in good.text
    # calibrated: a positive answer turn grew, and half the penalty of a search is gone
    assert bad.texts("advantage") == [f"{MINUS}0.35", f"{MINUS}0.70"]
    assert good.texts("advantage") == ["+0.70", "+1.40"]
    assert f"({MINUS}0.70 → {MINUS}0.35)correctness 0.50" in bad.texts("turn")[0]
    assert [t.attributes["class"] for t in [*good.all("turn"), *bad.all("turn")]] == [
        "turn positive",
        "turn positive",
        "turn negative",
        "turn negative",
    ]
    assert bad.texts("summary") == ["T asilvergold", "T x"]
    assert all("open" not in details.attributes for details in page.all("details"))
    assert "about x" in bad.texts("document")[1]


def test_the_address_chooses_what_colours_and_what_is_open(browse: Browse) -> None:
    page = browse({"train.jsonl": GROUP}, "show=difference&docs=open&theme=dark")
    assert page.texts("advantage") == ["0.00", "+0.70", "+0.35", "0.00"]
    assert [turn.attributes["class"].split()[1:] for turn in page.all("turn")] == [[], ["positive"], ["positive"], []]
    assert all("open" in details.attributes for details in page.all("details"))
    assert page.all("html")[0].attributes["data-theme"] == "dark"


def test_the_page_opens_where_rollouts_differ(browse: Browse) -> None:
    tied = [of_question(7, record, score=0.0) for record in GROUP]
    files = {"train.jsonl": [*tied, *GROUP]}
    chosen = [row.attributes["aria-selected"] for row in browse(files).all("row")]
    assert chosen == ["false", "true"]
    assert [row.attributes["aria-selected"] for row in browse(files, "group=0").all("row")] == ["true", "false"]


def test_files_that_share_steps_are_told_apart(browse: Browse) -> None:
    page = browse({"grpo/train.jsonl": GROUP, "calibadv/train.jsonl": GROUP})
    assert [meta.text.split(" · ")[-1] for meta in page.by_id("rows").all("meta")] == [
        "grpo/train.jsonl",
        "calibadv/train.jsonl",
    ]
    assert "jsonl" not in browse({"train.jsonl": numbered(2)}).by_id("rows").text


def test_filters_keep_groups_and_fade_the_other_rollouts(browse: Browse) -> None:
    broken = rollout_to_json(rollout(search("a"), search("b"), sample=1))
    files = {
        "train.jsonl": [*numbered(2), of_question(2, GROUP[0]), of_question(2, broken)],
        "later.jsonl": [record | {"step": 9} for record in numbered(2)],
    }
    page = browse(files, "status=invalid")
    assert page.by_id("count").text == "1 rollout of 10 in 1 group"
    assert [r.attributes["class"] for r in page.all("rollout")] == ["rollout other", "rollout"]
    assert page.by_id("statuses").text == "invalid 1answered 9"
    page = browse(files, "step=9&max=0.5&text=NUMBER+1&in=question&only=yes")
    assert page.by_id("count").text == "1 rollout of 10 in 1 group"
    assert [r.attributes["aria-label"] for r in page.all("rollout")] == ["rollout 1"]
    page = browse(files, "file=train.jsonl&text=about+x&in=documents")
    assert page.by_id("count").text == "2 rollouts of 10 in 2 groups"
    page = browse(files, "text=nowhere")
    assert page.by_id("count").text == "0 rollouts of 10 in 0 groups"
    assert "No rollout is left by the filters" in page.by_id("group").text


def test_groups_are_sorted(browse: Browse) -> None:
    def scored(number: int, *scores: float, moved: float) -> list[dict[str, Any]]:
        advantages = {"estimated": [0.0, 0.0], "calibrated": [moved, 0.0]}
        return [of_question(number, GROUP[0], sample=n, score=s, advantages=advantages) for n, s in enumerate(scores)]

    files = {"train.jsonl": [*scored(0, 1, 1, moved=0.2), *scored(1, 0, 1, moved=-0.9), *scored(2, 0, 0.5, moved=0.1)]}
    choose = """
      const select = document.getElementById("sort");
      const orders = ["mean", "spread", "change", "file"].map((order) => {
        select.value = order;
        select.dispatchEvent(new Event("change"));
        return [...document.querySelectorAll(".row")].map((row) => row.title.match(/[0-9]/)[0]).join("");
      });
      document.title = orders.join(" ");"""
    # means 1 1/2 1/4, spreads 0 1 1/2, changes 0.2 0.9 0.1
    assert browse(files, "sort=spread", then=choose).texts("title") == ["210 120 102 012"]
    assert browse(files, "sort=change").all("row")[0].attributes["title"] == "what is number 1?"


def test_only_what_is_in_view_is_in_the_document(browse: Browse) -> None:
    files = {"train.jsonl": [*numbered(500), *(GROUP[0] | {"sample": sample} for sample in range(100))]}
    page = browse(files, "group=500")
    assert page.by_id("count").text == "1,100 rollouts of 1,100 in 501 groups"
    assert page.all("row")[-1].attributes["aria-posinset"] == "501"
    assert 0 < len(page.all("row")) < 50
    assert len(page.all("rollout")) == 16  # of the 100 of one group
    assert "rollouts 1 to 16 of 100" in page.by_id("group").text


def test_ten_thousand_rollouts_stay_few_elements_wherever_one_looks(browse: Browse) -> None:
    look = """
      window.requestAnimationFrame = (draw) => draw();  // without a window no frame is due
      const list = document.getElementById("list");
      const seen = [0.3, 0.7, 1, 0].map((share) => {
        list.scrollTop = share * list.scrollHeight;
        list.dispatchEvent(new Event("scroll"));
        const first = document.querySelector(".row").getAttribute("aria-posinset");
        return [Number(first), document.querySelectorAll("*").length];
      });
      document.title = JSON.stringify(seen);"""
    page = browse({"train.jsonl": numbered(5000)}, then=look)
    assert page.by_id("count").text == "10,000 rollouts of 10,000 in 5,000 groups"
    seen = json.loads(page.all("title")[0].text)
    third, two_thirds, end, start = (place for place, _ in seen)
    assert start == 1 < third < two_thirds < end
    assert end > 4900
    assert max(elements for _, elements in seen) < 1000


def test_keys_go_to_the_next_and_the_previous_group(browse: Browse) -> None:
    def press(keys: str) -> str:
        event = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))"
        return f"for (const key of {json.dumps(list(keys))}) {event}; document.title = location.hash;"

    page = browse({"train.jsonl": numbered(4)}, then=press("jjjjkad"))  # the last group stays the last
    assert page.all("title")[0].text == "#docs=open&show=difference&group=2"
    assert page.by_id("group").texts("h2") == ["what is number 2?"]


def test_texts_of_strangers_are_texts(browse: Browse) -> None:
    evil = rollout(search("a", think=HOSTILE), answer(HOSTILE), golden=[HOSTILE], data_source=HOSTILE)
    record = rollout_to_json(evil, [1.0, 1.0], [1.0, 1.0]) | {"question": HOSTILE, "question_id": HOSTILE}
    record["metadata"] = {"supporting_titles": [HOSTILE]}
    record["segments"][1]["documents"] = [{"id": HOSTILE, "title": HOSTILE, "text": HOSTILE}]
    page = browse({"train.jsonl": [record]}, "docs=open")
    assert page.texts("title") == ["Rollouts"]
    assert page.all("img") == []
    assert HOSTILE in page.by_id("group").all("h2")[0].text
    assert [HOSTILE in text for text in page.texts("said")] == [True, True]
    assert page.all("document")[0].all("p")[0].text == HOSTILE


def test_the_page_runs_no_other_script(browse: Browse) -> None:
    files = {"train.jsonl": GROUP}
    assert browse(files, then="document.title = 'ran'").texts("title") == ["ran"]
    assert browse(files, then="document.title = 'ran'", guarded=True).texts("title") == ["Rollouts"]


def test_rollouts_without_advantages(browse: Browse, shared: Path) -> None:
    lines = (shared / "vectors" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    page = browse({"calibration.jsonl": records}, "legend=open")
    assert page.by_id("count").text.startswith("529 rollouts of 529")
    assert page.all("advantage") == []
    assert "disabled" in page.by_id("show").attributes
    assert "calibration.jsonl holds no advantages: calibadv replay computes them." in page.by_id("legend").text
    for meaning in status_descriptions().values():
        assert meaning in page.by_id("legend").text


def test_a_failed_search_has_no_advantage(browse: Browse) -> None:
    failed: Rollout = rollout([search("a")[0]], status=RolloutStatus.SEARCH_FAILED, sample=2)
    page = browse({"train.jsonl": [*GROUP, rollout_to_json(failed)]})
    assert "search_failed" in page.all("rollout")[2].text
    assert "no advantage" in page.all("rollout")[2].text
    assert "mean score 0.50" in page.all("facts")[0].text  # of the other two
