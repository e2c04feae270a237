// What /v1/look tells, or a saved file -> checked arrays -> heat maps. The form is in nanovlm/infer/looking.py.

const MOST = { images: 64, tiles: 4096, tokens: 4096, layers: 1024, heads: 1024, bytes: 2 ** 26 };

// Of the heat, from none to the most: transparent, then from yellow to red, as in nanovlm/infer/look_sheet.py.
const RAMP = [[255, 225, 60], [255, 120, 0], [225, 0, 30]];

function check(holds, what) {
  if (!holds) throw new Error(`this is no look at an answer: ${what}`);
}

const isCount = (x, least, most) => Number.isInteger(x) && x >= least && x <= most;
const isText = (x) => typeof x === "string" && x.length <= 10000;
const isList = (x, length) => Array.isArray(x) && x.length === length;
const isLogprob = (x) => Number.isFinite(x) && x <= 0.001;

function bytes(text, length, what) {
  check(typeof text === "string" && length <= MOST.bytes, `${what} has no place`);
  let raw;
  try {
    raw = atob(text);
  } catch {
    check(false, `${what} is not in base64`);
  }
  check(raw.length === length, `${what} has ${raw.length} bytes, not ${length}`);
  return Uint8Array.from(raw, (character) => character.charCodeAt(0));
}

function floats(text, count, what) {
  const view = new DataView(bytes(text, 4 * count, what).buffer);
  const values = Float32Array.from({ length: count }, (_, i) => view.getFloat32(4 * i, true));
  check(values.every((x) => x >= 0 && x <= 1.001), `${what} are no shares`);
  return values;
}

// Returns what a response says, with its arrays; throws an Error with a sentence for anything else.
export function readLook(data) {
  check(data !== null && typeof data === "object" && data.version === 1, "it has no version 1");
  const { images, tiles, grid, tokens, attention, experts } = data;
  check(Array.isArray(images) && images.length <= MOST.images, "images");
  for (const image of images) check(isCount(image?.width, 1, 65535) && isCount(image?.height, 1, 65535), "images");
  check(Array.isArray(tiles) && tiles.length <= MOST.tiles && isCount(grid, 0, 256), "tiles");
  for (const tile of tiles) {
    check(isList(tile?.box, 4) && tile.box.every((x) => Number.isFinite(x)), "tiles");
    const [left, top, right, bottom] = tile.box;
    // Not too small: heat is weight over area.
    check(right - left > 1e-6 && bottom - top > 1e-6 && typeof tile.whole === "boolean", "tiles");
    check(isCount(tile.image, 0, images.length - 1), "tiles");
  }
  check(Array.isArray(tokens) && isCount(tokens.length, 1, MOST.tokens), "tokens");
  for (const token of tokens) {
    check(isText(token?.text) && Number.isInteger(token.id) && isLogprob(token.logprob), "tokens");
    check(Array.isArray(token.likeliest) && token.likeliest.length <= 100, "alternatives");
    for (const other of token.likeliest) {
      check(isList(other, 3) && Number.isInteger(other[0]), "alternatives");
      check(isText(other[1]) && isLogprob(other[2]), "alternatives");
    }
  }
  const { layers, heads, mean } = attention ?? {};
  check(isCount(layers, 1, MOST.layers) && isCount(heads, 1, MOST.heads), "layers and heads");
  check(["none", "heads", "layers"].includes(mean), "means");
  const L = mean === "layers" ? 1 : layers;
  const N = mean === "none" ? heads : 1;
  const A = tokens.length;
  const P = tiles.length * grid * grid;
  if (experts !== null) {
    check(isCount(experts?.count, 1, 65536), "experts");
    check(isList(experts.chosen, A) && isList(experts.weights, A), "experts");
    for (let a = 0; a < A; a++) {
      const [chosen, weights] = [experts.chosen[a], experts.weights[a]];
      check(isList(chosen, layers) && isList(weights, layers), "experts");
      for (let layer = 0; layer < layers; layer++) {
        check(Array.isArray(chosen[layer]) && isList(weights[layer], chosen[layer].length), "experts");
        check(chosen[layer].length <= experts.count, "experts");
        check(chosen[layer].every((e) => isCount(e, 0, experts.count - 1)), "experts");
        check(weights[layer].every((x) => Number.isFinite(x)), "experts");
      }
    }
  }
  return {
    images, tiles, grid, tokens, layers, heads, mean, experts, L, N, A, P,
    leftOut: isCount(data.left_out, 1, 2 ** 31) ? data.left_out : 0,
    weights: bytes(attention.weights, L * N * A * P, "attention"),
    peaks: floats(attention.peaks, L * N * A, "largest weights"),
    text: floats(attention.text, L * N * A, "weights of the text"),
  };
}

// Returns a token's weights of all image tokens, and of the text: of a layer and a head, or means where these are null.
export function weightsOf(look, token, layer, head) {
  const layers = layer === null || look.L === 1 ? [...Array(look.L).keys()] : [layer];
  const heads = head === null || look.N === 1 ? [...Array(look.N).keys()] : [head];
  const share = 1 / (layers.length * heads.length);
  const images = new Float32Array(look.P);
  let text = 0;
  for (const l of layers) {
    for (const n of heads) {
      const query = (l * look.N + n) * look.A + token;
      text += share * look.text[query];
      const scale = (share * look.peaks[query]) / 255;
      for (let p = 0; p < look.P; p++) images[p] += scale * look.weights[query * look.P + p];
    }
  }
  return { images, text };
}

// Spreads weights over a picture of so many pixels. `view` is all, tiles or whole: which tiles of the picture count.
export function heatMap(look, weights, image, view, width, height) {
  const heat = new Float32Array(width * height);
  const side = look.grid;
  look.tiles.forEach((tile, number) => {
    if (tile.image !== image || (view !== "all" && tile.whole !== (view === "whole"))) return;
    const [left, top, right, bottom] = tile.box;
    const across = ((right - left) * width) / side;
    const down = ((bottom - top) * height) / side;
    for (let cell = 0; cell < side * side; cell++) {
      const x = left * width + (cell % side) * across;
      const y = top * height + Math.floor(cell / side) * down;
      const density = weights[number * side * side + cell] / (across * down);
      if (density === 0) continue;
      // A pixel that a cell covers in part gets that part.
      for (let row = Math.max(0, Math.floor(y)); row < Math.min(height, y + down); row++) {
        const part = density * (Math.min(row + 1, y + down) - Math.max(row, y));
        for (let col = Math.max(0, Math.floor(x)); col < Math.min(width, x + across); col++) {
          heat[row * width + col] += part * (Math.min(col + 1, x + across) - Math.max(col, x));
        }
      }
    }
  });
  return heat;
}

// Draws a heat map into a canvas of its size; `most` is where the colors end.
export function paint(canvas, heat, most) {
  const context = canvas.getContext("2d");
  const drawn = context.createImageData(canvas.width, canvas.height);
  heat.forEach((value, i) => {
    const share = most > 0 ? Math.min(1, value / most) : 0;
    const at = share * (RAMP.length - 1);
    const step = Math.min(Math.floor(at), RAMP.length - 2);
    for (let c = 0; c < 3; c++) {
      drawn.data[4 * i + c] = RAMP[step][c] + (at - step) * (RAMP[step + 1][c] - RAMP[step][c]);
    }
    drawn.data[4 * i + 3] = 255 * 0.62 * share ** 1.5;
  });
  context.putImageData(drawn, 0, 0);
}
