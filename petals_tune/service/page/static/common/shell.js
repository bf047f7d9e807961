// What both pages have: the API key, the scheme of colours, and the drawer of small screens.

import { key } from "./api.js";
import { $, icon } from "./dom.js";

const THEMES = ["system", "light", "dark"];

// Asks for the API key; `problem` says why. The page begins anew with what was entered.
export function askKey(problem = "") {
  $("key-problem").textContent = problem;
  $("key-value").value = key.get();
  $("key-forget").hidden = !key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

function keep(value) {
  key.set(value);
  location.reload();
}

function showTheme() {
  const { theme } = document.documentElement.dataset;
  $("theme").replaceChildren(icon("theme"), `Colours: ${theme}`);
}

export function setDrawer(open) {
  document.body.classList.toggle("drawer", open);
  $("menu").setAttribute("aria-expanded", String(open));
  $("page").inert = open;
  if (open) $("sidebar").querySelector("a, button").focus();
}

export function beginShell() {
  $("key").addEventListener("click", () => askKey());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keep($("key-value").value.trim());
  });
  $("key-forget").addEventListener("click", () => keep(""));
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-dialog").addEventListener("keydown", (event) => event.stopPropagation()); // Escape closes it, and does no more
  $("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    dataset.theme = THEMES[(THEMES.indexOf(dataset.theme) + 1) % THEMES.length];
    localStorage.setItem("petals_tune.theme", dataset.theme);
    showTheme();
  });
  showTheme();
  $("menu")?.addEventListener("click", () => setDrawer(true));
  $("shade")?.addEventListener("click", () => setDrawer(false));
  $("sidebar-close")?.addEventListener("click", () => { setDrawer(false); $("menu").focus(); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !document.body.classList.contains("drawer")) return;
    event.preventDefault();
    setDrawer(false);
    $("menu").focus();
  });
}
