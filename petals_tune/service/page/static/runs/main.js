// Training runs: their list, the chosen ones, and the form for a new one. The address names what is shown: #ID,ID or #new;
// with #list,ID,ID small screens, which have room for one of them, show the list.

import { json } from "../common/api.js";
import { $, icon, make } from "../common/dom.js";
import { askKey, beginShell } from "../common/shell.js";
import { Detail } from "./detail.js";
import { showList } from "./list.js";
import { tuningForm } from "./tuning.js";

const LIVE_MS = 1500;
const IDLE_MS = 10_000;

let runs = [];
let models = [];
let shown = { name: null, detail: null }; // what stands in the page
let timer = null;
const known = new Map(); // data of runs, by id

const address = () => location.hash.slice(1);
const selected = () => address().split(",").filter((part) => part && part !== "new" && part !== "list").map(decodeURIComponent);
const hasList = () => address() === "" || address().split(",")[0] === "list";
const isSmall = matchMedia("(max-width: 760px)");
const isLive = ({ status }) => status === "running" || status === "queued";

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function failed(error) {
  if (error.status === 401) askKey("This service needs an API key that it knows.");
  else notify(`${error.message} ${error.advice ?? ""}`);
}

function compare(id, ticked) {
  const ids = selected().filter((each) => each !== id);
  if (!selected().length && !isSmall.matches && runs[0].id !== id) ids.push(runs[0].id); // that was shown of itself
  if (ticked) ids.push(id);
  location.hash = [...(isSmall.matches ? ["list"] : []), ...ids.map(encodeURIComponent)].join(",");
}

async function load(id) {
  const run = runs.find((each) => each.id === id);
  const held = known.get(id);
  if (!held || isLive(held) || run?.status !== held.status) known.set(id, await json(`/runs/data/${encodeURIComponent(id)}`));
  return known.get(id);
}

function showForm() {
  if (shown.name === "new") return;
  const form = tuningForm(models, { failed, begun: ({ id }) => { notify(""); location.hash = encodeURIComponent(id); } });
  shown = { name: "new", detail: null };
  $("content").replaceChildren(form);
}

async function showRuns(ids) {
  const name = ids.join(",");
  const found = await Promise.all(ids.map(load));
  if (name !== (selected().join(",") || runs[0]?.id) || address() === "new") return; // another was chosen meanwhile
  if (shown.name !== name) {
    shown = { name, detail: new Detail({ failed, changed: refresh }) };
    $("content").replaceChildren(shown.detail.element);
    $("content").scrollTop = 0;
  }
  shown.detail.update(found, models);
  if (found.length === 1 && found[0].kind === "job") await shown.detail.followEvents(found[0]);
}

function showNothing() {
  shown = { name: "", detail: null };
  $("content").replaceChildren(make("div", { class: "empty" }, icon("petals"), make("h1", {}, "No training run yet"),
    make("p", {}, "Start a tuning from a file of chats, train with Tinker’s SDK, or run a recipe: what they leave is shown here.")));
}

// Asks for what has changed, and shows it; then again, sooner while something runs.
async function refresh() {
  clearTimeout(timer);
  try {
    ({ runs } = await json("/runs/list"));
    models = (await json("/v1/models")).data.map((each) => each.id);
    const ids = selected().length ? selected() : runs.slice(0, 1).map((each) => each.id);
    showList(runs, isSmall.matches ? selected() : address() === "new" ? [] : ids, compare);
    if (address() === "new") showForm();
    else if (ids.length) await showRuns(ids);
    else showNothing();
    if ($("notice").dataset.lost !== undefined) { delete $("notice").dataset.lost; notify(""); }
  } catch (error) {
    failed(error);
    if (error.status === 0) $("notice").dataset.lost = "";
    if (error.status === 404 && selected().length) $("content").replaceChildren();
    if (error.advice === undefined) throw error;
  }
  document.body.classList.toggle("chosen", !hasList());
  clearTimeout(timer);
  if (!document.hidden && !$("key-dialog").open) timer = setTimeout(refresh, runs.some(isLive) ? LIVE_MS : IDLE_MS);
}

beginShell();
$("tune").addEventListener("click", () => { location.hash = "new"; });
$("back").addEventListener("click", () => { location.hash = selected().length > 1 ? `list,${address()}` : ""; });
isSmall.addEventListener("change", refresh);
window.addEventListener("hashchange", () => { notify(""); refresh(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
