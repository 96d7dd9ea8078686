// The RMP map in the browser: canvases, controls, page inspector, legend. State comes from Python.

const LARGE = 512; // pages of 4 KB in one of 2 MB

const grouped = (n) => n.toLocaleString("en-US");
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

function compare(before, after) { // where two tables differ: runs of pages (the first of them), and how many
  const found = { runs: [], count: 0, pages: 0, to: 0 };
  for (let i = 0; i < after.length; i++) {
    if (before[i] === after[i]) continue;
    const from = i;
    while (i < after.length && before[i] !== after[i]) i++;
    if (found.count++ < OUTLINES) found.runs.push([from, i - 1]);
    found.pages += i - from;
    found.to = i - 1;
  }
  return found;
}

function render({ model, el }) {
  const columns = model.get("_columns"), first = model.get("first_pfn"), palette = model.get("_palette");
  const { looks } = palette, states = bytes(model.get("_states")), seen = new Set(), selects = model.get("selects");
  const selected = () => (selects ? model.get("selection").map((pfn) => pfn - first) : null);
  const now = {
    states, index: model.get("cursor") - first, changes: compare(states, states), changedAt: -1e9, selected: selected(),
  };

  const keysId = `snpbook-keys-${Math.random().toString(36).slice(2)}`;
  const canvas = make("canvas", {
    tabindex: 0, role: "application", "aria-roledescription": "memory map", "aria-describedby": keysId,
  });
  const overlay = make("canvas", { "aria-hidden": "true" });
  const pages = pageCanvas(canvas, overlay, palette, first, columns, now);
  const button = (name, sign, click) => on(make("button", { type: "button", "aria-label": name, title: name }, sign), { click });
  const zooms = make("div", { class: "zooms", role: "group", "aria-label": "Zoom" },
    button("Zoom out", "\u2212", () => pages.zoom(1 / 2)), button("Zoom in", "+", () => pages.zoom(2)),
    button("Fit", "Fit", pages.fit));
  const input = () => make("input", { size: 12, spellcheck: "false", autocomplete: "off" });
  const field = input(), last = input();
  const form = make("form", {}, make("label", {}, selects ? "First page frame " : "Page frame ", field),
    ...(selects ? [make("label", {}, "last ", last)] : []),
    make("button", { type: "submit" }, selects ? "Select" : "Go"));
  const title = make("strong"), status = make("p", { role: "status" });
  const size = make("span", { class: "quiet" }, `${grouped(states.length)} pages of 4 KB, ${grouped(columns)} a row`);
  const changed = make("p", { class: "change", role: "status" });
  const keys = make("p", { id: keysId, class: "quiet" }, "Arrow keys move the cursor, with Ctrl to the next state; " +
    "Page Up and Page Down by 2 MB; Home, End; + \u2212 0 zoom. " +
    (selects ? "With Shift they select; so does dragging. Drag with Ctrl to pan." : "Drag to pan."));
  const legend = make("ul", { class: "legend", "aria-label": "Legend" }), fields = make("tbody");
  const inspector = make("table", { class: "inspector" }, make("caption", {}, "Page inspector"), fields);
  const stage = make("div", { class: "stage" }, canvas, overlay);
  const lines = make("div", { class: "lines" }, status, changed);
  el.append(make("figure", { class: "snpbook-map", "data-lm-suppress-shortcuts": "true" },
    make("figcaption", {}, title, size), make("div", { class: "tools" }, zooms, form),
    make("div", { class: "body" }, make("div", { class: "main" }, stage, lines, legend, keys), inspector)));

  // What is said in words

  function tellCursor() {
    const pfn = hex(first + now.index), { label, letter } = looks[now.states[now.index]];
    const values = { title: model.get("title"), pages: grouped(states.length), pfn, state: label };
    const fill = (template) => template.replace(/\{(\w+)\}/g, (_, name) => values[name]);
    const [from, to] = now.selected ?? [0, 0];
    Object.assign(values, { count: grouped(to - from + 1), from: hex(first + from), to: hex(first + to) });
    const range = to > from ? `; ${fill(model.get("_selected"))}` : "";
    canvas.setAttribute("aria-label", fill(model.get("_label")) + range);
    status.textContent = `Cursor: pfn ${pfn}, ${label} (${letter})${range}`;
    title.textContent = values.title;
  }
  function tellChanges() {
    const { runs, count, pages: all, to } = now.changes, many = count > 1 ? ` in ${grouped(count)} runs` : "";
    const from = runs[0]?.[0], range = from === to ? "" : ` to ${hex(first + to)}`;
    const text = () => `Changed: ${grouped(all)} ${all > 1 ? "pages" : "page"}${many}, pfn ${hex(first + from)}${range}`;
    changed.textContent = count ? text() : "";
  }
  function tellPage() {
    const page = model.get("_page");
    inspector.setAttribute("aria-busy", String(page.pfn !== model.get("cursor")));
    fields.replaceChildren(...(page.rows ?? []).map(([name, value]) =>
      make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value))));
  }
  function tellLegend() {
    const counts = new Uint32Array(looks.length);
    for (const code of now.states) counts[code]++;
    counts.forEach((count, code) => count && seen.add(code));
    const codes = [...seen].sort((a, b) => looks[a].rank - looks[b].rank);
    legend.replaceChildren(...codes.map((code) =>
      make("li", {}, chip(looks[code]), `${looks[code].label} `, make("b", {}, grouped(counts[code])))));
  }
  function chip(look) {
    const ratio = window.devicePixelRatio || 1, { fill, ink } = look[pages.theme()];
    const node = make("canvas", { width: 36 * ratio, height: 18 * ratio, role: "img", "aria-label": look.letter });
    const pen = node.getContext("2d");
    pen.scale(ratio, ratio);
    pen.fillStyle = fill;
    pen.fillRect(0, 0, 36, 18);
    pen.fillStyle = pattern(pen, look, ink) ?? fill;
    pen.fillRect(18, 0, 18, 18);
    pen.fillStyle = ink;
    pen.font = "600 12px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.fillText(look.letter, 9.5, 13.5);
    return node;
  }

  // What the reader does

  const inside = (index) => Number.isInteger(index) && index >= 0 && index < states.length;
  function move(index, from = index) { // the cursor, and what is selected from `from` to it
    if (!inside(index)) return;
    if (selects) model.set("selection", [from, index].sort((a, b) => a - b).map((i) => first + i));
    model.set("cursor", first + index);
    model.save_changes();
  }
  const anchor = () => now.selected.find((end) => end !== now.index) ?? now.index; // the end that stays
  function border(direction) { // the next page in another state
    let at = now.index + direction;
    while (now.states[at] === now.states[now.index]) at += direction;
    return at;
  }
  const moves = {
    ArrowLeft: (i, jump) => (jump ? border(-1) : i - 1), ArrowRight: (i, jump) => (jump ? border(1) : i + 1),
    ArrowUp: (i) => i - columns, ArrowDown: (i) => i + columns,
    PageUp: (i) => i - LARGE, PageDown: (i) => i + LARGE, Home: () => 0, End: () => states.length - 1,
  };
  const zoomKeys = { "+": () => pages.zoom(2), "=": () => pages.zoom(2), "-": () => pages.zoom(1 / 2), 0: pages.fit };
  const point = (event) => [event.offsetX, event.offsetY];
  let drag = null;
  on(canvas, {
    keydown(event) {
      const jump = event.ctrlKey || event.metaKey;
      const to = moves[event.key]?.(now.index, jump);
      if (to !== undefined) move(to, selects && event.shiftKey ? anchor() : to);
      else if (zoomKeys[event.key] && !jump) zoomKeys[event.key]();
      else return;
      event.preventDefault();
      event.stopPropagation();
    },
    wheel(event) {
      if (!event.ctrlKey && !event.metaKey) return; // plain scrolling belongs to the notebook
      event.preventDefault();
      pages.zoom(event.deltaY < 0 ? 1.25 : 0.8, point(event));
    },
    pointerdown(event) {
      canvas.setPointerCapture(event.pointerId);
      const from = selects && event.shiftKey ? anchor() : pages.pageAt(point(event));
      drag = { at: point(event), view: pages.view(), moved: false, from, pans: !selects || event.ctrlKey || from === null };
    },
    pointermove(event) {
      const at = point(event), under = pages.pageAt(at);
      canvas.title = under === null ? "" : `pfn ${hex(first + under)}: ${looks[now.states[under]].label}`;
      if (!drag) return;
      const [dx, dy] = [at[0] - drag.at[0], at[1] - drag.at[1]];
      drag.moved ||= Math.hypot(dx, dy) > 3;
      if (drag.moved && drag.pans) pages.pan(drag.view, dx, dy);
      else if (drag.moved && under !== null && under !== now.index) move(under, drag.from);
    },
    pointerup(event) {
      const under = pages.pageAt(point(event));
      if (drag && !drag.moved && under !== null) move(under, event.shiftKey && selects ? drag.from : under);
      drag = null;
    },
    pointercancel: () => (drag = null),
  });
  const settle = () => model.send({ cursor: model.get("cursor"), selection: model.get("selection") });
  el.addEventListener("focusout", settle); // a state may still wait for the kernel, and a button is told at once
  on(enters(form), {
    submit(event) {
      event.preventDefault();
      const read = (from) => Number(from.value.trim().replaceAll("_", "") || NaN) - first;
      const at = read(field), to = last.value.trim() ? read(last) : at;
      const wrong = [[field, at], [last, to]].find(([, index]) => !inside(index))?.[0];
      wrong?.setCustomValidity(`A page frame from ${hex(first)} to ${hex(first + states.length - 1)}`);
      if (wrong) wrong.reportValidity();
      else move(to, at);
    },
    input: () => [field, last].forEach((entry) => entry.setCustomValidity("")),
  });

  // What Python does

  const listeners = {
    "change:_states": () => {
      const before = now.states;
      now.states = bytes(model.get("_states"));
      now.changes = compare(before, now.states);
      if (!matchMedia("(prefers-reduced-motion: reduce)").matches) now.changedAt = performance.now();
      restyle(); tellChanges(); tellCursor();
    },
    "change:cursor": () => {
      now.index = model.get("cursor") - first;
      pages.reveal(); tellCursor(); tellPage();
    },
    "change:selection": () => {
      now.selected = selected();
      pages.reveal(); tellCursor();
    },
    "change:_page": tellPage,
    "change:title": tellCursor,
  };
  const restyle = () => { pages.draw(); tellLegend(); };
  const resize = () => { stage.style.height = `${pages.resize(Math.floor(stage.clientWidth))}px`; };
  const watch = new MutationObserver(restyle), sizes = new ResizeObserver(resize);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  for (const name in listeners) model.on(name, listeners[name]);
  watch.observe(document.body, { attributes: true });
  sizes.observe(stage);
  scheme.addEventListener("change", restyle);
  resize(); tellCursor(); tellPage(); restyle();
  requestAnimationFrame(restyle); // once it lies on its paper

  return () => {
    for (const name in listeners) model.off(name, listeners[name]);
    el.removeEventListener("focusout", settle);
    watch.disconnect();
    sizes.disconnect();
    scheme.removeEventListener("change", restyle);
  };
}

export default { render };
