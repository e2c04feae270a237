// The page: pictures and questions in, answers as they come, and for each of their tokens where it looked.
// Whatever comes from a model, a file or a person is put into the page as text alone.

import { drawChosen, hideLook, plural, showLook } from "./panel.js";
import { isPicture, readConversation, writeConversation } from "./saved.js";
import { ask, askLook, findModel, messagesOf } from "./talk.js";
import { readLook } from "./look.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

// A turn: {question, pictures: [{name, url}], model, answer, ids, finish, counts, look, read}, where `model` gave the
// answer, `look` is what the server told and `read` is that with its arrays.
let turns = [];
let pending = []; // pictures of the next question
let model = ""; // the one that is served
let running = null; // AbortController of what is being asked

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

// Scrolls as little as shows the element.
function bring(element) {
  element.scrollIntoView({ block: "nearest" });
}

// ---- pictures ----

function readFile(file, how) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader[how](file);
  });
}

// Ends well where the browser can show the picture: not all show TIFF, and a name says little.
function tryPicture({ name, url }) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = resolve;
    image.onerror = () => reject(new Error(`${name} cannot be shown`));
    image.src = url;
  });
}

async function take(files) {
  say("");
  for (const file of files) {
    try {
      if (file.type === "application/json" || file.name.endsWith(".json")) {
        await open(await readFile(file, "readAsText"));
        continue;
      }
      const url = await readFile(file, "readAsDataURL");
      if (!isPicture(url)) throw new Error(`${file.name} is no picture that can be shown`);
      const picture = { name: file.name, url };
      await tryPicture(picture);
      pending.push(picture);
    } catch (error) {
      say(error.message, true);
    }
  }
  showPending();
}

function thumbnail(picture) {
  const image = make("img", { alt: picture.name, src: picture.url });
  image.onload = () => image.classList.toggle("small", image.naturalHeight < 72);
  return image;
}

