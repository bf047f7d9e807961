// Conversations, kept in this browser, each under a name of its own: two windows do not overwrite each other's.
//
// A conversation is {id, title, changed, settings, turns}; a turn {question, answers}, with an answer for each model
// that was asked; an answer {model, content, state, ...} (answer.js).

import { owner } from "../common/api.js";

const PREFIX = `petals_tune.chat.${owner()}.`;

export const DEFAULTS = { model: "", beside: "", system: "", temperature: 0.7, tokens: 256 };

export const newConversation = (settings = {}) => ({
  id: `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`,
  title: "",
  changed: Date.now(),
  settings: { ...DEFAULTS, ...settings },
  turns: [],
});

export const title = ({ title: given, turns }) => given || turns[0]?.question.trim().slice(0, 60) || "New chat";

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

// All conversations, latest first.
export const all = () =>
  Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .map(read)
    .filter((found) => found?.turns?.length)
    .sort((one, other) => other.changed - one.changed);

export const find = (id) => read(PREFIX + id);

// False where the browser has no room left; the conversation goes on, and is lost when the page is closed.
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export const remove = (id) => localStorage.removeItem(PREFIX + id);

// Calls `changed` when another window changes conversations.
export const follow = (changed) =>
  window.addEventListener("storage", ({ key }) => { if (key === null || key.startsWith(PREFIX)) changed(); });
