// A picture under a grid of cells: pointing outlines the group of a cell, a click or the arrow keys choose one.

// JupyterLab takes a key that is pressed in a menu or on a slider for a command: an arrow for a step to the next cell,
// "x" for a cell to cut. Before it looks, this attribute says that it is none.
window.addEventListener("keydown", (event) => {
  const held = event.ctrlKey || event.altKey || event.metaKey || event.shiftKey;
  if (event.target.closest?.(".vitlab-explorer")) event.target.toggleAttribute("data-lm-suppress-shortcuts", !held);
}, true);

function render({ model, el }) {
  const box = document.createElement("div");
  box.style.cssText = "position: relative; display: inline-block; line-height: 0; max-width: 100%";
  const image = document.createElement("img");
  image.style.cssText = "max-width: 100%; height: auto";
  const canvas = document.createElement("canvas");
  canvas.style.cssText = "position: absolute; left: 0; top: 0; width: 100%; height: 100%";
  const label = document.createElement("div");
  label.style.cssText = "min-height: 1.5em; line-height: 1.5; font-size: var(--jp-widgets-font-size, 13px)";
  label.setAttribute("aria-live", "polite");
  box.append(image, canvas);
  el.append(box);
  if (model.get("grid")[0]) {
    box.tabIndex = 0;
    box.setAttribute("role", "application");
    canvas.style.cursor = "crosshair";
    el.append(label);
  }
  let pointed = -1;
  let url = null;

  const outline = (context, cells, colour, width, size) => {
    const [rows, columns] = model.get("grid");
    const inside = new Set(cells);
    const [w, h] = [size[0] / columns, size[1] / rows];
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    for (const cell of cells) {
      const [r, c] = [Math.floor(cell / columns), cell % columns];
      const edges = [
        [r === 0 || !inside.has(cell - columns), c, r, c + 1, r],
        [r === rows - 1 || !inside.has(cell + columns), c, r + 1, c + 1, r + 1],
        [c === 0 || !inside.has(cell - 1), c, r, c, r + 1],
        [c === columns - 1 || !inside.has(cell + 1), c + 1, r, c + 1, r + 1],
      ];
      for (const [open, x0, y0, x1, y1] of edges) {
        if (open) {
          context.moveTo(x0 * w, y0 * h);
          context.lineTo(x1 * w, y1 * h);
        }
      }
    }
    context.stroke();
  };
  const groupOf = (cell) => {
    const groups = model.get("groups");
    if (cell < 0 || groups.length === 0) return cell < 0 ? [] : [cell];
    return groups.flatMap((group, other) => (group === groups[cell] ? [other] : []));
  };
  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    const size = [image.clientWidth, image.clientHeight];
    canvas.width = size[0] * ratio;
    canvas.height = size[1] * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    for (const cell of new Set([model.get("picked"), pointed])) {
      outline(context, groupOf(cell), "black", 4, size);
      outline(context, groupOf(cell), cell === pointed ? "white" : "#DE8F05", 2, size);
    }
    label.textContent = model.get("labels")[pointed >= 0 ? pointed : model.get("picked")] ?? "";
  };
  const show = () => {
    const old = url;
    url = URL.createObjectURL(new Blob([model.get("picture")], { type: "image/png" }));
    image.onload = () => {
      draw();
      if (old) URL.revokeObjectURL(old);
    };
    image.width = model.get("width");
    image.alt = model.get("alt");
    box.setAttribute("aria-label", model.get("alt"));
    image.src = url;
  };
  const cellAt = (event) => {
    const [rows, columns] = model.get("grid");
    const frame = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - frame.left) / frame.width) * columns);
    const row = Math.floor(((event.clientY - frame.top) / frame.height) * rows);
    return row < 0 || column < 0 || row >= rows || column >= columns ? -1 : row * columns + column;
  };
  const pick = (cell) => {
    model.set("picked", cell);
    model.save_changes();
  };
  canvas.addEventListener("pointermove", (event) => {
    pointed = cellAt(event);
    draw();
  });
  canvas.addEventListener("pointerleave", () => {
    pointed = -1;
    draw();
  });
  canvas.addEventListener("click", (event) => {
    box.focus({ preventScroll: true });
    pick(cellAt(event));
  });
  box.addEventListener("keydown", (event) => {
    const [rows, columns] = model.get("grid");
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    const from = Math.max(0, model.get("picked"));
    const row = Math.floor(from / columns) + steps[event.key][0];
    const column = (from % columns) + steps[event.key][1];
    if (row >= 0 && column >= 0 && row < rows && column < columns) pick(row * columns + column);
  });
  for (const name of ["picture", "width", "alt"]) model.on(`change:${name}`, show);
  for (const name of ["grid", "groups", "labels", "picked"]) model.on(`change:${name}`, draw);
  show();
  return () => url && URL.revokeObjectURL(url);
}

export default { render };
