// Alarms: which streams no longer look as calibration did, what to do about it, and that somebody has seen to it.

import { get, send } from "./api.js";
import { asked, count, el, figure, fill, find, percent, tell, time } from "./dom.js";
import { may } from "./state.js";
import { examples } from "./verdicts.js";

const MOST = 8;
const TITLES = { rate: "More outliers than expected", shift: "Most pictures have moved" };
let before;

function figures(alarm) {
  const known = [
    ["Outliers lately", alarm.recent_rate, percent], ["Outliers in all", alarm.observed_rate, percent],
    ["Expected", alarm.expected_rate, percent], ["Tolerated", alarm.tolerated_rate, percent], ["Pictures", alarm.images, count],
    ["Evidence", alarm.evidence, (value) => (value > 1e6 ? "over a million" : figure(value, 3))], ["Part", alarm.part, (name) => name.replaceAll("_", " ")],
    ["Effect", alarm.effect, (value) => figure(value, 2)], ["Limit", alarm.limit, figure],
  ].filter(([name, value]) => value !== null && value !== undefined && !(alarm.kind === "shift" && ["Evidence", "Tolerated"].includes(name)));
  return el("dl", { class: "facts" }, known.map(([name, value, shown]) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(value)))));
}

function alarmed(alarm) {
  const wrong = el("p", { class: "wrong", role: "alert" });
  const acknowledge = async () => {
    if (!(await asked("Acknowledge this alarm?", "It begins anew, and is raised again if the stream stays as it is.", "Acknowledge"))) return;
    try {
      await send("POST", `v1/alarms/${alarm.id}:acknowledge`);
      tell("Acknowledged.");
      await showAlarms();
    } catch (error) {
      wrong.textContent = error.message;
    }
  };
  const shown = el("p", { class: "examples" });
  examples(alarm.examples.slice(0, MOST)).then((found) => fill(shown, found));
  return el("article", { class: "alarm", "data-id": alarm.id },
    el("div", { class: "heading" }, el("h2", {}, `▲ ${TITLES[alarm.kind] ?? alarm.kind}`),
      may("admin") ? el("button", { type: "button", class: "quiet", click: acknowledge }, "Acknowledge") : null),
    el("p", {}, alarm.message),
    el("p", { class: "muted" }, `${alarm.model} ${alarm.version} · source ${alarm.source}`, alarm.since ? [" · raised ", time(alarm.since)] : null),
    figures(alarm), shown, wrong);
}

export async function showAlarms() {
  const found = await get("v1/alarms");
  if (found === before) return;
  const raised = found.alarms.filter((one) => one.raised);
  const known = new Set(before?.alarms.filter((one) => one.raised).map((one) => one.id));
  const fresh = raised.filter((one) => before && !known.has(one.id));
  before = found;
  if (fresh.length) tell(`Alarm: ${fresh[0].message}`);
  const quiet = found.alarms.filter((one) => !one.raised);
  const open = find("alarms").querySelector("details")?.open ?? false;
  fill(find("alarms"), raised.length ? raised.map(alarmed) : el("p", { class: "calm" }, "✓ No alarms."),
    quiet.length ? el("details", { open }, el("summary", {}, "What is watched"),
      el("ul", {}, quiet.map((one) => el("li", {}, el("strong", {}, `${one.source}, ${one.kind}: `), one.message)))) : null);
}
