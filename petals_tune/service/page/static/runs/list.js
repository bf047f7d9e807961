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

// `selected`: ids; `compare(id, ticked)`.
export function showList(runs, selected, compare) {
  $("compare").hidden = selected.length < 2;
  $("compare").textContent = `Compare ${selected.length} runs`;
  $("compare").href = `#${selected.map(encodeURIComponent).join(",")}`;
  const focused = document.activeElement?.dataset?.focus;
  $("runs").replaceChildren(...runs.map((run) => {
    const { id } = run;
    const chosen = selected.includes(id);
    const box = make("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, "data-focus": `box ${id}`, onchange: ({ target }) => compare(id, target.checked) });
    box.checked = chosen;
    const facts = `${kind(run)} · ${when(run.created)}`;
    const link = make("a", { href: `#${encodeURIComponent(id)}`, "data-focus": `link ${id}` },
      make("span", { class: "name" }, run.name), make("span", { class: "faint" }, facts), state(run));
    if (chosen) link.setAttribute("aria-current", "true");
    return make("li", {}, make("label", { class: "tick", title: "Compare" }, box), link);
  }));
  $("no-runs").hidden = runs.length > 0;
  if (focused) document.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}
