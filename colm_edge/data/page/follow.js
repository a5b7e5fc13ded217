// Follow what is written at the end, unless the reader has scrolled up.

/** Keep the end of `content` in sight inside `area`; `button` leads back to it. */
export function follow(area, content, button) {
  let following = true, last = 0;
  const left = () => area.scrollHeight - area.clientHeight - area.scrollTop;

  function toEnd() {
    following = true;
    area.scrollTop = area.scrollHeight;
    button.hidden = true;
  }

  function update() {
    if (following) toEnd();
    button.hidden = following || left() < 40;
  }

  area.addEventListener("scroll", () => {
    // A text that grows or a window that shrinks moves the end away too; only a reader moves up.
    if (left() < 8) following = true;
    else if (area.scrollTop < last) following = false;
    last = area.scrollTop;
    button.hidden = following || left() < 40;
  });
  button.addEventListener("click", toEnd);
  const sizes = new ResizeObserver(update);
  sizes.observe(area);
  sizes.observe(content);
  return toEnd;
}
