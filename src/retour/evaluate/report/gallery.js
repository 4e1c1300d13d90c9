/* Every edit side by side. A card's pictures are read and made when it comes into view. */

const PRINTED = 12;
const SMALL = 128;
const cards = byId("cards");
// The copied input says nothing that the input beside it does not.
const shownRuns = new Set([...data.runs.keys()].filter((k) => data.runs[k].label !== "copy-input"));
const seen = new IntersectionObserver(onSeen, { rootMargin: "600px" });
let items = [];

/** Pictures of an item, or null where the page leaves them out. */
function picturesOf(item) {
  const block = byId(`pictures-${item}`);
  return block === null ? null : JSON.parse(block.textContent);
}

function prompts(item) {
  const said = (words, tag) =>
    words.flatMap(([word, differs], k) => [k ? " " : "", differs ? make(tag, {}, word) : word]);
  const arrow = make("span", { class: "arrow" }, "→");
  return [...said(item.source, "del"), " ", arrow, " ", ...said(item.target, "ins")];
}

function makeCard(place) {
  const item = data.items[place];
  const tag = make("span", { class: "tag" }, make("b", {}, spokenKind(item.kind)), ` ${item.split} ${item.id}`);
  const head = make("div", { class: "card-head" }, make("p", { class: "prompts" }, ...prompts(item)), tag);
  const strip = make("div", { class: "strip" });
  const card = make("article", { class: "card", "data-item": place }, head, strip);
  seen.observe(card);
  return card;
}

const spokenKind = (key) => (data.kinds.find((known) => known.key === key) || { name: key }).name;

function onSeen(entries) {
  for (const entry of entries) {
    if (entry.isIntersecting) fillCard(entry.target);
  }
}

/** Pictures into a card, unless they are there. */
function fillCard(card) {
  const item = Number(card.dataset.item);
  const strip = card.querySelector(".strip");
  if (strip.childElementCount) return;
  const pictures = picturesOf(item);
  const given = [["Input", pictures.input]];
  if (pictures.truth) given.push(["True edit", pictures.truth]);
  strip.append(...given.map(([name, uri]) => shot(name, uri, pictures, { fixed: true })));
  data.runs.forEach((run, k) => {
    const options = { run: k, heat: pictures.attention[k], words: pictures.words[k], item };
    strip.append(shot(run.label, pictures.runs[k], pictures, options));
  });
  card.classList.add("filled");
  seen.unobserve(card);
}

/** A picture; its pixels stay visible unless it has more of them than a card shows. */
function image(source, kind, alt) {
  const element = make("img", { src: source, class: kind, alt, decoding: "async" });
  element.addEventListener("load", () => element.classList.toggle("smooth", element.naturalWidth > SMALL));
  return element;
}

/** One picture with its layers and its name. */
function shot(name, uri, pictures, { fixed = false, run = null, heat = null, words = "", item = null }) {
  const layers = uri
    ? [
        image(uri, null, name),
        heat ? image(heat, "layer heat", `attention to ${words}`) : null,
        pictures.mask ? image(pictures.mask, "layer mask", "") : null,
      ]
    : [make("span", { class: "missing" }, "none")];
  const frame = make(run === null ? "div" : "button", { class: "frame" }, ...layers);
  if (run !== null) {
    frame.type = "button";
    frame.setAttribute("aria-label", `${name}, enlarge`);
    frame.addEventListener("click", () => openViewer(item, run));
  }
  const value = run === null ? null : make("span", { class: "value" }, valueText(item, run));
  const sought = heat && words ? make("span", { class: "sought" }, `map of ${words}`) : null;
  const text = make("figcaption", {}, name, value, sought);
  const shown = run === null || shownRuns.has(run);
  return make("figure", { class: fixed ? "shot fixed" : "shot", "data-run": run ?? "", hidden: !shown }, frame, text);
}

/** The value that the cards are sorted by, of one run. */
function valueText(item, run) {
  const k = columnAt(byId("sort-metric").value);
  if (k < 0) return "";
  const column = data.columns[k];
  return `${figure(number(data.items[item].values[run][k]), column.digits)} ${column.unit}`.trim();
}

