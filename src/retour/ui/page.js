// The page's own hands: files, painting, points, options, tabs, copying. All by delegation, since
// the server replaces the elements.
(() => {
  "use strict";
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const drawn = new WeakMap(); // canvas -> what was drawn on it
  let pending = "";
  let stroke = null;

  function send(button, text) {
    pending = text;
    find(`#${button}`).click();
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
    const reader = new FileReader();
    reader.onload = () => {
      // A file without bytes gives "data:" alone.
      const data = String(reader.result).includes(",") ? reader.result : "data:,";
      send("u-take", JSON.stringify({ name: file.name, data }));
    };
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
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }

  // --- Drawing ---
  const surface = () => find("#u-source canvas");
  const held = () => find("#u-source .r-paint")?.dataset.tool ?? "none";

  function sheet(canvas) {
    if (!drawn.has(canvas)) {
      const mask = document.createElement("canvas");
      mask.width = canvas.width;
      mask.height = canvas.height;
      drawn.set(canvas, { mask, painted: false, points: [] });
    }
    return drawn.get(canvas);
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

  function refresh() {
    const canvas = surface();
    if (!canvas) return;
    const { mask, painted, points } = sheet(canvas);
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (painted) {
      pen.globalAlpha = 0.5;
      pen.drawImage(mask, 0, 0);
      pen.globalAlpha = 1;
    }
    const unit = Math.max(canvas.width, canvas.height) / 100;
    points.forEach(([x, y], k) => {
      const at = [x * canvas.width, y * canvas.height];
      if (k % 2) {
        const from = [points[k - 1][0] * canvas.width, points[k - 1][1] * canvas.height];
        line(pen, from, at, unit);
      }
      pen.beginPath();
      pen.arc(at[0], at[1], 1.5 * unit, 0, 2 * Math.PI);
      pen.fillStyle = k % 2 ? "#2563eb" : "#dc2626";
      pen.fill();
      pen.lineWidth = 0.5 * unit;
      pen.strokeStyle = "#fff";
      pen.stroke();
    });
    const clear = find("#u-source [data-clear]");
    if (clear) clear.hidden = !painted && !points.length;
  }

  function line(pen, from, to, unit) {
    for (const [width, colour] of [[1.5, "#fff"], [0.7, "#2563eb"]]) {
      pen.beginPath();
      pen.moveTo(...from);
      pen.lineTo(...to);
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
    pen.strokeStyle = "#f43f5e";
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
  document.addEventListener("click", (event) => {
    const hit = event.target.closest("button");
    if (!hit) return;
    const data = hit.dataset;
    if (data.choose) find("#r-file").click();
    else if (data.sample) send("u-pick", data.sample);
    else if (data.result) send("u-show", data.result);
    else if (data.tool) choose(data.tool);
    else if (data.clear) {
      drawn.delete(surface());
      refresh();
    } else if (data.tab) tab(hit);
    else if (data.copy) copy(hit);
  });

  function tab(button) {
    const section = button.closest("section");
    all("[role=tab]", section).forEach((b) => b.setAttribute("aria-selected", String(b === button)));
    all("[role=tabpanel]", section).forEach((p, k) => (p.hidden = String(k) !== button.dataset.tab));
  }

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
