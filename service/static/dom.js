// Elements, numbers and times. Text is only ever set as text, so that no file name is read as HTML.

/** An element; properties that are functions listen, `class` and `data-*` are attributes, null and false are left out. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const find = (id) => document.getElementById(id);

/** Put `children` into `place`; what has the focus keeps it where it stays. */
export function fill(place, ...children) {
  place.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
}

/** A share as percent, with two figures that count. */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  return new Intl.NumberFormat(undefined, { style: "percent", maximumSignificantDigits: share >= 0.1 ? 3 : 2 }).format(share);
}

export const count = (number) => new Intl.NumberFormat().format(number);

export function figure(number, digits = 4) {
  if (number === null || number === undefined) return "–";
  return new Intl.NumberFormat(undefined, { maximumSignificantDigits: digits }).format(number);
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayAndClock = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });

/** A moment in the reader's own zone; the day is left out where it is today. */
export function time(moment) {
  const at = new Date(moment);
  const today = at.toDateString() === new Date().toDateString();
  return el("time", { datetime: moment, title: at.toLocaleString() }, (today ? clock : dayAndClock).format(at));
}

/** A table with a caption that is only heard; the first cell of each row heads it. */
export function table(caption, head, rows, properties = {}) {
  return el("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": caption },
    el("table", properties, el("caption", { class: "unseen" }, caption),
      el("thead", {}, el("tr", {}, head.map((one) => el("th", { scope: "col" }, one)))),
      el("tbody", {}, rows.map(([first, ...rest]) =>
        el("tr", {}, el("th", { scope: "row" }, first), rest.map((one) => el("td", {}, one)))))));
}

/** What people see of a verdict: a shape and a word, not a colour alone. */
export const badge = (outlier) =>
  el("span", { class: outlier ? "badge outlier" : "badge normal" }, outlier ? "▲ outlier" : "● normal");

/** Say it to those who listen rather than look. */
export function tell(text) {
  find("told").textContent = text;
}

/** Ask before something is changed; whether the answer was yes. */
export function asked(title, text, yes) {
  const box = find("question");
  return new Promise((resolve) => {
    const end = (said) => { box.close(); resolve(said); };
    fill(box,
      el("h2", { id: "question-title" }, title), el("p", {}, text),
      el("p", { class: "actions" },
        el("button", { type: "button", click: () => end(true) }, yes),
        el("button", { type: "button", class: "quiet", click: () => end(false) }, "Cancel")));
    box.oncancel = () => resolve(false);
    box.showModal();
  });
}
