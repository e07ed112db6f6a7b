// Prometheus' text format: the series of a scrape, and what changed between two of them.

/** Parse a scrape into { name: [{ labels, value }] }. */
export function parse(text) {
  const series = {};
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const pairs = [...labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, text]) => [key, text]);
    (series[name] ??= []).push({ labels: Object.fromEntries(pairs), value: Number(value.replace("Inf", "Infinity")) });
  }
  return series;
}

/** The sum of a name's series; null if there are none. */
export function total(series, name) {
  return series[name] ? series[name].reduce((sum, { value }) => sum + value, 0) : null;
}

/** How much a counter has grown between two scrapes; null if it was reset, or is unknown. */
export function growth(before, after, name) {
  const [from, to] = [total(before, name), total(after, name)];
  return from === null || to === null || to < from ? null : to - from;
}

/** The mean of the observations that a histogram got between two scrapes; null without any. */
export function mean(before, after, name) {
  const count = growth(before, after, `${name}_count`);
  return count ? growth(before, after, `${name}_sum`) / count : null;
}

/** A quantile of those observations, within its bucket by interpolation as in Prometheus. */
export function quantile(before, after, name, share) {
  const buckets = new Map();
  for (const [scrape, sign] of [[before, -1], [after, 1]]) {
    for (const { labels, value } of scrape[`${name}_bucket`] ?? []) {
      const bound = Number(labels.le.replace("Inf", "Infinity"));
      buckets.set(bound, (buckets.get(bound) ?? 0) + sign * value);
    }
  }
  const bounds = [...buckets.keys()].sort((a, b) => a - b);
  const count = buckets.get(Infinity) ?? 0;
  if (count <= 0) return null;
  let [lower, below] = [0, 0];
  for (const bound of bounds) {
    const upTo = buckets.get(bound);
    if (upTo >= share * count) {
      return bound === Infinity ? lower : lower + ((bound - lower) * (share * count - below)) / (upTo - below || 1);
    }
    [lower, below] = [bound, upTo];
  }
  return lower;
}
