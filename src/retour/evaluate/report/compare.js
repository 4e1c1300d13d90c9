/* Paired differences between two chosen runs, each with its interval drawn against zero. */

const FOREST = { width: 190, height: 26 };

/** [mean, low, high] of run a minus run b. */
function difference(a, b, k) {
  const pair = data.differences[kind][a < b ? `${a}-${b}` : `${b}-${a}`];
  const [mean, low, high] = pair[k].map(number);
  return a < b ? [mean, low, high] : [-mean, -high, -low];
}

/** Which run is better by a difference whose interval excludes zero. */
function verdict(column, [mean, low, high]) {
  if (Number.isNaN(low)) return "";
  if (low <= 0 && high >= 0) return "not told apart";
  if (!sense(column)) return mean > 0 ? "A is higher" : "A is lower";
  return mean * sense(column) > 0 ? "A is better" : "B is better";
}

function forest([mean, low, high]) {
  if (Number.isNaN(low)) return "";
  const { width, height } = FOREST;
  const reach = 1.1 * Math.max(Math.abs(low), Math.abs(high)) || 1;
  const x = (value) => width / 2 + (value / reach) * (width / 2);
  const middle = height / 2;
  const line = (x1, y1, x2, y2, stroke, wide) =>
    draw("line", { x1, y1, x2, y2, stroke, "stroke-width": wide });
  return draw(
    "svg",
    { class: "forest", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    line(width / 2, 0, width / 2, height, "var(--soft)", 1),
    line(x(low), middle, x(high), middle, "var(--accent)", 3),
    draw("circle", { cx: x(mean), cy: middle, r: 5, fill: "var(--accent)" }),
  );
}

function differenceRow(column, k, a, b) {
  const gap = difference(a, b, k);
  const told = gap[1] > 0 || gap[2] < 0;
  const mean = (run) => figure(number(data.cells[kind][run][k].mean), column.digits);
  const ends = Number.isNaN(gap[1])
    ? "n/a"
    : `${signed(gap[1], column.digits)} to ${signed(gap[2], column.digits)}`;
  const title = make("span", { class: "label" }, column.title);
  const name = make("th", { scope: "row", class: "first" }, title, make("span", { class: "unit" }, column.unit));
  const star = told ? make("b", { class: "star", title: "the interval excludes zero" }, " ★") : null;
  return make(
    "tr",
    { class: told ? "told" : null },
    name,
    make("td", {}, mean(a)),
    make("td", {}, mean(b)),
    make("td", { class: "gap" }, signed(gap[0], column.digits), star),
    make("td", { class: "verdict" }, verdict(column, gap)),
    make("td", {}, ends),
    make("td", {}, forest(gap)),
  );
}

function fillDifferences() {
  const [a, b] = [Number(byId("first").value), Number(byId("second").value)];
  const metrics = data.columns.filter((column) => !column.cost);
  const rows = a === b ? [] : metrics.map((column, k) => differenceRow(column, k, a, b));
  const same = make("tr", {}, make("td", { colspan: 7, class: "empty" }, "Choose two different runs."));
  byId("differences").tBodies[0].replaceChildren(...(rows.length ? rows : [same]));
}

function swapRuns() {
  [byId("first").value, byId("second").value] = [byId("second").value, byId("first").value];
  fillDifferences();
}

function startCompare() {
  if (data.runs.length < 2 || !Object.keys(data.differences[""]).length) {
    byId("compare").hidden = true;
    return;
  }
  const pairs = data.runs.map((run, k) => [k, run.label]);
  const own = data.runs.map((run, k) => k).filter((k) => !data.runs[k].reference);
  const [a, b] = own.length > 1 ? own : [data.runs.length - 1, 0];
  offer(byId("first"), pairs, a);
  offer(byId("second"), pairs, b);
  for (const id of ["first", "second"]) byId(id).addEventListener("change", fillDifferences);
  byId("swap").addEventListener("click", swapRuns);
  kindListeners.push(fillDifferences);
  fillDifferences();
}
