// The page's own hands: files, painting, points, options, tabs, copying. All by delegation, since
// the server replaces the elements.
(() => {
  "use strict";
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  let drawn = null; // What was drawn on the picture that is there.
  let pending = "";
  let picked = null; // The example's button, until its picture comes.
  let stroke = null;

  function send(button, text) {
    pending = text;
    press(button, 200);
  }

  // The button may still be on its way when the page has only just come.
  function press(button, tries) {
    const there = find(`#${button}`);
    if (there) there.click();
    else if (tries) setTimeout(() => press(button, tries - 1), 50);
  }

  // --- Files ---
  function take(file) {
    if (!file) return;
    const most = Number(find("#r-file").dataset.most);
    if (most && file.size > most) {
      const count = (n) => n.toLocaleString("en-US");
      const said = `'${file.name}' has ${count(file.size)} bytes: make it smaller first, at most ${count(most)}.`;
      send("u-refuse", said);
      return;
    }
    picked = null;
    const reader = new FileReader();
    reader.onload = () => {
      // A file without bytes gives "data:" alone.
      const data = String(reader.result).includes(",") ? reader.result : "data:,";
      send("u-take", JSON.stringify({ name: file.name, data }));
    };
    reader.onerror = () => send("u-refuse", `'${file.name}' cannot be read: choose a picture file.`);
    reader.readAsDataURL(file);
  }

  document.addEventListener("change", (event) => {
    if (event.target.id !== "r-file") return;
    take(event.target.files[0]);
    event.target.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
    if (file) take(file);
  });
  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => {
      const brought = (type) => [...event.dataTransfer.types].includes(type);
      // The browser would leave the page for an address, or for a file, that is dropped on it.
      const address = brought("text/uri-list") && !event.target.closest?.("input, textarea");
      if (!brought("Files") && !address) return;
      event.preventDefault();
      if (kind !== "drop") return;
      const file = event.dataTransfer.files[0];
      if (file) take(file);
      else send("u-refuse", "That is an address: save the picture, then drop its file.");
    });
  }

  // --- Drawing ---
  const surface = () => find("#u-source canvas");
  const held = () => find("#u-source .r-paint")?.dataset.tool ?? "none";

  function blank(like) {
    const made = document.createElement("canvas");
    made.width = like.width;
    made.height = like.height;
    return made;
  }

  function sheet(canvas) {
    drawn ??= { mask: blank(canvas), painted: false, points: [] };
    return drawn;
  }

  // Another picture, which may come with what was drawn on it before.
  function redraw(canvas) {
    drawn = null;
    all("[data-sample]").forEach((b) => b.setAttribute("aria-current", String(b === picked)));
    picked = null;
    const kept = sheet(canvas);
    kept.points = JSON.parse(canvas.dataset.points ?? "[]");
    refresh();
    if (!canvas.dataset.mask) return;
    const image = new Image();
    image.onload = () => {
      const pen = kept.mask.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      kept.painted = true;
      refresh();
    };
    image.src = canvas.dataset.mask;
  }

  function choose(name) {
    const tool = held() === name ? "none" : name;
    for (const button of all("#u-source [data-tool]")) {
      if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
      else button.dataset.tool = tool;
    }
    const brush = find("#u-source .r-brush");
    if (brush) brush.hidden = tool !== "paint" && tool !== "erase";
    refresh();
  }

  // What the tool in hand is for, below the tools.
  function tell(points) {
    const line = find("#u-source .r-told");
    const tool = held();
    line.hidden = tool === "none";
    const said = tool === "none" ? "" : find(`#u-source button[data-tool=${tool}]`).title;
    const text = tool === "drag" && points.length % 2 ? "Now click where it should go." : said;
    if (line.firstChild.textContent !== text) line.firstChild.textContent = text;
  }

  // Stripes of light and dark, which no picture hides.
  function stripes(pen) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 16;
    const brush = tile.getContext("2d");
    brush.fillStyle = "rgb(255 255 255 / 0.6)";
    brush.fillRect(0, 0, 16, 16);
    brush.strokeStyle = "rgb(67 56 202 / 0.8)";
    brush.lineWidth = 5;
    for (const x of [-16, 0, 16]) {
      brush.beginPath();
      brush.moveTo(x - 2, 18);
      brush.lineTo(x + 18, -2);
      brush.stroke();
    }
    return pen.createPattern(tile, "repeat");
  }

  function refresh() {
    const canvas = surface();
    if (!canvas) return;
    const { mask, painted, points } = sheet(canvas);
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (painted) {
      const layer = blank(canvas);
      const brush = layer.getContext("2d");
      brush.drawImage(mask, 0, 0);
      brush.globalCompositeOperation = "source-in";
      brush.fillStyle = stripes(brush);
      brush.fillRect(0, 0, layer.width, layer.height);
      pen.drawImage(layer, 0, 0);
    }
    const unit = Math.max(canvas.width, canvas.height) / 100;
    points.forEach(([x, y], k) => {
      const at = [x * canvas.width, y * canvas.height];
      if (k % 2) {
        const from = [points[k - 1][0] * canvas.width, points[k - 1][1] * canvas.height];
        arrow(pen, from, at, unit);
        return;
      }
      pen.beginPath();
      pen.arc(at[0], at[1], 1.5 * unit, 0, 2 * Math.PI);
      pen.fillStyle = "#4338ca";
      pen.fill();
      pen.lineWidth = 0.6 * unit;
      pen.strokeStyle = "#fff";
      pen.stroke();
    });
    find("#u-source [data-clear]").hidden = !painted && !points.length;
    tell(points);
  }

  function arrow(pen, from, to, unit) {
    const turn = Math.atan2(to[1] - from[1], to[0] - from[0]);
    const barb = (side) => [to[0] - 3.2 * unit * Math.cos(turn + side), to[1] - 3.2 * unit * Math.sin(turn + side)];
    pen.lineCap = pen.lineJoin = "round";
    for (const [width, colour] of [[1.9, "#fff"], [0.9, "#4338ca"]]) {
      pen.beginPath();
      pen.moveTo(...from);
      pen.lineTo(...to);
      pen.moveTo(...barb(0.55));
      pen.lineTo(...to);
      pen.lineTo(...barb(-0.55));
      pen.lineWidth = width * unit;
      pen.strokeStyle = colour;
      pen.stroke();
    }
  }

  function place(event, canvas) {
    const box = canvas.getBoundingClientRect();
    const part = (value, low, size) => Math.min(1, Math.max(0, (value - low) / size));
    return [part(event.clientX, box.left, box.width), part(event.clientY, box.top, box.height)];
  }

  function daub(canvas, from, to) {
    const kept = sheet(canvas);
    const pen = kept.mask.getContext("2d");
    const side = Math.max(canvas.width, canvas.height);
    pen.globalCompositeOperation = held() === "erase" ? "destination-out" : "source-over";
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = (Number(find("#r-brush").value) / 100) * side;
    pen.strokeStyle = "#fff";
    pen.beginPath();
    pen.moveTo(from[0] * canvas.width, from[1] * canvas.height);
    pen.lineTo(to[0] * canvas.width, to[1] * canvas.height + 0.01);
    pen.stroke();
    kept.painted = true;
    refresh();
  }

  document.addEventListener("pointerdown", (event) => {
    const canvas = surface();
    const tool = held();
    if (!canvas || event.target !== canvas || tool === "none") return;
    event.preventDefault();
    const at = place(event, canvas);
    if (tool === "drag") {
      sheet(canvas).points.push(at);
      refresh();
      return;
    }
    canvas.setPointerCapture(event.pointerId);
    stroke = at;
    daub(canvas, at, at);
  });
  document.addEventListener("pointermove", (event) => {
    const canvas = surface();
    if (!stroke || event.target !== canvas) return;
    const at = place(event, canvas);
    daub(canvas, stroke, at);
    stroke = at;
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    document.addEventListener(kind, () => (stroke = null));
  }

  // --- Clicks ---
  // Where the focus goes on when the server replaces the button that had it.
  let next = "";
  function follow(hit) {
    if (!hit) next = "";
    else if (hit.id === "u-run" || hit.id === "u-stop") next = "#u-stop, #u-run";
    else if (hit.dataset.result) next = `[data-result="${hit.dataset.result}"]`;
    else if (hit.dataset.restore) next = "#u-run";
    else if (!hit.closest("#u-hidden")) next = "";
  }

  document.addEventListener("click", (event) => {
    const hit = event.target.closest("button");
    follow(hit);
    if (!hit) return;
    const data = hit.dataset;
    if (data.choose) find("#r-file").click();
    else if (data.sample) {
      picked = hit;
      send("u-pick", data.sample);
    } else if (data.result) send("u-show", data.result);
    else if (data.restore) send("u-restore", data.restore);
    else if (data.tool) choose(data.tool);
    else if (data.clear) {
      drawn = null;
      refresh();
    } else if (data.tab) tab(hit);
    else if (data.copy) copy(hit);
  });

  function tab(button) {
    const section = button.closest("section");
    all("[role=tab]", section).forEach((b) => {
      b.setAttribute("aria-selected", String(b === button));
      b.tabIndex = b === button ? 0 : -1;
    });
    all("[role=tabpanel]", section).forEach((p, k) => (p.hidden = String(k) !== button.dataset.tab));
  }

  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !event.target.matches?.(".r-again [role=tab]")) return;
    const tabs = all("[role=tab]", event.target.parentNode);
    const chosen = tabs[(tabs.indexOf(event.target) + by + tabs.length) % tabs.length];
    tab(chosen);
    chosen.focus();
  });

  // --- What the server sends ---
  // The framework changes elements in place: another `data-made`, or another text, is another one.
  const met = new WeakMap();
  function news(element, mark) {
    if (met.get(element) === mark) return false;
    return Boolean(met.set(element, mark));
  }
  let busy = false;

  function anew(form) {
    for (const field of all("input, select", form)) {
      const chosen = find("option[selected]", field) ?? find("option", field);
      field.value = chosen ? chosen.value : field.getAttribute("value");
    }
  }

  function arrived() {
    for (const made of all("[data-made]")) {
      if (!news(made, made.dataset.made)) continue;
      if (made === surface()) redraw(made);
      else anew(made);
    }
    // What is to be seen is brought into sight: a phone shows little at a time.
    for (const said of all(".r-notice")) {
      if (news(said, said.textContent)) said.scrollIntoView({ block: "nearest" });
    }
    const works = Boolean(find(".r-busy"));
    if (works && !busy) find("#u-result").scrollIntoView({ block: "nearest" });
    busy = works;
    if (!next || document.activeElement !== document.body) return;
    all(next).find((button) => button.offsetParent)?.focus({ preventScroll: true });
  }
  const watched = { childList: true, characterData: true, attributeFilter: ["data-made"] };
  new MutationObserver(arrived).observe(document, { ...watched, subtree: true });

  async function copy(button) {
    const text = find("pre", button.parentNode).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without a secure connection there is no clipboard: the text is selected for the reader.
      getSelection().selectAllChildren(find("pre", button.parentNode));
      return;
    }
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1200);
  }

  // --- What the server asks for ---
  function options() {
    const found = { invert: {}, edit: {} };
    for (const form of all("[data-task]")) {
      for (const field of all("input, select", form)) {
        if (field.value !== field.dataset.default) found[form.dataset.task][field.name] = field.value;
      }
    }
    return found;
  }

  window.retour = {
    payload: () => [pending],
    gather: (...values) => {
      const canvas = surface();
      const kept = canvas ? sheet(canvas) : { painted: false, points: [] };
      const mask = kept.painted ? kept.mask.toDataURL("image/png") : "";
      const asked = { mask, points: kept.points, options: options() };
      return [...values.slice(0, -1), JSON.stringify(asked)];
    },
  };
})();
