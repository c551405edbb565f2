// Signing in with a key and out again. The key goes to the service once and is kept nowhere on this side.

import { get, send } from "./api.js";
import { find } from "./dom.js";
import { state } from "./state.js";

function show() {
  const { session } = state;
  find("whoami").textContent = session.key ? `${session.key} (${session.role})` : "";
  find("sign-out").hidden = !session.key;
}

export async function learnSession() {
  state.session = await get("v1/session");
  show();
  return state.session.role !== null;
}

/** `entered` is called whenever somebody has signed in, `left` when the session is over. */
export function begin(entered, left) {
  find("sign-in").addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = find("key");
    find("sign-in-error").textContent = "";
    try {
      state.session = await send("POST", "v1/session", { key: key.value });
      key.value = "";
      show();
      await entered();
    } catch (error) {
      find("sign-in-error").textContent = error.message;
      key.select();
    }
  });
  find("sign-out").addEventListener("click", async () => {
    await send("DELETE", "v1/session").catch(() => {});
    left();
  });
  document.addEventListener("signed-out", left);
}
