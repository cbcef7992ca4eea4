// The state of the view. It is kept in the fragment of the address, so that a view can be shared and restored.
const DEFAULTS = {
  text: "", in: "all", status: "", min: "", max: "", step: "", file: "", sort: "file",
  only: "", docs: "", show: "calibrated", theme: "", legend: "", group: "",
};
const FILTERS = ["text", "in", "status", "min", "max", "step", "file"];
const CHOICES = {
  in: ["all", "question", "policy", "documents"],
  sort: ["file", "mean", "spread", "change"],
  show: ["estimated", "calibrated", "difference"],
  theme: ["", "light", "dark"],
};
const state = { ...DEFAULTS };

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(DEFAULTS)) {
    const value = given.get(key);
    state[key] = value !== null && isKnown(key, value) ? value : DEFAULTS[key];
  }
}

function isKnown(key, value) {
  if (key === "min" || key === "max") return Number.isFinite(Number(value));
  return !(key in CHOICES) || CHOICES[key].includes(value);
}

function writeAddress() {
  const changed = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
}

/** The groups with a rollout that all filters keep, sorted; each gets `kept`, one boolean per rollout. */
function selectGroups() {
  const keeps = rolloutFilter();
  const groups = DATA.groups.filter((group) => {
    const fits = (state.step === "" || String(group.step) === state.step)
      && (state.file === "" || DATA.files[group.file] === state.file);
    if (!fits) return false;
    group.kept = keeps(group);
    return group.kept.includes(true);
  });
  return sorted(groups);
}

function sorted(groups) {
  const direction = state.sort === "mean" ? 1 : -1;
  const worth = (group) => group[state.sort] ?? direction * Infinity; // groups without a value come last
  if (state.sort === "file") return groups;
  return groups.sort((a, b) => (worth(a) === worth(b) ? 0 : direction * (worth(a) - worth(b))) || a.index - b.index);
}

function rolloutFilter() {
  const statuses = state.status ? new Set(state.status.split(",")) : null;
  const bounded = state.min !== "" || state.max !== "";
  const low = state.min === "" ? -Infinity : Number(state.min);
  const high = state.max === "" ? Infinity : Number(state.max);
  const says = textFilter();
  return (group) => {
    const asked = says.question(group);
    return group.rollouts.map((rollout) =>
      (!statuses || statuses.has(rollout.status))
      && (!bounded || (isNumber(rollout.score) && rollout.score >= low && rollout.score <= high))
      && (asked || says.rollout(rollout)));
  };
}

/** Predicates for a question and for a rollout that contain the text of the filter, ignoring case. */
function textFilter() {
  if (!state.text.trim()) return { question: () => true, rollout: () => true };
  const literal = state.text.trim().replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&");
  const pattern = new RegExp(literal.replace(/\s+/g, "\\s+"), "i");
  const looksIn = (index) => state.in === "all" || state.in === index;
  const documents = DATA.documents.map((parts) => looksIn("documents") && parts.some((part) => pattern.test(part)));
  return {
    question: (group) => looksIn("question")
      && [group.question, group.id, group.source, ...group.golden].some((part) => pattern.test(part)),
    rollout: (rollout) => rollout.turns.some(([message, , seen]) =>
      (looksIn("policy") && pattern.test(message))
      || (Array.isArray(seen) && seen.some((index) => documents[index]))),
  };
}
