// Requests to the server, and what the browser stores: settings, and the API key until the tab is closed.

export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null; // storage can be disabled
  }
}

export function keep(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    // the value is requested again
  }
}

// Answer of the server to a request; rejects with the server's message and its status.
export async function call(path, options = {}) {
  const key = recall("sessionStorage", "tnnlm.key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached.");
  }
  if (response.ok) return response;
  let message = `The server returned ${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // the error is not from the API, for example from a proxy
  }
  throw Object.assign(new Error(message), { status: response.status });
}

// Chunks of a streamed answer, up to [DONE].
export async function* chunks(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The connection was lost.");
}

// Server-sent events: network chunks may end anywhere, also within a line or a character.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
  }
}
