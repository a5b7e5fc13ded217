// An answer while it is written: asked for, received token by token, saved every second.

import { forgetOldest, makeRoom, messagesFor, remember, turnOf } from "./chat.js";
import { writerOf } from "./experts.js";
import { Refusal, stream } from "./server.js";
import { alone, changeChat, getChat, settings } from "./store.js";

const SAVE_EVERY = 1000; // ms

export class Writing {
  /** page: {model(): the server's entry; askKey(): whether a new key was given; show(writing)} */
  constructor(chatId, turnId, page) {
    Object.assign(this, { chatId, turnId, page });
    this.answer = turnOf(getChat(chatId), turnId).answer;
    this.answer.state = "writing";
    this.answer.note = "";
    this.drafts = []; // tokens that may still be withdrawn
    this.stopping = new AbortController();
    this.stopped = new Promise((go) => { this.stopping.signal.onabort = () => go(null); });
  }

  /** Write the answer to its end. Throws nothing: what goes wrong is the answer's note. */
  async run() {
    try {
      await alone(this.chatId, () => this.#write());
    } catch {
      this.#end("failed", "Another tab is writing in this conversation.");
    }
  }

  /** End it now, with what is there. */
  stop(state = "stopped") {
    this.#end(state);
    this.stopping.abort();
  }

  async #write() {
    this.#save();
    this.begun = performance.now() - 1000 * this.answer.seconds;
    try {
      const reason = await this.#receive();
      this.#end(reason === "length" ? "full" : "done");
    } catch (e) {
      this.#end("failed", e.message);
      this.stopping.abort(); // the server may still be writing
    }
  }

  // Ask until the prompt fits and the key is right. Returns why the answer ended.
  async #receive() {
    for (;;) {
      try {
        return await this.#take();
      } catch (e) {
        if (!(e instanceof Refusal) || this.stopping.signal.aborted) throw e;
        const tooLong = e.code === "context_length_exceeded";
        const again = e.status === 401 ? await this.page.askKey()
          : tooLong && this.#change((chat) => forgetOldest(chat, this.turnId));
        if (again) continue;
        if (tooLong) this.#change(remember); // nothing was gained by forgetting
        throw e;
      }
    }
  }

  async #take() {
    const own = settings();
    // It may hang, and the reader can stop it all the same.
    const known = await Promise.race([this.page.model(), this.stopped]);
    this.stopping.signal.throwIfAborted();
    const { max_model_len: nCtx } = known ?? {};
    const messages = messagesFor(getChat(this.chatId), this.turnId, own.system);
    const body = { messages, ...optionsOf(own) };
    const before = this.answer.tokens.length;
    let reason = null;
    for await (const data of stream(body, own.key, this.stopping.signal)) {
      if (this.answer.state !== "writing") break;
      reason ??= data.choices[0]?.finish_reason;
      if (data.usage && nCtx) {
        this.#change((chat) => makeRoom(chat, this.turnId, data.usage.total_tokens, nCtx));
      }
      if (!data.colm) continue;
      this.#event(data.colm, before);
      this.answer.seconds = (performance.now() - this.begun) / 1000;
      this.page.show(this);
      this.saving ??= setTimeout(() => this.#save(), SAVE_EVERY);
    }
    return reason;
  }

  #event(colm, before) {
    const { tokens, withdrawn } = this.answer;
    if (colm.draft) this.drafts.push(tokenOf(colm.draft));
    if (colm.undone) {
      this.drafts.splice(-colm.undone.tokens.length);
      const { at, text, source, regret } = colm.undone;
      withdrawn.push({ at: before + at, text, source, regret });
    }
    if (colm.source) { // final: the first of the drafts, if there are any
      this.drafts.shift();
      tokens.push(tokenOf(colm));
    }
  }

  #end(state, note = "") {
    if (this.answer.state !== "writing") return;
    Object.assign(this.answer, { state, note });
    this.drafts = [];
    this.#save();
    this.page.show(this);
  }

  #save() {
    clearTimeout(this.saving);
    this.saving = null;
    this.#change((chat) => { turnOf(chat, this.turnId).answer = this.answer; });
  }

  // Change the conversation, unless this turn was deleted meanwhile: it stays deleted.
  #change(change) {
    let result;
    const chat = changeChat(this.chatId, (chat) => {
      if (turnOf(chat, this.turnId)) result = change(chat);
    });
    if (!turnOf(chat, this.turnId)) this.stopping.abort();
    return result;
  }
}

function tokenOf({ text, source, p_defer }) {
  return [text, writerOf(source), Number(p_defer.toFixed(4))];
}

function optionsOf({ temperature, max_tokens, threshold, review }) {
  const colm = { trace: true, provisional: true, threshold, review };
  const text = JSON.stringify({ temperature, max_tokens, colm });
  return JSON.parse(text, (name, value) => value ?? undefined); // without what is null
}
