// The policy editor: a rate of false alarms or a threshold, tried on the last verdicts before it is applied.

import { get, send } from "./api.js";
import { asked, count, el, fill, figure, percent, table, tell, time } from "./dom.js";
import { learnModels, may } from "./state.js";

const said = (one) => (one.threshold !== null ? `score above ${figure(one.threshold)}` : one.alpha === null && one.mode === null ? "the bundle's own"
  : `α = ${one.alpha === null ? "the bundle's own" : percent(one.alpha)}${one.mode ? `, ${one.mode}` : ""}`);

/** The form of one model; `changed` is called once another policy is in force. */
export function editor(model, changed) {
  const { policy } = model;
  const key = `policy-${model.name}`;
  const percentage = el("input", { type: "number", name: "alpha", min: "0.0001", max: "99", step: "any", value: String(+(policy.alpha * 100).toPrecision(4)) });
  const mode = el("select", { name: "mode" }, el("option", { value: "average" }, "on average"), el("option", { value: "guaranteed" }, "guaranteed (95% sure)"));
  if (policy.mode === "guaranteed") mode.value = "guaranteed";
  const threshold = el("input", { type: "number", name: "threshold", step: "any", value: policy.threshold === null ? "" : String(+policy.threshold.toPrecision(6)) });
  const kinds = [["alpha", "Rate of false alarms"], ["threshold", "Threshold of the score"], ["own", "The bundle's own policy"]];
  const radios = kinds.map(([value, label]) => el("label", {}, el("input", { type: "radio", name: "kind", value, checked: value === (policy.mode === "threshold" ? "threshold" : "alpha") }), ` ${label}`));
  const fields = { alpha: el("p", { class: "bar" }, el("label", {}, "Percent ", percentage), el("label", {}, "Kept ", mode)), threshold: el("p", { class: "bar" }, el("label", {}, "Outlier above ", threshold)) };
  const outcome = el("div", { class: "outcome", "aria-live": "polite" });
  const history = el("div", {});
  let tried = null;

  const form = el("form", { class: "policy", "data-policy": model.name, novalidate: true, submit: preview },
    el("h3", { id: key }, "Policy"),
    el("p", { class: "said" }, "In force: ", el("strong", {}, policy.mode === "threshold" ? `score above ${figure(policy.threshold)}` : `α = ${percent(policy.alpha)}, ${policy.mode}`),
      policy.threshold !== null && policy.mode !== "threshold" ? ` (score above ${figure(policy.threshold)})` : "", ` · revision ${policy.revision}`),
    el("fieldset", {}, el("legend", {}, "Try another"), el("div", { class: "choices" }, radios), fields.alpha, fields.threshold,
      el("p", { class: "actions" }, el("button", {}, "Preview"))),
    outcome, history);

  const kind = () => form.elements.kind.value;
  function wanted() {
    if (kind() === "own") return {};
    if (kind() === "threshold") return threshold.value === "" ? null : { threshold: Number(threshold.value) };
    return percentage.value === "" ? null : { alpha: +(Number(percentage.value) / 100).toPrecision(12), mode: mode.value };
  }
  function arranged() {
    for (const name of ["alpha", "threshold"]) fields[name].hidden = kind() !== name;
  }
  // What was previewed is what is applied; another choice wants another preview.
  form.addEventListener("input", () => { tried = null; fill(outcome); arranged(); });

  async function preview(event) {
    event.preventDefault();
    const choice = wanted();
    if (choice === null) {
      fill(outcome, el("p", { class: "wrong" }, "Give a number."));
      return;
    }
    try {
      const found = await send("POST", `v1/models/${model.name}/policy:preview`, choice);
      tried = choice;
      fill(outcome, told(found), may("admin") ? el("p", { class: "actions" }, el("button", { type: "button", click: apply }, "Apply")) : el("p", { class: "muted" }, "Applying it takes a key with the role admin."));
    } catch (error) {
      fill(outcome, el("p", { class: "wrong" }, error.message));
    }
  }

  function told(found) {
    const share = (flagged) => (found.verdicts ? `${count(flagged)} of ${count(found.verdicts)} (${percent(flagged / found.verdicts)})` : "no verdicts yet");
    const range = (one) => (one.band ? `${percent(one.band[0])} to ${percent(one.band[1])}` : "–");
    const row = (name, one, flagged) => [name, share(flagged), percent(one.expected_false_alarm_rate), range(one), one.threshold === null ? "–" : figure(one.threshold)];
    return table("Preview", ["Policy", "Flagged of the last verdicts", "Expected false alarms", "90% band", "Score above"],
      [row("now", policy, found.flagged_now), row("then", found.policy, found.flagged_then)]);
  }

  async function apply() {
    if (tried === null || !(await asked("Apply this policy?", `${model.name} judges by it from the next verdict on. The policy before stays one step away.`, "Apply"))) return;
    await changing(() => send("PUT", `v1/models/${model.name}/policy`, tried), "The policy is applied.");
  }

  async function changing(work, done) {
    try {
      await work();
      tell(done);
      await learnModels();
      await changed();
      document.querySelector(`[data-policy="${model.name}"] input:checked`)?.focus();
    } catch (error) {
      fill(outcome, el("p", { class: "wrong" }, error.message));
    }
  }

  get(`v1/models/${model.name}/policy`).then((book) => {
    if (!book.revisions.length) return;
    const back = el("button", { type: "button", class: "quiet", click: () => changing(() => send("POST", `v1/models/${model.name}/policy:rollback`), "The policy before is in force again.") }, "Back to the policy before");
    fill(history, el("details", {}, el("summary", {}, `Decided before (${book.revisions.length})`),
      table("Policies, the newest first", ["Revision", "Policy", "By", "When"], book.revisions.map((one) => [String(one.revision), said(one), one.by, time(one.at)])),
      may("admin") ? el("p", { class: "actions" }, back) : null));
  }).catch(() => {});
  arranged();
  return form;
}
