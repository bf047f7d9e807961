// Which curves stand in one chart, and in what unit: by the names that recipes and the gateway give them.

const UNITS = [
  [/\/loss$/, "nats per token"],
  [/^loss$/, "per token"], // of Tinker's interface, where a loss may be any
  [/tokens_per_s$/, "tokens/s"],
  [/_mb$/, "MB"],
  [/_ms$/, "ms"],
  [/_s$/, "s"],
  [/share$|accuracy$/, "share"],
];
const MAIN = /loss|perplexity|accuracy|reward|kl|entropy/;

// train/loss and val/loss stand together, and so do the replies of all servers (swarm/reply_ms/PEER). A name alone is
// of training.
function place(metric) {
  const parts = metric.split("/");
  if (parts.length > 2) return { chart: parts[1], label: parts.slice(2).join("/") };
  return { chart: parts.at(-1), label: parts.length > 1 ? parts[0] : "train" };
}

const words = (name) => (name === "tokens_per_s" ? "speed" : name.replace(/_(mb|ms|s)$/, "").replaceAll("_", " "));
const unitOf = (metric) => UNITS.find(([pattern]) => pattern.test(metric))?.[1] ?? "";

// The last value that is a number; training that diverged leaves null.
export const last = (points) => points.findLast(([, value]) => value !== null);

// Charts of the curves of `runs`, those that say how good a model is first: [{name, title, unit, main, series}].
export function charts(runs) {
  const found = new Map();
  runs.forEach((run, number) => {
    for (const [metric, points] of Object.entries(run.curves)) {
      const { chart, label } = place(metric);
      if (!found.has(chart)) found.set(chart, { name: chart, unit: unitOf(metric), series: [] });
      found.get(chart).series.push({ number, run: run.name, kind: label, points });
    }
  });
  const made = [...found.values()].map(({ name, unit, series }) => {
    // The curve with most points is drawn whole, those of few points dashed.
    const kinds = [...new Set(series.toSorted((one, other) => other.points.length - one.points.length).map(({ kind }) => kind))];
    const drawn = series.map(({ number, run, kind, points }) => {
      const order = kinds.indexOf(kind);
      if (runs.length === 1) return { label: kind, color: 1 + (order % 6), dashed: false, points, order };
      return { label: kinds.length > 1 ? `${kind}, ${run}` : run, color: 1 + (number % 6), dashed: order > 0, points, order };
    });
    return { name, title: words(name), unit, main: MAIN.test(name), series: drawn.sort((one, other) => one.order - other.order) };
  });
  return made.sort((one, other) => Number(other.main) - Number(one.main));
}
