// The form that starts a tuning: a file of chats is checked here, uploaded, and a job begun (OpenAI's interface).

import { json } from "../common/api.js";
import { make } from "../common/dom.js";

// What is wrong with a file of chats, or how many there are. Each line is {"messages": [{"role", "content"}, ...]}.
export function check(text) {
  const lines = text.split("\n").map((line, place) => [line.trim(), place + 1]).filter(([line]) => line);
  if (!lines.length) return { problem: "The file is empty." };
  for (const [line, place] of lines) {
    let found;
    try {
      found = JSON.parse(line);
    } catch {
      return { problem: `Line ${place} is not JSON.` };
    }
    const { messages } = found ?? {};
    if (!Array.isArray(messages) || !messages.every((each) => typeof each?.role === "string")) return { problem: `Line ${place} has no "messages".` };
    if (!messages.some(({ role }) => role === "assistant")) return { problem: `Line ${place} has no answer: a message of the role "assistant".` };
  }
  return { chats: lines.length };
}

const field = (name, label, attributes, hint) =>
  make("label", {}, label, make("input", { id: `tune-${name}`, name, ...attributes }), hint ? make("span", { class: "faint" }, hint) : null);

// `begun(job)`: after the job is accepted; `failed(error)`.
export function tuningForm(models, { begun, failed }) {
  const verdict = make("p", { class: "verdict faint", role: "status" }, "One chat a line: {\"messages\": [{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", \"content\": …}]}");
  const file = field("file", "File of chats (JSONL)", { type: "file", accept: ".jsonl,application/jsonl", required: true });
  const model = make("label", {}, "Model", make("select", { name: "model" }, ...models.map((name) => make("option", { value: name }, name))));
  const start = make("button", { disabled: true }, "Start");
  const form = make("form", { class: "tuning" }, make("h1", {}, "Start a tuning"), file, verdict, model,
    make("div", { class: "row" },
      field("epochs", "Epochs", { type: "number", min: "1", max: "50", step: "1", value: "3" }, "times through the file"),
      field("rate", "Learning rate", { type: "number", min: "0.01", max: "1000", step: "any", value: "1" }, "times the recipe’s own"),
      field("suffix", "Name", { type: "text", pattern: "[A-Za-z0-9_\\-]{1,64}", placeholder: "optional" }, "letters, digits, - and _")),
    make("div", { class: "buttons" }, start));

  form.elements.file.addEventListener("change", async ({ target: { files: [chosen] } }) => {
    const { problem, chats } = chosen ? check(await chosen.text()) : { problem: "No file is chosen." };
    verdict.className = problem ? "verdict problem-text" : "verdict good";
    verdict.textContent = problem ?? `${chats} ${chats === 1 ? "chat" : "chats"}`;
    start.disabled = Boolean(problem);
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    start.disabled = true;
    try {
      begun(await begin(form.elements));
    } catch (error) {
      failed(error);
      start.disabled = false;
    }
  });
  return form;
}

async function begin({ file, model, epochs, rate, suffix }) {
  const upload = new FormData();
  upload.append("purpose", "fine-tune");
  upload.append("file", file.files[0]);
  const { id } = await json("/v1/files", { method: "POST", form: upload });
  const hyperparameters = { n_epochs: Number(epochs.value), learning_rate_multiplier: Number(rate.value) };
  const body = { training_file: id, model: model.value, method: { type: "supervised", supervised: { hyperparameters } } };
  if (suffix.value.trim()) body.suffix = suffix.value.trim();
  return json("/v1/fine_tuning/jobs", { method: "POST", body });
}
