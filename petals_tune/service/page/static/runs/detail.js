// One run, or several compared: facts, curves, replies, events, and what can be done with them.

import { json, request } from "../common/api.js";
import { icon, make } from "../common/dom.js";
import { Chart } from "./chart.js";
import { kind, state, when } from "./list.js";
import { charts, last } from "./metrics.js";
import { number } from "./scale.js";

const JOBS = "/v1/fine_tuning/jobs";
const unfinished = ({ status }) => status === "running" || status === "queued";

export class Detail {
  // `failed(error)`, `changed()`.
  constructor({ failed, changed }) {
    Object.assign(this, { failed, changed, drawn: new Map() });
    this.head = make("header", { class: "run-head" });
    this.main = make("div", { class: "charts" });
    this.rest = make("div", { class: "charts" });
    this.more = make("details", { class: "more", hidden: true }, make("summary", {}, "More curves"), this.rest);
    this.replies = make("section", { class: "replies", hidden: true });
    this.log = make("section", { class: "log", hidden: true });
    this.element = make("div", { class: "detail" }, this.head, this.main, this.replies, this.log, this.more);
  }

  // `models`: the names that can be chatted with, the base first.
  update(runs, models) {
    const now = JSON.stringify([runs, models]);
    if (now === this.last) return;
    this.last = now;
    this.models = models;
    this.showHead(runs);
    this.showCharts(runs);
    this.showReplies(runs.length > 1 ? [] : runs[0].replies);
  }

  // Buttons stay the same elements while only curves and replies grow: a click would be lost on a button that is replaced.
  showHead(runs) {
    const [{ curves, replies, ...facts }] = runs;
    const now = JSON.stringify(runs.length > 1 ? runs : [facts, !Object.keys(curves).length, this.models]);
    if (now === this.headed) return;
    this.headed = now;
    this.head.replaceChildren(...(runs.length > 1 ? this.compared(runs) : this.one(runs[0])));
  }

  one(run) {
    const facts = [["Kind", kind(run)], ["Base model", run.base_model], ["Started", when(run.created)]];
    return [
      make("div", { class: "title" }, make("h1", {}, run.name), state(run)),
      make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
      run.error ? make("p", { class: "problem", role: "alert" }, run.error) : null,
      make("div", { class: "buttons" }, ...this.actions(run)),
      Object.keys(run.curves).length ? null : make("p", { class: "faint" }, unfinished(run) ? "No curve yet: the first step is being computed." : "This run left no curves."),
    ].filter(Boolean);
  }

  actions(run) {
    const actions = [];
    if (run.adapter && this.models.includes(run.name)) {
      const base = this.models.includes(run.base_model) ? run.base_model : this.models[0];
      const link = `/?${new URLSearchParams({ model: base, beside: run.name })}`;
      actions.push(make("a", { class: "button", href: link }, icon("chat"), "Chat with it"));
    }
    if (run.adapter) actions.push(make("button", { type: "button", class: "plain", title: "Download the adapter in PEFT’s format", onclick: () => this.download(run) }, icon("download"), "Adapter"));
    if (run.kind === "job" && unfinished(run)) actions.push(make("button", { type: "button", class: "plain", onclick: () => this.cancel(run) }, "Cancel"));
    return actions;
  }

  compared(runs) {
    const main = charts(runs).filter((chart) => chart.main).map(({ name }) => name);
    const metrics = [...new Set(runs.flatMap(({ curves }) => Object.keys(curves)))].filter((metric) => main.includes(metric.split("/").at(-1)));
    const cell = ({ curves }, metric) => { const found = last(curves[metric] ?? []); return found ? number(found[1]) : "–"; };
    return [
      make("div", { class: "title" }, make("h1", {}, `${runs.length} runs compared`)),
      make("div", { class: "table" }, make("table", {},
        make("thead", {}, make("tr", {}, ...["Run", "State", ...metrics.map((name) => `last ${name}`)].map((text) => make("th", { scope: "col" }, text)))),
        make("tbody", {}, ...runs.map((run, place) => make("tr", {},
          make("th", { scope: "row" }, make("div", {}, make("i", { class: `swatch series-${1 + (place % 6)}`, "aria-hidden": "true" }), run.name)),
          make("td", {}, state(run)), ...metrics.map((name) => make("td", {}, cell(run, name)))))))),
    ];
  }

  showCharts(runs) {
    const found = charts(runs);
    for (const { name, title, unit, main, series } of found) {
      if (!this.drawn.has(name)) {
        const chart = new Chart(title, unit);
        this.drawn.set(name, chart);
        (main ? this.main : this.rest).append(chart.element);
      }
      this.drawn.get(name).update(series);
    }
    this.more.hidden = !this.rest.childElementCount;
  }

  // By prompt: what the model said to it at each step.
  showReplies(replies) {
    this.replies.hidden = !replies.length;
    const prompts = [...new Set(replies.map(({ prompt }) => prompt))];
    this.replies.replaceChildren(make("h2", {}, "Replies during training"), ...prompts.map((prompt) =>
      make("article", {}, make("div", { class: "prompt" }, prompt), make("ol", {}, ...replies.filter((each) => each.prompt === prompt).map(({ step, reply }) =>
        make("li", {}, make("span", { class: "faint" }, `step ${step}`), make("div", {}, reply)))))));
  }

  async followEvents(run) {
    const { data } = await json(`${JOBS}/${encodeURIComponent(run.id)}/events?limit=100`); // the latest, latest first
    const now = JSON.stringify(data);
    if (now === this.said) return;
    this.said = now;
    this.log.hidden = !data.length;
    this.log.replaceChildren(make("h2", {}, "Events, latest first"), make("ol", {}, ...data.map(({ created_at: at, level, message }) =>
      make("li", { class: level }, make("time", { class: "faint" }, new Date(at * 1000).toLocaleTimeString()), make("span", {}, message)))));
  }

  async cancel(run) {
    try {
      await request(`${JOBS}/${encodeURIComponent(run.id)}/cancel`, { method: "POST" });
      this.changed();
    } catch (error) {
      this.failed(error);
    }
  }

  // A link would come without the API key: the file is fetched, and saved from here.
  async download(run) {
    try {
      const file = await (await request(`/runs/data/${encodeURIComponent(run.id)}/adapter.zip`)).blob();
      const link = make("a", { href: URL.createObjectURL(file), download: `${run.name.replace(/[^\w.-]+/g, "-")}.zip` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    } catch (error) {
      this.failed(error);
    }
  }
}
