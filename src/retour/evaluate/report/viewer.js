/* One output, enlarged between its input and the true edit; arrow keys go from run to run. */

const viewer = byId("viewer");
const view = { item: 0, run: 0 };

function openViewer(item, run) {
  Object.assign(view, { item, run });
  fillViewer();
  viewer.showModal();
}

function fillViewer() {
  const item = data.items[view.item];
  const run = data.runs[view.run];
  const pictures = picturesOf(view.item);
  byId("viewer-title").textContent = run.label;
  byId("viewer-prompts").replaceChildren(...prompts(item));
  const shots = [["Input", pictures.input], [run.label, pictures.runs[view.run]], ["True edit", pictures.truth]];
  const heat = pictures.attention[view.run];
  if (heat) shots.push([`Attention: ${pictures.words[view.run]}`, heat]);
  const known = shots.filter(([name, uri]) => uri || name !== "True edit");
  byId("viewer-pictures").replaceChildren(...known.map(([name, uri]) => shot(name, uri, pictures, {})));
  byId("viewer-pictures").className = cards.className;
  byId("viewer-values").replaceChildren(...data.columns.map((column, k) => viewerValue(column, k)));
}

function viewerValue(column, k) {
  const value = number(data.items[view.item].values[view.run][k]);
  const text = `${figure(value, column.digits)} ${column.unit}`.trim();
  return make("div", { hidden: Number.isNaN(value) }, make("dt", {}, column.title), make("dd", {}, text));
}

/** To the next or previous run that is shown. */
function step(by) {
  const shown = [...shownRuns].sort((a, b) => a - b);
  if (!shown.length) return;
  const place = shown.indexOf(view.run);
  view.run = shown[(place + by + shown.length) % shown.length];
  fillViewer();
}

function startViewer() {
  byId("viewer-close").addEventListener("click", () => viewer.close());
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
}
