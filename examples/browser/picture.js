// A picture -> the tiles that the model was trained on, and the text that shows them.
//
// It does what nanovlm/data/images.py does for tiling.policy = idefics3, to the last bit: the same sizes, and the same
// resizing as Pillow's, whose sums are of whole numbers. The processor of transformers.js leaves resizing to the browser,
// which gives other pixels, and so sometimes other answers.

const LONGEST_EDGE = 4096; // no picture is made longer than this
const FRACTION = 2 ** 22; // coefficients are multiples of 1 / FRACTION, as in Pillow

/** File -> {width, height, data}: RGB bytes of a picture file, upright, transparent parts on white. */
export async function readPicture(file) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return { width: bitmap.width, height: bitmap.height, data: data.filter((_, i) => i % 4 !== 3) };
}

/** Picture -> {tiles, rows, columns}: tiles of RGB bytes in reading order, then the whole if there are several. */
export function cutPicture(picture, longestEdge, side) {
  const [width, height] = firstSize(picture.width, picture.height, longestEdge);
  const [fullWidth, fullHeight] = wholeTiles(width, height, side);
  const rows = fullHeight / side;
  const columns = fullWidth / side;
  const grid = resize(resize(picture, width, height), fullWidth, fullHeight); // each rounds, as in training
  const tiles = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) tiles.push(crop(grid, column * side, row * side, side));
  }
  if (tiles.length > 1) tiles.push(resize(grid, side, side).data);
  return { tiles, rows, columns };
}

/** Tiles -> float32[tiles, 3, side, side], normalised. */
export function toPixels(tiles, side, mean, std) {
  const pixels = new Float32Array(tiles.length * 3 * side * side);
  let place = 0;
  for (const tile of tiles) {
    for (let channel = 0; channel < 3; channel++) {
      const shift = Math.fround(mean[channel] / std[channel]);
      for (let i = channel; i < tile.length; i += 3) {
        pixels[place++] = Math.fround(tile[i] / (255 * std[channel])) - shift;
      }
    }
  }
  return pixels;
}

/** The text in the place of a picture; `image` stands for the image tokens of one tile. */
export function layout({ rows, columns }, image) {
  const fake = "<fake_token_around_image>";
  const whole = `${fake}<global-img>${image}${fake}`;
  if (rows * columns === 1) return whole;
  let text = "";
  for (let row = 1; row <= rows; row++) {
    for (let column = 1; column <= columns; column++) text += `${fake}<row_${row}_col_${column}>${image}`;
    text += "\n";
  }
  return `${text}\n${whole}`;
}

/** Bring the longest side to `longestEdge`, the other to an even number, and both below the cap. */
function firstSize(width, height, longestEdge) {
  let aspect = width / height;
  if (width >= height) {
    [width, height] = [longestEdge, Math.trunc(longestEdge / aspect)];
    height += height % 2;
  } else {
    [width, height] = [Math.trunc(longestEdge * aspect), longestEdge];
    width += width % 2;
  }
  [width, height] = [Math.max(1, width), Math.max(1, height)];
  aspect = width / height;
  if (Math.max(width, height) > LONGEST_EDGE) {
    if (width >= height) [width, height] = [LONGEST_EDGE, Math.trunc(LONGEST_EDGE / aspect)];
    else [width, height] = [Math.trunc(LONGEST_EDGE * aspect), LONGEST_EDGE];
  }
  return [Math.max(1, width), Math.max(1, height)];
}

/** Round both sides up to whole tiles. */
function wholeTiles(width, height, side) {
  const aspect = width / height;
  const up = (x) => Math.max(1, Math.ceil(x / side)) * side;
  if (width >= height) {
    width = up(width);
    return [width, up(Math.trunc(width / aspect))];
  }
  height = up(height);
  return [up(Math.trunc(height * aspect)), height];
}

function crop({ width, data }, left, top, side) {
  const tile = new Uint8ClampedArray(side * side * 3);
  for (let y = 0; y < side; y++) {
    const start = ((top + y) * width + left) * 3;
    tile.set(data.subarray(start, start + side * 3), y * side * 3);
  }
  return tile;
}

/** Resize by Lanczos' filter, across and down, each of which rounds to bytes, in the order of Pillow 13. */
function resize({ width, height, data }, newWidth, newHeight) {
  const across = (rows) => newWidth !== width && (data = resample(data, rows, width, 3, newWidth));
  const down = (columns) => newHeight !== height && (data = resample(data, 1, height, columns * 3, newHeight));
  if (height > newHeight && height - newHeight > 2 * (width - newWidth)) {
    down(width);
    across(newHeight);
  } else {
    across(height);
    down(newWidth);
  }
  return { width: newWidth, height: newHeight, data };
}

/** Bytes [outer, size, inner] -> [outer, newSize, inner]. */
function resample(data, outer, size, inner, newSize) {
  const found = new Uint8ClampedArray(outer * newSize * inner);
  const weights = filter(size, newSize);
  for (let o = 0; o < outer; o++) {
    for (let place = 0; place < newSize; place++) {
      const [first, own] = weights[place];
      const from = (o * size + first) * inner;
      const to = (o * newSize + place) * inner;
      for (let i = 0; i < inner; i++) {
        let sum = FRACTION / 2;
        for (let k = 0; k < own.length; k++) sum += data[from + k * inner + i] * own[k];
        found[to + i] = Math.floor(sum / FRACTION); // a clamped array cuts what is below 0 or above 255
      }
    }
  }
  return found;
}

/** For each new place the first old one that counts, and the weights from there on, in units of 1 / FRACTION. */
function filter(size, newSize) {
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  const reach = 3 * stretch;
  return Array.from({ length: newSize }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(size, Math.trunc(centre + reach + 0.5));
    const weights = Array.from({ length: end - first }, (_, k) => lanczos((first + k - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((weight) => roundAway((weight / sum) * FRACTION))];
  });
}

function lanczos(x) {
  return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function roundAway(x) {
  return x < 0 ? Math.trunc(x - 0.5) : Math.trunc(x + 0.5);
}
