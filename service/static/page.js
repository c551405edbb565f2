// The page: which view is shown, and what is asked anew while somebody looks.

import { get } from "./api.js";
import { find } from "./dom.js";
import * as models from "./models.js";
import * as outliers from "./outliers.js";
import * as overview from "./overview.js";
import * as review from "./review.js";
import * as scans from "./scans.js";
import * as score from "./score.js";
import * as session from "./session.js";
import { features, learnModels, may, offerChoices } from "./state.js";

const EVERY = 4000;
const STANDINGS = { ready: "● ready", loading: "○ loading", draining: "○ ending", failed: "▲ failed" };
const VIEWS = {
  overview: { of: overview, may: () => features.verdicts && may("read") },
  outliers: { of: outliers, may: () => features.verdicts && may("read") },
  score: { of: score, may: () => may("score") },
  review: { of: review, may: () => features.verdicts && may("read") },
  scans: { of: scans, may: () => features.scans && may("read") },
  models: { of: models, may: () => may("score") },
};
let current = null;
let timer = null;
let asking = false;

function show(name, focus) {
  current = name;
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `view-${name}`;
  for (const link of document.querySelectorAll("#views a")) {
    link.hidden = !VIEWS[link.dataset.view].may();
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  find("views").hidden = name === "sign-in";
  const title = document.querySelector(`#view-${name} h1`);
  document.title = `${title.textContent} · anomaly-vae`;
  if (focus) title.focus();
}

function wanted() {
  const name = location.hash.slice(1);
  if (VIEWS[name]?.may()) return name;
  return Object.keys(VIEWS).find((one) => VIEWS[one].may());
}

async function navigated(focus = true) {
  show(wanted(), focus);
  await again();
}

/** Ask anew, now and then every few seconds, as long as somebody can see it. */
async function again() {
  clearTimeout(timer);
  if (current === null || current === "sign-in" || document.hidden || asking) return;
  asking = true;
  const name = current;
  try {
    if (!(await session.learnSession())) return left();
    const [ready] = await Promise.all([get("ready").catch((error) => ({ state: error.status === 503 ? "loading" : null })), VIEWS[name].of.refresh()]);
    standing(ready);
    trouble(null);
    offerChoices();
  } catch (error) {
    if (current !== "sign-in") trouble(error);
  } finally {
    asking = false;
    // Another view was chosen meanwhile.
    timer = setTimeout(again, current === name ? EVERY : 0);
  }
}

function standing(ready) {
  const text = ready.store?.state === "behind" ? `▲ ${ready.store.waiting} verdicts wait for the store` : STANDINGS[ready.state] ?? "";
  if (find("standing").textContent !== text) find("standing").textContent = text;
}

function trouble(error) {
  const place = find("trouble");
  place.hidden = error === null;
  const text = error?.message ?? "";
  if (place.textContent !== text) place.textContent = text;
  if (error?.status === 0) find("standing").textContent = "▲ no answer";
}

let shown = false;

async function entered() {
  shown = true;
  await learnModels();
  offerChoices();
  await navigated(false);
}

function left() {
  clearTimeout(timer);
  // Nothing of what was shown may stay behind.
  if (shown) return location.reload();
  show("sign-in", false);
  find("key").focus();
}

async function start() {
  for (const view of Object.values(VIEWS)) view.of.begin();
  session.begin(entered, left);
  addEventListener("hashchange", () => { if (current !== "sign-in") navigated(); });
  document.addEventListener("visibilitychange", () => again());
  try {
    if (await session.learnSession()) await entered();
    else left();
  } catch (error) {
    trouble(error);
    timer = setTimeout(() => location.reload(), EVERY);
  }
}

start();
