// What several views need to know: who is signed in, which models there are, what this service can do.

import { get } from "./api.js";
import { el } from "./dom.js";

const RANKS = { score: 1, read: 2, admin: 3 };

export const features = JSON.parse(document.body.dataset.features);
export const state = { session: null, models: [], bundles: [], sources: new Set(), scanned: new Set() };

/** Whether who is signed in has this role or a higher one. */
export const may = (role) => (RANKS[state.session?.role] ?? 0) >= RANKS[role];

export async function learnModels() {
  const found = await get("v1/models");
  // The one that answers unless another is named comes first.
  state.models = found.models.toSorted((one, other) => other.default - one.default);
  state.bundles = found.bundles;
  return found;
}

/** Keep a list of choices up to date without changing what is chosen. */
export function choices(select, options) {
  const wanted = JSON.stringify(options);
  if (select.dataset.options === wanted) return;
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, label]) => el("option", { value }, label)));
  select.dataset.options = wanted;
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

/** The lists of models and sources of all forms. */
export function offerChoices() {
  const names = state.models.map((model) => [model.name, model.name]);
  const kept = [...names, ...[...state.scanned].filter((name) => !state.models.some((one) => one.name === name)).sort().map((name) => [name, name])];
  for (const select of document.querySelectorAll("select[name=model]")) {
    // What is kept may be of models that scans alone know.
    const filter = select.form.id === "filter";
    choices(select, filter ? [["", "all"], ...kept] : names);
    select.closest("label").hidden = (filter ? kept : names).length < 2;
  }
  const sources = [...state.sources].sort().map((name) => [name, name]);
  for (const select of document.querySelectorAll("select[name=source]")) {
    choices(select, [["", "all"], ...sources]);
    select.closest("label").hidden = sources.length < 2 && !select.value;
  }
}