function showPending() {
  $("pending").replaceChildren(
    ...pending.map((picture, number) => {
      const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove ${picture.name}` });
      remove.onclick = () => {
        pending.splice(number, 1);
        showPending();
        $("question").focus();
      };
      return make("li", {}, thumbnail(picture), remove);
    }),
  );
}

// ---- turns ----

function showTurn(turn) {
  const thumbs = make("div", { className: "thumbs" }, ...turn.pictures.map(thumbnail));
  const question = make("div", { className: "question" }, thumbs, make("span", { textContent: turn.question }));
  turn.view = make("div", { className: "answer" });
  turn.note = make("p", { className: "counts" });
  $("hint").hidden = true;
  $("turns").append(make("article", { className: "turn" }, question, turn.view, turn.note));
  showCounts(turn);
  showAnswer(turn);
}

function showCounts(turn) {
  turn.note.textContent = turn.counts;
  turn.note.classList.toggle("bad", turn.finish === "error");
}

function showAnswer(turn) {
  if (!turn.read) {
    turn.view.textContent = turn.answer;
    return;
  }
  turn.view.setAttribute("role", "listbox");
  turn.view.setAttribute("aria-label", "Tokens of the answer");
  turn.view.setAttribute("aria-orientation", "horizontal");
  const tokens = turn.read.tokens.map(({ text, logprob }, number) => {
    const token = make("span", { className: "token", role: "option", textContent: text || "·" });
    token.setAttribute("aria-selected", "false");
    token.tabIndex = number === 0 ? 0 : -1;
    token.classList.toggle("part", !text);
    token.classList.toggle("unsure", Math.exp(logprob) < 0.5);
    token.onpointerenter = () => select(turn, number);
    token.onfocus = () => select(turn, number);
    token.onclick = () => token.focus();
    token.onkeydown = (event) => walk(event, turn, number);
    return token;
  });
  turn.view.replaceChildren(...tokens);
  if (turn.read.leftOut) turn.note.textContent += `; not told: the last ${plural(turn.read.leftOut, "token")}`;
}

function select(turn, number) {
  const before = document.querySelector(".token[aria-selected=true]");
  before?.setAttribute("aria-selected", "false");
  for (const token of turn.view.children) token.tabIndex = -1;
  turn.view.children[number].setAttribute("aria-selected", "true");
  turn.view.children[number].tabIndex = 0;
  const seen = turns.slice(0, turns.indexOf(turn) + 1);
  showLook(turn.read, number, seen.flatMap(({ pictures }) => pictures));
}

function walk(event, turn, number) {
  const last = turn.view.children.length - 1;
  const moves = { ArrowLeft: number - 1, ArrowRight: number + 1, Home: 0, End: last };
  const isShortcut = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey; // Alt+ArrowLeft goes back
  if (isShortcut || !(event.key in moves)) return;
  event.preventDefault();
  turn.view.children[Math.max(0, Math.min(last, moves[event.key]))].focus();
}

function refresh() {
  const [shown, gone] = running ? [$("stop"), $("send")] : [$("send"), $("stop")];
  const hadFocus = document.activeElement === gone;
  [shown.hidden, gone.hidden] = [false, true];
  if (hadFocus) shown.focus();
  $("save").disabled = !turns.length || running !== null;
}

function clear() {
  running?.abort();
  [turns, pending, running] = [[], [], null];
  hideLook();
  $("turns").replaceChildren($("hint"));
  $("hint").hidden = false;
  showPending();
  say("");
  refresh();
}

async function open(text) {
  const opened = readConversation(text); // throws before anything is cleared, as does the next line
  await Promise.all(opened.flatMap(({ pictures }) => pictures).map(tryPicture));
  clear();
  turns = opened;
  turns.forEach(showTurn);
  refresh();
  const models = [...new Set(turns.map((turn) => turn.model))];
  say(`opened; ${models.join(" and ")} gave the answers`);
  const last = turns.findLast((turn) => turn.read);
  if (last) select(last, 0);
  bring($("ask"));
  bring(turns.at(-1).view.parentElement);
}

function save() {
  const blob = new Blob([writeConversation(turns)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(blob), download: "conversation.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ---- asking ----

function options() {
  const chosen = {};
  for (const name of NUMBERS) {
    $(name).value ||= $(name).defaultValue; // an emptied one is as it was at first, and what is asked is seen
    if ($(name).value) chosen[name] = Number($(name).value);
  }
  return chosen;
}

async function send() {
  const question = $("question").value.trim();
  if (running) return;
  if (!question) {
    say("write a question");
    $("question").focus();
    return;
  }
  const turn = { question, pictures: pending, answer: "", ids: [], finish: "", counts: "", look: null, read: null };
  turns.push(turn);
  pending = [];
  $("question").value = "";
  showPending();
  showTurn(turn);
  bring($("ask")); // the turn has moved it down, with what is said there
  await during(turn, answer);
  if (turns.includes(turn) && turn.ids.length) await during(turn, look);
}

// Runs a part of a turn that can be stopped.
async function during(turn, part) {
  const controller = new AbortController();
  running = controller;
  refresh();
  try {
    await part(turn, controller.signal);
  } catch (error) {
    if (running !== controller) return; // another conversation has begun
    const isStopped = error.name === "AbortError";
    say(isStopped ? "stopped" : error.message, !isStopped);
  }
  if (running !== controller) return;
  running = null;
  refresh();
}

async function answer(turn, signal) {
  const start = performance.now();
  let first = 0;
  try {
    say("answering…");
    if (!model) await connect();
    turn.model = model;
    const body = { model, messages: messagesOf(turns), ...options() };
    turn.finish = await ask(body, $("token").value, signal, (text, ids) => {
      first ||= ids.length ? performance.now() : 0;
      turn.ids.push(...ids);
      turn.answer += text;
      turn.counts = count(turn.ids.length, start, first);
      turn.view.textContent = turn.answer;
      showCounts(turn);
    });
    if (turn.finish === "length") turn.counts += "; ended at the most tokens";
    say(turn.ids.length ? "" : "the answer is empty");
  } catch (error) {
    if (!turns.includes(turn)) return; // another conversation has begun
    if (!turn.ids.length) {
      takeBack(turn);
      throw error;
    }
    const isStopped = error.name === "AbortError";
    turn.finish = isStopped ? "stopped" : "error";
    turn.counts += `; ${isStopped ? "stopped" : error.message}`;
  }
  showCounts(turn);
}

// Puts a question that got no answer back to where it can be asked again.
function takeBack(turn) {
  turn.view.parentElement.remove();
  turn.ids = [];
  turns.pop();
  $("hint").hidden = turns.length > 0;
  pending = [...turn.pictures, ...pending];
  $("question").value ||= turn.question;
  showPending();
}

async function look(turn, signal) {
  say("looking…");
  const told = await askLook(model, turns, turn.ids, $("token").value, signal);
  turn.read = readLook(told);
  turn.look = told;
  if (!turns.includes(turn)) return;
  showAnswer(turn);
  say("");
  select(turn, 0);
}

function count(num, start, first) {
  const seconds = (performance.now() - first) / 1000;
  // Pieces that come together, as from a proxy that gathers them, tell no speed.
  const speed = num > 1 && seconds > 0.2 ? `, ${((num - 1) / seconds).toFixed(1)} tokens a second` : "";
  return `${plural(num, "token")}${speed}, the first after ${((first - start) / 1000).toFixed(2)} s`;
}

async function connect() {
  model = await findModel($("token").value);
  $("model").textContent = model;
}

// ---- what people do ----

$("ask").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("stop").onclick = () => running?.abort();
document.onkeydown = (event) => {
  if (event.key === "Escape" && !event.isComposing) running?.abort();
};
$("new").onclick = () => {
  clear();
  $("question").focus();
};
$("save").onclick = save;
for (const id of ["open", "pictures"]) {
  $(id).onchange = async () => {
    const files = [...$(id).files];
    $(id).value = "";
    await take(files);
  };
}
for (const id of ["layer", "head", "view"]) $(id).onchange = drawChosen;
document.onpaste = (event) => {
  const { files, types } = event.clipboardData;
  // Office programs add a picture to formatted text. A copied file may come with its name, but only as plain text.
  const isText = types.includes("text/plain") && types.includes("text/html");
  if (!files.length || isText) return;
  event.preventDefault();
  take([...files]);
};
// Text that is dragged goes where it is dropped, as in any page.
const holdsFiles = (event) => event.dataTransfer.types.includes("Files");
document.ondragover = (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
};
document.ondrop = (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  take([...event.dataTransfer.files]);
};

let kept = {}; // what the browser keeps for this page
try {
  kept = localStorage;
} catch {
  // It is told to keep nothing.
}
$("theme").onchange = () => {
  document.documentElement.dataset.theme = kept.theme = $("theme").value;
};
$("theme").value = ["light", "dark"].includes(kept.theme) ? kept.theme : "auto";
$("theme").onchange();

$("token").onchange = () => connect().then(() => say(""), (error) => say(error.message, true));
connect().catch((error) => say(error.status === 401 ? "the server asks for its token: see Options" : error.message, true));
