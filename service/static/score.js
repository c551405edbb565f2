// Score pictures that are chosen, dropped or pasted, and show what the model makes of them.

import { address, send } from "./api.js";
import { badge, el, fill, find } from "./dom.js";
import { explanation, numbers, parts, regions } from "./facts.js";
import { layered } from "./picture.js";
import { features, state } from "./state.js";

const MOST = 12;
const drop = find("drop");

const asData = (base64) => (base64 ? `data:image/png;base64,${base64}` : null);

function sizeOf(source) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
    image.onerror = () => resolve(null);
    image.src = source;
  });
}

async function judged(file) {
  const name = drop.elements.model.value || state.models.find((one) => one.default)?.name;
  const query = { model: name, heatmap: features.overlay ? "overlay" : "png", reconstruction: features.reconstruction ? "true" : null };
  const form = new FormData();
  form.append("file", file);
  const ask = (more) => send("POST", address("v1/score", { ...query, ...more }), form);
  const found = await ask({ explain: "true" }).catch((error) => {
    // An older bundle keeps nothing to explain by.
    if (error.code === "cannot_explain") return ask({});
    throw error;
  });
  return [found.results[0], state.models.find((one) => one.name === found.model.name), found.model];
}

function shown(file, result, model, of) {
  const source = URL.createObjectURL(file);
  const image = model?.image;
  const placed = sizeOf(source).then((size) => size && { regions: result.regions ?? [], width: size[0], height: size[1] });
  // An overlay is drawn on the picture as it was sent, other heat maps on what the model saw of it.
  const drawn = features.overlay ? { drawnOn: "picture" } : { shape: image && [image.width, image.height] };
  const others = result.reconstruction_png ? [[asData(result.reconstruction_png), "reconstruction"]] : [];
  return [
    el("div", { class: "heading" }, el("h2", {}, file.name || "pasted picture"), badge(result.outlier)),
    el("div", { class: "inside" },
      layered({ picture: source, heat: asData(result.heatmap_png), others, alt: `The picture ${file.name || "pasted"}`, regions: placed, fit: image?.fit, ...drawn }),
      el("div", {}, numbers(result), el("p", { class: "muted" }, `${of.name} ${of.version} · `, el("code", {}, result.id)),
        regions(result.regions), parts(result.parts, result.explanation?.percentiles), explanation(result.explanation))),
  ];
}

async function score(files) {
  let outliers = 0;
  for (const [k, file] of files.entries()) {
    find("scoring").textContent = `Scoring ${k + 1} of ${files.length}…`;
    const place = el("li", { class: "panel" });
    try {
      const [result, model, of] = await judged(file);
      outliers += result.outlier;
      fill(place, shown(file, result, model, of));
    } catch (error) {
      fill(place, el("h2", {}, file.name || "pasted picture"), el("p", { class: "wrong" }, error.message));
    }
    find("scored").prepend(place);
    while (find("scored").children.length > MOST) {
      URL.revokeObjectURL(find("scored").lastChild.querySelector(".below")?.src);
      find("scored").lastChild.remove();
    }
  }
  find("scoring").textContent = `${files.length === 1 ? "One picture" : `${files.length} pictures`} done: ${outliers} ${outliers === 1 ? "outlier" : "outliers"}.`;
}

export function begin() {
  const input = find("files");
  const take = (list) => {
    const files = [...list].filter((file) => file.type.startsWith("image/") || !file.type);
    if (files.length) score(files);
    else find("scoring").textContent = "That is no picture; drop JPEG, PNG, WebP, BMP, TIFF or GIF files.";
  };
  input.addEventListener("change", () => { take(input.files); input.value = ""; });
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => {
    if (find("view-score").hidden || !event.clipboardData.files.length) return;
    event.preventDefault();
    take(event.clipboardData.files);
  });
}

export async function refresh() {}
