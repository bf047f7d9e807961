// The text of a model as elements: paragraphs, lists, headings, code. Links and markup stay the text that they are.

import { copy, iconButton, make } from "../common/dom.js";

const FENCE = /^ {0,3}```\s*([\w+#.-]*)\s*$/;
const ITEM = /^\s*(?:([-*•])|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;

// `code` and **strong words** of a line.
function inline(text) {
  return text.split(INLINE).filter(Boolean).map((part) => {
    if (INLINE.test(part) && part.startsWith("`")) return make("code", {}, part.slice(1, -1));
    if (INLINE.test(part)) return make("strong", {}, part.slice(2, -2));
    return part;
  });
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const button = iconButton("copy", "Copy code", ({ currentTarget }) => copy(text, currentTarget));
  return make("div", { class: "code" }, make("div", { class: "code-bar" }, make("span", {}, language), button),
    make("pre", { tabindex: "0" }, make("code", {}, text)));
}

function list(items) {
  const [first] = items;
  const ordered = first[2] !== undefined;
  const made = make(ordered ? "ol" : "ul", {}, ...items.map((item) => make("li", {}, ...inline(item[3]))));
  if (ordered) made.start = Number(first[2]);
  return made;
}

// Code that has no end yet goes to the end of the text: answers are shown while they come.
export function rendered(text) {
  const shown = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  const take = (accept) => {
    const begin = at;
    while (at < lines.length && accept(lines[at])) at += 1;
    return lines.slice(begin, at);
  };
  const isText = (line) => line.trim() && !FENCE.test(line) && !ITEM.test(line) && !HEADING.test(line);
  while (at < lines.length) {
    const line = lines[at];
    if (FENCE.test(line)) {
      at += 1;
      shown.append(codeBlock(take((each) => !FENCE.test(each)), line.match(FENCE)[1]));
      at += 1;
    } else if (HEADING.test(line)) {
      at += 1;
      shown.append(make("p", { class: "heading" }, ...inline(line.match(HEADING)[1])));
    } else if (ITEM.test(line)) {
      const ordered = line.match(ITEM)[2] !== undefined;
      const found = take((each) => ITEM.test(each) && (each.match(ITEM)[2] !== undefined) === ordered);
      shown.append(list(found.map((each) => each.match(ITEM))));
    } else if (line.trim()) {
      shown.append(make("p", {}, ...inline(take(isText).join("\n"))));
    } else at += 1;
  }
  return shown;
}
