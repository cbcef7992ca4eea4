"use strict";

const form = document.getElementById("form");
const input = document.getElementById("question");
const button = document.getElementById("ask");
const answers = document.getElementById("answers");

const ENDS = {
  truncated: "No answer: a message, or the rollout, became too long.",
  invalid: "Not a valid rollout: a message does not keep the format.",
  out_of_turns: "No answer: the agent went on searching.",
};

function add(parent, tag, text, kind) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  parent.append(element);
  return element;
}

function addDocuments(card, documents) {
  if (!documents.length) add(card, "p", "nothing found", "waiting");
  for (const document_ of documents) {
    const details = add(card, "details", "");
    add(details, "summary", document_.title || document_.id);
    add(details, "p", document_.text);
  }
}

// Shows one event of a question in its card; thinks come in pieces.
function show(card, state, event) {
  if (event.kind === "think") {
    const text = state.think ? event.text : event.text.trimStart();
    if (!text) return;
    state.think ??= add(card, "p", "", "think");
    state.think.textContent += text;
    return;
  }
  state.think = null;
  if (event.kind === "documents") addDocuments(card, event.content);
  else if (event.kind === "search" || event.kind === "answer") add(card, "p", event.text, event.kind);
  else if (event.kind === "error") add(card, "p", event.text, "note");
  else if (ENDS[event.text]) add(card, "p", ENDS[event.text], "note");
}

async function ask(question) {
  const card = document.createElement("article");
  add(card, "h2", question);
  answers.prepend(card);
  const waiting = add(card, "p", "...", "waiting");
  const state = { think: null };
  const response = await fetch("/ask", { method: "POST", body: question });
  if (!response.ok) throw new Error("the server answered " + response.status);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      show(card, state, JSON.parse(line));
      card.append(waiting);
    }
  }
  waiting.remove();
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = input.value.trim();
  if (!question) return;
  button.disabled = true;
  input.value = "";
  try {
    await ask(question);
  } catch (error) {
    add(answers.firstElementChild, "p", String(error.message), "note");
  } finally {
    button.disabled = false;
    input.focus();
  }
});

// A question behind # is asked when the page opens, so that it can be linked to.
if (location.hash.length > 1) {
  input.value = decodeURIComponent(location.hash.slice(1));
  form.requestSubmit();
}
