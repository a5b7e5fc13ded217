// One turn on the page: the question, the answer, and what can be done with both.

import { speedOf, textOf } from "./chat.js";
import { copyButton } from "./copy.js";
import { button, element } from "./dom.js";
import { Rendering } from "./markdown.js";

const ENDS = {
  stopped: "Stopped.",
  cut: "Cut here: the page was closed while the answer was written.",
  full: "Cut here: the limit of tokens was reached, or no room was left.",
};
const DRAW_EVERY = 100; // ms; slower where drawing takes long, to leave the CPU to the models

export class TurnView {
  #answer; #drafts = []; // as they are now
  #tokens = []; #withdrawn = []; // as they are shown
  #shape = ""; #offered = "";
  #next = 0; #waiting = false; // when it is drawn again

  /** actions: edit(id, question), again(id), goOn(id), remove(id), each of a turn */
  constructor(turn, actions) {
    this.id = turn.id;
    this.actions = actions;
    this.question = turn.question;
    this.words = element("div", { className: "words", dir: "auto" }, turn.question);
    this.text = element("div", { className: "text", dir: "auto" });
    this.wait = element("p", { className: "wait" }, "Waiting for the first token");
    this.note = element("p", { className: "note" });
    this.speed = element("span", { className: "speed" });
    this.buttons = element("div", { className: "buttons" });
    this.editor = button("Edit", () => this.edit(), { title: "Ask another question here" });
    this.asked = element("article", { className: "question" }, element("h2", {}, "You"), this.words,
      element("div", { className: "buttons" },
        copyButton(() => this.question, "Copy the question"), this.editor,
        button("Delete", () => actions.remove(this.id), { title: "Delete this turn" })));
    this.answered = element("article", { className: "answer" }, element("h2", {}, "Answer"),
      this.text, this.wait, this.note, this.buttons);
    this.element = element("section", { className: "turn" }, this.asked, this.answered);
    this.element.dataset.turn = turn.id;
    this.rendering = new Rendering(this.text);
  }

  /** Show the turn. last: it is the last one; elsewhere: another tab writes it; drafts: tokens that
   *  may still be withdrawn. */
  show(turn, { last, elsewhere, drafts }) {
    this.#answer = turn.answer;
    this.#drafts = drafts;
    this.element.classList.toggle("forgotten", Boolean(turn.forgotten));
    this.#draw();
    this.#foot(last, elsewhere);
  }

  /** Show more of an answer that is being written, soon. */
  grow(answer, drafts) {
    this.#answer = answer;
    this.#drafts = drafts;
    if (this.#waiting) return;
    this.#waiting = true;
    setTimeout(() => requestAnimationFrame(() => {
      this.#waiting = false;
      if (this.#answer.state === "writing") this.#draw();
    }), Math.max(0, this.#next - performance.now()));
  }

  #draw() {
    const begun = performance.now(), { tokens, withdrawn, state } = this.#answer;
    const writing = state === "writing";
    // A stored answer is shown again with every change of its conversation.
    const shape = `${tokens.length} ${withdrawn.length} ${state}`;
    if (writing || shape !== this.#shape) {
      this.#tokens = [...tokens, ...this.#drafts].map(([text, expert, pDefer], i) => (
        { text, expert, pDefer, draft: i >= tokens.length }));
      this.#withdrawn = [...withdrawn];
      this.rendering.show(this.#tokens, withdrawn, writing ? textOf(this.#answer).length : null);
      this.#letIn();
    }
    this.#shape = shape;
    this.wait.hidden = !writing || this.#tokens.length > 0;
    this.answered.ariaBusy = String(writing);
    this.speed.textContent = speedOf(this.#answer);
    this.#next = begun + Math.max(DRAW_EVERY, 8 * (performance.now() - begun));
  }

  #foot(last, elsewhere) {
    const { state, note, tokens } = this.#answer;
    const writing = state === "writing", failed = state === "failed";
    const empty = state === "done" && !tokens.length ? "The answer is empty." : "";
    const why = note || ENDS[state] || empty;
    this.note.textContent = elsewhere ? "Another tab is writing this answer." : why;
    this.note.classList.toggle("error", failed);
    this.note.hidden = !this.note.textContent;
    const offered = {
      Copy: tokens.length > 0,
      Continue: last && !writing && state !== "done" && tokens.length > 0,
      Retry: failed && !tokens.length,
      Regenerate: !writing && !(failed && !tokens.length),
    };
    this.#offer(Object.keys(offered).filter((one) => offered[one]));
  }

  #offer(names) {
    if (names.join() === this.#offered) return; // a button keeps its focus
    this.#offered = names.join();
    const { goOn, again } = this.actions;
    const doing = { Continue: goOn, Retry: again, Regenerate: again };
    const buttons = names.map((name) => (name === "Copy"
      ? copyButton(() => textOf(this.#answer), "Copy the answer")
      : button(name, () => doing[name](this.id))));
    this.buttons.replaceChildren(...buttons, this.speed);
  }

  // The keyboard reaches one token of an answer with Tab, and the others from there with arrows.
  #letIn() {
    if (!this.text.querySelector("[tabindex='0'].token")) {
      const first = this.text.querySelector(".token.expert") ?? this.text.querySelector(".token");
      if (first) first.tabIndex = 0;
    }
  }

  /** What a token or a mark of a withdrawal on the page stands for. */
  factOf(node) {
    if (node.dataset.w) return { withdrawn: this.#withdrawn[node.dataset.w] };
    return { token: this.#tokens[node.dataset.i] };
  }

  /** What the reader has written in the place of the question, and not sent. */
  get draft() {
    const text = this.asked.querySelector(".edit textarea")?.value.trim() ?? "";
    return text === this.question ? "" : text;
  }

  /** Let the question be changed in its place. */
  edit() {
    if (this.asked.querySelector("form")) return;
    const box = element("textarea", { value: this.question, rows: 1, ariaLabel: "Your question" });
    const send = element("button", { className: "main" }, "Ask again");
    const buttons = element("div", { className: "buttons" }, send, button("Cancel", () => close()));
    const form = element("form", { className: "edit" }, box, buttons);
    const close = () => {
      form.replaceWith(this.words);
      this.asked.classList.remove("editing");
      this.editor.focus();
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      const question = box.value.trim();
      if (question) this.actions.edit(this.id, question);
    };
    form.onkeydown = (event) => {
      if (event.key === "Escape" && !composes(event)) {
        event.stopPropagation();
        close();
      }
      submitOnEnter(event, form);
    };
    this.words.replaceWith(form);
    this.asked.classList.add("editing");
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }
}

/** Whether a key belongs to an input method; Safari tells the one that ends it by 229 alone. */
export const composes = (event) => event.isComposing || event.keyCode === 229;

/** Enter sends, Shift+Enter is a new line; an input method's Enter is its own. */
export function submitOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
  if (event.target.type !== "textarea") return;
  event.preventDefault();
  form.requestSubmit();
}
