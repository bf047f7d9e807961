// The list of runs; ticked ones are compared.

import { $, make } from "../common/dom.js";

const KINDS = { tinker: "Tinker", job: "tuning", folder: "recipe" };

export const kind = (run) => KINDS[run.kind] ?? run.kind;

export function when(seconds) {
  const past = Date.now() / 1000 - seconds;
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 24 * 3600) return `${Math.floor(past / 3600)} h ago`;
  return new Date(seconds * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

export const state = ({ status }) => make("span", { class: `state ${status}` }, status);

const rows = new Map(); // by id. Rows stay the same elements: a click is lost on one that is replaced in the middle of it.

function newRow(id, compare) {
  const box = make("input", { type: "checkbox", onchange: () => compare(id, box.checked) });
  const link = make("a", { href: `#${encodeURIComponent(id)}` });
  return { box, link, element: make("li", {}, make("label", { class: "tick", title: "Compare" }, box), link), seen: "" };
}

function fill(row, run, isChosen) {
  const facts = `${kind(run)} · ${when(run.created)}`;
  const seen = JSON.stringify([run.name, facts, run.status]);
  if (row.seen !== seen) {
    row.seen = seen;
    row.box.ariaLabel = `Compare ${run.name}`;
    row.link.replaceChildren(make("span", { class: "name" }, run.name), make("span", { class: "faint" }, facts), state(run));
  }
  row.box.checked = isChosen;
  row.link.ariaCurrent = isChosen ? "true" : null;
}

// `selected`: ids; `compare(id, ticked)`.
export function showList(runs, selected, compare) {
  $("compare").hidden = selected.length < 2;
  $("compare").textContent = `Compare ${selected.length} runs`;
  $("compare").href = `#${selected.map(encodeURIComponent).join(",")}`;
  for (const run of runs) {
    if (!rows.has(run.id)) rows.set(run.id, newRow(run.id, compare));
    fill(rows.get(run.id), run, selected.includes(run.id));
  }
  const elements = runs.map(({ id }) => rows.get(id).element);
  const shown = [...$("runs").children];
  if (elements.length !== shown.length || elements.some((each, place) => each !== shown[place])) $("runs").replaceChildren(...elements);
  $("no-runs").hidden = runs.length > 0;
}
