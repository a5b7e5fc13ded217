// The two things that the page asks of the server.

/** A request was refused. */
export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answers ${status}.`);
    Object.assign(this, { status, code: error?.code });
  }
}

const BROKEN = "The answer broke off.";

const auth = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** The server's entry for its pair, or null where it gives none. */
export async function model(key) {
  try {
    const response = await fetch("v1/models", { headers: auth(key) });
    return response.ok ? (await response.json()).data[0] : null;
  } catch {
    return null;
  }
}

/** Ask for an answer; yield the events of its stream. Throws Refusal. */
export async function* stream(body, key, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...auth(key) },
    signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  }).catch(() => { throw new Error("The server does not answer."); });
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    throw new Refusal(response.status, error);
  }
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const data = JSON.parse(event);
    if (data.error) throw new Refusal(500, data.error);
    yield data;
  }
  throw new Error(BROKEN);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => { throw new Error(BROKEN); });
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}
