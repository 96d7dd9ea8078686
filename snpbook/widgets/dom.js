// What every view in the browser needs: elements, listeners, and whether the paper below it is dark.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function on(node, acts) {
  for (const [name, act] of Object.entries(acts)) node.addEventListener(name, act, { passive: false });
  return node;
}

function enters(form) { // sends itself on Enter, which JupyterLab keeps from doing so
  return on(form, {
    keydown(event) {
      if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
      event.preventDefault();
      form.requestSubmit();
    },
  });
}

function isDark(node) { // by the paper that the map really lies on
  for (let at = node; at; at = at.parentElement) {
    const [r, g, b, a = 1] = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || []).map(Number);
    if (a > 0.5) return 0.2126 * r + 0.7152 * g + 0.0722 * b < 110;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}
