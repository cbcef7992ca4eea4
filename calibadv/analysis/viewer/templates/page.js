// The page around the group: filters, list, legend, keys.
const ROW_HEIGHT = 58; // of .row in style.css
const PAUSE = 200; // milliseconds without a key until a text is looked for
const byId = (id) => document.getElementById(id);
let chosen = []; // the groups that the filters leave
let current = -1; // index in `chosen` of the group that is shown

function update(keys) {
  if (keys.some((key) => FILTERS.includes(key) || key === "sort")) {
    chosen = selectGroups();
    const kept = chosen.reduce((sum, group) => sum + group.kept.filter(Boolean).length, 0);
    const total = DATA.groups.reduce((sum, group) => sum + group.rollouts.length, 0);
    const rollouts = `${plural(kept, "rollout")} of ${total.toLocaleString("en")}`;
    byId("count").textContent = `${rollouts} in ${plural(chosen.length, "group")}`;
    byId("rows").style.height = `${chosen.length * ROW_HEIGHT}px`;
    byId("list").scrollTop = 0;
    current = Math.max(0, chosen.findIndex((group) => (state.group ? String(group.index) === state.group : opens(group))));
  }
  showControls();
  showGroup(current);
}

/** True for a group to open first: one whose scores differ. */
function opens(group) {
  return state.sort !== "file" || group.spread > 0;
}

function change(values) {
  Object.assign(state, values);
  update(Object.keys(values));
}

function showGroup(index) {
  current = Math.min(Math.max(index, 0), chosen.length - 1);
  const group = chosen[current];
  state.group = group ? String(group.index) : "";
  renderGroup(group);
  scrollToRow(current);
  renderRows();
  writeAddress();
}

/** Only the rows in view are in the document. */
function renderRows() {
  const [list, rows] = [byId("list"), byId("rows")];
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 3);
  const last = Math.min(chosen.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 6);
  rows.replaceChildren(...chosen.slice(first, last).map((group, offset) => rowElement(group, first + offset)));
}

function rowElement(group, index) {
  const row = make("div", {
    class: "row", role: "option", title: group.question, "aria-selected": String(index === current),
    "aria-setsize": String(chosen.length), "aria-posinset": String(index + 1),
  },
  make("div", {}, group.question),
  make("div", { class: "meta" }, scoresElement(group), make("span", {}, rowFigures(group))));
  row.style.top = `${index * ROW_HEIGHT}px`;
  row.addEventListener("click", () => showGroup(index));
  return row;
}

function rowFigures(group) {
  const sortedBy = state.sort === "spread" || state.sort === "change" ? state.sort : "mean";
  const file = DATA.filesShareSteps ? ` · ${runOf(DATA.files[group.file])}` : "";
  return `step ${group.step} · ${sortedBy} ${figure(group[sortedBy])}${file}`;
}

/** The run, where the file is one of its rollouts: the step stands beside it. */
function runOf(file) {
  return file.replace(/\/rollouts\/[^/]*$/, "");
}

/** A bar per rollout, filled up to its score. */
function scoresElement(group) {
  return make("span", { class: "scores", "aria-hidden": "true" }, ...group.rollouts.slice(0, COLUMNS).map((rollout) => {
    const bar = make("i", { class: rollout.status === "search_failed" ? "failed" : null });
    bar.style.setProperty("--filled", `${isNumber(rollout.score) ? Math.round(100 * rollout.score) : 0}%`);
    return bar;
  }));
}

function scrollToRow(index) {
  const list = byId("list");
  const top = index * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
}

function showControls() {
  for (const key of ["text", "in", "min", "max", "step", "file", "sort"]) {
    if (byId(key) !== document.activeElement || byId(key).value.trim() !== state[key]) byId(key).value = state[key];
  }
  byId("only").checked = state.only !== "";
  byId("docs").checked = state.docs !== "";
  for (const radio of byId("show").querySelectorAll("input")) radio.checked = radio.value === state.show;
  const picked = state.status.split(",");
  for (const button of byId("statuses").children) button.ariaPressed = String(picked.includes(button.name));
  byId("theme").textContent = `Theme: ${state.theme || "system"}`;
  byId("legend").hidden = state.legend === "";
  byId("help").setAttribute("aria-expanded", String(state.legend !== ""));
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
}

