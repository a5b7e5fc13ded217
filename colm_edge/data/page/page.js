// The page: what is open, what is being written, and what the reader does.

import { askAgain, newChat, newTurn, removeTurn, textOf, titleOf, turnOf } from "./chat.js";
import { chatList } from "./chats.js";
import { $, button, element } from "./dom.js";
import { classOf, setExperts } from "./experts.js";
import { follow } from "./follow.js";
import * as server from "./server.js";
import { askKey, settingsPanel } from "./settings.js";
import * as store from "./store.js";
import { tips } from "./tip.js";
import { composes, submitOnEnter, TurnView } from "./turn.js";
import { Writing } from "./writing.js";

const log = $("log"), turns = $("turns"), toast = $("toast");
const form = $("form"), prompt = $("prompt");
const writings = new Map(); // by conversation
const views = new Map(); // by turn, of the open conversation
const left = new Set(); // conversations that no tab writes in, until they change
let openId = null; // null: a new conversation, stored with its first question
let known = null; // the server's entry for its pair
let warned = false; // that the browser keeps no more

// The server

async function model() {
  known ??= await server.model(store.settings().key);
  if (known) name(known);
  return known;
}

function name({ meta }) {
  // In the experts' colours; later, while a question is being changed.
  if (setExperts(meta) && ![...views.values()].some((view) => view.draft)) redraw();
  const several = Object.entries(meta?.experts ?? {});
  if (several.length) {
    $("experts").replaceChildren(...several.map(([expert, file]) => element("span",
      { className: "who" }, element("span", { className: classOf(expert) }, expert), " ",
      element("b", { title: file }, file))));
  }
  for (const part of several.length ? ["base", "switch"] : ["base", "expert", "switch"]) {
    const called = meta?.[part] === part ? "" : meta?.[part] ?? ""; // the shipped pair's files
    $(part).textContent = $(part).title = called;
    if (part === "switch") $(part).parentElement.hidden = !called;
  }
}

// What is open

const placed = () => location.hash.slice(1) || null;

// instead: of a conversation that is no more, which Back must not lead to.
function open(id, instead = false) {
  if (id === openId) return;
  openId = id;
  const place = id ? `#${id}` : location.pathname;
  if (placed() !== id) history[instead ? "replaceState" : "pushState"](null, "", place);
  redraw();
  toEnd();
}

function redraw() {
  for (const view of views.values()) keep(view.draft, []);
  views.clear();
  turns.replaceChildren();
  draw();
}

function draw() {
  const chat = openId && store.getChat(openId);
  if (openId && !chat) return open(null, true); // deleted, here or in another tab
  const title = titleOf(chat);
  $("title").textContent = title;
  document.title = chat ? `${title} – colm-edge` : "colm-edge";
  drawList(openId);
  drawTurns(chat?.turns ?? []);
  const busy = writings.has(openId);
  const button = document.querySelector(":focus-visible"); // of the keyboard: it is to go on there
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  if (button === $("send") && busy) $("stop").focus();
  if (button === $("stop") && !busy) prompt.focus({ preventScroll: true });
}

function drawTurns(all) {
  const writing = writings.get(openId);
  if (writing && !all.some((turn) => turn.id === writing.turnId)) writing.stop();
  const shown = all.map((turn, i) => {
    if (!views.has(turn.id)) views.set(turn.id, new TurnView(turn, actions));
    const view = views.get(turn.id), here = writing?.turnId === turn.id;
    if (here) turn.answer = writing.answer;
    const unfinished = turn.answer.state === "writing" && !here;
    const elsewhere = unfinished && !writing && !left.has(openId);
    if (unfinished && !elsewhere) turn.answer.state = "cut";
    view.show(turn, { last: i === all.length - 1, elsewhere, drafts: here ? writing.drafts : [] });
    if (elsewhere) recover(openId);
    return view.element;
  });
  const lost = all.findLastIndex((turn) => turn.forgotten);
  if (lost >= 0) shown.splice(lost + 1, 0, border);
  place(shown.length ? shown : [hint]);
  for (const [id, view] of views) {
    if (all.some((turn) => turn.id === id)) continue;
    views.delete(id);
    keep(view.draft, all);
  }
}

// A question that was being changed is not lost when another tab replaces its turn, or another
// conversation is opened.
function keep(draft, all) {
  if (!draft || all.some((turn) => turn.question === draft)) return;
  prompt.value = [prompt.value, draft].filter(Boolean).join("\n");
  say("That turn is no longer shown; what you wrote is below.");
}

// Put elements in their order, and leave those where they are that are there: what is moved loses
// its focus and selection.
function place(shown) {
  for (const old of [...turns.children]) if (!shown.includes(old)) old.remove();
  for (const [i, one] of shown.entries()) {
    const there = turns.children[i] ?? null;
    if (there !== one) turns.insertBefore(one, there);
  }
}

const border = element("p", { className: "border" },
  "What is above no longer fits the context and is not sent any more.");
const hint = element("p", { className: "hint" }, "Two models write: the base, and ",
  element("span", { className: "expert" }, "the expert"), " wherever the switch defers to it. "
  + "Point at a word, tap it, or reach it with Tab and the arrows to see how sure the switch was.");

// An answer that is unfinished though no tab writes it was cut when its page was closed. That is
// shown and not stored: a tab's last words may reach this one after its lock is free.
const recovering = new Set();
async function recover(chatId) {
  if (recovering.has(chatId)) return;
  recovering.add(chatId);
  await store.whenFree(chatId);
  recovering.delete(chatId);
  left.add(chatId);
  draw();
}

