// The three charts. Each has a sentence and a table beside it, for whoever cannot see it.

import { count, el, fill, figure, find, percent, table } from "./dom.js";

const CONFIG = { displayModeBar: false, responsive: true };
let loading;

/** Plotly, once; it is large, so that the page does not wait for it. */
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const place = new URL(`${document.body.dataset.static}/plotly.min.js`, document.baseURI);
    const script = el("script", { src: place.href, load: () => resolve(window.Plotly), error: () => reject(new Error("plotly")) });
    document.head.append(script);
  });
  return loading;
}

/** A colour of the page's style as plotly reads it, which does not know of variables and schemes. */
function colour(name) {
  const probe = el("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

async function draw(place, label, traces, layout) {
  const Plotly = await plotly();
  const font = { family: "system-ui, sans-serif", size: 12, color: colour("muted") };
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), fixedrange: true, automargin: true };
  await Plotly.react(place, traces, {
    font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, bargap: 0.08,
    margin: { l: 44, r: 12, t: 8, b: 36 }, height: 260, showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { ...font, color: colour("ink") } },
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, rangemode: "tozero", ...layout.yaxis },
  }, CONFIG);
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", label);
}

function beside(name, sentence, caption, head, rows) {
  find(`${name}-said`).textContent = sentence;
  const open = find(`${name}-table`).querySelector("details")?.open ?? false;
  const drawn = el("details", { open }, el("summary", {}, "As a table"), table(caption, head, rows));
  fill(find(`${name}-table`), rows.length ? drawn : null);
}

/** Milliseconds as plotly's local time. */
function local(milliseconds) {
  const at = new Date(milliseconds);
  return new Date(milliseconds - at.getTimezoneOffset() * 60000).toISOString().slice(0, 19);
}

/** Outlier rate with its 95% band, beside what is expected of normal pictures: on average, and with this calibration. */
export async function drawRates(rates, sentence, promised) {
  const width = rates.minutes * 60000;
  const buckets = rates.buckets.map((one) => ({ ...one, from: Date.parse(one.start), middle: Date.parse(one.start) + width / 2 }));
  const label = (at) => new Date(at).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
  beside("rate", sentence, "Outlier rate over time", ["From", "Pictures", "Outliers", "Rate", "95% band", "Expected"],
    buckets.toReversed().map((b) => [label(b.from), count(b.scored), count(b.outliers), percent(b.rate),
      `${percent(b.band[0])} to ${percent(b.band[1])}`, percent(b.expected_rate)]));
  const band = { x: [], y: [] };
  // Never without a point: plotly cannot draw the axes of nothing.
  const line = { x: [local(Date.parse(rates.since))], y: [null], text: [""] };
  const expected = { x: [], y: [] };
  let last = null;
  for (const b of buckets) {
    const [x0, x1] = [local(b.from), local(b.from + width)];
    band.x.push(x0, x0, x1, x1, x0, null);
    band.y.push(b.band[0], b.band[1], b.band[1], b.band[0], b.band[0], null);
    if (last !== null && b.from - last > 1.5 * width) {
      line.x.push(local(b.from - width)); line.y.push(null); line.text.push("");
      expected.x.push(local(b.from - width)); expected.y.push(null);
    }
    line.x.push(local(b.middle)); line.y.push(b.rate);
    line.text.push(`${percent(b.rate)}: ${count(b.outliers)} of ${count(b.scored)}`);
    expected.x.push(x0, x1); expected.y.push(b.expected_rate, b.expected_rate);
    last = b.from;
  }
  // A bucket of few pictures has a band up to nearly 100%; it may leave the chart, so that the others can be read.
  const tops = buckets.map((b) => Math.max(b.rate, b.expected_rate));
  const bands = buckets.map((b) => b.band[1]).sort((a, b) => a - b);
  const top = buckets.length ? Math.min(1, 1.15 * Math.max(...tops, bands[Math.floor(bands.length * 0.8)])) : 0.1;
  const range = promised && { type: "rect", layer: "below", xref: "paper", x0: 0, x1: 1, y0: promised[0], y1: promised[1], line: { width: 0 },
    fillcolor: colour("expected"), showlegend: true, name: "with this calibration, 90%" };
  const traces = [
    { ...band, name: "95% band", type: "scatter", mode: "lines", fill: "toself", line: { width: 0 }, fillcolor: colour("band"), hoverinfo: "skip" },
    { ...expected, name: "expected", type: "scatter", mode: "lines", line: { color: colour("ink"), width: 1.5, dash: "dash" }, hoverinfo: "skip" },
    { ...line, name: "outlier rate", type: "scatter", mode: "lines+markers", line: { color: colour("accent"), width: 2 }, marker: { size: 5, color: colour("accent") }, hoverinfo: "text" },
  ];
  const end = Date.parse(rates.until);
  await draw(find("rate-chart"), sentence, traces, {
    shapes: range ? [range] : [],
    xaxis: { type: "date", range: [local(Date.parse(rates.since)), local(end)] }, yaxis: { tickformat: ".1~%", range: [0, top] },
  });
}

