// Elements. Whatever comes from a model or a user becomes text, never markup.

export const $ = (id) => document.getElementById(id);

// An element with attributes, listeners (`onclick: f`) and children; text that is given as a child stays text.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const icon = (name) =>
  svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `/static/icons.svg#${name}` }));

// A button that shows an icon; `label` is its name for everybody who does not see it.
export const iconButton = (name, label, onclick, attributes = {}) =>
  make("button", { type: "button", class: "quiet icon-only", title: label, "aria-label": label, onclick, ...attributes }, icon(name));

// A button that asks once more before it does what cannot be taken back.
export function carefulButton(name, label, question, act) {
  const button = iconButton(name, label, () => {
    if (button.dataset.sure === undefined) {
      button.dataset.sure = "";
      button.replaceChildren(question);
    } else act();
  });
  button.addEventListener("blur", () => {
    delete button.dataset.sure;
    button.replaceChildren(icon(name));
  });
  return button;
}

// Over plain HTTP from another machine a page has no clipboard: there the text is selected in a field and copied.
export async function copy(text, button) {
  const written = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (!written) {
    const field = make("textarea", { class: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.replaceChildren(icon("done"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

// Lets a text field grow with its text.
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}
