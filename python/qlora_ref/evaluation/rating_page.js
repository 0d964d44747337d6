"use strict";
// Answers reach the page as text only. The server never sends the names of the systems.
const $ = (id) => document.getElementById(id);
let task = null, busy = false;

async function call(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

function show(next) {
  task = next.task;
  $("progress").textContent = next.done + " of " + next.total + " rated" + (task ? "" : ". All done, thank you: you can close this page.");
  $("task").hidden = !task;
  if (!task) return;
  for (const part of ["question", "left", "right"]) $(part).textContent = task[part];
  window.scrollTo(0, 0);
}

async function answer(score) {
  if (!task || busy) return;
  busy = true;
  try {
    show(await call("/answer", { id: task.id, score }));
    $("error").textContent = "";
  } catch (error) {
    $("error").textContent = "Not saved: " + error.message + ". Choose again to retry.";
  } finally {
    busy = false;
  }
}

for (const button of document.querySelectorAll("button")) button.addEventListener("click", () => answer(Number(button.dataset.score)));
document.addEventListener("keydown", (event) => {
  if (["1", "2", "3"].includes(event.key) && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey) answer(Number(event.key));
});
call("/next").then(show).catch((error) => { $("error").textContent = error.message; });
