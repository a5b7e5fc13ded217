// An answer's Markdown as elements, each character marked with the token that wrote it.

import { element } from "./dom.js";
import { copyButton } from "./copy.js";
import { classOf } from "./experts.js";
import { findPlaces, linesOf } from "./places.js";

const md = window.markdownit({ html: false, linkify: true, breaks: true });
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // a file's name is no address
md.core.ruler.disable("text_join"); // escapes stay tokens of their own, which `places` can follow

const escape = md.utils.escapeHtml;
const CLEAN = {
  RETURN_DOM_FRAGMENT: true,
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "button", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li",
    "ol", "p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: [
    "aria-label", "class", "data-i", "data-language", "data-w", "href", "start", "tabindex",
    "title", "type",
  ],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
};

Object.assign(md.renderer.rules, {
  text: (tokens, i, options, env) => painted(tokens[i], env),
  text_special: (tokens, i, options, env) => painted(tokens[i], env),
  code_inline: (tokens, i, options, env) => `<code>${painted(tokens[i], env)}</code>`,
  fence: code,
  code_block: code,
  image(tokens, i, options, env) { // never loaded: its text, as a link to it
    const words = painted(tokens[i], env) || "image";
    return `<a class="image" href="${escape(tokens[i].attrGet("src"))}">${words}</a>`;
  },
  heading_open: (tokens, i) => `<h3 class="level-${tokens[i].tag[1]}">`,
  heading_close: () => "</h3>\n", // below the page's title and the turn's, whatever the level
  th_open: cell,
  td_open: cell,
});

function code(tokens, i, options, env) {
  const language = escape(tokens[i].info.trim().split(/\s/)[0]);
  return `<pre data-language="${language}"><code>${painted(tokens[i], env)}</code></pre>`;
}

function cell(tokens, i) { // markdown-it would write a style, which the page's policy forbids
  const side = (tokens[i].attrGet("style") ?? "").split(":")[1];
  return side ? `<${tokens[i].tag} class="${side}">` : `<${tokens[i].tag}>`;
}

// A text in spans, one for each token of the answer that has a part in it.
function painted({ content, at }, env) {
  if (!at) return escape(content);
  let html = "";
  for (let k = 0, end; k < content.length; k = end) {
    const i = env.writer(at[k]);
    for (end = k + 1; end < content.length && env.writer(at[end]) === i; end++);
    html += env.marks(i) + span(content.slice(k, end), i, env.tokens);
  }
  return html;
}

function span(text, i, tokens) {
  const { expert, draft } = tokens[i];
  const tintBegins = expert && tokens[i - 1]?.expert !== expert;
  const space = tintBegins ? text.match(/^\s*/)[0] : ""; // with a word
  if (space === text) return space;
  const name = ["token", classOf(expert), draft ? "draft" : ""].filter(Boolean).join(" ");
  const rest = escape(text.slice(space.length));
  return `${space}<span class="${name}" data-i="${i}" tabindex="-1">${rest}</span>`;
}

function mark(i) {
  const name = 'class="withdrawn" aria-label="Withdrawn"';
  return `<button type="button" ${name} data-w="${i}" tabindex="-1"></button>`;
}

/** An answer's text on the page. It is parsed and drawn block by block, and while it grows only
 *  its last blocks are. */
export class Rendering {
  #blocks = []; // {start, html, node, n: withdrawals that are shown so far}

  constructor(place) {
    this.place = place;
  }

  /** Show tokens ({text, expert, draft}) and withdrawals ({at: a token's index}).
   *  `settled`: this many characters are there to stay, and what follows is still to come; without
   *  it the text is complete. */
  show(tokens, withdrawn, settled = null) {
    const source = tokens.map((token) => token.text).join("");
    // The block that a text ends with may still become another one, and join the one before it.
    const growing = settled === null ? 0 : this.#blocks.findLastIndex((b) => b.start < settled) - 1;
    const kept = Math.max(0, growing);
    const [from, n] = kept ? [this.#blocks[kept].start, this.#blocks[kept - 1].n] : [0, 0];
    const env = new Marks(tokens, withdrawn, n, from);
    const fresh = blocksOf(source.slice(from), env);
    if (settled === null) {
      const rest = env.marks(tokens.length);
      if (rest) fresh.push({ start: source.length, html: `<p>${rest}</p>`, n: withdrawn.length });
    }
    this.#replace(kept, fresh);
  }

  #replace(kept, fresh) {
    fresh.forEach((block, i) => {
      const old = this.#blocks[kept + i];
      block.node = old?.html === block.html ? old.node : drawn(block.html);
      if (block.node === old?.node) return;
      if (old) old.node.replaceWith(block.node);
      else this.place.append(block.node);
    });
    for (const old of this.#blocks.slice(kept + fresh.length)) old.node.remove();
    this.#blocks.splice(kept, Infinity, ...fresh);
  }
}

// Who wrote which character, and what was withdrawn before it.
class Marks {
  constructor(tokens, withdrawn, n, from) {
    let end = 0;
    this.starts = tokens.map((token) => (end += token.text.length) - token.text.length);
    Object.assign(this, { tokens, withdrawn, n, from });
  }

  /** The last token that begins at or before a place. */
  writer(place) {
    let low = 0, high = this.starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= place + this.from) low = middle;
      else high = middle;
    }
    return low;
  }

  /** The marks that belong before a token, and are not shown yet. */
  marks(i) {
    let html = "";
    for (; this.withdrawn[this.n]?.at <= i; this.n++) html += mark(this.n);
    return html;
  }
}

// The blocks of a source: what stands on the top level.
function blocksOf(source, env) {
  const tokens = md.parse(source, env);
  findPlaces(tokens, source, md.helpers);
  const lines = linesOf(source);
  const blocks = [];
  for (let first = 0, depth = 0, i = 0; i < tokens.length; i++) {
    depth += tokens[i].nesting;
    if (depth) continue;
    const html = md.renderer.render(tokens.slice(first, i + 1), md.options, env);
    blocks.push({ start: env.from + lines[tokens[first].map[0]].start, html, n: env.n });
    first = i + 1;
  }
  return blocks;
}

function drawn(html) {
  const node = element("div", { className: "block" }, window.DOMPurify.sanitize(html, CLEAN));
  for (const link of node.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const pre of node.querySelectorAll("pre")) frame(pre);
  for (const table of node.querySelectorAll("table")) {
    const wide = element("div", { className: "wide", tabIndex: 0 });
    table.replaceWith(wide);
    wide.append(table);
  }
  return node;
}

function frame(pre) {
  const language = element("span", {}, pre.dataset.language);
  const head = element("div", { className: "code-head" }, language);
  const box = element("div", { className: "code" }, head);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.replaceWith(box);
  box.append(pre);
  head.append(copyButton(() => pre.textContent, "Copy code"));
}
