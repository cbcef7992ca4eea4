// One group on the page: its question, and its rollouts side by side.
const COLUMNS = 16; // a file may call everything one group
const MARKS = {
  silver: "retrieved by the best rollouts of the group, if their score is at least 0.7",
  gold: "named by the question's metadata",
  correctness: "share of silver documents among a search's, those of earlier turns left out; 0 for repetitions and in "
    + "invalid rollouts",
  "answer alone": "score of the answer without regard to the format",
  "bars in the list": "a bar per rollout, filled up to its score; dashed: search failed",
  faded: "rollouts that the filters do not keep",
};

function renderGroup(group, start = firstKept(group)) {
  const article = document.getElementById("group");
  if (!group) {
    const why = DATA.groups.length ? "No rollout is left by the filters. Reset shows all." : "There are no rollouts.";
    article.replaceChildren(make("p", { class: "note" }, why));
    return;
  }
  const shown = group.rollouts.map((_, row) => row).filter((row) => !state.only || group.kept[row]);
  const columns = shown.slice(start, start + COLUMNS).map((row) => rolloutElement(group, row));
  const side = make("div", { class: "columns" }, ...columns);
  const head = [make("h2", {}, group.question), groupFacts(group), pager(group, shown.length, start)];
  article.replaceChildren(make("div", { class: "asked" }, ...head), side);
  const wanted = side.querySelector(".rollout:not(.other)");
  if (wanted) side.scrollLeft = wanted.offsetLeft - side.firstChild.offsetLeft;
}

/** Start of the page of columns with the first rollout that the filters keep. */
function firstKept(group) {
  const row = group && !state.only ? group.kept.indexOf(true) : 0;
  return row - (row % COLUMNS);
}

function groupFacts(group) {
  const gold = group.gold.map(([label, indexes]) => {
    const title = indexes.length ? DATA.documents[indexes[0]][1] || label : label;
    const found = group.rollouts.filter((rollout) => rollout.turns.some(([, , seen]) =>
      Array.isArray(seen) && seen.some((index) => indexes.includes(index)))).length;
    return `${title} (found by ${found})`;
  });
  return make("div", { class: "facts" },
    fact("golden answer", group.golden.join(" / ")),
    fact("question", group.id),
    group.source ? fact("source", group.source) : null,
    fact("step", String(group.step)),
    fact("file", DATA.files[group.file]),
    fact("rollouts", String(group.rollouts.length)),
    group.rollouts.length > 1 ? fact("mean score", figure(group.mean)) : null,
    group.change !== null ? fact("largest change", figure(group.change)) : null,
    group.rollouts.length > 1 ? fact("silver documents", String(group.silver.length)) : null,
    gold.length ? fact("gold documents", gold.join(", ")) : null);
}

function fact(name, value) {
  return make("span", {}, `${name} `, make("b", {}, value));
}

function pager(group, total, start) {
  if (total <= COLUMNS) return null;
  const step = (text, to) => {
    const button = make("button", { type: "button", disabled: to < 0 || to >= total }, text);
    button.addEventListener("click", () => renderGroup(group, to));
    return button;
  };
  const last = Math.min(start + COLUMNS, total);
  return make("p", { class: "facts" },
    step("‹", start - COLUMNS), `rollouts ${start + 1} to ${last} of ${total}`, step("›", start + COLUMNS));
}

