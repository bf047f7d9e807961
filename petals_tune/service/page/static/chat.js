// The chat: one question to one model, or to two side by side.

import { events, json, key, request } from "./api.js";
import { Conversations, title } from "./conversations.js";

const $ = (id) => document.getElementById(id);
const columns = [...document.querySelectorAll(".column")];
const conversations = new Conversations();
let running = null; // an AbortController while answers come

const models = () => [$("model").value, $("beside").value].filter(Boolean);

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showTurn(column, turn, number) {
  const shown = element("div", `turn ${turn.error ? "error" : turn.role}`, turn.error ?? turn.content);
  if (turn.role === "user" && !turn.error) {
    const edit = element("button", "quiet", "Edit");
    edit.addEventListener("click", () => editFrom(number));
    shown.append(edit);
  }
  if (turn.route) shown.append(element("span", "route", turn.route));
  columns[column].append(shown);
  return shown;
}

function show() {
  const { current } = conversations;
  const two = models().length > 1;
  $("columns").classList.toggle("two", two);
  columns.forEach((column, number) => {
    column.hidden = number > 0 && !two;
    column.replaceChildren();
    if (two) column.append(element("h2", "", models()[number] ?? ""));
    current.columns[number].forEach((turn, place) => showTurn(number, turn, place));
    column.scrollTop = column.scrollHeight;
  });
  $("conversations").replaceChildren(
    ...conversations.all.map((each) => {
      const item = element("li", each === current ? "current" : "");
      const open = element("button", "", title(each));
      open.addEventListener("click", () => { stop(); conversations.choose(each.id); restore(); closeMenu(); });
      const remove = element("button", "remove", "×");
      remove.setAttribute("aria-label", `Delete ${title(each)}`);
      remove.addEventListener("click", () => { if (each === current) stop(); conversations.remove(each.id); restore(); });
      item.append(open, remove);
      return item;
    }),
  );
}

function restore() {
  const { settings } = conversations.current;
  for (const id of ["model", "beside", "temperature", "tokens", "system"]) {
    if (settings[id] === undefined) continue;
    const known = $(id).tagName !== "SELECT" || [...$(id).options].some((option) => option.value === settings[id]);
    if (known) $(id).value = settings[id];
  }
  show();
}

function keepSettings() {
  const { current } = conversations;
  for (const id of ["model", "beside", "temperature", "tokens", "system"]) current.settings[id] = $(id).value;
  conversations.save();
}

function editFrom(number) {
  stop();
  const { current } = conversations;
  $("question").value = current.columns[0][number]?.content ?? "";
  current.columns = current.columns.map((turns) => turns.slice(0, number));
  conversations.save();
  show();
  $("question").focus();
}

async function answer(column, model, turns, signal) {
  const system = $("system").value.trim();
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []),
      ...turns.filter((turn) => !turn.error).map(({ role, content }) => ({ role, content }))],
    temperature: Number($("temperature").value),
    max_completion_tokens: Number($("tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  const turn = { role: "assistant", content: "" };
  turns.push(turn);
  const shown = showTurn(column, turn);
  shown.classList.add("waiting");
  const text = document.createTextNode("");
  shown.prepend(text);
  const began = performance.now();
  let first = null;
  try {
    const reply = await request("/v1/chat/completions", { method: "POST", body, signal });
    let usage = null;
    for await (const event of events(reply)) {
      const piece = event.choices[0]?.delta?.content ?? "";
      if (piece && first === null) first = performance.now();
      turn.content += piece;
      text.data = turn.content;
      usage = event.usage ?? usage;
      const { parentNode: box } = shown;
      if (box && box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
    }
    turn.route = await described(model, usage, began, first);
  } catch (error) {
    if (error.name === "AbortError") turn.route = "stopped";
    else if (turn.content) turn.route = `broke off: ${error.message}`;
    else turn.error = error.message;
    if (error.status === 401) askKey();
  }
  shown.classList.remove("waiting");
}

async function described(model, usage, began, first) {
  const seconds = (performance.now() - (first ?? began)) / 1000;
  const speed = usage && seconds > 0 ? `${(usage.completion_tokens / seconds).toFixed(1)} tokens/s` : "";
  const route = await json("/route").then((found) => found.route, () => "");
  return [speed, route].filter(Boolean).join(" · ");
}

async function ask(question) {
  const { current } = conversations;
  keepSettings();
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  const asked = models();
  asked.forEach((_, column) => current.columns[column].push({ role: "user", content: question }));
  show();
  await Promise.all(asked.map((model, column) => answer(column, model, current.columns[column], running.signal)));
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  conversations.save();
  show();
}

function stop() {
  running?.abort();
}

function closeMenu() {
  $("sidebar").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
}

function askKey() {
  $("key-value").value = key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function begin() {
  try {
    const { data } = await json("/v1/models");
    const names = data.map((each) => each.id);
    $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    $("beside").replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
  } catch (error) {
    if (error.status === 401) askKey();
    else columns[0].append(element("div", "turn error", error.message));
  }
  restore();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running || !$("model").value) return;
  $("question").value = "";
  $("question").style.height = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("question").addEventListener("input", ({ target }) => {
  target.style.height = "";
  target.style.height = `${target.scrollHeight}px`;
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => { stop(); conversations.begin({ ...conversations.current.settings }); restore(); closeMenu(); });
$("menu").addEventListener("click", () => {
  const open = $("sidebar").classList.toggle("open");
  $("menu").setAttribute("aria-expanded", String(open));
});
$("settings").addEventListener("change", () => { keepSettings(); show(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("click", askKey);
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "save") return;
  key.set($("key-value").value.trim());
  begin();
});
begin();
