// A conversation: {id, title, changed, turns}. A turn: {id, question, answer, forgotten}, forgotten
// once it is no longer sent. An answer: {tokens, withdrawn, state, note, seconds}, where
//   tokens     [text, who wrote it, p_defer] each; who: 0 the base, 1 the expert, or its name
//   withdrawn  {at, text, source, regret} each; `at` is a place among the tokens
//   state      "writing" (no tab may do so any more: the page finds out), "done", or why it ended
//              before: "stopped", "cut" (the page was closed), "full" (no room was left), "failed"
//              (note says why)

import { sourceOf } from "./experts.js";

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

export const newChat = () => ({ id: newId(), title: "", changed: Date.now(), turns: [] });
export const newTurn = (question) => ({ id: newId(), question, answer: newAnswer() });
const newAnswer = () => ({ tokens: [], withdrawn: [], state: "writing", note: "", seconds: 0 });

export const textOf = (answer) => answer.tokens.map(([text]) => text).join("");
export const turnOf = (chat, id) => chat?.turns.find((turn) => turn.id === id);

export function titleOf(chat) {
  const question = chat?.turns[0]?.question.split("\n")[0] ?? "New chat";
  return chat?.title || (question.length > 80 ? `${question.slice(0, 80).trimEnd()}…` : question);
}

/** What is sent to have a turn answered. Turns that are forgotten or failed are left out. */
export function messagesFor(chat, turnId, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of chat.turns) {
    const text = textOf(turn.answer), last = turn.id === turnId;
    if (!last && (turn.forgotten || !text)) continue;
    messages.push({ role: "user", content: turn.question });
    if (text) messages.push({ role: "assistant", content: text }); // the last one is gone on with
    if (last) break;
  }
  return messages;
}

const sent = (chat) => chat.turns.filter((turn) => !turn.forgotten);

/** Leave out the oldest turn that is still sent. Returns false where only the last is left. */
export function forgetOldest(chat, turnId) {
  const [oldest] = sent(chat);
  if (!oldest || oldest.id === turnId) return false;
  oldest.forgotten = true;
  return true;
}

/** Leave a quarter of the context to the next answer: forget the oldest turns, by their share of
 *  the text. nTokens: what the conversation up to this turn takes now. */
export function makeRoom(chat, turnId, nTokens, nCtx) {
  const size = ({ question, answer }) => question.length + textOf(answer).length;
  const length = () => sent(chat).reduce((sum, turn) => sum + size(turn), 0);
  const all = length();
  while (nTokens * length() / all > nCtx * 3 / 4 && forgetOldest(chat, turnId));
}

/** Ask a question again, or another one instead; what followed is dropped. Returns the new turn. */
export function askAgain(chat, turnId, question) {
  const turn = newTurn(question);
  chat.turns.splice(chat.turns.findIndex((one) => one.id === turnId), Infinity, turn);
  remember(chat);
  return turn;
}

export function removeTurn(chat, turnId) {
  chat.turns = chat.turns.filter((turn) => turn.id !== turnId);
  remember(chat);
}

/** Send all turns again, as far as they fit. */
export function remember(chat) {
  for (const turn of chat.turns) delete turn.forgotten;
}

/** "33 % deferred, 191.7 tok/s" */
export function speedOf({ tokens, seconds }) {
  if (!tokens.length) return "";
  const n = tokens.filter(([, expert]) => expert).length;
  const share = Math.round(100 * n / tokens.length), speed = (tokens.length / seconds).toFixed(1);
  return `${share} % deferred, ${speed} tok/s`;
}

export function asMarkdown(chat) {
  const parts = chat.turns.flatMap(({ question, answer }) => (
    ["## You", question, "## Answer", textOf(answer)]));
  return `${[`# ${titleOf(chat)}`, ...parts].join("\n\n")}\n`;
}

/** A conversation as OpenAI's messages, with who wrote each token. */
export function asJson(chat, model) {
  const messages = chat.turns.flatMap(({ question, answer }) => [
    { role: "user", content: question },
    {
      role: "assistant",
      content: textOf(answer),
      tokens: answer.tokens.map(([text, expert, p_defer]) => (
        { text, source: sourceOf(expert), p_defer })),
      withdrawn: answer.withdrawn,
    },
  ]);
  return JSON.stringify({ title: titleOf(chat), model, messages }, null, 2);
}
