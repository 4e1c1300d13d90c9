/* The table of runs: sorted by any column, with the columns one chooses. */

const runsTable = byId("runs");
const sorting = { key: null, down: true };

/** Figures of the chosen kind of edit into the cells that the page came with. */
function fillTable() {
  for (const row of runsTable.tBodies[0].rows) {
    const cells = data.cells[kind][Number(row.dataset.run)];
    cells.forEach((cell, k) => fillCell(row.cells[k + 1], cell, data.columns[k].digits));
  }
}

function fillCell(td, cell, digits) {
  td.className = cell.mark;
  const [mean, ends] = td.children;
  mean.textContent = figure(number(cell.mean), digits);
  const known = cell.low !== null;
  ends.textContent = known ? `${figure(cell.low, digits)} to ${figure(cell.high, digits)}` : "";
  td.title = { best: "best mean", close: "not told apart from the best" }[cell.mark] || "";
}

function sortValue(row, key) {
  const run = Number(row.dataset.run);
  return key === "label" ? data.runs[run].label : number(data.cells[kind][run][Number(key)].mean);
}

/** Negative where a comes first; what is no number comes last either way. */
function order(a, b) {
  const [x, y] = [sortValue(a, sorting.key), sortValue(b, sorting.key)];
  if (typeof x === "string") return sorting.down ? y.localeCompare(x) : x.localeCompare(y);
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
  if (x === y) return 0;
  return (x < y ? -1 : 1) * (sorting.down ? -1 : 1);
}

function sortRows() {
  if (sorting.key === null) return;
  const body = runsTable.tBodies[0];
  body.append(...[...body.rows].sort(order));
  for (const head of runsTable.tHead.rows[0].cells) {
    if (head.dataset.sort !== sorting.key) head.removeAttribute("aria-sort");
    else head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
  }
}

/** A first click puts the best on top, a second one turns the order around. */
function sortBy(key) {
  const best = key !== "label" && sense(data.columns[Number(key)]) >= 0;
  sorting.down = sorting.key === key ? !sorting.down : best;
  sorting.key = key;
  sortRows();
}

function showColumn(k, shown) {
  for (const row of runsTable.rows) row.cells[k + 1].hidden = !shown;
}

function startTable() {
  for (const head of runsTable.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => sortBy(head.dataset.sort));
  }
  for (const box of byId("columns").querySelectorAll("input")) {
    showColumn(Number(box.dataset.column), box.checked);
    box.addEventListener("change", () => showColumn(Number(box.dataset.column), box.checked));
  }
  kindListeners.push(fillTable, sortRows);
  fillTable();
}
