/** What the page asks of the server. */

/** Returns the model: its id, the sampling options of a request that gives none, and the length of its context. */
export async function describeModel(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw new Error(await reason(response));
  return (await response.json()).data[0];
}

/** Yields the pieces of an answer: {text, timings}, the latter under the names of llama.cpp's server. */
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, timings_per_token: true });
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw new Error(await reason(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    yield { text: event.choices[0]?.delta.content ?? "", timings: event.timings };
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

/** Yields the objects of server-sent events, each one line "data: {...}" before an empty one. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", piece; !(piece = await reader.read()).done;) {
    const parts = (held + piece.value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}
