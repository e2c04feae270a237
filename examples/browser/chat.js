// The page: a picture and a question -> an answer that appears as it is made.
//
// Of transformers.js it uses the tokenizer, the chat template and `generate` over the ONNX graphs in model/; what shows
// a picture to the model is in picture.js. `?dtype=q8` or `?dtype=q4` in the address takes the weights in fewer bits.

import { cutPicture, layout, readPicture, toPixels } from "./picture.js";

const MAX_NEW_TOKENS = 128; // as generate.py
const DTYPE = new URLSearchParams(location.search).get("dtype") ?? "fp32";
const $ = (id) => document.getElementById(id);
let library, model, tokenizer, settings, picture, interrupt;

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

/** An error that a person can do something about, in one sentence. */
class UserError extends Error {}

async function readJson(name) {
  const response = await fetch(`model/${name}`, { cache: "no-cache" });
  if (!response.ok) {
    throw new UserError(
      `There is no model/${name}: write the model with python -m nanovlm.hub.export RUN examples/browser/model ` +
        "--format onnx.",
    );
  }
  return response.json();
}

async function load() {
  const names = ["config", "preprocessor_config", "processor_config", "tokenizer"];
  const found = await Promise.allSettled(names.map((name) => readJson(`${name}.json`)));
  const missing = found.find((read) => read.status === "rejected"); // the first in this order, not in time
  if (missing) throw missing.reason;
  const [config, image, processor, { added_tokens }] = found.map((read) => read.value);
  settings = { config, image, processor, markers: added_tokens.map((token) => token.content) };
  try {
    library = await import("@huggingface/transformers");
  } catch {
    throw new UserError("vendor/ has no transformers.js: run make browser, which puts it there.");
  }
  const { AutoModelForImageTextToText, AutoTokenizer, env } = library;
  Object.assign(env, {
    allowLocalModels: true,
    allowRemoteModels: false,
    localModelPath: new URL(".", location.href).pathname,
    useBrowserCache: false, // else a model that was written anew would not be read
    useWasmCache: false,
  });
  const wasm = (end) => new URL(`vendor/ort-wasm-simd-threaded.${end}`, location.href).href;
  env.backends.onnx.wasm.wasmPaths = { mjs: wasm("mjs"), wasm: wasm("wasm") };
  tokenizer = await AutoTokenizer.from_pretrained("model");
  try {
    model = await AutoModelForImageTextToText.from_pretrained("model", { dtype: DTYPE, device: "wasm" });
  } catch (error) {
    throw new UserError(`The model does not load with dtype = ${DTYPE}: ${error.message}`);
  }
  // Let the browser draw, and hear the button that stops, before each token.
  const forward = model.forward.bind(model);
  model.forward = (inputs) => new Promise((resolve) => setTimeout(resolve)).then(() => forward(inputs));
  say("Choose a picture, and ask.");
  $("ask").disabled = false;
}

async function choose(file) {
  if (!file) return;
  try {
    picture = await readPicture(file);
  } catch {
    return say(`${file.name} is no picture that this browser reads.`, true);
  }
  URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(file);
  $("picture").alt = file.name;
  $("picture").hidden = false;
  say(`${file.name}: ${picture.width} x ${picture.height} pixels.`);
}

/** The inputs of the model for a question about the picture. */
function prepare(question) {
  const { config, image, processor, markers } = settings;
  if (!picture) throw new UserError("Choose a picture first.");
  if (!question.trim()) throw new UserError("Write a question first.");
  const marker = markers.find((token) => question.includes(token));
  if (marker) throw new UserError(`The question contains ${marker}, which controls the model: leave it out.`);
  const side = image.max_image_size.longest_edge;
  const cut = cutPicture(picture, image.size.longest_edge, side);
  const content = [{ type: "image" }, { type: "text", text: question }];
  const text = tokenizer
    .apply_chat_template([{ role: "user", content }], { tokenize: false, add_generation_prompt: true })
    .replace("<image>", () => layout(cut, "<image>".repeat(processor.image_seq_len)));
  const inputs = tokenizer(text, { add_special_tokens: false });
  const room = config.text_config.max_position_embeddings - inputs.input_ids.dims[1];
  if (room < 1) throw new UserError(`The prompt has ${inputs.input_ids.dims[1]} tokens, more than the model reads.`);
  const pixels = toPixels(cut.tiles, side, image.image_mean, image.image_std);
  const shape = [1, cut.tiles.length, side, side];
  return {
    ...inputs,
    pixel_values: new library.Tensor("float32", pixels, [1, cut.tiles.length, 3, side, side]),
    pixel_attention_mask: new library.Tensor("bool", new Uint8Array(shape.reduce((a, b) => a * b)).fill(1), shape),
    max_new_tokens: Math.min(MAX_NEW_TOKENS, room),
  };
}

function addAnswer(question) {
  const [asked, answer] = [document.createElement("dt"), document.createElement("dd")];
  asked.textContent = question;
  $("answers").prepend(asked, answer);
  return answer;
}

async function ask(question) {
  const inputs = prepare(question);
  const answer = addAnswer(question);
  interrupt = new library.InterruptableStoppingCriteria();
  const streamer = new library.TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => answer.append(text),
  });
  await model.generate({ ...inputs, do_sample: false, streamer, stopping_criteria: interrupt });
}

async function onSubmit(event) {
  event.preventDefault();
  if ($("ask").disabled) return;
  $("ask").disabled = true;
  $("stop").hidden = false;
  say("Answering …");
  try {
    await ask($("question").value);
    say("");
  } catch (error) {
    fail(error);
  }
  $("ask").disabled = false;
  $("stop").hidden = true;
}

function fail(error) {
  say(error instanceof UserError ? error.message : `Something went wrong: ${error.message ?? error}`, true);
}

$("file").addEventListener("change", () => choose($("file").files[0]));
$("form").addEventListener("submit", onSubmit);
$("stop").addEventListener("click", () => interrupt?.interrupt());
for (const type of ["dragover", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    if (type === "drop") choose(event.dataTransfer.files[0]);
  });
}
load().catch(fail);