/**
 * How many of `total` p-values fall into each of `bins` if all pictures are normal, and half of the 95% range. A p-value is
 * a rank among n calibration scores, and these are a sample: a bin of j ranks holds a beta-binomial(total, j, n + 1 - j).
 */
function uniform(total, bins, n) {
  const ranks = Array(bins).fill(0);
  for (let k = 1; k <= n + 1; k += 1) ranks[Math.max(0, Math.ceil((k * bins) / (n + 1) - 1e-9) - 1)] += 1;
  const means = ranks.map((j) => (total * j) / (n + 1));
  const spread = (j) => 1.96 * Math.sqrt((total * j * (n + 1 - j) * (n + 1 + total)) / ((n + 1) ** 2 * (n + 2)));
  return [means, ranks.map(spread)];
}

/** p-values against what they would be if all pictures were normal; `n`: calibration pictures of the one model. */
export async function drawPValues(counts, n) {
  const total = counts.reduce((sum, one) => sum + one, 0);
  const [expected, half] = uniform(total, counts.length, n);
  const edge = (k) => k / counts.length;
  const outside = counts.filter((one, k) => Math.abs(one - expected[k]) > half[k] + 0.5).length;
  const sentence = total === 0 ? "No pictures in this time." :
    `${count(total)} p-values; ${outside} of ${counts.length} bars lie outside the 95% range of normal pictures. Outliers pile up at the left.`;
  beside("p", sentence, "p-values", ["p-value", "Pictures", "If all were normal"],
    total ? counts.map((one, k) => [`${edge(k).toFixed(2)} to ${edge(k + 1).toFixed(2)}`, count(one), figure(expected[k])]) : []);
  const steps = { x: counts.flatMap((_, k) => [edge(k), edge(k + 1)]), y: expected.flatMap((mean) => [mean, mean]) };
  const ranges = expected.map((mean, k) => ({
    type: "rect", layer: "below", x0: edge(k), x1: edge(k + 1), y0: Math.max(0, mean - half[k]), y1: mean + half[k],
    line: { width: 0 }, fillcolor: colour("expected"), showlegend: k === 0, name: "95% range if all were normal",
  }));
  await draw(find("p-chart"), sentence, [
    { name: "pictures", type: "bar", x: counts.map((_, k) => edge(k + 0.5)), y: counts, marker: { color: colour("bar") },
      hovertemplate: "%{y} pictures<extra></extra>" },
    { name: "expected", type: "scatter", mode: "lines", line: { color: colour("ink"), width: 1.5, dash: "dash" }, hoverinfo: "skip",
      showlegend: false, ...steps },
  ], { shapes: ranges, xaxis: { range: [0, 1], dtick: 0.2, title: { text: "p-value" } } });
}

/** Scores of the last verdicts against those of the calibration, as shares. */
export async function drawScores(found) {
  const sum = (values) => values.reduce((total, one) => total + one, 0);
  const [normals, recent] = [sum(found.calibration), sum(found.recent)];
  const middle = found.calibration.map((_, k) => (found.edges[k] + found.edges[k + 1]) / 2);
  const share = (values, total) => values.map((one) => (total ? one / total : 0));
  const [of, now] = [share(found.calibration, normals), share(found.recent, recent)];
  const threshold = found.threshold === null ? "" : ` The threshold is ${figure(found.threshold)}.`;
  const sentence = `The last ${count(recent)} scores, beside ${count(normals)} of the normal pictures that calibrate.${threshold}`;
  beside("score", sentence, "Scores", ["Score", "Last verdicts", "Calibration"], recent || normals ? middle.map((_, k) =>
    [`${figure(found.edges[k])} to ${figure(found.edges[k + 1])}`, percent(now[k]), percent(of[k])]) : []);
  const steps = { x: [found.edges[0]], y: [0] };
  of.forEach((y, k) => { steps.x.push(found.edges[k], found.edges[k + 1]); steps.y.push(y, y); });
  const shapes = found.threshold === null ? [] : [{ type: "line", x0: found.threshold, x1: found.threshold, yref: "paper",
    y0: 0, y1: 1, line: { color: colour("outlier"), width: 2, dash: "dot" } }];
  const notes = found.threshold === null ? [] : [{ x: found.threshold, yref: "paper", y: 1, text: "outlier →", showarrow: false,
    xanchor: "left", yanchor: "top", xshift: 4, font: { color: colour("outlier") } }];
  await draw(find("score-chart"), sentence, [
    { name: "last verdicts", type: "bar", x: middle, y: now, marker: { color: colour("bar") }, hovertemplate: "%{y:.1%} of the last verdicts<extra></extra>" },
    { name: "calibration", type: "scatter", mode: "lines", line: { color: colour("ink"), width: 1.5 }, x: steps.x, y: steps.y, hoverinfo: "skip" },
  ], { shapes, annotations: notes, xaxis: { title: { text: "score (last bar: and above)" } }, yaxis: { tickformat: ".0%" } });
}
