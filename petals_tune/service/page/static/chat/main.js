// The chat: questions to one model, or to two side by side.

import { $, grow, make } from "../common/dom.js";
import { askKey, beginShell, setDrawer } from "../common/shell.js";
import { follow, newAnswer } from "./answer.js";
import { asked, loadModels, readSettings, showSettings, showTemperature } from "./settings.js";
import { showSidebar } from "./sidebar.js";
import * as store from "./store.js";
import { View } from "./view.js";

const running = new Map(); // by the id of a conversation: {conversation, controller, count of answers that come}
let current = store.newConversation();

const view = new View({
  edit(turn, question) {
    stop();
    current.turns.splice(current.turns.indexOf(turn));
    ask(question);
  },
  regenerate(turn, place) {
    turn.answers[place] = newAnswer(asked(current.settings)[place] ?? turn.answers[place].model);
    begin(current, turn, [place]);
  },
});

const sidebar = () => showSidebar(current, {
  open: (id) => { choose(id); setDrawer(false); },
  gone: (id) => { running.get(id)?.controller.abort(); running.delete(id); if (id === current.id) fresh(); else sidebar(); },
  renamed: (id, title) => { if (id === current.id) current.title = title; const live = running.get(id); if (live) live.conversation.title = title; sidebar(); },
  busy: (id) => running.has(id),
});

// The messages for the answer at `place`. A model that joined later goes on from the first one's answers; a turn
// without an answer is left out, since most templates want question and answer by turns.
function messages(conversation, turn, place) {
  const before = conversation.turns.slice(0, conversation.turns.indexOf(turn));
  const heard = before.flatMap(({ question, answers }) => {
    const { content } = answers[place] ?? answers[0];
    return content ? [{ role: "user", content: question }, { role: "assistant", content }] : [];
  });
  return [...heard, { role: "user", content: turn.question }];
}

function keep(conversation) {
  if (!store.save(conversation)) notify("This browser has no room left: delete a chat, or this one is lost when the page is closed.");
}

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// Asks for the answers of a turn at these places, all at once.
async function begin(conversation, turn, places) {
  const live = running.get(conversation.id) ?? { conversation, controller: new AbortController(), count: 0 };
  running.set(conversation.id, live);
  live.count += places.length;
  show();
  keep(conversation);
  sidebar();
  await Promise.all(places.map(async (place) => {
    const answer = turn.answers[place];
    const { settings } = conversation;
    await follow(answer, { settings, messages: messages(conversation, turn, place), signal: live.controller.signal, changed: () => view.update(answer) });
    if (answer.error?.status === 401) askKey("This service does not know the key, or needs one.");
  }));
  live.count -= places.length;
  if (live.count === 0 && running.get(conversation.id) === live) running.delete(conversation.id);
  if (store.find(conversation.id)) keep(conversation); // not where it was deleted meanwhile
  sidebar();
  showButtons();
}

function ask(question) {
  current.settings = readSettings();
  current.changed = Date.now();
  const turn = { question, answers: asked(current.settings).map(newAnswer) };
  current.turns.push(turn);
  history.replaceState(null, "", `#${current.id}`);
  begin(current, turn, turn.answers.map((_, place) => place));
}

function stop() {
  const live = running.get(current.id);
  running.delete(current.id); // answers that are asked for now are stopped apart
  live?.controller.abort();
  showButtons();
}

function showButtons() {
  const busy = running.has(current.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("question").value.trim() || !$("model").value;
}

function show() {
  view.show(current);
  document.title = current.turns.length ? `${store.title(current)} · petals_tune` : "petals_tune";
  $("page").classList.toggle("comparing", Boolean($("beside").value));
  showButtons();
}

function choose(id) {
  const found = running.get(id)?.conversation ?? store.find(id);
  if (!found) return fresh();
  current = found;
  if (!running.has(id)) {
    const left = current.turns.flatMap(({ answers }) => answers).filter(({ state }) => state === "open");
    for (const answer of left) answer.state = "stopped"; // the page was closed
  }
  history.replaceState(null, "", `#${id}`);
  showSettings(current.settings);
  show();
  sidebar();
}

function fresh(settings = readSettings()) {
  current = store.newConversation(settings);
  history.replaceState(null, "", location.pathname);
  showSettings(current.settings);
  show();
  sidebar();
  if (matchMedia("(any-pointer: fine)").matches) $("question").focus(); // elsewhere a keyboard would cover the page
}

function listen() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || running.has(current.id) || !$("model").value) return;
    $("question").value = "";
    grow($("question"));
    ask(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("question").addEventListener("input", () => { grow($("question")); showButtons(); });
  $("stop").addEventListener("click", () => { stop(); $("question").focus(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !event.defaultPrevented) stop(); });
  $("new").addEventListener("click", () => { setDrawer(false); fresh(); });
  $("settings-toggle").addEventListener("click", () => {
    const open = $("settings").hidden;
    $("settings").hidden = !open;
    $("settings-toggle").setAttribute("aria-expanded", String(open));
    showTemperature();
    if (open) $("system").focus();
  });
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("input", showTemperature);
  for (const id of ["model", "beside", "settings"]) {
    $(id).addEventListener("change", () => {
      current.settings = readSettings();
      $("page").classList.toggle("comparing", Boolean($("beside").value));
      if (current.turns.length) keep(current);
    });
  }
  window.addEventListener("hashchange", () => choose(location.hash.slice(1)));
  window.addEventListener("pagehide", () => { for (const { conversation } of running.values()) store.save(conversation); });
  store.follow(sidebar);
}

// The settings that a link names: /?model=NAME&beside=NAME
function linked() {
  const asked = new URLSearchParams(location.search);
  const found = Object.fromEntries(["model", "beside"].filter((name) => asked.has(name)).map((name) => [name, asked.get(name)]));
  return Object.keys(found).length ? found : null;
}

async function start() {
  beginShell();
  listen();
  try {
    await loadModels();
  } catch (error) {
    if (error.status === 401) askKey("This service needs an API key.");
    else notify(`${error.message} ${error.advice}`);
  }
  const settings = linked();
  if (!settings && location.hash) choose(location.hash.slice(1));
  else fresh({ ...store.all()[0]?.settings, ...(settings ?? {}) });
}

start();
