// The experts that write tokens: their names, and the colour of each.

const COLOURS = 6; // in page.css
let names = [];

/** Take the experts' names from the server's entry for its pair; one expert has none. Returns
 *  whether these are others than before. */
export function setExperts(meta) {
  const before = names.join();
  names = Object.keys(meta?.experts ?? {});
  return names.join() !== before;
}

/** Who wrote a token, as it is kept: 0 the base, 1 the expert, or the expert's name. */
export function writerOf(source) {
  const [kind, name] = source.split(/:(.*)/s);
  return kind === "expert" ? name || 1 : 0;
}

/** The same as the server says it. */
export function sourceOf(writer) {
  if (typeof writer === "string") return `expert:${writer}`;
  return writer ? "expert" : "base";
}

/** The classes of an expert's tokens; "" for the base's. */
export function classOf(writer) {
  if (!writer) return "";
  const i = names.indexOf(writer);
  return i > 0 ? `expert expert-${i % COLOURS}` : "expert";
}
