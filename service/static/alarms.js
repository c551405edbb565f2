// Alarms of rates and shifts, and that somebody has seen them.

import { get, send } from "./api.js";
import { el, figure, fill, find, percent, time } from "./dom.js";
import { may } from "./state.js";

const TITLES = { rate: "More outliers than expected", shift: "The pictures have changed" };
let before;

function figures(alarm) {
  const known = [
    ["Observed", alarm.observed_rate, percent], ["Expected", alarm.expected_rate, percent], ["Pictures", alarm.images, figure],
    ["Evidence", alarm.evidence, figure], ["Limit", alarm.limit, figure], ["Part", alarm.part, String], ["Effect", alarm.effect, figure],
  ];
  return el("dl", { class: "facts" }, known.filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value, shown]) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(value)))));
}

function alarmed(alarm) {
  const wrong = el("p", { class: "wrong", role: "alert" });
  const seen = el("button", { type: "button", click: async () => {
    seen.disabled = true;
    try {
      await send("POST", `v1/alarms/${alarm.id}:acknowledge`);
      await showAlarms();
    } catch (error) {
      wrong.textContent = error.message;
      seen.disabled = false;
    }
  } }, "Acknowledge");
  const examples = (alarm.examples ?? []).slice(0, 6).map((id) => el("img", { src: `v1/verdicts/${id}/image`, alt: "", width: "64", height: "64",
    error: (event) => event.currentTarget.remove() }));
  return el("article", { class: "alarm" },
    el("h2", {}, `▲ ${TITLES[alarm.kind] ?? alarm.kind}`), el("p", {}, alarm.message),
    el("p", { class: "muted" }, `${alarm.model} ${alarm.version} · ${alarm.source} · raised `, time(alarm.raised), " · since ", time(alarm.since)),
    figures(alarm), examples.length ? el("p", { class: "examples" }, examples) : null, may("admin") ? el("p", {}, seen) : null, wrong);
}

export async function showAlarms() {
  const found = await get("v1/alarms");
  if (found === before) return;
  before = found;
  const open = found.alarms.filter((one) => !one.acknowledged && !one.ended);
  fill(find("alarms"), open.length ? open.map(alarmed) : el("p", { class: "calm" }, "✓ No alarms."));
}
