// One token of an answer -> its heat map over the pictures, its alternatives and its experts.

import { heatMap, paint, weightsOf } from "./look.js";

const $ = (id) => document.getElementById(id);
const MOST_PIXELS = 320; // along the longer side of a heat map

let shown = null; // {look, token}, what is in the panel

// Small shares have a decimal.
export const percent = (share) => {
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
};
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const quote = (text) => `“${text.replaceAll("\n", "↵")}”`;

export function hideLook() {
  shown = null;
  $("look").hidden = true;
}

// Shows a token of a look (of `readLook`) at pictures [{name, url}].
export function showLook(look, token, pictures) {
  if (shown?.look !== look) {
    fill($("layer"), look.layers, look.mean === "layers");
    fill($("head"), look.heads, look.mean !== "none");
    $("views").hidden = !look.tiles.some((tile) => tile.whole);
    $("shown").replaceChildren(...pictures.map((picture, image) => figure(picture, look.images[image])));
    $("look").hidden = false;
  }
  shown = { look, token };
  drawChosen();
}

function fill(list, count, isMean) {
  const before = list.value;
  const names = ["mean", ...(isMean ? [] : [...Array(count).keys()].map(String))];
  list.replaceChildren(...names.map((name) => new Option(name)));
  list.value = names.includes(before) ? before : "mean";
  list.disabled = isMean;
}

function figure(picture, { width, height }) {
  const scale = MOST_PIXELS / Math.max(width, height);
  const [element, image, canvas] = ["figure", "img", "canvas"].map((tag) => document.createElement(tag));
  element.className = "picture";
  image.alt = picture.name;
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
  image.src = picture.url;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.setAttribute("aria-hidden", "true");
  element.append(image, canvas);
  return element;
}

// Draws the token for the layer, the head and the tiles that are chosen.
export function drawChosen() {
  const { look, token } = shown;
  const chosen = (list) => (list.value === "mean" ? null : Number(list.value));
  const { images, text } = weightsOf(look, token, chosen($("layer")), chosen($("head")));
  const view = $("views").hidden ? "all" : $("view").value;
  const canvases = [...$("shown").querySelectorAll("canvas")];
  const heats = canvases.map((canvas, image) => heatMap(look, images, image, view, canvas.width, canvas.height));
  // One color means one density in all pictures: attention to an equal part of a picture.
  const most = Math.max(0, ...heats.map((heat) => heat.length * heat.reduce((a, b) => Math.max(a, b), 0)));
  heats.forEach((heat, image) => paint(canvases[image], heat, most / heat.length));
  const told = look.tokens[token];
  const where = look.images.length > 1 ? "pictures" : "picture";
  const shares = `${percent(1 - text)} of its attention is on the ${where}, ${percent(text)} on the text`;
  const likely = `${quote(told.text || "part of a character")} is ${percent(Math.exp(told.logprob))} likely`;
  $("about").textContent = look.images.length ? `${likely}; ${shares}.` : `${likely}.`;
  $("likeliest").replaceChildren(...told.likeliest.map((other) => alternative(other, told.id)));
  $("mixture").hidden = look.experts === null;
  const [ids, weights] = [look.experts?.chosen[token] ?? [], look.experts?.weights[token]];
  $("experts").replaceChildren(...ids.map((chosen, layer) => experts(layer, chosen, weights[layer])));
}

function alternative([id, text, logprob], chosen) {
  const share = Math.exp(logprob);
  const [item, bar, name, number] = ["li", "div", "span", "span"].map((tag) => document.createElement(tag));
  bar.className = "bar";
  bar.style.width = `${100 * share}%`;
  name.textContent = quote(text);
  number.textContent = percent(share);
  item.classList.toggle("chosen", id === chosen);
  item.append(bar, name, number);
  return item;
}

function experts(layer, ids, weights) {
  const item = document.createElement("li");
  const chosen = ids.map((expert, i) => `${expert} (${percent(weights[i])})`).join(", ");
  item.textContent = `layer ${layer}: ${chosen || "dense"}`;
  return item;
}
