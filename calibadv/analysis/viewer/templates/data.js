"use strict";

// The form of the data is described in calibadv/analysis/viewer/data.py. All of its texts are untrusted: they reach the
// document as text nodes and attributes only, never as HTML.
const DATA = readData();

function readData() {
  const element = document.getElementById("data");
  const data = JSON.parse(element.textContent);
  element.remove(); // tens of megabytes that nobody reads again
  data.groups.forEach((group, index) => Object.assign(group, { index }, summary(group)));
  data.hasAdvantages = data.limit !== null;
  data.filesShareSteps = shareSteps(data.groups);
  return data;
}

/** True if two files hold the same step, so that a step alone does not identify the file. */
function shareSteps(groups) {
  const files = new Map();
  for (const { step, file } of groups) if (files.set(step, files.get(step) ?? file).get(step) !== file) return true;
  return false;
}

/** Statistics to sort by, without scores that are not numbers and rollouts that are not trained. */
function summary(group) {
  let [count, total, lowest, highest, change] = [0, 0, Infinity, -Infinity, null];
  for (const rollout of group.rollouts) {
    if (isNumber(rollout.score) && rollout.status !== "search_failed") {
      count += 1;
      total += rollout.score;
      lowest = Math.min(lowest, rollout.score);
      highest = Math.max(highest, rollout.score);
    }
    for (let turn = 0; turn < rollout.turns.length; turn += 1) {
      const moved = advantage(rollout, turn, "difference");
      if (isNumber(moved)) change = Math.max(change ?? 0, Math.abs(moved));
    }
  }
  return { mean: count ? total / count : null, spread: count ? highest - lowest : null, change };
}

/** Advantage of a turn: a number, a string if it is not finite, or null if there is none. */
function advantage(rollout, turn, show) {
  if (show !== "difference") return rollout[show]?.[turn] ?? null;
  const [before, after] = [advantage(rollout, turn, "estimated"), advantage(rollout, turn, "calibrated")];
  return isNumber(before) && isNumber(after) ? after - before : null;
}

function isNumber(value) {
  return typeof value === "number";
}

function figure(value, digits = 2) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

function signed(value) {
  const text = figure(value);
  return isNumber(value) && Number(value.toFixed(2)) > 0 ? `+${text}` : text;
}

function plural(count, name) {
  return `${count.toLocaleString("en")} ${name}${count === 1 ? "" : "s"}`;
}

/** Make an element: attributes by name, then children; a child that is a string becomes text. */
function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
