// Scans of whole folders, and their reports.

import { get } from "./api.js";
import { count, el, fill, find, percent, table, time } from "./dom.js";

const PAGE = 50;
let before;

function row(scan) {
  const share = scan.scored ? `${count(scan.outliers)} (${percent(scan.outliers / scan.scored)})` : count(scan.outliers);
  const report = scan.has_report ? el("a", { href: `v1/scans/${scan.id}/report`, target: "_blank", rel: "noopener" }, "Report ", el("span", { class: "unseen" }, `of ${scan.name} (new tab)`)) : "–";
  return [scan.name, time(scan.started), scan.finished ? time(scan.finished) : "running", `${scan.model} ${scan.version}`, scan.source, count(scan.scored), count(scan.failed),
    share, percent(scan.expected_rate), report];
}

export async function refresh() {
  const found = await get("v1/scans", { limit: PAGE });
  if (found === before) return;
  before = found;
  const head = ["Scan", "Started", "Finished", "Model", "Source", "Scored", "Failed", "Outliers", "Expected", "Report"];
  fill(find("scans"), found.scans.length ? table("Scans, the newest first", head, found.scans.map(row))
    : el("p", { class: "empty" }, "No scans yet. anomaly-vae scan judges every picture below a folder."));
}

export function begin() {}
