// How it goes: alarms, the outlier rate over time, p-values and scores against calibration, the latest outliers.

import { get } from "./api.js";
import { showAlarms } from "./alarms.js";
import { drawPValues, drawRates, drawScores } from "./charts.js";
import { count, el, fill, find, percent } from "./dom.js";
import { held, place, wilson } from "./facts.js";
import { features, state } from "./state.js";
import { Cards } from "./verdicts.js";

const LATEST = 5;
const MINUTES = { 60: 1, 360: 5, 1440: 30, 10080: 180, 43200: 720 };
const form = find("span");
let latest;
let shown = [];

/** The form's choices, with a span that begins and ends at whole buckets, so that it is the same question for a while. */
function asked() {
  const span = Number(form.elements.span.value);
  const minutes = MINUTES[span];
  const until = (Math.floor(Date.now() / 60000 / minutes) + 1) * minutes * 60;
  const model = form.elements.model.value;
  return { model, source: form.elements.source.value, minutes, since: until - span * 60, until };
}

function totals(rates) {
  const sum = (of) => rates.buckets.reduce((total, bucket) => total + of(bucket), 0);
  const scored = sum((one) => one.scored);
  const outliers = sum((one) => one.outliers);
  const expected = scored ? sum((one) => one.expected_rate * one.scored) / scored : null;
  return { scored, outliers, expected, band: scored ? wilson(outliers, scored) : null };
}

function tile(name, value, note, state = "") {
  return el("div", { class: `tile ${state}` }, el("dt", {}, name), el("dd", {}, el("strong", {}, value), el("span", {}, note)));
}

function showTotals({ scored, outliers, expected, band }, promised) {
  const where = scored ? place(band, expected, promised) : 0;
  const range = promised ? `${percent(promised[0])} to ${percent(promised[1])} with this calibration` : "of normal pictures";
  fill(find("tiles"),
    tile("Pictures", count(scored), "scored in this time"),
    tile("Outliers", count(outliers), scored ? `${count(Math.round(expected * scored))} expected if all were normal` : ""),
    tile("Outlier rate", scored ? percent(outliers / scored) : "–", scored ? `${["▼ low", "✓ as expected", "▲ high"][where + 1]}; 95%: ${percent(band[0])} to ${percent(band[1])}` : "no pictures yet", where > 0 ? "high" : ""),
    tile("Expected rate", percent(expected), scored ? range : ""));
}

/** Draw what has changed; `again`: all of it, as when the colours changed. */
export async function refresh(again = false) {
  if (!features.verdicts) return;
  const { model, source, minutes, since, until } = asked();
  const [rates, scores, verdicts] = await Promise.all([
    get("v1/rates", { model, source, minutes, since, until }),
    model ? get(`v1/models/${model}/calibration`) : null,
    get("v1/verdicts", { model, source, outlier: true, limit: LATEST }),
    features.alarms ? showAlarms() : null,
  ]);
  verdicts.verdicts.forEach((one) => state.sources.add(one.source));
  latest ??= new Cards(find("latest"), () => "No outliers yet. Score a picture, or send some to the service.");
  latest.show(verdicts.verdicts);
  const [ratesBefore, scoresBefore] = again ? [] : shown;
  shown = [rates, scores];
  if (rates !== ratesBefore) {
    const total = totals(rates);
    const served = state.models.find((one) => one.name === model);
    // What calibration promises is of the policy in force; scans, and policies before, may have judged by another.
    const same = served && (total.expected === null || Math.abs(total.expected / served.policy.expected_false_alarm_rate - 1) < 0.05);
    const promised = same ? served.policy.band : null;
    showTotals(total, promised);
    const range = promised ? ` (with this calibration ${percent(promised[0])} to ${percent(promised[1])}, nine times in ten)` : "";
    const sentence = total.scored ? `Outliers: ${held(total.outliers, total.scored, total.band, total.expected, promised)}; ${percent(total.expected)} of normal pictures are expected to be flagged${range}.` : "No pictures in this time. Send some with POST /v1/score, or choose a longer time.";
    await drawRates(rates, sentence, promised);
    if (served) await drawPValues(rates.p_values, served.n);
  }
  if (scores && scores !== scoresBefore) await drawScores(scores);
}

export function begin() {
  form.addEventListener("change", () => refresh().catch(() => {}));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => refresh(true).catch(() => {}));
}
