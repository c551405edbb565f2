// A picture with its heat map over it, how strong is the reader's choice, and boxes around what is hot.

import { el } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const FITS = { stretch: ["fill", "none"], crop: ["cover", "xMidYMid slice"], letterbox: ["contain", "xMidYMid meet"] };

function boxes(regions, width, height, fit) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.setAttribute("preserveAspectRatio", FITS[fit][1]);
  drawing.setAttribute("aria-hidden", "true");
  for (const region of regions) {
    const box = document.createElementNS(SVG, "rect");
    for (const name of ["x", "y", "width", "height"]) box.setAttribute(name, region[name]);
    drawing.append(box);
  }
  return drawing;
}

/**
 * `picture`, `heat`: addresses. `fit`: how the model fitted the picture into `shape`, its own [width, height]; a kept
 * picture is what the model saw, so that it fits as it is. `drawnOn`: whether the heat map lies on what the model saw or on
 * the picture itself. `others`: [address, caption] of what is shown beside it. `regions`: a promise of {regions, width, height}.
 */
export function layered({ picture, heat, others = [], alt, fit = "stretch", shape = null, drawnOn = "seen", regions = null }) {
  const below = el("img", { src: picture, alt, class: "below" });
  const placed = drawnOn === "picture" ? "stretch" : fit;
  below.style.objectFit = FITS[placed][0];
  const stack = el("div", { class: "stack" }, below);
  if (shape) stack.style.aspectRatio = `${shape[0]} / ${shape[1]}`;
  const side = others.map(([address, caption]) => el("figure", {}, el("img", { src: address, alt: caption }), el("figcaption", {}, caption)));
  // The shape of whichever can be shown first: browsers read fewer formats than the service.
  const shapedBy = (image) => image.addEventListener("load", () => {
    stack.style.aspectRatio ||= `${image.naturalWidth} / ${image.naturalHeight}`;
    // What the model stretched is shown as the picture was.
    if (fit === "stretch") for (const one of side) one.firstChild.style.aspectRatio = stack.style.aspectRatio;
  });
  shapedBy(below);
  const controls = el("div", { class: "controls" });
  if (heat) {
    const above = el("img", { src: heat, alt: "", class: "above" });
    shapedBy(above);
    const slider = el("input", { type: "range", min: "0", max: "100", value: "70", "aria-label": "Heat map" });
    const show = () => { above.style.opacity = slider.value / 100; slider.setAttribute("aria-valuetext", `${slider.value}%`); };
    slider.addEventListener("input", show);
    above.addEventListener("error", () => { above.remove(); controls.replaceChildren(el("p", { class: "muted" }, "There is no heat map of it any more.")); });
    show();
    stack.append(above);
    controls.append(el("label", {}, "Picture ", slider, " heat map"));
  }
  regions?.then((found) => {
    if (!found?.regions.length) return;
    const drawing = boxes(found.regions, found.width, found.height, placed);
    stack.append(drawing);
    const shown = el("input", { type: "checkbox", checked: true });
    shown.addEventListener("change", () => { drawing.classList.toggle("away", !shown.checked); });
    controls.append(el("label", {}, shown, ` boxes around what is hot (${found.regions.length})`));
  });
  return el("div", { class: "picture" }, el("div", { class: "sides" }, el("figure", {}, stack, side.length ? el("figcaption", {}, "picture and heat map") : null), side), controls);
}
