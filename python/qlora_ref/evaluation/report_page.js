"use strict";
// Everything written by a model or a judge reaches the page as textContent, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PAGE = 20;
let chosen = [], shown = 0;

function element(tag, className, text) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

function fill(id, values, first) {
  $(id).append(...[first, ...values].map((v, i) => { const o = element("option", "", v); o.value = i ? v : ""; return o; }));
}

// How good a verdict was for a system: the lead of its score, or 1, 0, -1. null: not rated or not taking part.
function lead(v, system) {
  if (v.lead === null) return null;
  return v.a === system ? v.lead : v.b === system ? -v.lead : null;
}

function matches(v) {
  const q = data.questions[v.q], system = $("system").value, against = $("against").value;
  if ($("category").value && q.category !== $("category").value) return false;
  if (system && v.a !== system && v.b !== system) return false;
  if (against && (against === system || (v.a !== against && v.b !== against))) return false;
  const l = system ? lead(v, system) : v.lead, outcome = $("outcome").value;
  if (outcome === "unparsed" && v.lead !== null) return false;
  if (outcome === "tie" && v.lead !== 0) return false;
  if (outcome === "win" && !(l !== null && l > 0)) return false;
  if (outcome === "loss" && !(l !== null && l < 0)) return false;
  const words = $("words").value.toLowerCase();
  return !words || [q.text, data.answers[v.a][v.q], data.answers[v.b][v.q], v.review].some((t) => t.toLowerCase().includes(words));
}

function side(v, system, l, where) {
  const box = element("section", "side" + (l > 0 ? " win" : l < 0 ? " lose" : ""));
  box.append(element("h2", "", system + " (" + where + ")"), element("div", "text", data.answers[system][v.q]));
  return box;
}

function card(v) {
  const q = data.questions[v.q], box = element("article"), head = element("header");
  head.append(element("span", "tag", "question " + q.item + (q.category ? " · " + q.category : "")), element("span", "tag verdict", v.says));
  const sides = element("div", "sides");
  sides.append(side(v, v.a, v.lead, "shown first"), side(v, v.b, v.lead === null ? 0 : -v.lead, "shown second"));
  const judge = element("details");
  judge.append(element("summary", "", "the judge's words"), element("div", "text review", v.review));
  box.append(head, element("div", "question", q.text), sides, judge);
  return box;
}

function more() {
  $("cards").append(...chosen.slice(shown, shown + PAGE).map(card));
  shown = Math.min(shown + PAGE, chosen.length);
  $("more").hidden = shown >= chosen.length;
}

function refresh() {
  const system = $("system").value, order = $("order").value;
  chosen = data.verdicts.filter(matches);
  if (order !== "file") {
    // The lead in this verdict, then the mean lead of the system on the question over all verdicts shown.
    const key = (v) => (system ? lead(v, system) : v.lead);
    const sums = new Map();
    for (const v of chosen) { const k = key(v); if (k !== null) { const s = sums.get(v.q) || [0, 0]; sums.set(v.q, [s[0] + k, s[1] + 1]); } }
    const mean = (v) => sums.get(v.q)[0] / sums.get(v.q)[1];
    const sign = order === "best" ? -1 : 1;
    chosen = chosen.filter((v) => key(v) !== null);
    chosen.sort((x, y) => sign * (key(x) - key(y)) || sign * (mean(x) - mean(y)) || x.q - y.q);
  }
  $("count").textContent = chosen.length + " of " + data.verdicts.length + " verdicts";
  $("cards").replaceChildren();
  shown = 0;
  more();
}

for (const note of data.notes) $("notes").append(element("li", "", note));
if (data.plot) { const image = element("img"); image.src = data.plot; image.alt = "ratings with intervals"; $("plot").append(image); }
fill("category", [...new Set(data.questions.map((q) => q.category).filter(Boolean))], "all");
fill("system", Object.keys(data.answers), "any");
fill("against", Object.keys(data.answers), "any");
fill("outcome", ["win", "loss", "tie", "unparsed"], "any");
for (const select of document.querySelectorAll("select")) select.addEventListener("change", refresh);
$("words").addEventListener("input", refresh);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("more").addEventListener("click", more);
refresh();
