// Models: what is active, what it promises and how it does; other versions, and the way back.

import { get, send } from "./api.js";
import { asked, count, el, fill, find, percent, tell } from "./dom.js";
import { held, wilson } from "./facts.js";
import { editor } from "./policy.js";
import { features, learnModels, may, offerChoices, state } from "./state.js";

const DAY = 86400;
const LAST = 200;
const LIVE = { day: lastDay, judged };
let before;

async function lastDay({ name, policy }) {
  if (!features.verdicts || !may("read")) return null;
  const until = (Math.floor(Date.now() / 3600000) + 1) * 3600;
  const { buckets } = await get("v1/rates", { model: name, since: until - DAY, until, minutes: 1440 });
  const sum = (key) => buckets.reduce((total, one) => total + one[key], 0);
  const scored = sum("scored");
  if (!scored) return "no pictures";
  const expected = buckets.reduce((total, one) => total + one.expected_rate * one.scored, 0) / scored;
  return held(sum("outliers"), scored, wilson(sum("outliers"), scored), expected, policy.band);
}

/** What people said of its last outliers. */
async function judged({ name }) {
  if (!features.verdicts || !may("read")) return null;
  const { verdicts } = await get("v1/verdicts", { model: name, outlier: true, limit: LAST });
  const said = (label) => verdicts.filter((one) => one.feedback?.label === label).length;
  if (!verdicts.length) return "no outliers";
  return `${count(said("confirmed"))} confirmed, ${count(said("false_alarm"))} false alarms of the last ${count(verdicts.length)} outliers`;
}

function promised(policy) {
  const band = policy.band ? `, between ${percent(policy.band[0])} and ${percent(policy.band[1])} nine times in ten` : "";
  const bound = policy.bound !== null ? `; at most ${percent(policy.bound)} on average` : "";
  return `${percent(policy.expected_false_alarm_rate)} of normal pictures${band}${bound}`;
}

/** Ask, do, and show all models anew. */
async function change(title, text, yes, path, body, wrong) {
  if (!(await asked(title, text, yes))) return;
  wrong.textContent = "";
  try {
    await send("POST", path, body);
    tell("Done.");
    await learnModels();
    offerChoices();
    await refresh(true);
  } catch (error) {
    wrong.textContent = error.message;
  }
}

function versions(model, wrong) {
  const rows = model.loaded.map((version) => {
    const active = version === model.version;
    return el("li", {}, el("code", {}, version), active ? el("span", { class: "badge active" }, "✓ active")
      : may("admin") ? el("button", { type: "button", class: "quiet", "aria-label": `Activate ${version}`, click: () => change(`Activate ${version}?`, `${model.name} answers by it from the next request on.`, "Activate", `v1/models/${model.name}:activate`, { version }, wrong) }, "Activate") : "");
  });
  return el("ul", { class: "versions" }, rows);
}

function actions(model, wrong) {
  if (!may("admin")) return null;
  const bundle = el("select", {}, state.bundles.map((name) => el("option", { value: name }, name)));
  const load = (event) => {
    event.preventDefault();
    change(`Load ${bundle.value}?`, `It is loaded beside what is active under the name ${model.name}; activate it then.`, "Load", `v1/models/${model.name}:load`, { bundle: bundle.value }, wrong);
  };
  return el("div", { class: "actions" },
    el("button", { type: "button", class: "quiet", click: () => change("Roll back?", `${model.name} answers by the bundle that was active before.`, "Roll back", `v1/models/${model.name}:rollback`, {}, wrong) }, "Roll back"),
    state.bundles.length ? el("form", { class: "bar", submit: load }, el("label", {}, "Bundle ", bundle), el("button", { class: "quiet" }, "Load")) : null);
}

function panel(model) {
  const wrong = el("p", { class: "wrong", role: "alert" });
  const [day, said] = Object.keys(LIVE).map((name) => el("dd", { "data-live": name }, "–"));
  const { policy, image } = model;
  const facts = [
    ["Version", [el("code", {}, model.version), model.version === model.base_version ? "" : ` (recalibrated; the bundle's own is ${model.base_version})`]],
    ["Bundle", model.bundle], ["Pictures", `${image.width} × ${image.height}, ${image.channels === 1 ? "grey" : "colour"}, ${image.fit}`],
    ["Calibrated by", `${count(model.n)} normal pictures`], ["Expected false alarms", promised(policy)], ["Outliers, last 24 hours", day], ["Feedback", said],
  ];
  return el("article", { class: "panel", "data-model": model.name, "aria-labelledby": `model-${model.name}` },
    el("div", { class: "heading" }, el("h2", { id: `model-${model.name}` }, model.name), model.default ? el("span", { class: "muted" }, "answers unless another is named") : null),
    el("dl", { class: "facts wide" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), value instanceof HTMLElement ? value : el("dd", {}, value)))),
    el("h3", {}, "Loaded versions"), versions(model, wrong), actions(model, wrong), wrong,
    may("read") && features.verdicts ? editor(model, () => refresh(true)) : null);
}

/** Show the models, unless they are as they were: what somebody types into the editor must stay. */
export async function refresh(again = false) {
  const found = await learnModels();
  if (again || JSON.stringify(found) !== before) {
    before = JSON.stringify(found);
    fill(find("models"), found.models.map(panel));
  }
  for (const place of document.querySelectorAll("[data-live]")) {
    const model = found.models.find((one) => one.name === place.closest("[data-model]").dataset.model);
    place.textContent = (await LIVE[place.dataset.live](model)) ?? "–";
  }
}

export function begin() {}
