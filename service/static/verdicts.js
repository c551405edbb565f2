// Cards of kept verdicts, what a person says of them, and the window that shows one in full.

import { get, send } from "./api.js";
import { badge, el, figure, fill, find, tell, time } from "./dom.js";
import { numbers, parts, regions } from "./facts.js";
import { layered } from "./picture.js";
import { features } from "./state.js";

const LABELS = { false_alarm: "✕ False alarm", confirmed: "✓ Confirmed", missed: "✓ Missed", normal: "✕ Normal", unclear: "? Unclear" };
const words = (label) => LABELS[label].slice(2).toLowerCase();

/** Buttons that say what a picture was; `changed` hears of the verdict as it then is. */
function judging(verdict, changed, all = false) {
  const wrong = el("p", { class: "wrong", role: "alert" });
  const names = verdict.outlier ? ["false_alarm", "confirmed"] : ["normal", "missed"];
  if (all || verdict.feedback?.label === "unclear") names.push("unclear");
  const buttons = names.map((label) => el("button", {
    type: "button", class: "choice", "data-label": label, "aria-pressed": String(verdict.feedback?.label === label),
    click: async (event) => {
      const pressed = event.currentTarget;
      pressed.disabled = true;
      try {
        const now = await send("POST", "v1/feedback", { verdict: verdict.id, label, note: verdict.feedback?.note ?? "" });
        tell(`Kept: ${words(label)}.`);
        changed(now);
      } catch (error) {
        wrong.textContent = error.message;
        pressed.disabled = false;
      }
    },
  }, LABELS[label]));
  return el("div", { class: "judging" }, el("div", { role: "group", "aria-label": "What was it?", class: "choices" }, buttons), wrong);
}

const said = (verdict) => verdict.feedback ? el("p", { class: "said" }, `${words(verdict.feedback.label)}, said ${verdict.feedback.by} `, time(verdict.feedback.at)) : null;

/** Why there is no picture: scans send verdicts alone. */
const unseen = (verdict) => verdict.request_id.startsWith("scan-") ? "A scan sent this verdict; the picture is where it was. The scan's report shows the most unusual ones."
  : "No picture of it is kept; the setting images says of which verdicts one is.";

/** Scans tell whole paths, of which the end says most. */
const nameOf = (verdict) => verdict.filename?.split("/").findLast(Boolean) ?? verdict.filename ?? `picture ${verdict.id.slice(-6)}`;

function card(verdict, list) {
  const title = nameOf(verdict);
  const thumb = verdict.has_picture
    ? el("img", { src: `v1/verdicts/${verdict.id}/image`, alt: "", loading: "lazy", width: "160", height: "160" })
    : el("span", { class: "nothing" }, "no picture kept");
  return el("li", { class: "card", "data-id": verdict.id, "data-label": verdict.feedback?.label ?? "" },
    el("button", { type: "button", class: verdict.has_picture ? "thumb" : "thumb bare", "aria-label": `Show ${title}`, click: () => open(verdict.id, list) }, thumb),
    el("div", { class: "about" },
      el("p", { class: "name", title: verdict.filename ?? title }, title),
      el("p", { class: "line" }, badge(verdict.outlier), el("span", { class: "muted" }, `p = ${figure(verdict.p_value, 2)}`)),
      el("p", { class: "muted" }, time(verdict.at), verdict.source === "default" ? "" : ` · ${verdict.source}`),
      said(verdict)),
    judging(verdict, (now) => list.changed(now)));
}

/** A list of cards in a `place`; cards of verdicts that did not change stay as they are, with the focus in them. */
export class Cards {
  constructor(place, empty) {
    this.place = place;
    this.empty = empty;
    this.verdicts = [];
  }

  show(verdicts) {
    const before = new Map(this.verdicts.map((one, k) => [one.id, [one, this.place.children[k]]]));
    this.verdicts = verdicts;
    const cards = verdicts.map((one) => {
      const [known, made] = before.get(one.id) ?? [];
      return made && JSON.stringify(known) === JSON.stringify(one) ? made : card(one, this);
    });
    if (!cards.length) {
      fill(this.place, el("li", { class: "empty" }, this.empty()));
      return;
    }
    const focused = document.activeElement?.closest?.("[data-id]") && this.place.contains(document.activeElement) ? document.activeElement : null;
    const [id, label] = [focused?.closest("[data-id]").dataset.id, focused?.dataset.label];
    if (cards.length !== this.place.children.length || cards.some((one, k) => one !== this.place.children[k])) this.place.replaceChildren(...cards);
    if (focused && document.activeElement !== focused) {
      const again = cards.find((one) => one.dataset.id === id);
      again?.querySelector(label ? `[data-label="${label}"]` : ".thumb")?.focus();
    }
  }

  changed(verdict) {
    this.show(this.verdicts.map((one) => (one.id === verdict.id ? verdict : one)));
  }
}

/** Small pictures of some verdicts, as far as they are kept; each opens its own. */
export async function examples(ids) {
  const asked = await Promise.allSettled(ids.map((id) => get(`v1/verdicts/${id}`)));
  const verdicts = asked.filter((one) => one.status === "fulfilled").map((one) => one.value);
  const list = { verdicts, changed: (now) => { list.verdicts = list.verdicts.map((one) => (one.id === now.id ? now : one)); } };
  return verdicts.filter((one) => one.has_picture).map((one) => el("button", { type: "button", class: "example", "aria-label": `Show ${nameOf(one)}`,
    click: () => open(one.id, list) }, el("img", { src: `v1/verdicts/${one.id}/image`, alt: "", width: "72", height: "72" })));
}

/** Show one verdict in full; its neighbours in `list` are a key away. */
async function open(id, list) {
  const box = find("viewer");
  const k = list.verdicts.findIndex((one) => one.id === id);
  const verdict = list.verdicts[k];
  if (!verdict) return;
  const place = `v1/verdicts/${id}`;
  const hot = verdict.has_picture ? get(`${place}/regions`).catch(() => null) : null;
  const where = el("div", {});
  hot?.then((found) => found && fill(where, regions(found.regions)));
  const go = (step, label) => {
    const other = list.verdicts[k + step];
    return el("button", { type: "button", class: "quiet", disabled: !other, click: () => open(other.id, list) }, label);
  };
  const judged = el("div", {});
  const showJudged = (now) => fill(judged, said(now), judging(now, (next) => { list.changed(next); showJudged(next); judged.querySelector("[aria-pressed=true]")?.focus(); }, true));
  showJudged(verdict);
  fill(box,
    el("div", { class: "heading" }, el("h2", { id: "viewer-title", tabindex: "-1" }, nameOf(verdict)),
      el("p", { class: "actions" }, go(-1, "← Newer"), go(1, "Older →"),
        el("button", { type: "button", class: "quiet", click: () => box.close() }, "Close"))),
    el("div", { class: "inside" },
      verdict.has_picture
        ? layered({ picture: `${place}/image`, heat: `${place}/heatmap${features.overlay ? "?style=overlay" : ""}`, alt: `What the model saw of ${nameOf(verdict)}`, regions: hot })
        : el("p", { class: "notice" }, unseen(verdict)),
      el("div", {}, numbers(verdict), judged,
        verdict.filename?.includes("/") ? el("p", { class: "muted path" }, verdict.filename) : null,
        el("p", { class: "muted" }, time(verdict.at), ` · ${verdict.model} ${verdict.version} · ${verdict.source} · `, el("code", {}, verdict.id)),
        where, parts(verdict.parts))));
  if (!box.open) box.showModal();
  find("viewer-title").focus();
}