function rolloutElement(group, row) {
  const rollout = group.rollouts[row];
  const alone = rollout.answer_score === rollout.score ? null : rollout.answer_score;
  const last = rollout.turns.length - 1;
  const kind = group.kept[row] ? "rollout" : "rollout other";
  return make("section", { class: kind, "aria-label": `rollout ${rollout.sample}` },
    make("header", {},
      make("div", { class: "figures" },
        make("b", {}, `#${rollout.sample}`),
        make("span", { class: `pill ${rollout.status}`, title: meaning(rollout.status) }, rollout.status),
        make("span", {}, "score ", make("b", {}, figure(rollout.score))),
        make("span", {}, `F1 ${figure(rollout.f1)}`),
        make("span", {}, `EM ${figure(rollout.em, 0)}`),
        alone === null ? null : note(`answer alone ${figure(alone)}`, MARKS["answer alone"])),
      make("div", { class: "figures" }, "answer ",
        rollout.answer ? make("b", {}, rollout.answer) : note(rollout.answer === null ? "none" : "empty"))),
    ...rollout.turns.flatMap((turn, index) => turnElements(group, rollout, index, index === last)));
}

function note(text, title = null) {
  return make("span", { class: "note", title }, text);
}

function meaning(status) {
  return DATA.statuses.find(({ name }) => name === status)?.meaning ?? "";
}

function turnElements(group, rollout, index, last) {
  const [message, tokens, seen] = rollout.turns[index];
  const value = advantage(rollout, index, state.show);
  const kind = isNumber(value) && figure(value) !== "0.00" ? (value > 0 ? "positive" : "negative") : "";
  const element = make("div", { class: `turn ${kind}` },
    make("header", {},
      make("span", {}, last ? "answer turn" : `search ${index + 1}`),
      DATA.hasAdvantages ? advantageElement(rollout, index, value) : null,
      last ? null : correctnessElement(group, rollout, index),
      make("span", { class: "quiet" }, plural(tokens, "token"))),
    messageElement(message, rollout.prepended));
  if (kind) element.style.setProperty("--strength", `${Math.round(60 * Math.min(1, Math.abs(value) / DATA.limit))}%`);
  return seen === null ? [element] : [element, observationElement(group, seen)];
}

function advantageElement(rollout, index, value) {
  if (rollout.estimated === null && rollout.calibrated === null) return note("no advantage");
  const [before, after] = ["estimated", "calibrated"].map((show) => signed(advantage(rollout, index, show)));
  return make("span", { title: "advantage: before → after calibration" },
    make("span", { class: "advantage" }, signed(value)),
    make("span", { class: "quiet" }, before === after ? " not changed" : ` (${before} → ${after})`));
}

function correctnessElement(group, rollout, index) {
  const value = rollout.correctness[index];
  if (value === undefined || value === null) return null; // a turn whose tools find no documents
  return make("span", { title: MARKS.correctness }, `correctness ${figure(value)}`);
}

/** The message with its tags set apart; what stands in a search or answer block is bold. */
function messageElement(message, prepended) {
  const box = make("div", { class: "said" });
  const title = "written by the environment, not trained";
  if (prepended) box.append(make("span", { class: "written", title }, "<think>"));
  let acting = false;
  for (const part of message.split(/(<\/?(?:think|search|information|answer)>)/)) {
    if (/^<\/?(?:think|search|information|answer)>$/.test(part)) {
      acting = part === "<search>" || part === "<answer>";
      box.append(make("span", { class: "tag" }, part));
    } else if (part) {
      box.append(acting ? make("span", { class: "act" }, part) : part);
    }
  }
  return box;
}

function observationElement(group, seen) {
  if (typeof seen === "string") {
    return make("div", { class: "observation" },
      make("details", { open: state.docs !== "" },
        make("summary", {}, "no documents"),
        make("p", { class: "said" }, seen.trim())));
  }
  const gold = group.gold.flatMap(([, indexes]) => indexes);
  return make("div", { class: "observation" }, ...seen.map((index) => {
    const [id, title, text] = DATA.documents[index];
    return make("details", { class: "document", open: state.docs !== "" },
      make("summary", { title: `document ${id}` }, title || id,
        group.silver.includes(index) ? mark("silver") : null,
        gold.includes(index) ? mark("gold") : null),
      make("p", {}, text));
  }));
}

function mark(kind) {
  return make("span", { class: kind, title: MARKS[kind] }, kind);
}
