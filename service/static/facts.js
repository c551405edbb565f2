// What is known of a verdict: its numbers, the parts of its score, and why.

import { badge, count, el, figure, percent, table } from "./dom.js";

const plain = (name) => name.replaceAll("_", " ");

/** Verdict, p-value, score, and the rate at which it was judged. */
export function numbers(verdict) {
  const rows = [["Verdict", badge(verdict.outlier)], ["p-value", figure(verdict.p_value)], ["Score", figure(verdict.score)]];
  if (verdict.threshold !== undefined && verdict.threshold !== null) rows.push(["Threshold", figure(verdict.threshold)]);
  rows.push(["Judged at", `α = ${percent(verdict.alpha)}`]);
  return el("dl", { class: "facts" }, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

/** The parts of a score; `percentiles` say where each lies among normal pictures. */
export function parts(values, percentiles = null) {
  if (!values || !Object.keys(values).length) return null;
  const names = Object.keys(values);
  const head = percentiles ? ["Part of the score", "Value", "Beyond so many normals"] : ["Part of the score", "Value"];
  const rows = names.map((name) => {
    const row = [plain(name), figure(values[name])];
    const place = percentiles?.[name];
    if (percentiles) row.push(place === undefined ? "–" : meter(place));
    return row;
  });
  return el("section", {}, el("h3", {}, "Parts"), table("Parts of the score", head, rows, { class: "numbers" }));
}

function meter(percentile) {
  const text = percentile >= 100 ? "all" : `${figure(percentile)}%`;
  return el("span", { class: "metered" }, el("meter", { min: "0", max: "100", value: percentile, "aria-hidden": "true" }), text);
}

/** Where a picture is hot. */
export function regions(found) {
  if (!found?.length) return el("p", { class: "muted" }, "No place stands out.");
  const rows = found.map((one, k) => [`${k + 1}`, `${Math.round(one.x)}, ${Math.round(one.y)}`,
    `${Math.round(one.width)} × ${Math.round(one.height)}`, percent(one.area), figure(one.peak_heat)]);
  return el("section", {}, el("h3", {}, "Regions"),
    table("Regions, the hottest first", ["No.", "Left, top", "Size", "Share of the picture", "Heat (1: as hot as normal gets)"], rows, { class: "numbers" }));
}

/** The rest of an explanation: numbers of the code, and the most similar normal picture. */
export function explanation(why) {
  if (!why) return null;
  const odd = why.latents.map((one) => [`${one.index}`, figure(one.value), `${figure(one.deviations)} σ`]);
  return el("section", {}, el("h3", {}, "Explanation"),
    why.nearest_normal ? el("p", {}, "Most similar normal picture: ", el("code", {}, why.nearest_normal.name ?? why.nearest_normal.id), ` (distance ${figure(why.nearest_normal.distance)})`) : null,
    odd.length ? table("Numbers of the code that lie far from normal ones", ["Number of the code", "Value", "From normal"], odd, { class: "numbers" })
      : el("p", { class: "muted" }, `None of the numbers of its code lies far from normal ones.`));
}

/**
 * Where a rate lies, given its 95% band: 1 above, -1 below, 0 within what normal pictures give. With the calibration at
 * hand that may be anything in the band that its policy promises; without one it is the expected rate.
 */
export function place(band, expected, promised) {
  const [low, high] = promised ?? [expected, expected];
  return band[0] > high ? 1 : band[1] < low ? -1 : 0;
}

/** A sentence for a rate with its band beside what is expected. */
export function held(outliers, scored, band, expected, promised) {
  if (!scored) return "no pictures";
  const where = ["below what normal pictures give", "within what normal pictures give", "above what normal pictures give"];
  return `${percent(outliers / scored)} of ${count(scored)} (95%: ${percent(band[0])} to ${percent(band[1])}), ${where[place(band, expected, promised) + 1]}`;
}

/** 95% confidence interval of a rate (Wilson 1927). */
export function wilson(outliers, scored) {
  const [share, z] = [outliers / scored, 1.959964];
  const [weight, spread] = [z ** 2 / scored, z * Math.sqrt((share * (1 - share) + z ** 2 / scored / 4) / scored)];
  return [Math.max(0, (share + weight / 2 - spread) / (1 + weight)), Math.min(1, (share + weight / 2 + spread) / (1 + weight))];
}
