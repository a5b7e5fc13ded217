// What the browser keeps: each conversation under a key of its own, and the settings.
//
// Tabs share it. Every change reads the conversation again, so no tab writes back what another one
// has changed meanwhile.

const CHAT = "colm-edge/chat/", SETTINGS = "colm-edge/settings";
const ALIVE = "colm-edge/alive/"; // by conversation: when the tab that writes it said so last
const SILENCE = 70_000; // ms; a hidden tab may say it only once a minute
const unsaved = new Map(); // by key: {text, over}: what could not be kept, and what is instead
const watchers = [];

/** Whether something could not be kept: the storage is full, or the window private. */
export let full = false;

function kept(key) {
  try { return localStorage.getItem(key); } catch { return null; } // forbidden
}

function read(key) {
  const text = unsaved.get(key)?.text ?? kept(key);
  if (!text) return null;
  try { return JSON.parse(text); } catch { return null; }
}

function write(key, value) {
  const text = JSON.stringify(value);
  try {
    localStorage.setItem(key, text);
    unsaved.delete(key);
  } catch {
    unsaved.set(key, { text, over: unsaved.has(key) ? unsaved.get(key).over : kept(key) });
  }
  full = unsaved.size > 0;
  tell(key);
}

// There may be room again. What another tab has changed meanwhile is not written over.
function tryUnsaved() {
  for (const [key, { text, over }] of unsaved) {
    if (kept(key) !== over) continue;
    try { localStorage.setItem(key, text); } catch { continue; }
    unsaved.delete(key);
  }
  full = unsaved.size > 0;
}

function keys() {
  let kept = [];
  try { kept = Object.keys(localStorage); } catch { /* as above */ }
  return new Set([...kept, ...unsaved.keys()]);
}

function tell(key) {
  const id = key?.startsWith(CHAT) ? key.slice(CHAT.length) : null;
  for (const watcher of watchers) watcher(id);
}

/** Call `watcher` with the id of a conversation that was changed here or in another tab, or with
 *  null after any other change. */
export function watch(watcher) {
  watchers.push(watcher);
}

window.addEventListener("storage", ({ key }) => {
  if (key?.startsWith(ALIVE)) return;
  tryUnsaved();
  tell(key);
});

export const getChat = (id) => read(CHAT + id);
export const putChat = (chat) => write(CHAT + chat.id, chat);

/** All conversations, the one that was changed last first. */
export function allChats() {
  const chats = [...keys()].filter((key) => key.startsWith(CHAT)).map(read);
  return chats.filter((chat) => chat?.turns).sort((a, b) => b.changed - a.changed);
}

/** Change a conversation as it is stored now. Returns it, or null where it is no more. */
export function changeChat(id, change) {
  const chat = getChat(id);
  if (!chat) return null;
  change(chat);
  putChat(chat);
  return chat;
}

export function removeChat(id) {
  unsaved.delete(CHAT + id);
  try { localStorage.removeItem(CHAT + id); } catch { /* it was in `unsaved` only */ }
  tryUnsaved();
  tell(CHAT + id);
}

const OWN = {
  system: "", temperature: null, max_tokens: null, threshold: null, review: null, key: "",
  marks: true,
};

/** The settings; null leaves a thing to the server and the switch. */
export const settings = () => ({ ...OWN, ...read(SETTINGS) });
export const set = (changes) => write(SETTINGS, { ...settings(), ...changes });

// While a tab writes into a conversation it holds a lock. So other tabs know that it is being
// written, and that what is found unfinished without a lock was cut. Over plain http to another
// machine there are no locks: there it says the time, again and again.

/** Do some work while no other tab writes into a conversation. Throws if one does. */
export async function alone(id, work) {
  if (navigator.locks) {
    const signal = AbortSignal.timeout(1000);
    return navigator.locks.request(CHAT + id, { signal }, work);
  }
  if (isWritten(id)) throw new DOMException("another tab writes", "TimeoutError");
  const beat = () => { try { localStorage.setItem(ALIVE + id, Date.now()); } catch { /* full */ } };
  beat();
  const beating = setInterval(beat, 2000);
  const end = () => {
    clearInterval(beating);
    try { localStorage.removeItem(ALIVE + id); } catch { /* forbidden */ }
  };
  window.addEventListener("pagehide", end);
  try {
    return await work();
  } finally {
    window.removeEventListener("pagehide", end);
    end();
  }
}

/** Returns once no tab writes into a conversation. */
export async function whenFree(id) {
  if (navigator.locks) {
    await navigator.locks.request(CHAT + id, { mode: "shared" }, () => {});
    return;
  }
  while (isWritten(id)) await new Promise((go) => { setTimeout(go, 500); });
}

function isWritten(id) {
  return Date.now() - Number(kept(ALIVE + id)) < SILENCE;
}
