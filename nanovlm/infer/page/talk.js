// Questions -> the server -> answers as they come, and what led to them.

const LOST = "the connection to the server was lost";

async function refusal(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // It says nothing that we understand.
  }
  const error = new Error(message || `the server answered ${response.status}`);
  error.status = response.status;
  return error;
}

// Says a sentence where the network fails: browsers tell of it by a TypeError, each in words of its own.
async function orSay(sentence, promise) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new Error(sentence) : error;
  }
}

const reach = (path, options) => orSay("the server cannot be reached", fetch(path, options));
const receive = (promise) => orSay(LOST, promise);

function post(path, body, token, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  return reach(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// Returns the name of the served model.
export async function findModel(token) {
  const response = await reach("v1/models", token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data[0].id;
}

// Returns the messages of turns, of which the last is asked.
export function messagesOf(turns) {
  const messages = [];
  turns.forEach((turn, number) => {
    const pictures = turn.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
    messages.push({ role: "user", content: [...pictures, { type: "text", text: turn.question }] });
    if (number < turns.length - 1) messages.push({ role: "assistant", content: turn.answer });
  });
  return messages;
}

// Asks for an answer and calls `hear(text, ids)` for each piece of it; returns why it ended.
export async function ask(body, token, signal, hear) {
  const response = await post("v1/chat/completions", { ...body, stream: true, return_token_ids: true }, token, signal);
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, finish] = ["", null];
  for (;;) {
    const { done, value } = await receive(reader.read());
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      for (const choice of data.choices) {
        finish = choice.finish_reason ?? finish;
        hear(choice.delta.content ?? "", choice.token_ids ?? []);
      }
    }
  }
  if (finish === null) throw new Error(LOST);
  return finish;
}

// Returns the response of /v1/look for the answer to the last of the turns.
export async function askLook(model, turns, ids, token, signal) {
  const body = { model, messages: messagesOf(turns), answer_ids: ids };
  const response = await post("v1/look", body, token, signal);
  if (!response.ok) throw await refusal(response);
  return receive(response.json());
}
