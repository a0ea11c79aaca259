"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

// The nodes in the order of the positions, each with the rows [start, stop) of the embedding it holds.
const nodes = [];
{
  let start = 0;
  data.tokens_per_node.forEach((count, level) => {
    const cells = 2 ** level;
    for (let i = 0; i < cells * cells; i++) {
      const row = Math.floor(i / cells), col = i % cells;
      nodes.push({ level, row, col, cells, start, stop: start + count, path: pathOf(level, row, col) });
      start += count;
    }
  });
}
const held = nodes.filter((node) => node.stop > node.start);

function pathOf(level, row, col) {
  let path = "";
  for (let bit = level - 1; bit >= 0; bit--) path += "/" + (2 * ((row >> bit) & 1) + ((col >> bit) & 1));
  return path || "/";
}

// The integer rule: patch y of h rows overlaps node row i of g.
function overlaps(node, y, x) {
  const [h, w] = data.grid, g = node.cells;
  return y * g < (node.row + 1) * h && (y + 1) * g > node.row * h
    && x * g < (node.col + 1) * w && (x + 1) * g > node.col * w;
}

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (parent) parent.append(made);
  return made;
}

function overlay(holder, viewBox = "0 0 1 1") {
  return holder.querySelector("svg") || element("svg", { viewBox, preserveAspectRatio: "none" }, holder);
}

function outline(svg, shown) {
  svg.replaceChildren();
  [...shown].sort((a, b) => b.level - a.level).forEach((node) => {
    const size = 1 / node.cells;
    const box = { x: node.col * size, y: node.row * size, width: size, height: size };
    const width = 2 + 2 * (data.tokens_per_node.length - 1 - node.level);
    element("rect", { ...box, stroke: "#000", "stroke-width": width + 2 }, svg);
    element("rect", { ...box, stroke: data.colors[node.level], "stroke-width": width }, svg);
  });
}

function patchAt(event, holder) {
  const box = holder.getBoundingClientRect(), [h, w] = data.grid;
  const inside = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value * count)));
  return [inside((event.clientY - box.top) / box.height, h), inside((event.clientX - box.left) / box.width, w)];
}

const span = (node) => (node.stop - node.start > 1 ? node.start + "–" + (node.stop - 1) : "" + node.start);
const key = (node) => `<span class="key" style="background:${data.colors[node.level]}">${node.path}&ensp;${span(node)}</span>`;

// 1. The gallery: the nodes under the pointer, on both pictures of a card.
document.querySelectorAll(".card").forEach((card) => {
  const holders = [...card.querySelectorAll(".pic")], line = card.querySelector(".under");
  const usual = line.innerHTML;
  holders.forEach((holder) => {
    holder.addEventListener("pointermove", (event) => {
      const seen = held.filter((node) => overlaps(node, ...patchAt(event, holder)));
      holders.forEach((other) => outline(overlay(other), seen));
      line.innerHTML = seen.map(key).join("");
    });
    holder.addEventListener("pointerleave", () => {
      holders.forEach((other) => outline(overlay(other), []));
      line.innerHTML = usual;
    });
  });
});

// 2. The explorer: picture and embedding light each other up.
{
  const where = byId("where"), rows = byId("rows"), readout = byId("readout");
  const total = nodes[nodes.length - 1].stop, usual = readout.innerHTML;
  const cover = overlay(rows, "0 0 1 " + total);
  const show = (seen, words) => {
    outline(overlay(where), seen);
    cover.replaceChildren();
    for (const node of held) {
      const box = { x: 0, y: node.start, height: node.stop - node.start - 0.12 };
      if (seen.length && !seen.includes(node)) element("rect", { ...box, width: 1, fill: "#0d0f13", opacity: 0.85 }, cover);
      else element("rect", { ...box, width: 0.02, fill: data.colors[node.level] }, cover);
    }
    readout.innerHTML = seen.length ? words + " " + seen.map(key).join("") : usual;
  };
  where.addEventListener("pointermove", (event) => {
    const [y, x] = patchAt(event, where);
    const seen = held.filter((node) => overlaps(node, y, x));
    const count = seen.reduce((sum, node) => sum + node.stop - node.start, 0);
    show(seen, `This patch (row ${y}, column ${x}) reads <b>${count} of ${total}</b> positions:`);
  });
  rows.addEventListener("pointermove", (event) => {
    const box = rows.getBoundingClientRect();
    const row = Math.min(total - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * total)));
    show(held.filter((node) => node.start <= row && row < node.stop), `Position <b>${row}</b> belongs to the node`);
  });
  for (const holder of [where, rows]) holder.addEventListener("pointerleave", () => show([], ""));
  const buttons = data.pictures.map((picture, i) => {
    const button = document.createElement("button");
    button.innerHTML = `<img alt="" src="${picture.source}">`;
    button.setAttribute("aria-label", "Picture " + (i + 1));
    button.addEventListener("click", () => choose(i));
    byId("thumbs").append(button);
    return button;
  });
  const choose = (i) => {
    where.querySelector("img").src = data.pictures[i].source;
    rows.querySelector("img").src = data.pictures[i].heat;
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", i === j));
  };
  choose(0);
  show([], "");
}

// 3. The interpolation.
{
  const slider = byId("slider"), last = data.frames.length - 1;
  const thumbs = data.frames.map((frame, i) => {
    const button = document.createElement("button");
    button.innerHTML = `<img alt="" src="${frame}">`;
    button.setAttribute("aria-label", `${Math.round((100 * i) / last)} % of B`);
    button.addEventListener("click", () => { slider.value = i; show(); });
    byId("frames").append(button);
    return button;
  });
  const show = () => {
    const i = Number(slider.value), share = Math.round((100 * i) / last);
    byId("frame").src = data.frames[i];
    byId("weight").textContent = `${100 - share} % A, ${share} % B`;
    slider.setAttribute("aria-valuetext", `${share} % of B`);
    thumbs.forEach((button, j) => button.setAttribute("aria-pressed", i === j));
  };
  slider.addEventListener("input", show);
  show();
}

// 4. The transplant.
{
  const paths = Object.keys(data.transplants);
  const buttons = paths.map((path) => {
    const button = document.createElement("button");
    button.setAttribute("aria-label", "Take " + path + " from B");
    button.addEventListener("click", () => choose(path));
    byId("quadrants").append(button);
    return button;
  });
  const choose = (path) => {
    byId("grafted").src = data.transplants[path];
    byId("graft").innerHTML = `A with <code>${path}</code> of B`;
    outline(byId("hole"), nodes.filter((node) => node.path === path));
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", paths[i] === path));
  };
  choose(data.transplant);
}
