// The turns of a conversation as elements.

import { $, copy, grow, icon, iconButton, make } from "../common/dom.js";
import { described } from "./answer.js";
import { rendered } from "./text.js";

// `actions`: edit(turn, text), regenerate(turn, place).
export class View {
  constructor(actions) {
    this.actions = actions;
    this.shown = new WeakMap(); // of an answer: its element
    this.waiting = new Set(); // answers that have changed since the last frame
    this.followed = true; // whether the end of the conversation is kept in sight
    const turns = $("turns");
    turns.addEventListener("scroll", () => {
      this.followed = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
    }, { passive: true });
  }

  show({ turns }) {
    $("turns").replaceChildren(
      ...(turns.length ? [make("div", { class: "turn-list" }, ...turns.map((turn) => this.turn(turn, turn === turns.at(-1))))] : [this.nothing()]),
    );
    this.followed = true;
    this.toEnd();
  }

  nothing() {
    const hint = "Enter sends, Shift+Enter begins a new line, Escape stops an answer. Chats stay in this browser.";
    return make("div", { class: "empty" }, icon("petals"), make("h1", {}, "What shall we talk about?"), make("p", {}, hint));
  }

  turn(turn, last) {
    const answers = turn.answers.map((answer, place) => this.answer(turn, answer, place, last));
    return make("article", { class: turn.answers.length > 1 ? "turn two" : "turn" }, this.question(turn),
      make("div", { class: "answers" }, ...answers));
  }

  question(turn) {
    const text = make("div", { class: "text" }, turn.question);
    const edit = iconButton("edit", "Edit and send again", () => box.replaceWith(this.editor(turn, box)));
    const box = make("div", { class: "question" }, make("div", { class: "actions" }, copyButton("Copy question", turn.question), edit), text);
    return box;
  }

  editor(turn, box) {
    const field = make("textarea", { "aria-label": "Question", rows: "2" });
    field.value = turn.question;
    const leave = () => { form.replaceWith(box); box.querySelector(".actions button:last-child").focus(); };
    const form = make("form", { class: "editor" }, field,
      make("div", { class: "buttons" }, make("button", { type: "button", class: "plain", onclick: leave }, "Cancel"), make("button", {}, "Send again")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(turn, field.value.trim());
    });
    field.addEventListener("input", () => grow(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    requestAnimationFrame(() => { grow(field); field.focus(); });
    return form;
  }

  answer(turn, answer, place, last) {
    // A screen reader reads an answer that comes, once it is whole; not those that are shown again.
    const element = make("section", { class: "answer", "aria-label": `Answer of ${answer.model}`, "aria-live": "polite" });
    this.shown.set(answer, { element, again: last ? () => this.actions.regenerate(turn, place) : null });
    this.fill(answer);
    return element;
  }

  // Shows an answer as far as it has come, in the next frame.
  update(answer) {
    if (!this.waiting.size) {
      requestAnimationFrame(() => {
        const changed = [...this.waiting];
        this.waiting.clear();
        changed.forEach((each) => this.fill(each));
        this.toEnd();
      });
    }
    this.waiting.add(answer);
  }

  fill(answer) {
    const found = this.shown.get(answer);
    if (!found) return;
    const { element, again } = found;
    const open = answer.state === "open";
    const text = make("div", { class: "text" }, rendered(answer.content));
    element.setAttribute("aria-busy", String(open));
    element.dataset.state = answer.state;
    element.replaceChildren(make("h2", {}, answer.model), text);
    if (open) (text.lastElementChild?.matches("p") ? text.lastElementChild : text).append(make("span", { class: "caret" }));
    if (answer.error) element.append(problem(answer.error));
    const line = described(answer);
    const buttons = open ? [] : [
      answer.content ? copyButton("Copy answer", answer.content) : null,
      again ? iconButton("again", "Answer again", again) : null,
    ];
    element.append(make("footer", {}, make("span", { class: "facts" }, line), make("span", { class: "actions" }, ...buttons)));
  }

  toEnd() {
    if (this.followed) $("turns").scrollTop = $("turns").scrollHeight;
  }
}

const copyButton = (label, text) => iconButton("copy", label, ({ currentTarget }) => copy(text, currentTarget));

const problem = ({ message, advice }) =>
  make("div", { class: "problem", role: "alert" }, make("strong", {}, message), advice ? make("span", {}, advice) : null);
