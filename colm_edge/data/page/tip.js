// What is told about a token or a withdrawal: on hover, tap and keyboard focus.

import { $, element } from "./dom.js";
import { sourceOf } from "./experts.js";

const MARKED = ".token, .withdrawn";

/** Tell about what is marked inside `area`. factOf: from a node to {token} or {withdrawn}. */
export function tips(area, factOf) {
  const tip = $("tip");
  let over = null;

  function show(node) {
    if (over === node) return;
    hide();
    if (document.body.classList.contains("plain") || !node) return;
    over = node;
    tip.replaceChildren(...told(factOf(node)));
    tip.hidden = false;
    place(tip, node);
    node.setAttribute("aria-describedby", tip.id);
  }

  function hide() {
    over?.removeAttribute("aria-describedby");
    over = null;
    tip.hidden = true;
  }

  const marked = (event) => event.target.closest?.(MARKED);
  for (const kind of ["pointerover", "focusin", "click"]) {
    area.addEventListener(kind, (event) => show(marked(event)));
  }
  area.addEventListener("focusout", hide);
  area.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  // The focus scrolls to its token; what it tells stays beside it.
  area.addEventListener("scroll", () => {
    if (over && over === document.activeElement) place(tip, over);
    else hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    else if (area.contains(document.activeElement)) step(event);
  });
}

function told({ token, withdrawn }) {
  if (token) {
    const words = `${sourceOf(token.expert).replace(":", " ")}, p_defer ${token.pDefer.toFixed(3)}`;
    return [token.draft ? `${words}, may be withdrawn` : words];
  }
  const { text, source, regret } = withdrawn;
  const why = `${source}, withdrawn: a regret of ${regret.toFixed(2)} nats`;
  return [element("del", {}, text.trim() || "(a space)"), element("br"), why];
}

// Below the node, or above it where there is no room; never outside the window.
function place(tip, node) {
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = at.bottom + 6;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  tip.style.top = `${below + height < innerHeight ? below : at.top - height - 6}px`;
}

// From a token to the one beside it.
function step(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const from = document.activeElement.closest(MARKED);
  if (!by || !from) return;
  event.preventDefault();
  const all = [...from.closest(".text").querySelectorAll(MARKED)];
  const to = all[all.indexOf(from) + by];
  if (!to) return;
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}
