// The list of conversations: open, rename, delete.

import { $, carefulButton, iconButton, make } from "../common/dom.js";
import { all, find, remove, save, title } from "./store.js";

// `actions`: open(id), gone(id), renamed(id, title); `busy(id)`: whether an answer comes there.
export function showSidebar(current, { open, gone, renamed, busy }) {
  const kept = all();
  $("conversations").replaceChildren(...kept.map((each) => item(each, each.id === current.id, { open, gone, renamed, busy })));
  $("no-conversations").hidden = kept.length > 0;
}

function item(conversation, isCurrent, { open, gone, renamed, busy }) {
  const { id } = conversation;
  const name = title(conversation);
  const link = make("a", { href: `#${id}`, title: name, onclick: (event) => { event.preventDefault(); open(id); } }, name);
  if (isCurrent) link.setAttribute("aria-current", "true");
  const rename = iconButton("edit", `Rename ${name}`, () => row.replaceChildren(renaming(conversation, renamed)));
  const drop = carefulButton("delete", `Delete ${name}`, "Delete?", () => { remove(id); gone(id); });
  const row = make("li", { class: busy(id) ? "busy" : "" }, link, ...(isCurrent ? [rename, drop] : []));
  return row;
}

function renaming(conversation, renamed) {
  const field = make("input", { "aria-label": "Name of this chat", maxlength: "80" });
  field.value = title(conversation);
  let kept = true;
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    kept = event.key === "Enter";
    field.blur();
  });
  field.addEventListener("blur", () => {
    const name = kept ? field.value.trim() : conversation.title;
    const found = find(conversation.id);
    if (found) save({ ...found, title: name });
    renamed(conversation.id, name);
  });
  requestAnimationFrame(() => field.select());
  return field;
}
