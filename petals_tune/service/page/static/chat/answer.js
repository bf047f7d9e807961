// One answer of a model: asked for, followed while it comes, and described.
//
// {model, content, state, tokens, pieces, firstS, seconds, route, error}; its state is "open" while it comes, "whole",
// "long" (cut off at the most tokens), "stopped" or "failed".

import { events, json, request, ServiceError } from "../common/api.js";

export const newAnswer = (model) => ({ model, content: "", state: "open", pieces: 0 });

function body(model, { system, temperature, tokens }, messages) {
  const first = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  return {
    model,
    messages: [...first, ...messages],
    temperature,
    max_completion_tokens: tokens,
    stream: true,
    stream_options: { include_usage: true },
  };
}

// Asks for an answer and writes it into `answer`; `changed` is called after each piece. Raises nothing: errors are
// the answer's.
export async function follow(answer, { settings, messages, signal, changed }) {
  const began = performance.now();
  let first = null;
  try {
    const reply = await request("/v1/chat/completions", { method: "POST", body: body(answer.model, settings, messages), signal });
    let state = "whole";
    for await (const { choices: [choice], usage } of events(reply)) {
      if (usage) answer.tokens = usage.completion_tokens;
      if (choice?.finish_reason === "length") state = "long";
      const piece = choice?.delta?.content;
      if (!piece) continue;
      first ??= performance.now();
      answer.content += piece;
      answer.pieces += 1;
      answer.firstS = (first - began) / 1000;
      answer.seconds = (performance.now() - first) / 1000;
      changed();
    }
    answer.state = state;
    changed();
    answer.route = (await json("/route", { signal }).catch(() => ({}))).route;
  } catch (error) {
    if (error.name === "AbortError") {
      if (answer.state === "open") answer.state = "stopped";
    } else if (error instanceof ServiceError) {
      answer.state = "failed";
      answer.error = { message: error.message, advice: error.advice, status: error.status };
    } else throw error;
  }
  changed();
}

// The line under an answer: speed behind the first token, how long that took, and the way through the swarm.
export function described({ state, tokens, pieces, firstS, seconds, route }) {
  const known = tokens ?? pieces;
  const speed = known > 1 && seconds > 0 ? `${((known - 1) / seconds).toFixed(1)} tokens/s` : null;
  const count = known ? `${known} ${known === 1 ? "token" : "tokens"}` : null;
  const wait = firstS === undefined ? null : `first after ${firstS.toFixed(1)} s`;
  const end = { long: "cut off: raise “Most tokens”", stopped: "stopped" }[state];
  return [end, speed, count, wait, route].filter(Boolean).join(" · ");
}
