// Asking the service: one way for all, with the header that no form of another site can send.

const HEADERS = { "X-Asked-By": "page" };
const MOST_REMEMBERED = 60;
const PATIENCE = 30_000;
const remembered = new Map();

/** The service said no: `code` is stable, the message is for people. Status 0: there was no answer. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Address of something under the page's own folder; `query` leaves out what is empty. */
export function address(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const text = new URLSearchParams(given).toString();
  return text ? `${path}?${text}` : path;
}

/** JSON of an address. The very same value comes back while nothing has changed. */
export async function get(path, query) {
  const where = address(path, query);
  const before = remembered.get(where);
  const headers = before ? { ...HEADERS, "If-None-Match": before.tag } : HEADERS;
  const answer = await reached(where, { headers, signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 304) return before.value;
  const value = await read(answer);
  remembered.delete(where);
  if (answer.headers.has("ETag")) remembered.set(where, { tag: answer.headers.get("ETag"), value });
  if (remembered.size > MOST_REMEMBERED) remembered.delete(remembered.keys().next().value);
  return value;
}

/** Have something done; `body` is JSON, or a form with files. */
export async function send(method, path, body = {}) {
  return read(await reached(path, { method, headers: HEADERS, body: body instanceof FormData ? body : JSON.stringify(body) }));
}

async function reached(where, options) {
  try {
    return await fetch(where, { ...options, credentials: "same-origin", cache: "no-store" });
  } catch {
    throw new Refused(0, "no_answer", "The service does not answer. The page goes on trying.");
  }
}

async function read(answer) {
  const body = await answer.json().catch(() => null);
  if (answer.ok && body !== null) return body;
  const error = body?.error ?? { code: "no_answer", message: `The service answered with status ${answer.status}.` };
  if (["session_over", "no_key"].includes(error.code)) document.dispatchEvent(new Event("signed-out"));
  throw new Refused(answer.status, error.code, error.message);
}
