// Draws pages on one canvas, cursor and changes on another above; knows nothing of widgets or words.

const GUTTER = 72, PAD = 7; // css pixels left of the map, for page frame numbers, and around it, for the cursor
const TALLEST = 380, LARGEST_CELL = 28;
const LINES_FROM = 6, PATTERNS_FROM = 9, LETTERS_FROM = 15; // css pixels per cell
const GRAIN = 3; // the least width of a mark, in dots
const OUTLINES = 400; // changed runs beyond which only the whole range is outlined

const hex = (n) => "0x" + n.toString(16);
const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));

function packed(colour) { // "#RRGGBB" as a little-endian RGBA word
  const n = parseInt(colour.slice(1), 16);
  return (0xff000000 | ((n & 0xff) << 16) | (n & 0xff00) | (n >> 16)) >>> 0;
}

function pattern(context, look, ink) {
  if (!look.pattern) return null;
  const tile = document.createElement("canvas"), pen = tile.getContext("2d");
  tile.width = tile.height = 8;
  pen.strokeStyle = ink;
  pen.globalAlpha = 0.5;
  pen.stroke(new Path2D(look.pattern));
  return context.createPattern(tile, "repeat");
}

function pageCanvas(canvas, overlay, { looks, ...themes }, first, columns, now) {
  const rows = Math.ceil(now.states.length / columns);
  let width = 0, height = 0, tall = 1, view = null; // view: column and row at the upper left, css pixels per column
  let theme = "light";

  const across = () => width - GUTTER - PAD, down = () => height - 2 * PAD;
  const fitScale = () => Math.min(across() / columns, LARGEST_CELL);
  const cell = () => [view.scale, view.scale * (view.scale < LINES_FROM ? tall : 1)]; // square once one can see them
  const inSight = () => [across() / cell()[0], down() / cell()[1]];
  const x = (col) => GUTTER + (col - view.x) * cell()[0];
  const y = (row) => PAD + (row - view.y) * cell()[1];
  const cellAt = ([px, py]) => [view.x + (px - GUTTER) / cell()[0], view.y + (py - PAD) / cell()[1]];
  const cursor = () => [now.index % columns, Math.floor(now.index / columns)];

  function look(to) { // move the view, within the map
    view = { ...view, ...to };
    view.scale = clamp(view.scale, fitScale(), LARGEST_CELL);
    view.x = clamp(view.x, 0, columns - inSight()[0]);
    view.y = clamp(view.y, 0, rows - inSight()[1]);
    draw();
  }
  const fit = () => look({ x: 0, y: 0, scale: fitScale() });
  const pan = (from, dx, dy) => look({ x: from.x - dx / cell()[0], y: from.y - dy / cell()[1] });

  function zoom(factor, point = null) { // about the point, or to the cursor
    const [col, row] = point ? cellAt(point) : cursor().map((n) => n + 0.5);
    const [px, py] = point ?? [GUTTER + across() / 2, PAD + down() / 2];
    view.scale = clamp(view.scale * factor, fitScale(), LARGEST_CELL);
    look({ x: col - (px - GUTTER) / cell()[0], y: row - (py - PAD) / cell()[1] });
  }
  function reveal() { // the cursor
    if (!view) return; // not on the page yet
    const [col, row] = cursor(), [wide, high] = inSight();
    const to = {
      x: Math.max(Math.min(view.x, col), col + 1 - wide), y: Math.max(Math.min(view.y, row), row + 1 - high),
    };
    if (to.x !== view.x || to.y !== view.y) look(to);
    else drawOverlay();
  }
  function pageAt(point) {
    const [col, row] = cellAt(point).map(Math.floor), i = row * columns + col;
    return col >= 0 && col < columns && row >= 0 && i < now.states.length ? i : null;
  }
  function resize(to) {
    if (!to || to === width) return height;
    width = to;
    const natural = rows * fitScale();
    tall = fitScale() < LINES_FROM ? clamp(TALLEST / natural, 1, 2) : 1;
    height = Math.round(Math.min(natural * tall, TALLEST)) + 2 * PAD;
    if (view) look({});
    else fit();
    return height;
  }

  function prepare(node) {
    const ratio = window.devicePixelRatio || 1, context = node.getContext("2d", { willReadFrequently: node === canvas });
    node.width = Math.round(width * ratio);
    node.height = Math.round(height * ratio);
    context.scale(ratio, ratio);
    return [context, ratio];
  }

  function draw() {
    if (!view) return;
    theme = isDark(canvas) ? "dark" : "light";
    const [context, ratio] = prepare(canvas), [dx, dy] = cell().map((size) => size * ratio);
    const image = context.createImageData(Math.round(across() * ratio), Math.round(down() * ratio));
    const pixels = new Uint32Array(image.data.buffer), colours = looks.map((l) => packed(l[theme].fill));
    (dx >= GRAIN ? magnify : condense)(pixels, colours, image.width, image.height, dx, dy);
    context.putImageData(image, Math.round(GUTTER * ratio), Math.round(PAD * ratio));
    if (view.scale >= LINES_FROM) detail(context);
    numbers(context);
    drawOverlay();
  }

  function magnify(pixels, colours, w, h, dx, dy) {
    const columnOf = Int32Array.from({ length: w }, (_, px) => Math.floor(view.x + px / dx));
    for (let py = 0; py < h; py++) {
      const base = Math.floor(view.y + py / dy) * columns;
      for (let px = 0; px < w && columnOf[px] < columns; px++)
        pixels[py * w + px] = colours[now.states[base + columnOf[px]]]; // 0, transparent, beyond the last page
    }
  }

  // Pages share dots: the most particular state shows, and wide enough that a single page is seen.
  function condense(pixels, colours, w, h, dx, dy) {
    const { states } = now, best = new Uint8Array(w * h);
    const ranks = looks.map((l) => l.rank + 1), grains = looks.map((l) => (l.rank ? GRAIN : 1));
    const dotOf = Int32Array.from({ length: columns + 1 }, (_, col) => Math.floor((col - view.x) * dx));
    for (let row = Math.max(0, Math.floor(view.y)); row < Math.min(rows, view.y + h / dy); row++) {
      const top = Math.max(0, Math.floor((row - view.y) * dy)), floor = Math.floor((row + 1 - view.y) * dy);
      for (let col = 0, i = row * columns; col < columns && i < states.length; col++, i++) {
        const code = states[i], left = Math.max(0, dotOf[col]);
        const right = Math.min(w, Math.max(dotOf[col + 1], dotOf[col] + grains[code]));
        const low = Math.min(h, Math.max(floor, top + grains[code]));
        for (let line = top; line < low; line++) {
          for (let dot = line * w + left; dot < line * w + right; dot++) {
            if (ranks[code] <= best[dot]) continue;
            best[dot] = ranks[code];
            pixels[dot] = colours[code];
          }
        }
      }
    }
  }

  function detail(context) { // patterns, letters and lines, for the cells in sight
    const size = view.scale, [wide, high] = inSight();
    const patterns = looks.map((l) => (size >= PATTERNS_FROM ? pattern(context, l, l[theme].ink) : null));
    context.save();
    context.beginPath();
    context.rect(GUTTER, PAD, across(), down());
    context.clip();
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.font = `600 ${Math.round(size * 0.6)}px system-ui, sans-serif`;
    for (let row = Math.floor(view.y); row < Math.min(rows, view.y + high); row++) {
      for (let col = Math.floor(view.x); col < Math.min(columns, view.x + wide); col++) {
        const code = now.states[row * columns + col], l = looks[code];
        if (!l) break;
        if (patterns[code]) {
          context.fillStyle = patterns[code];
          context.fillRect(x(col), y(row), size, size);
        }
        context.strokeStyle = l[theme].fill;
        context.fillStyle = l.rank ? l[theme].ink : themes[theme].quiet;
        context.lineWidth = 4;
        for (const put of size >= LETTERS_FROM ? ["strokeText", "fillText"] : [])
          context[put](l.letter, x(col + 0.5), y(row + 0.5) + 1);
        context.strokeStyle = themes[theme].surface;
        context.lineWidth = 1;
        context.strokeRect(Math.round(x(col)) + 0.5, Math.round(y(row)) + 0.5, size, size);
      }
    }
    context.restore();
  }

  function numbers(context) {
    context.font = "11px ui-monospace, Menlo, Consolas, monospace";
    context.textAlign = "right";
    context.fillStyle = themes[theme].quiet;
    const apart = 2 ** Math.max(0, Math.ceil(Math.log2(28 / cell()[1])));
    for (let row = Math.ceil(view.y / apart) * apart; row < rows && y(row) + 12 <= height; row += apart)
      context.fillText(hex(first + row * columns), GUTTER - 10, y(row) + clamp(view.scale / 2 + 4, 9, 18));
  }

  function drawOverlay() {
    if (!view) return;
    const [context] = prepare(overlay), { runs, count, to } = now.changes, box = new Path2D();
    context.beginPath();
    context.rect(GUTTER - PAD, 0, across() + 2 * PAD, height);
    context.clip();
    const pulse = Math.max(0, 1 - (performance.now() - now.changedAt) / 600);
    for (const run of count > OUTLINES ? [[runs[0][0], to]] : runs) stroke(context, outline(...run), 1.5 + 3 * pulse, [4, 3]);
    if (now.selected?.[1] > now.selected?.[0]) {
      const area = outline(...now.selected);
      context.fillStyle = themes[theme].text;
      context.globalAlpha = 0.16;
      context.fill(area);
      context.globalAlpha = 1;
      stroke(context, area, 1.5, []);
    }
    const [col, row] = cursor(), [wide, high] = cell().map((size) => Math.max(size, 9));
    box.rect(x(col + 0.5) - wide / 2, y(row + 0.5) - high / 2, wide, high);
    stroke(context, box, 2, []);
    if (pulse > 0) requestAnimationFrame(drawOverlay);
  }

  function stroke(context, path, line, dash) { // in the colour of text, set off from whatever lies below
    for (const [colour, size, gaps] of [["surface", line + 2.5, []], ["text", line, dash]]) {
      context.strokeStyle = themes[theme][colour];
      context.lineWidth = size;
      context.setLineDash(gaps);
      context.stroke(path);
    }
  }

  function outline(from, to) { // the border of a run of pages, as of selected text
    const a = Math.floor(from / columns), b = Math.floor(to / columns), path = new Path2D();
    const x0 = x(from % columns), x1 = Math.max(x((to % columns) + 1), a === b ? x0 + 2 : 0);
    const left = x(0), right = x(columns), top = y(a) - 1, low = Math.max(y(b + 1), y(b) + 2) + 1;
    const corners = a === b ? [[x0, top], [x1, top], [x1, low], [x0, low]] : [[x0, top], [right, top], [right, y(b)],
      [x1, y(b)], [x1, low], [left, low], [left, y(a + 1)], [x0, y(a + 1)]];
    for (const corner of corners) path.lineTo(...corner);
    path.closePath();
    return path;
  }

  return { draw, fit, pan, zoom, reveal, pageAt, resize, theme: () => (isDark(canvas) ? "dark" : "light"), view: () => view };
}
