// Requests to this service, with the API key that this browser keeps.

const KEY = "petals_tune.key";

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function request(path, { method = "GET", body, form, signal } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, signal, body: form ?? (body && JSON.stringify(body)) });
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => null);
  throw new ServiceError(answer.status, found?.error?.message ?? `${answer.status} ${answer.statusText}`);
}

export const json = async (path, options) => (await request(path, options)).json();

// Yields the JSON of each server-sent event until [DONE].
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new ServiceError(event.error.code ?? 500, event.error.message);
      yield event;
    }
  }
}
