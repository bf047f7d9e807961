// Requests to this service, with the API key that this browser keeps.

const KEY = "petals_tune.key";

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

// A name for what is kept in this browser for the user of a key, without the key itself (FNV-1a, 64 bits).
export function owner() {
  let hash = 0xcbf29ce484222325n;
  for (const byte of new TextEncoder().encode(key.get())) hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100000001b3n);
  return hash.toString(36);
}

export class ServiceError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }

  // What a user can do about it.
  get advice() {
    const later = this.retryAfter ? `in ${this.retryAfter} s` : "in a moment";
    if (this.status === 0) return "Is it still running, and this machine online? Then try again.";
    if (this.status === 401) return "Enter a key that this service knows.";
    if (this.code === "model_not_found") return "Choose another model above, and try again.";
    if (this.status === 429) return `Try again ${later}.`;
    if (this.status === 503) return `Servers of the swarm are missing or busy. Try again ${later}.`;
    if (this.status >= 500) return "The log of the service says more.";
    return "";
  }
}

const failed = (error) => ({ message: error?.message ?? "the service refused this", code: error?.code ?? null });

// The answer to a request. Raises ServiceError, and AbortError where `signal` was used.
export async function request(path, { method = "GET", body, form, signal } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: form ?? (body && JSON.stringify(body)) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service does not answer.");
  }
  if (answer.ok) return answer;
  const { message, code } = failed((await answer.json().catch(() => null))?.error);
  throw new ServiceError(message, { status: answer.status, code, retryAfter: answer.headers.get("Retry-After") });
}

export const json = async (path, options) => (await request(path, options)).json();

// Yields the JSON of each server-sent event. Raises ServiceError for a stream that ends before its [DONE].
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      read = { done: true };
    }
    if (read.done) throw new ServiceError("The answer broke off.");
    const parts = (held + read.value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new ServiceError(event.error.message, { status: 500, ...failed(event.error) });
      yield event;
    }
  }
}
