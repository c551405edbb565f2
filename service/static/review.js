// Pictures that chance drew, looked at without knowing their verdict; and calibration anew by the normal ones.

import { get, send } from "./api.js";
import { asked, count, el, fill, find, percent, table, tell, time } from "./dom.js";
import { learnModels, may, state } from "./state.js";

const LABELS = { normal: ["normal", "false_alarm"], odd: ["missed", "confirmed"], unclear: ["unclear", "unclear"] };
const WORDS = { normal: "✕ Normal", odd: "✓ Anomalous", unclear: "? Unclear" };
const AT_ONCE = 12;

async function say(one, answer, place, wrong) {
  try {
    // Only now is the verdict looked at: which word the service keeps for the answer depends on it.
    const verdict = await get(`v1/verdicts/${one.id}`);
    await send("POST", "v1/feedback", { verdict: one.id, label: LABELS[answer][Number(verdict.outlier)] });
    const next = place.nextElementSibling ?? place.previousElementSibling;
    place.remove();
    tell("Kept.");
    next?.querySelector("button")?.focus();
    if (!find("to-review").children.length) await refresh();
  } catch (error) {
    wrong.textContent = error.message;
  }
}

function card(one) {
  const wrong = el("p", { class: "wrong", role: "alert" });
  const title = one.filename ?? `picture ${one.id.slice(-6)}`;
  const place = el("li", { class: "card", "data-id": one.id },
    el("div", { class: "thumb" }, one.has_picture ? el("img", { src: `v1/verdicts/${one.id}/image`, alt: title, width: "160", height: "160" }) : el("span", { class: "nothing" }, "no picture kept")),
    el("div", { class: "about" }, el("p", { class: "name", title }, title), el("p", { class: "muted" }, time(one.at))),
    el("div", { class: "choices", role: "group", "aria-label": `What is ${title}?` },
      Object.keys(LABELS).map((answer) => el("button", { type: "button", class: "choice", "data-answer": answer, click: () => say(one, answer, place, wrong) }, WORDS[answer]))), wrong);
  return place;
}

export async function refresh() {
  const place = find("to-review");
  const found = await get("v1/review", { limit: AT_ONCE });
  const shown = [...place.querySelectorAll("[data-id]")].map((one) => one.dataset.id).join();
  // Cards stay while somebody looks at them.
  if (found.verdicts.length && place.querySelector("[data-id]")) return;
  if (found.verdicts.map((one) => one.id).join() !== shown || !place.children.length) {
    fill(place, found.verdicts.length ? found.verdicts.map(card) : el("li", { class: "empty" }, "Nothing to review. Chance draws a share of all pictures: the setting review_share, 1% unless set."));
  }
  if (!find("recalibration").children.length && may("read")) fill(find("recalibration"), recalibration());
}

function recalibration() {
  const result = el("div", { "aria-live": "polite" });
  const model = el("select", {}, state.models.map((one) => el("option", { value: one.name }, one.name)));
  const minimum = el("input", { type: "number", min: "20", max: "1000000", step: "1", value: "100", required: true });
  const ask = (more) => send("POST", `v1/models/${model.value}:recalibrate`, { minimum: Number(minimum.value), ...more });
  const tried = (work) => async (event) => {
    event?.preventDefault();
    try {
      fill(result, await work());
    } catch (error) {
      fill(result, el("p", { class: "wrong" }, error.message));
    }
  };
  const told = (found) => [
    el("p", {}, `${count(found.judged)} of ${count(found.drawn)} reviewed; ${count(found.normal)} normal, ${count(found.unclear)} unclear.`),
    table("Before and after", ["Calibration", "Version", "Normals", "Expected rate", "Flagged of the reviewed normals"],
      [["before", found.before], ["after", found.after]].map(([name, one]) => [name, one.version, count(one.normals), percent(one.expected_false_alarm_rate), percent(one.flagged_normals)])),
    found.applied ? el("p", { class: "calm" }, "✓ Done.") : null,
  ];
  const done = async (more) => { const found = await ask(more); await learnModels(); return told(found); };
  const apply = el("button", { type: "button", click: async () => {
    if (await asked("Recalibrate?", `${model.value} then ranks among the reviewed normals; its version changes. It can be undone.`, "Recalibrate")) await tried(() => done({}))();
  } }, "Recalibrate");
  return el("section", { class: "panel", "aria-labelledby": "h-recalibrate" }, el("h2", { id: "h-recalibrate" }, "Recalibrate by what was reviewed"),
    el("p", { class: "muted" }, "Verdicts are then ranked among the reviewed pictures that are normal, up to the first that nobody judged."),
    el("form", { class: "bar", submit: tried(async () => [...told(await ask({ preview: true })), el("p", { class: "actions" }, apply)]) },
      el("label", {}, "Model ", model), el("label", {}, "At least so many normals ", minimum),
      may("admin") ? el("button", {}, "Preview") : null,
      may("admin") ? el("button", { type: "button", class: "quiet", click: tried(() => done({ undo: true })) }, "Back to the bundle's own") : null),
    may("admin") ? null : el("p", { class: "muted" }, "It takes a key with the role admin."), result);
}

export function begin() {}
