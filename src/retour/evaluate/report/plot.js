/* Plots of any two columns. Editors have colours, inverters have shapes, and every point its name,
   so that nothing hangs on colour alone. An infinite mean stands on the plot's edge. */

const COLOURS = 7;
const MARGIN = { left: 62, right: 18, top: 16, bottom: 50 };
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0,${-1.25 * r}L${1.15 * r},${0.9 * r}H${-1.15 * r}z`,
  (r) => `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0z`,
  (r) => `M0,${1.25 * r}L${1.15 * r},${-0.9 * r}H${-1.15 * r}z`,
  (r) => `M${-r},${-0.4 * r}L0,${-1.3 * r}L${r},${-0.4 * r}L${0.7 * r},${r}H${-0.7 * r}z`,
  (r) => `M${-0.4 * r},${-1.2 * r}h${0.8 * r}v${0.8 * r}h${0.8 * r}v${0.8 * r}h${-0.8 * r}v${0.8 * r}h${-0.8 * r}v${-0.8 * r}h${-0.8 * r}v${-0.8 * r}h${0.8 * r}z`,
];
const CROSS = (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`;

const distinct = (field) =>
  [...new Set(data.runs.filter((run) => !run.reference).map((run) => run[field]))];
const editors = distinct("editor");
const inverters = distinct("inverter");

/** Colour and shape of a run; where only one of the two varies, it decides both. */
function look(run) {
  if (run.reference) return { colour: "var(--soft)", path: CROSS, fill: "none" };
  const [editor, inverter] = [editors.indexOf(run.editor), inverters.indexOf(run.inverter)];
  const hue = editors.length > 1 ? editor : inverter;
  const shape = inverters.length > 1 ? inverter : editor;
  const colour = `var(--c${hue % COLOURS})`;
  return { colour, path: SHAPES[shape % SHAPES.length], fill: colour };
}

/** About `count` round values that cover [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) {
    found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return found;
}

const tickText = (value) => String(Number(value.toPrecision(6))).replace("-", "−");

/** Means with their ends of every run in one column. */
function along(k) {
  return data.cells[kind].map((row) => {
    const mean = number(row[k].mean);
    const known = row[k].low !== null;
    return { mean, low: known ? row[k].low : mean, high: known ? row[k].high : mean };
  });
}

