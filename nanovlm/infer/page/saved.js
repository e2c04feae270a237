// A conversation <-> a JSON file. What is read is a stranger's: all of it is checked, and only shown as text.

import { readLook } from "./look.js";

const FORMAT = "nanovlm conversation";
const PICTURE = /^data:image\/(png|jpeg|webp|gif|avif|bmp|tiff);base64,[A-Za-z0-9+/]+=*$/;

export const isPicture = (url) => typeof url === "string" && PICTURE.test(url);

// Returns the text of the file.
export function writeConversation(turns) {
  const told = turns.map(({ question, pictures, model, answer, ids, finish, counts, look }) => ({
    question, pictures, model, answer, ids, finish, counts, look,
  }));
  return JSON.stringify({ format: FORMAT, version: 1, turns: told });
}

// Returns the turns of a file's text; throws an Error with a sentence for what is no such file.
export function readConversation(text) {
  const refuse = (what) => {
    throw new Error(`this is no conversation that was saved here: ${what}`);
  };
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    refuse("it is not JSON");
  }
  if (data?.format !== FORMAT || data.version !== 1) refuse(`its format is not ${FORMAT}, version 1`);
  if (!Array.isArray(data.turns) || !data.turns.length || data.turns.length > 1000) refuse("it has no turns");
  let numPictures = 0;
  return data.turns.map((turn) => {
    for (const name of ["question", "model", "answer", "finish", "counts"]) {
      if (typeof turn?.[name] !== "string") refuse(`a turn has no ${name}`);
    }
    if (!Array.isArray(turn.ids) || !turn.ids.every(Number.isInteger)) refuse("a turn has no tokens");
    if (!Array.isArray(turn.pictures)) refuse("a turn has no list of pictures");
    const pictures = turn.pictures.map((picture) => {
      if (typeof picture?.name !== "string" || !isPicture(picture.url)) refuse("a picture is not in the file");
      return { name: picture.name, url: picture.url };
    });
    numPictures += pictures.length;
    const { question, model, answer, finish, counts, ids } = turn;
    const read = turn.look === null ? null : readLook(turn.look);
    if (read && read.images.length !== numPictures) refuse("what was looked at are other pictures");
    return { question, model, answer, finish, counts, ids, pictures, look: turn.look, read };
  });
}
