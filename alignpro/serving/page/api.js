// Requests to the proxy, and the events of its streams.

/** An answer of the proxy or the target that is an error; the message is for people. */
export class RequestFailed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Send a request.
 * @param {string} path Relative to the page.
 * @param {{token?: string, body?: object, signal?: AbortSignal}} options
 * @returns {Promise<Response>} Whose status is one of success.
 */
export async function request(path, { token = "", body, signal } = {}) {
  const headers = {};
  if (token !== "") headers.authorization = `Bearer ${token}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const options = { headers, signal, credentials: "omit", cache: "no-store" };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed("The proxy cannot be reached.", 0);
  }
  if (!response.ok) throw new RequestFailed(await problem(response), response.status);
  return response;
}

async function problem(response) {
  const text = await response.text();
  try {
    const error = JSON.parse(text).error;
    return typeof error === "string" ? error : String(error.message);
  } catch {
    return `The answer has the status ${response.status}.`;
  }
}

/**
 * The pieces of an answer's text as they come.
 * @param {Response} response Of a chat: a stream of events, or JSON where the target does not stream.
 */
export async function* pieces(response) {
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    yield (await response.json()).choices?.[0]?.message?.content ?? "";
    return;
  }
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") continue; // to the end of the stream: who leaves before is counted as gone
    const event = JSON.parse(data);
    if (event.error) throw new RequestFailed(String(event.error.message ?? event.error), response.status);
    const content = event.choices?.[0]?.delta?.content;
    if (content) yield content;
  }
}

/** The data of server-sent events. */
async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r\n\r\n|\n\n|\r\r/);
      rest = events.pop();
      yield* events.map(dataOf).filter((data) => data !== null);
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed: the reader's caller knows
  }
}

function dataOf(event) {
  const lines = event.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
  return lines.length === 0 ? null : lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
