// Conversations, kept in this browser. A conversation has one list of turns for each column.

const NAME = "petals_tune.conversations";

export class Conversations {
  constructor() {
    try {
      this.all = JSON.parse(localStorage.getItem(NAME)) ?? [];
    } catch {
      this.all = [];
    }
    if (!this.all.length) this.begin();
    this.current = this.all[0];
  }

  begin(settings = {}) {
    const conversation = { id: crypto.randomUUID?.() ?? String(Date.now()), settings, columns: [[], []] };
    this.all.unshift(conversation);
    this.current = conversation;
    this.save();
    return conversation;
  }

  choose(id) {
    this.current = this.all.find((each) => each.id === id) ?? this.current;
  }

  remove(id) {
    this.all = this.all.filter((each) => each.id !== id);
    if (!this.all.length) this.begin();
    if (!this.all.includes(this.current)) this.current = this.all[0];
    this.save();
  }

  save() {
    try {
      localStorage.setItem(NAME, JSON.stringify(this.all));
    } catch {
      // The browser's room is full: this page goes on, and forgets the conversation when it is closed.
    }
  }
}

export const title = (conversation) =>
  conversation.columns[0].find((turn) => turn.role === "user")?.content.slice(0, 60) || "New conversation";