function fillControls() {
  const steps = [...new Set(DATA.groups.map((group) => group.step))].sort((a, b) => a - b).map(String);
  fillSelect("step", steps);
  fillSelect("file", DATA.files);
  const counts = {};
  for (const { rollouts } of DATA.groups) for (const { status } of rollouts) counts[status] = (counts[status] ?? 0) + 1;
  byId("statuses").append(...DATA.statuses.filter(({ name }) => counts[name]).map(({ name, meaning: title }) => {
    const button = make("button", { type: "button", name, title }, `${name} ${counts[name].toLocaleString("en")}`);
    button.addEventListener("click", () => toggleStatus(name));
    return button;
  }));
  byId("show").disabled = !DATA.hasAdvantages;
  byId("scale").hidden = !DATA.hasAdvantages;
  byId("scale").append(`−${figure(DATA.limit)}`, make("i", {}), `+${figure(DATA.limit)}`);
  byId("legend").append(...legendParts());
}

function fillSelect(id, values) {
  byId(id).append(make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
}

function toggleStatus(name) {
  const picked = new Set(state.status.split(",").filter(Boolean));
  if (!picked.delete(name)) picked.add(name);
  change({ status: [...picked].join(",") });
}

function legendParts() {
  const colours = DATA.hasAdvantages
    ? "Orange turns are made less likely, blue ones more likely. Beyond the ends of the scale the colour stays. "
      + "Difference is calibrated minus estimated."
    : "These files hold no advantages.";
  return [
    make("div", {}, make("h2", {}, "Advantage of a turn"),
      ...[colours, ...DATA.notes].map((note) => make("p", { class: "note" }, note))),
    make("div", {}, make("h2", {}, "Statuses"), pairs(DATA.statuses.map(({ name, meaning: text }) => [name, text]))),
    make("div", {}, make("h2", {}, "Marks"), pairs(Object.entries(MARKS))),
    make("div", {}, make("h2", {}, "Keys"), pairs([
      ["j, →", "next group"], ["k, ←", "previous group"], ["a", "estimated, calibrated, difference"],
      ["d", "open or close documents"], ["/", "look for a text"], ["?", "this legend"],
    ])),
  ];
}

function pairs(entries) {
  return make("dl", {}, ...entries.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
}

function nextChoice(key) {
  const choices = CHOICES[key];
  change({ [key]: choices[(choices.indexOf(state[key]) + 1) % choices.length] });
}

const KEYS = {
  j: () => showGroup(current + 1), ArrowRight: () => showGroup(current + 1),
  k: () => showGroup(current - 1), ArrowLeft: () => showGroup(current - 1),
  a: () => { if (DATA.hasAdvantages) nextChoice("show"); },
  d: () => change({ docs: state.docs ? "" : "open" }),
  "/": () => byId("text").focus(),
  "?": () => change({ legend: state.legend ? "" : "open" }),
};

function listen() {
  let waiting = 0;
  byId("text").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => change({ text: event.target.value.trim() }), PAUSE);
  });
  for (const key of ["in", "min", "max", "step", "file", "sort"]) {
    byId(key).addEventListener("change", (event) => change({ [key]: event.target.value }));
  }
  byId("only").addEventListener("change", (event) => change({ only: event.target.checked ? "yes" : "" }));
  byId("docs").addEventListener("change", (event) => change({ docs: event.target.checked ? "open" : "" }));
  byId("show").addEventListener("change", (event) => change({ show: event.target.value }));
  byId("reset").addEventListener("click", () => change(Object.fromEntries(FILTERS.map((key) => [key, DEFAULTS[key]]))));
  byId("theme").addEventListener("click", () => nextChoice("theme"));
  byId("help").addEventListener("click", KEYS["?"]);
  byId("list").addEventListener("scroll", () => requestAnimationFrame(renderRows));
  addEventListener("resize", renderRows);
  addEventListener("hashchange", () => { readAddress(); update(FILTERS); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") document.activeElement.blur();
    const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]), select");
    if (typing || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault(); // of the list, which would scroll
    KEYS[event.key]();
  });
}

fillControls();
listen();
readAddress();
update(FILTERS);
