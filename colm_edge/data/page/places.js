// Where each rendered character stands in the source, so that who wrote it can be shown.
//
// markdown-it says which lines a block comes from, but not where its texts stand in them. Here each
// text is followed through its block's source, markup by markup. Where that does not agree to the
// letter, the texts of the block get no places, and are shown without their writer.

/** Give each text among markdown-it's tokens `at`: for each of its characters, the place in
 *  `source`. `helpers` are markdown-it's. */
export function findPlaces(tokens, source, helpers) {
  if (/\r(?!\n)/.test(source)) return; // markdown-it would count other lines
  const lines = linesOf(source);
  let row = null;
  for (const token of tokens) {
    if (token.type === "tr_open") row = { ...lines[token.map[0]], next: 0 };
    else if (token.type === "tr_close") row = null;
    else if (token.type === "fence") token.at = inLines(token.content, lines, token.map[0] + 1);
    else if (token.type === "code_block") token.at = inLines(token.content, lines, token.map[0]);
    else if (token.type === "inline") {
      const at = row ? inCell(token.content, row) : inLines(token.content, lines, token.map[0]);
      if (!at || !follow(token.children, token.content, at, helpers)) {
        for (const child of token.children) delete child.at;
      }
    }
  }
}

/** The lines of a text, and where each begins. */
export function linesOf(source) {
  let start = 0;
  return source.split("\n").map((text) => {
    const line = { start, text };
    start += text.length + 1;
    return line;
  });
}

// A block's content is its lines without what stands before (indent, list and quote marks).
function inLines(content, lines, first) {
  const at = [];
  for (const [i, text] of content.split("\n").entries()) {
    const line = lines[first + i];
    const shown = text.trimEnd();
    if (!line) {
      if (shown) return null;
      break; // the end of a code block that is not closed yet
    }
    let whole = line.text.trimEnd();
    if (!whole.endsWith(shown)) whole = withoutHashes(whole); // a heading's
    if (!whole.endsWith(shown)) return null;
    const start = line.start + whole.length - shown.length;
    for (let k = 0; k <= text.length; k++) at.push(start + k); // and the end of the line
  }
  return at;
}

function withoutHashes(text) {
  let end = text.length; // a pattern would take quadratic time for very long runs
  while (text[end - 1] === "#") end--;
  return text.slice(0, end).trimEnd();
}

function inCell(content, row) {
  const start = row.next + row.text.slice(row.next).match(/^[\s|]*/)[0].length;
  if (!content) return [];
  if (!row.text.startsWith(content, start)) return null;
  row.next = start + content.length;
  return Array.from({ length: content.length }, (_, k) => row.start + start + k);
}

// Go through the source of one paragraph, heading or cell, token by token.
function follow(children, content, at, helpers) {
  let p = 0;
  for (const token of children) {
    p = (STEPS[token.type] ?? missing)(token, content, p, at, helpers);
    if (p < 0) return false;
  }
  return !content.slice(p).trim();
}

// Each step returns where its token's source ends, or -1 where the source is another one.
const STEPS = {
  text(token, content, p, at) {
    token.at = at.slice(p, p + token.content.length);
    return past(token.content, content, p);
  },
  text_special(token, content, p, at) { // an escape or an entity
    token.at = Array(token.content.length).fill(at[p]);
    return past(token.markup, content, p);
  },
  code_inline(token, content, p, at) {
    const start = past(token.markup, content, p);
    if (start < 0) return -1;
    for (const { 0: run, index } of content.slice(start).matchAll(/`+/g)) {
      if (run.length !== token.markup.length) continue;
      const raw = content.slice(start, start + index);
      const inner = raw.replace(/\n/g, " ").replace(/^ (.+) $/, "$1");
      if (inner !== token.content) return -1;
      const shift = (raw.length - inner.length) / 2;
      token.at = at.slice(start + shift, start + shift + inner.length);
      return start + index + run.length;
    }
    return -1;
  },
  softbreak: lineEnd,
  hardbreak: lineEnd,
  em_open: markup,
  em_close: markup,
  strong_open: markup,
  strong_close: markup,
  s_open: markup,
  s_close: markup,
  link_open(token, content, p) {
    return past({ linkify: "", autolink: "<" }[token.markup] ?? "[", content, p);
  },
  link_close(token, content, p, at, helpers) {
    if (token.markup === "linkify") return p;
    return token.markup === "autolink" ? past(">", content, p) : linkEnd(content, p, helpers);
  },
  image(token, content, p, at, helpers) {
    const start = past("![", content, p);
    if (start < 0) return -1;
    token.at = at.slice(start, start + token.content.length);
    const end = past(token.content, content, start);
    return end < 0 ? -1 : linkEnd(content, end, helpers);
  },
};

const missing = () => -1;
const past = (text, content, p) => (content.startsWith(text, p) ? p + text.length : -1);

function markup(token, content, p) {
  return past(token.markup, content, p);
}

function lineEnd(token, content, p) {
  const end = /(?:\\|[ \t]*)\n[ \t]*/y;
  end.lastIndex = p;
  return end.test(content) ? end.lastIndex : -1;
}

// Behind the text of a link: "](address "title")", "][reference]" or "]".
function linkEnd(content, p, helpers) {
  const inside = past("](", content, p);
  if (inside < 0) {
    const reference = /\](?:\[[^\]]*\])?/y;
    reference.lastIndex = p;
    return reference.test(content) ? reference.lastIndex : -1;
  }
  const skip = (i) => i + content.slice(i).match(/^\s*/)[0].length;
  let i = skip(inside);
  for (const parse of [helpers.parseLinkDestination, helpers.parseLinkTitle]) {
    const found = parse(content, i, content.length);
    if (found.ok) i = skip(found.pos);
  }
  return past(")", content, i);
}