/** From values to pixels; the infinite go to the ends. */
function scale(values, start, stop, count) {
  const finite = values.flatMap((v) => [v.mean, v.low, v.high]).filter(Number.isFinite);
  let [low, high] = finite.length ? [Math.min(...finite), Math.max(...finite)] : [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  const positive = low >= 0;
  [low, high] = [positive ? Math.max(0, low - room) : low - room, high + room];
  const at = (v) => {
    if (!Number.isFinite(v)) return v > 0 ? stop : start;
    return start + ((v - low) / (high - low)) * (stop - start);
  };
  return { at, ticks: ticks(low, high, count) };
}

function axes(frame, x, y, titles) {
  const { left, right, top, bottom } = frame;
  const line = (x1, y1, x2, y2) => draw("line", { class: "grid", x1, y1, x2, y2 });
  const parts = [];
  for (const value of x.ticks) {
    const place = x.at(value);
    parts.push(line(place, top, place, bottom));
    parts.push(draw("text", { x: place, y: bottom + 17, "text-anchor": "middle" }, tickText(value)));
  }
  for (const value of y.ticks) {
    const place = y.at(value);
    parts.push(line(left, place, right, place));
    parts.push(draw("text", { x: left - 8, y: place + 4, "text-anchor": "end" }, tickText(value)));
  }
  const middle = (top + bottom) / 2;
  const across = { class: "axis-name", x: (left + right) / 2, y: bottom + 40, "text-anchor": "middle" };
  const up = { class: "axis-name", transform: `translate(14 ${middle}) rotate(-90)`, "text-anchor": "middle" };
  const titled = (place, title, room) => {
    const text = draw("text", place, title);
    text.style.fontSize = fitted(title, room);
    return text;
  };
  return [...parts, titled(across, titles[0], right - left), titled(up, titles[1], bottom - top)];
}

/** What an axis shows and which way is better. */
function axisTitle(column) {
  const arrows = { 1: "better →", "-1": "← better" };
  const unit = column.unit ? ` (${column.unit})` : "";
  return `${column.title}${unit}  ${arrows[sense(column)] || ""}`.trim();
}

const overlap = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;

const pen = make("canvas").getContext("2d");

function textWidth(text) {
  pen.font = `500 12px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

/** A font size at which a title of an axis stays within it. */
function fitted(title, room) {
  const width = (textWidth(title) * 13) / 12;
  return width > room ? `${((13 * room) / width).toFixed(1)}px` : "";
}

/** A free place for a point's name, or null. */
function placeName(point, text, taken, frame) {
  const [w, h] = [textWidth(text) + 4, 15];
  const { px, py } = point;
  const tries = [[10, -h / 2], [-10 - w, -h / 2], [-w / 2, -h - 9], [-w / 2, 9], [4, -h - 9], [4, 9], [-w - 4, -h - 9], [-w - 4, 9], [-w / 2, -h - 24], [-w / 2, 24]];
  for (const [dx, dy] of tries) {
    const box = { x: px + dx, y: py + dy, w, h };
    const inside = box.x >= frame.left && box.x + w <= frame.right + 14 && box.y >= frame.top - 12 && box.y + h <= frame.bottom;
    if (inside && !taken.some((other) => overlap(box, other))) return box;
  }
  return null;
}

function names(points, frame) {
  const taken = points.map(({ px, py }) => ({ x: px - 7, y: py - 7, w: 14, h: 14 }));
  const found = [];
  for (const point of points) {
    const text = point.run.label;
    const box = placeName(point, text, taken, frame);
    if (!box) continue;
    taken.push(box);
    found.push(draw("text", { class: "name", x: box.x + 2, y: box.y + 12 }, text));
  }
  return found;
}

/** What a point says when it is pointed at. */
function told(run, columns, values) {
  const part = (column, v) => {
    const spread = v.low !== v.high ? ` (${figure(v.low, column.digits)} to ${figure(v.high, column.digits)})` : "";
    return `${column.title}: ${figure(v.mean, column.digits)} ${column.unit}`.trim() + spread;
  };
  return [run.label, ...columns.map((column, k) => part(column, values[k]))].join("\n");
}

function pointMark({ run, px, py, x, y, text }, scales) {
  const { colour, path, fill } = look(run);
  const spread = (x1, y1, x2, y2) => draw("line", { class: "spread", stroke: colour, x1, y1, x2, y2 });
  const marks = [];
  if (x.low !== x.high) marks.push(spread(scales.x.at(x.low), py, scales.x.at(x.high), py));
  if (y.low !== y.high) marks.push(spread(px, scales.y.at(y.low), px, scales.y.at(y.high)));
  const attributes = { class: "point", d: path(6), transform: `translate(${px} ${py})`, fill, stroke: colour };
  Object.assign(attributes, { tabindex: 0, role: "img", "aria-label": text });
  marks.push(draw("path", attributes, draw("title", {}, text)));
  return marks;
}

/** Lines that join one pair's runs at several step counts. */
function paths(points) {
  const groups = new Map();
  for (const point of points.filter(({ run }) => !run.reference)) {
    const key = JSON.stringify([point.run.inverter, point.run.editor]);
    groups.set(key, [...(groups.get(key) || []), point]);
  }
  return [...groups.values()].filter((group) => group.length > 1).map((group) => {
    group.sort((a, b) => a.run.steps - b.run.steps);
    const d = group.map(({ px, py }, k) => `${k ? "L" : "M"}${px},${py}`).join("");
    return draw("path", { class: "path", d, stroke: look(group[0].run).colour });
  });
}

function drawPlot(svg, keys) {
  const width = Math.max(280, svg.parentElement.clientWidth - 28);
  const height = Math.round(Math.min(460, Math.max(320, width * 0.62)));
  const frame = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
  const [kx, ky] = keys.map(columnAt);
  const columns = [data.columns[kx], data.columns[ky]];
  const [xs, ys] = [along(kx), along(ky)];
  const scales = {
    x: scale(xs, frame.left, frame.right, width < 480 ? 4 : 7),
    y: scale(ys, frame.bottom, frame.top, 6),
  };
  const points = data.runs
    .map((run, k) => ({ run, x: xs[k], y: ys[k], text: told(run, columns, [xs[k], ys[k]]) }))
    .filter(({ x, y }) => !Number.isNaN(x.mean) && !Number.isNaN(y.mean))
    .map((point) => ({ ...point, px: scales.x.at(point.x.mean), py: scales.y.at(point.y.mean) }));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren(
    ...axes(frame, scales.x, scales.y, columns.map(axisTitle)),
    ...paths(points),
    ...points.flatMap((point) => pointMark(point, scales)),
    ...names(points, frame),
  );
  return points.some(({ x, y }) => !Number.isFinite(x.mean) || !Number.isFinite(y.mean));
}

const swatch = (...marks) => draw("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, ...marks);

const shapeMark = (path, fill, stroke) => draw("path", { d: path(5), fill, stroke, "stroke-width": 2 });

/** What colours stand for (bars), what shapes stand for (outlines), and the references' cross. */
function keyList() {
  const entries = [];
  if (editors.length > 1) {
    const bar = (k) => draw("rect", { x: -8, y: -3, width: 16, height: 6, rx: 3, fill: `var(--c${k % COLOURS})` });
    editors.forEach((name, k) => entries.push([bar(k), name]));
  }
  if (inverters.length > 1) {
    const filled = editors.length > 1 ? () => "none" : (k) => `var(--c${k % COLOURS})`;
    const mark = (k) => shapeMark(SHAPES[k % SHAPES.length], filled(k), editors.length > 1 ? "var(--ink)" : filled(k));
    inverters.forEach((name, k) => entries.push([mark(k), name]));
  }
  if (data.runs.some((run) => run.reference)) {
    entries.push([shapeMark(CROSS, "none", "var(--soft)"), "for reference"]);
  }
  return make("ul", { class: "keys" }, ...entries.map(([mark, text]) => make("li", {}, swatch(mark), text)));
}

function addPlot(title, keys) {
  const svg = draw("svg", { role: "group", "aria-label": title });
  const [across, up] = [make("select"), make("select")];
  offer(across, columnPairs(), keys[0]);
  offer(up, columnPairs(), keys[1]);
  const note = make("p", { class: "hint" }, "A point on the edge has an infinite mean.");
  const labels = [make("label", {}, "Across ", across), make("label", {}, "Up ", up)];
  const controls = make("div", { class: "controls" }, ...labels);
  const box = make("div", { class: "plot" }, make("h3", {}, title), controls, svg, keyList(), note);
  byId("plots").querySelector(".plots").append(box);
  const redraw = () => (note.hidden = !drawPlot(svg, [across.value, up.value]));
  for (const select of [across, up]) select.addEventListener("change", redraw);
  kindListeners.push(redraw);
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    redraw();
  }).observe(box);
}

function startPlots() {
  const { x, y, cost, error } = data.axes;
  addPlot("Preservation against edit", [x, y]);
  if (!cost) return;
  addPlot("Error against cost", [cost, error]);
  byId("plots").querySelector(".plots").classList.add("several");
}
