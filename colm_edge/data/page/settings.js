// The panel of settings. An empty field leaves the thing to the server, or to the switch file.

import { $ } from "./dom.js";
import { set, settings, watch } from "./store.js";

const TEXTS = ["system", "key"], NUMBERS = ["temperature", "max_tokens"];

export function settingsPanel() {
  for (const name of TEXTS) $(name).oninput = () => set({ [name]: $(name).value });
  for (const name of NUMBERS) {
    $(name).oninput = () => {
      const { value } = $(name);
      if ($(name).checkValidity()) set({ [name]: value === "" ? null : Number(value) });
    };
  }
  $("threshold").oninput = () => set({ threshold: Number($("threshold").value) });
  $("own").onclick = () => set({ threshold: null });
  $("review").onchange = () => {
    const { value } = $("review");
    set({ review: value === "" ? null : value === "off" ? value : Number(value) });
  };
  $("marks").onchange = () => set({ marks: $("marks").checked });
  watch((id) => { if (id === null) draw(); });
  draw();
}

function draw() {
  const own = settings();
  for (const name of [...TEXTS, ...NUMBERS]) {
    if ($(name) !== document.activeElement) $(name).value = own[name] ?? "";
  }
  $("threshold").value = own.threshold ?? 0.5;
  $("shown").textContent = own.threshold === null ? "own" : own.threshold.toFixed(2);
  $("threshold").classList.toggle("unset", own.threshold === null);
  $("own").disabled = own.threshold === null;
  $("review").value = own.review ?? "";
  $("marks").checked = own.marks;
  document.body.classList.toggle("plain", !own.marks);
}

/** Ask for the server's key. Returns whether one was given. */
export function askKey() {
  const dialog = $("ask-key");
  dialog.returnValue = "";
  $("new-key").value = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => {
      const key = dialog.returnValue && $("new-key").value;
      if (key) set({ key });
      done(Boolean(key));
    }, { once: true });
  });
}
