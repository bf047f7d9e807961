// Which models are asked, and how: the fields, and their values in a conversation.

import { json } from "../common/api.js";
import { $, grow, make } from "../common/dom.js";
import { DEFAULTS } from "./store.js";

const option = (value, text = value) => make("option", { value }, text);

// The names of the models that are offered now. Raises ServiceError.
export async function loadModels() {
  const names = (await json("/v1/models")).data.map((each) => each.id);
  $("model").replaceChildren(...names.map((name) => option(name)));
  $("beside").replaceChildren(option("", "Compare with …"), ...names.map((name) => option(name)));
  return names;
}

const offered = (select, name) => [...select.options].some((each) => each.value === name);

// Shows the settings of a conversation; a model that is gone gives way to the first.
export function showSettings(settings) {
  for (const id of ["model", "beside"]) {
    if (offered($(id), settings[id])) $(id).value = settings[id];
    else $(id).selectedIndex = 0;
  }
  $("system").value = settings.system;
  $("temperature").value = settings.temperature;
  $("tokens").value = settings.tokens;
  showTemperature();
}

export function showTemperature() {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(1);
  grow($("system"));
}

export function readSettings() {
  const tokens = Math.round(Number($("tokens").value));
  return {
    model: $("model").value,
    beside: $("beside").value,
    system: $("system").value,
    temperature: Number($("temperature").value),
    tokens: tokens >= 1 ? tokens : DEFAULTS.tokens,
  };
}

export const asked = ({ model, beside }) => [model, beside].filter(Boolean);
