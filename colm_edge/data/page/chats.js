// The list of conversations.

import { asJson, asMarkdown, titleOf } from "./chat.js";
import { $, button, element } from "./dom.js";
import { allChats, changeChat, getChat } from "./store.js";

const list = $("list"), menu = $("menu");

/** page: {open(id), remove(id), model()} */
export function chatList(page) {
  let chosen = null; // whose menu is open
  let opened = null; // the conversation that is
  let shown = "";

  function row(chat, openId) {
    const title = titleOf(chat);
    const name = button(title, () => page.open(chat.id), { className: "title", title });
    if (chat.id === openId) name.ariaCurrent = "page";
    const more = button("⋯", () => { chosen = chat.id; }, { className: "more" });
    more.ariaLabel = `More of ${title}`;
    more.popoverTargetElement = menu;
    const item = element("li", {}, name, more);
    item.dataset.chat = chat.id;
    return item;
  }

  function draw(openId) {
    opened = openId;
    const chats = allChats();
    const shape = JSON.stringify([openId, ...chats.map((chat) => [chat.id, titleOf(chat)])]);
    if (shape === shown || list.querySelector("form")) return; // or a name is being written
    shown = shape;
    list.replaceChildren(...chats.map((chat) => row(chat, openId)));
    $("none").hidden = chats.length > 0;
  }

  function rename(id) {
    const item = rowOf(id);
    const box = element("input", { value: titleOf(getChat(id)) });
    box.ariaLabel = "Name of the conversation";
    const form = element("form", {}, box);
    let over = false;
    const done = (keep) => {
      const title = box.value.trim();
      if (over) return;
      over = true;
      form.remove();
      shown = ""; // its row is drawn again
      const chat = changeChat(id, (chat) => { if (keep && title) chat.title = title; });
      if (!chat) draw(opened); // another tab has deleted it
      if (document.activeElement === document.body) rowOf(id)?.querySelector(".title")?.focus();
    };
    form.onsubmit = (event) => { event.preventDefault(); done(true); };
    form.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      event.preventDefault();
      done(false);
    };
    box.onblur = () => done(true);
    item.replaceChildren(form);
    box.focus();
    box.select();
  }

  async function save(suffix, type, text) {
    const chat = getChat(chosen);
    if (!chat) return; // deleted in another tab
    const link = element("a", { download: fileName(chat) + suffix });
    link.href = URL.createObjectURL(new Blob([await text(chat)], { type }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // once it is saved
  }

  const doing = {
    rename: () => rename(chosen),
    markdown: () => save(".md", "text/markdown", asMarkdown),
    json: () => save(".json", "application/json", async (chat) => (
      asJson(chat, (await page.model())?.id))),
    remove: () => page.remove(chosen),
  };
  menu.addEventListener("click", (event) => {
    const action = event.target.dataset.action;
    if (!action) return;
    menu.hidePopover();
    doing[action]();
  });
  menu.addEventListener("toggle", (event) => { if (event.newState === "open") placeMenu(chosen); });
  return draw;
}

const rowOf = (id) => list.querySelector(`[data-chat="${CSS.escape(id)}"]`);

function placeMenu(id) {
  const at = rowOf(id).querySelector(".more").getBoundingClientRect();
  const fits = at.bottom + menu.offsetHeight < innerHeight;
  menu.style.left = `${Math.max(8, Math.min(at.left, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${fits ? at.bottom : at.top - menu.offsetHeight}px`;
}

function fileName(chat) {
  const words = titleOf(chat).slice(0, 50).replace(/[^\p{L}\p{N}]+/gu, "-");
  return words.replace(/^-|-$/g, "") || "chat";
}