function sortKey(item) {
  const k = columnAt(byId("sort-metric").value);
  if (k < 0) return NaN;
  const chosen = byId("sort-run").value;
  const runs = chosen === "" ? data.runs.keys() : [Number(chosen)];
  const values = [...runs]
    .filter((run) => chosen !== "" || !data.runs[run].reference)
    .map((run) => number(data.items[item].values[run][k]))
    .filter((value) => !Number.isNaN(value));
  if (!values.length) return NaN;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return mean * (sense(data.columns[k]) || 1) * (byId("sort-order").value === "best" ? -1 : 1);
}

/** The chosen kind's cards in the chosen order; they keep what they show already. */
function arrange() {
  const known = new Map(items.map((card) => [Number(card.dataset.item), card]));
  const shown = items
    .filter((card) => !kind || data.items[Number(card.dataset.item)].kind === kind)
    .map((card) => [sortKey(Number(card.dataset.item)), Number(card.dataset.item)])
    .sort(([a, i], [b, j]) => {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || i - j;
      return a === b ? i - j : a < b ? -1 : 1;
    });
  cards.replaceChildren(...shown.map(([, item]) => known.get(item)));
  const total = data.items.filter((item) => !kind || item.kind === kind).length;
  byId("count").textContent =
    shown.length === total ? `${total} edits` : `${shown.length} of ${total} edits have pictures here`;
  refreshValues();
}

function refreshValues() {
  for (const value of cards.querySelectorAll(".value")) {
    const item = Number(value.closest(".card").dataset.item);
    value.textContent = valueText(item, Number(value.closest(".shot").dataset.run));
  }
  for (const id of ["sort-run", "sort-order"]) byId(id).disabled = !byId("sort-metric").value;
}

function showRun(run, shown) {
  if (shown) shownRuns.add(run);
  else shownRuns.delete(run);
  for (const card of items) {
    for (const found of card.querySelectorAll(`[data-run="${run}"]`)) found.hidden = !shown;
  }
}

function offerRuns() {
  const labels = data.runs.map((run, k) => {
    const box = make("input", { type: "checkbox", checked: shownRuns.has(k) });
    box.addEventListener("change", () => showRun(k, box.checked));
    return make("label", {}, box, run.label);
  });
  byId("shown-runs").querySelector("fieldset").append(...labels);
}

function resize() {
  const side = Number(byId("size").value);
  cards.style.setProperty("--side", `${side}px`);
  cards.classList.toggle("large", side > 128);
}

function printable(on) {
  [...cards.children].forEach((card, k) => {
    card.classList.toggle("unprinted", on && k >= PRINTED);
    if (on && k < PRINTED) fillCard(card);
  });
  const more = cards.children.length > PRINTED;
  byId("print-note").textContent = more ? `The first ${PRINTED} edits are printed.` : "";
}

/** Layers over the pictures, each with its box where there are any. */
function offerLayer(id, name) {
  const about = document.querySelector(`.about.${name === "masked" ? "masks" : "heats"}`);
  const show = () => {
    cards.classList.toggle(name, byId(id).checked);
    about.hidden = !byId(id).checked;
  };
  byId(id).addEventListener("change", show);
  show(); // A reloaded page keeps its boxes.
}

function startGallery() {
  const metrics = data.columns.filter((column) => !column.cost).map(({ key, title }) => [key, title]);
  const runs = data.runs.map((run, k) => [k, run.label]);
  offer(byId("sort-metric"), [["", "the set's order"], ...metrics], "");
  offer(byId("sort-run"), [["", "all runs, mean"], ...runs], "");
  items = [...data.items.keys()].filter((k) => byId(`pictures-${k}`)).map(makeCard);
  for (const id of ["sort-metric", "sort-run", "sort-order"]) {
    byId(id).addEventListener("change", arrange);
  }
  byId("size").addEventListener("change", resize);
  offerLayer("show-mask", "masked");
  offerLayer("show-attention", "heated");
  offerRuns();
  addEventListener("beforeprint", () => printable(true));
  addEventListener("afterprint", () => printable(false));
  kindListeners.push(arrange);
  arrange();
}
