// Buttons that copy a text.

import { button } from "./dom.js";

/** A button that copies what `text` returns, and says whether it could. */
export function copyButton(text, label) {
  const made = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      made.textContent = "Copied";
    } catch { // a page that did not come by https or from this machine
      made.textContent = "Not allowed";
    }
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  });
  if (label) made.title = label;
  return made;
}
