// The list of verdicts, the newest first, outliers unless all are wanted.

import { address, get } from "./api.js";
import { find, tell } from "./dom.js";
import { state } from "./state.js";
import { Cards } from "./verdicts.js";

const [PAGE, MOST_PAGES] = [24, 40];
const form = find("filter");
const older = find("older");
const cards = new Cards(find("verdicts"), () => "Nothing here. Outliers appear as soon as pictures are scored.");
let pages = 1;
let newest = null;

const asked = () => ({
  outlier: form.elements.what.value === "outliers" ? true : null, model: form.elements.model.value, source: form.elements.source.value,
});

export async function refresh() {
  find("export").href = address("v1/verdicts", { ...asked(), format: "csv" });
  // What was asked for by hand stays; what is new comes on top.
  const found = await get("v1/verdicts", { ...asked(), limit: PAGE * pages });
  found.verdicts.forEach((one) => state.sources.add(one.source));
  const fresh = newest === null ? 0 : found.verdicts.filter((one) => one.id > newest).length;
  newest = found.verdicts[0]?.id ?? "";
  cards.show(found.verdicts);
  if (fresh) tell(`${fresh} new`);
  older.hidden = found.next === null || pages >= MOST_PAGES;
}

/** Show the outliers of one source alone. */
export function only(model, source) {
  const models = form.elements.model;
  for (const [select, value] of [[form.elements.what, "outliers"], [models, models.options.length > 2 ? model : ""], [form.elements.source, source]]) select.value = value;
  for (const select of [models, form.elements.source]) select.closest("label").hidden = !select.value;
  pages = 1;
  newest = null;
}

export function begin() {
  form.addEventListener("change", () => { pages = 1; newest = null; refresh().catch(() => {}); });
  older.addEventListener("click", () => { pages += 1; refresh().catch(() => {}); });
}
