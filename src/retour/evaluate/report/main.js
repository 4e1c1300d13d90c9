/* Everything starts here. */

async function copyCommand() {
  const [code, button] = [byId("command"), byId("copy")];
  const done = (text) => {
    button.textContent = text;
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  try {
    await navigator.clipboard.writeText(code.textContent);
    done("Copied");
  } catch {
    // A page opened from a file may have no clipboard: the text is marked instead.
    getSelection().selectAllChildren(code);
    done(document.execCommand("copy") ? "Copied" : "Marked");
  }
}

/** Open menus close at a click elsewhere and at Escape. */
function closeMenus(event) {
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (event.key === "Escape") menu.querySelector("summary").focus();
    else if (event.type === "keydown" || menu.contains(event.target)) continue;
    menu.open = false;
  }
}

if (byId("copy")) byId("copy").addEventListener("click", copyCommand);
byId("kind").addEventListener("change", (event) => chooseKind(event.target.value));
for (const event of ["click", "keydown"]) document.addEventListener(event, closeMenus);
startTable();
startCompare();
startPlots();
startGallery();
startViewer();
// A reloaded page keeps what its menus said.
if (byId("kind").value) chooseKind(byId("kind").value);