// What is written

async function write(chatId, turnId) {
  const writing = new Writing(chatId, turnId, { model, askKey: newKey, show });
  writings.set(chatId, writing);
  store.changeChat(chatId, (chat) => { chat.changed = Date.now(); });
  draw();
  $("said").textContent = "The answer is being written.";
  writing.over = writing.run();
  await writing.over;
  writings.delete(chatId);
  draw();
  const { answer } = writing;
  if (chatId === openId) $("said").textContent = `${answer.note || "Answer:"} ${textOf(answer)}`;
}

function show({ chatId, turnId, answer, drafts }) {
  if (chatId === openId) views.get(turnId)?.grow(answer, drafts);
}

async function newKey() {
  known = null;
  return askKey();
}

async function stopWriting(chatId) {
  const writing = writings.get(chatId);
  writing?.stop();
  await writing?.over;
}

// Whether another tab writes in the open conversation; then the reader is told.
function isElsewhere() {
  const free = !openId || writings.has(openId) || left.has(openId);
  const found = !free && store.getChat(openId)?.turns.some(
    ({ answer }) => answer.state === "writing");
  if (found) say("Another tab is writing in this conversation.");
  return found;
}

function ask(question) {
  if (writings.has(openId) || isElsewhere()) return false;
  const chat = (openId && store.getChat(openId)) || newChat();
  const turn = newTurn(question);
  chat.turns.push(turn);
  store.putChat(chat);
  open(chat.id);
  write(chat.id, turn.id);
  toEnd();
  return true;
}

// What can be done with a turn, and taken back

const actions = {
  edit: (id, question) => again(id, question),
  again: (id) => again(id, turnOf(store.getChat(openId), id).question),
  goOn: (id) => write(openId, id),
  remove: (id) => isElsewhere() || undoably("Deleted.", (chatId) => {
    store.changeChat(chatId, (chat) => removeTurn(chat, id));
  }),
};

function again(id, question) {
  if (isElsewhere()) return;
  const { turns: all } = store.getChat(openId);
  const nothing = all.at(-1).id === id && !all.at(-1).answer.tokens.length;
  undoably(nothing ? "" : "Replaced.", (chatId) => {
    let turn;
    store.changeChat(chatId, (chat) => { turn = askAgain(chat, id, question); });
    write(chatId, turn.id);
    toEnd();
    return turn.id;
  });
}

// Change a conversation, and offer to put it back as it was, unless it has gone on by then. `change`
// returns the id of the turn that it has answered again, if any: that answer may grow.
async function undoably(words, change, chatId = openId) {
  await stopWriting(chatId);
  const before = store.getChat(chatId), grows = change(chatId);
  // What was pressed may be gone. On a touch screen the prompt would bring up the keyboard.
  if (document.activeElement === document.body && matchMedia("(pointer: fine)").matches) {
    prompt.focus({ preventScroll: true });
  }
  if (!words) return;
  const shape = () => store.getChat(chatId)?.turns.map(
    ({ id, answer }) => (id === grows ? id : `${id} ${answer.tokens.length}`)).join();
  const after = shape();
  const late = () => {
    if (shape() === after) return false;
    say("The conversation has gone on since, and stays as it is.");
    return true;
  };
  say(words, button("Undo", async () => {
    if (late()) return;
    await stopWriting(chatId);
    if (late()) return;
    say("");
    store.putChat({ ...before, title: store.getChat(chatId)?.title ?? before.title });
    open(chatId);
  }));
}

let silence = 0;
function say(words, ...more) {
  clearTimeout(silence);
  toast.replaceChildren(...(words ? [element("span", {}, words), ...more] : []));
  silence = setTimeout(() => { if (!toast.matches(":hover, :focus-within")) say(""); }, 20_000);
}

// What the reader does

form.onsubmit = (event) => {
  event.preventDefault();
  const words = prompt.value.trim();
  if (words && ask(words)) prompt.value = "";
};

prompt.onkeydown = (event) => {
  submitOnEnter(event, form);
  if (event.key === "ArrowUp" && !prompt.value && views.size) {
    event.preventDefault();
    views.get(store.getChat(openId).turns.at(-1).id).edit();
  }
};

document.addEventListener("keydown", (event) => {
  const closes = document.querySelector(":popover-open, dialog[open]"); // Escape closes that
  if (event.key === "Escape" && !closes && !composes(event)) stopWriting(openId);
});

$("stop").onclick = () => stopWriting(openId);
$("new").onclick = () => {
  hideDrawer();
  open(null);
  prompt.focus();
};
const hideDrawer = () => { if ($("chats").matches(":popover-open")) $("chats").hidePopover(); };
matchMedia("(min-width: 52rem)").onchange = hideDrawer; // it stands beside the conversation now

window.addEventListener("popstate", () => open(placed()));
window.addEventListener("pagehide", () => writings.forEach((writing) => writing.stop("cut")));

const drawList = chatList({
  open(id) { hideDrawer(); open(id); },
  remove: (id) => undoably("Deleted.", () => store.removeChat(id), id),
  model,
});
const toEnd = follow(log, turns, $("end"));
tips(log, (node) => views.get(node.closest(".turn").dataset.turn).factOf(node));
settingsPanel();
store.watch((id) => {
  left.delete(id);
  draw();
  if (store.full && !warned) say("The browser keeps no more: what is new is lost with this tab.");
  warned = store.full;
});
openId = placed();
draw();
toEnd();
model();
