// Scans of whole folders, and their reports.

import { get } from "./api.js";
import { count, el, fill, find, percent, table, time } from "./dom.js";
import { only } from "./outliers.js";
import { offerChoices, state } from "./state.js";

const PAGE = 50;
let before;

/** How many rows of its result are here, and the way to its outliers. */
function rows(scan) {
  if (!scan.rows) return "–";
  const all = scan.scored + scan.failed;
  const said = scan.rows < all ? `${count(scan.rows)} of ${count(all)}` : count(scan.rows);
  return el("a", { href: "#outliers", click: () => only(scan.model, scan.source) }, said, el("span", { class: "unseen" }, ` rows of ${scan.name}: its outliers`));
}

function row(scan) {
  const share = scan.scored ? `${count(scan.outliers)} (${percent(scan.outliers / scan.scored)})` : count(scan.outliers);
  const report = scan.has_report ? el("a", { href: `v1/scans/${scan.id}/report`, target: "_blank", rel: "noopener" }, "Report ", el("span", { class: "unseen" }, `of ${scan.name} (new tab)`)) : "–";
  return [scan.name, time(scan.started), scan.finished ? time(scan.finished) : "running", `${scan.model} ${scan.version}`, scan.source, count(scan.scored), count(scan.failed),
    share, percent(scan.expected_rate), rows(scan), report];
}

export async function refresh() {
  const found = await get("v1/scans", { limit: PAGE });
  if (found === before) return;
  before = found;
  // Models that are not served have verdicts too, which can be looked at.
  for (const scan of found.scans.filter((one) => one.rows)) {
    state.sources.add(scan.source);
    state.scanned.add(scan.model);
  }
  offerChoices();
  const head = ["Scan", "Started", "Finished", "Model", "Source", "Scored", "Failed", "Outliers", "Expected", "Rows", "Report"];
  fill(find("scans"), found.scans.length ? table("Scans, the newest first", head, found.scans.map(row))
    : el("p", { class: "empty" }, "No scans yet. anomaly-vae scan judges every picture below a folder."));
}

export function begin() {}
