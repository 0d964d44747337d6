"use strict";
// What people and models write is put into the page as text nodes only, never as HTML.
const by = (id) => document.getElementById(id);
const [model, talk, note, question, send, stop] = ["model", "talk", "note", "question", "send", "stop"].map(by);
let models = [], turns = [], running = null;

function show(role, name) {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "you" : name;
  const text = document.createTextNode("");
  turn.append(who, text);
  talk.append(turn);
  return text;
}

function reset() {
  if (running) running.abort();
  turns = [];
  talk.replaceChildren();
  const chosen = models.find((m) => m.id === model.value);
  note.textContent = chosen && chosen.single_turn ? "This model sees one question at a time." : "";
}

function busy(yes) {
  send.disabled = yes;
  model.disabled = yes;
  stop.disabled = !yes;
}

// Server-sent events, split at blank lines; a piece of a line stays in the buffer until the rest has come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(text) {
  const chosen = models.find((m) => m.id === model.value);
  if (chosen.single_turn) turns = [];
  turns.push({ role: "user", content: text });
  show("user").data = text;
  const answer = show("assistant", chosen.id);
  running = new AbortController();
  busy(true);
  note.textContent = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: chosen.id, messages: turns, stream: true }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      answer.data += event.choices[0].delta.content || "";
      talk.lastElementChild.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "Stopped." : error.message;
  } finally {
    running = null;
    busy(false);
    if (answer.data) turns.push({ role: "assistant", content: answer.data });
    else turns.pop();
  }
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    by("ask").requestSubmit();
  }
});
stop.addEventListener("click", () => running && running.abort());
by("reset").addEventListener("click", reset);
model.addEventListener("change", reset);

fetch("/v1/models")
  .then((response) => response.json())
  .then((list) => {
    models = list.data;
    for (const m of models) {
      const option = document.createElement("option");
      option.value = m.id;
      option.textContent = `${m.id} (${m.adapter ? "adapter, " : ""}${m.weights})`;
      model.append(option);
    }
    reset();
  })
  .catch((error) => { note.textContent = error.message; });
