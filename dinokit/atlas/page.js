"use strict";
// The map of an atlas: everything it shows is in this file, and it contacts no server.
// File names reach the page as text (textContent) only, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const N = data.paths.length;
const places = unpack(data.places, Uint16Array); // x, y of each photograph, 0 … 65535
const sizes = unpack(data.thumbnails.sizes, Uint16Array); // width, height of each thumbnail; 0 where there is none
const neighbours = unpack(data.neighbours, Uint16Array);
const similarities = unpack(data.similarities, Float32Array);
const K = N ? neighbours.length / N : 0;
const X = new Float32Array(N); // on the map, -1 … 1
const Y = new Float32Array(N);
const SX = new Float32Array(N); // on the screen when it was last drawn
const SY = new Float32Array(N);
for (let i = 0; i < N; i++) {
  X[i] = places[2 * i] / 32767.5 - 1;
  Y[i] = 1 - places[2 * i + 1] / 32767.5;
}
const names = data.paths.map((path) => path.toLowerCase());
const groupings = data.groupings.map((g) => ({ ...g, of: unpack(g.of, Uint8Array) }));
const bounds = { left: low(X), right: high(X), top: low(Y), bottom: high(Y) };
const spacing = typicalSpacing();

const MOST_PICTURES = 2500; // drawn at once; more would lie over each other, and move slowly
const PHOTO_SHARE = 0.78; // of the space that a photograph has on the map
const CHOSEN_SHARE = 1.15; // size of a chosen photograph relative to the others
const EDGE = 8; // pixels beside the outermost photographs, were they chosen, when the whole map is shown

const canvas = $("canvas");
const ctx = canvas.getContext("2d");
const sheets = data.thumbnails.sheets.map((uri) => {
  const image = new Image();
  image.onload = () => { repaint(); fillSmallPictures(); };
  image.src = uri;
  return image;
});

const state = {
  view: { x: 0, y: 0, scale: 1 }, // the point in the middle, and pixels a unit
  grouping: groupings[0],
  shown: new Set(), // groups; empty: all
  query: "",
  found: [],
  lit: new Uint8Array(N).fill(1), // what filter and search leave
  hovered: -1,
  chosen: -1,
  looked: -1, // which neighbour of the chosen one is looked at
};

// -- numbers

function unpack(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(bytes.buffer); // little endian, as written; so is every machine with a browser
}

function low(values) {
  return values.reduce((a, b) => Math.min(a, b), 0);
}

function high(values) {
  return values.reduce((a, b) => Math.max(a, b), 0);
}

function typicalSpacing() {
  // The area that photographs cover, divided among them: cells of a grid that hold any.
  const cells = new Set();
  const side = Math.max(2, Math.ceil(Math.sqrt(N)));
  for (let i = 0; i < N; i++) cells.add(Math.floor(((X[i] + 1) / 2.001) * side) * side + Math.floor(((Y[i] + 1) / 2.001) * side));
  return (2 / side) * Math.sqrt(cells.size / Math.max(1, N));
}

// -- colours

let dark = matchMedia("(prefers-color-scheme: dark)").matches;
let ink = {};

function colour(group) {
  if (state.grouping.other === group) return dark ? "#77777a" : "#9a9a96";
  const ring = Math.floor(group / 8); // the golden angle keeps hues apart; lightness tells the rings apart
  const lightness = (dark ? 0.75 : 0.6) - 0.11 * (ring % 2) + 0.06 * (ring > 1);
  return `oklch(${lightness} ${ring === 1 ? 0.11 : 0.16} ${(25 + 137.508 * group) % 360})`;
}

function useTheme(isDark) {
  dark = isDark;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const style = getComputedStyle(document.documentElement);
  ink = Object.fromEntries(["paper", "ink", "soft", "line", "accent"].map((n) => [n, style.getPropertyValue(`--${n}`)]));
  writeLegend();
  if (state.chosen >= 0) writeChosen();
  repaint();
}

// -- the view

function size() {
  return { width: canvas.clientWidth, height: canvas.clientHeight };
}

function wholeScale() {
  const { width, height } = size();
  const wide = Math.max(bounds.right - bounds.left, 0.05);
  const tall = Math.max(bounds.bottom - bounds.top, 0.05);
  return Math.min(scaleToFit(width, wide), scaleToFit(height, tall));
}

function scaleToFit(pixels, span) {
  // Half a photograph stands out on either side, and it grows with the scale up to its largest.
  const room = Math.max(pixels - 2 * EDGE, 1);
  const whileItGrows = room / (span + CHOSEN_SHARE * PHOTO_SHARE * spacing);
  const atItsLargest = (room - CHOSEN_SHARE * largestPhoto()) / span;
  return Math.min((0.92 * pixels) / span, Math.max(whileItGrows, atItsLargest));
}

function wholeMap() {
  flyTo((bounds.left + bounds.right) / 2, (bounds.top + bounds.bottom) / 2, wholeScale());
}

function zoom(factor, px, py) {
  const { width, height } = size();
  const { view } = state;
  flight = 0;
  const scale = Math.min(Math.max(view.scale * factor, wholeScale() * 0.5), wholeScale() * 400);
  const dx = (px ?? width / 2) - width / 2;
  const dy = (py ?? height / 2) - height / 2;
  view.x += dx / view.scale - dx / scale; // the point under the pointer stays there
  view.y += dy / view.scale - dy / scale;
  view.scale = scale;
  repaint();
}

function pan(dx, dy) {
  flight = 0;
  state.view.x -= dx / state.view.scale;
  state.view.y -= dy / state.view.scale;
  repaint();
}

let flight = 0;
function flyTo(x, y, scale) {
  const from = { ...state.view };
  const began = performance.now();
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const mine = (flight = began + Math.random());
  (function step(now) {
    if (flight !== mine) return; // another movement has taken over
    const t = still ? 1 : Math.min(1, Math.max(0, (now - began) / 260));
    const eased = 1 - (1 - t) ** 3;
    state.view.x = from.x + (x - from.x) * eased;
    state.view.y = from.y + (y - from.y) * eased;
    state.view.scale = from.scale * (scale / from.scale) ** eased;
    repaint();
    if (t < 1) requestAnimationFrame(step);
  })(began);
}

function bringIntoView(i) {
  const [x, y] = [SX[i], SY[i]];
  const { width, height } = size();
  const margin = 30;
  const inside = x > margin && y > margin && x < width - margin && y < height - margin;
  if (!inside) flyTo(X[i], Y[i], state.view.scale);
}

// -- drawing

let waiting = false;
function repaint() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

function wantedThumbnail() {
  return Math.min(PHOTO_SHARE * spacing * state.view.scale, largestPhoto());
}

function largestPhoto() {
  return Math.max(data.thumbnails.px, 96);
}

function draw() {
  const { width, height } = size();
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.fillStyle = ink.paper;
  ctx.fillRect(0, 0, width, height);
  for (let i = 0; i < N; i++) {
    SX[i] = (X[i] - state.view.x) * state.view.scale + width / 2;
    SY[i] = (Y[i] - state.view.y) * state.view.scale + height / 2;
  }
  const thumbnail = wantedThumbnail();
  const radius = Math.min(Math.max(spacing * state.view.scale * 0.3, 1.6), 5);
  const dimmed = [];
  const lit = groupsOfVisible(width, height, Math.max(thumbnail, 10), dimmed);
  ctx.globalAlpha = 0.28;
  dots(dimmed, Math.min(radius, 2.5), ink.soft);
  ctx.globalAlpha = 1;
  const crowd = [...lit.values()].reduce((sum, members) => sum + members.length, 0);
  for (const [group, members] of lit) {
    if (thumbnail < 15 || crowd > MOST_PICTURES) dots(members, radius, colour(group));
    else for (const i of members) drawPhoto(i, thumbnail, colour(group));
  }
  drawChosen(thumbnail);
  if (state.hovered >= 0) drawPhoto(state.hovered, Math.max(thumbnail, 30), ink.accent, 3);
}

function groupsOfVisible(width, height, margin, dimmed) {
  const lit = new Map();
  for (let i = 0; i < N; i++) {
    if (SX[i] < -margin || SY[i] < -margin || SX[i] > width + margin || SY[i] > height + margin) continue;
    if (!state.lit[i]) {
      dimmed.push(i);
      continue;
    }
    const group = state.grouping.of[i];
    if (!lit.has(group)) lit.set(group, []);
    lit.get(group).push(i);
  }
  return lit;
}

function dots(members, radius, fill) {
  ctx.fillStyle = fill;
  ctx.beginPath();
  for (const i of members) {
    ctx.moveTo(SX[i] + radius, SY[i]);
    ctx.arc(SX[i], SY[i], radius, 0, 2 * Math.PI);
  }
  ctx.fill();
}

function drawPhoto(i, longest, frame, line = 2) {
  const [x, y] = [SX[i], SY[i]];
  const [w, h] = fitted(i, longest);
  ctx.fillStyle = frame;
  ctx.fillRect(x - w / 2 - line, y - h / 2 - line, w + 2 * line, h + 2 * line);
  paintThumbnail(ctx, i, x - w / 2, y - h / 2, w, h);
}

function fitted(i, longest) {
  const w = sizes[2 * i] || 1;
  const h = sizes[2 * i + 1] || 1;
  const scale = longest / Math.max(w, h);
  return [Math.max(2, w * scale), Math.max(2, h * scale)];
}

function paintThumbnail(context, i, x, y, w, h) {
  const { cell, columns } = data.thumbnails;
  const sheet = sheets[Math.floor(i / columns ** 2)];
  if (!sizes[2 * i] || !sheet || !sheet.complete) { // the photograph is gone, or the sheet is not decoded yet
    context.fillStyle = dark ? "#4a4a4d" : "#c4c4c0";
    context.fillRect(x, y, w, h);
    return;
  }
  const at = i % columns ** 2;
  context.imageSmoothingQuality = "high";
  context.drawImage(
    sheet, (at % columns) * cell, Math.floor(at / columns) * cell, sizes[2 * i], sizes[2 * i + 1], x, y, w, h,
  );
}

function drawChosen(thumbnail) {
  const i = state.chosen;
  if (i < 0) return;
  ctx.strokeStyle = ink.accent;
  ctx.lineWidth = 1.5;
  ctx.beginPath();
  for (const j of neighboursOf(i)) {
    ctx.moveTo(SX[i], SY[i]);
    ctx.lineTo(SX[j], SY[j]);
  }
  ctx.stroke();
  for (const j of neighboursOf(i).reverse()) drawPhoto(j, Math.max(thumbnail, 30), colour(state.grouping.of[j]), 2);
  if (state.looked >= 0) drawPhoto(neighbours[i * K + state.looked], Math.max(thumbnail, 44), ink.accent, 3);
  drawPhoto(i, Math.max(thumbnail * CHOSEN_SHARE, 56), ink.accent, 4);
}

function neighboursOf(i) {
  return Array.from(neighbours.subarray(i * K, i * K + K));
}

function smallPicture(target, i, longest) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = fitted(i, longest);
  target.dataset.photo = i;
  target.dataset.longest = longest;
  target.width = Math.round(w * ratio);
  target.height = Math.round(h * ratio);
  target.style.width = `${w}px`;
  target.style.height = `${h}px`;
  paintThumbnail(target.getContext("2d"), i, 0, 0, target.width, target.height);
}

function fillSmallPictures() {
  for (const picture of document.querySelectorAll("canvas[data-photo]")) {
    smallPicture(picture, Number(picture.dataset.photo), Number(picture.dataset.longest));
  }
}

// -- what is shown: filter and search

function update() {
  const query = state.query;
  state.found = [];
  for (let i = 0; i < N; i++) {
    const inGroup = !state.shown.size || state.shown.has(state.grouping.of[i]);
    state.lit[i] = inGroup && (!query || names[i].includes(query)) ? 1 : 0;
    if (query && state.lit[i]) state.found.push(i);
  }
  $("found").textContent = query ? `${count(state.found.length)} of ${count(N)}` : "";
  writeLegend();
  repaint();
}

function count(number) {
  return number.toLocaleString("en");
}

function writeLegend() {
  const { grouping } = state;
  const totals = new Array(grouping.labels.length).fill(0);
  for (const group of grouping.of) totals[group]++;
  $("legend-title").textContent = grouping.title;
  const focused = document.activeElement?.dataset?.group;
  $("legend").replaceChildren(
    ...grouping.labels.map((label, group) => {
      const button = element("button");
      button.dataset.group = group;
      button.setAttribute("aria-pressed", state.shown.has(group));
      button.title = label;
      const sample = element("span", "sample");
      const picture = element("canvas");
      picture.setAttribute("aria-hidden", "true");
      smallPicture(picture, grouping.samples[group], 28);
      sample.append(picture);
      button.append(swatch(group), sample, element("span", "label", label), element("span", "count", count(totals[group])));
      button.onclick = () => {
        if (!state.shown.delete(group)) state.shown.add(group);
        update();
        say(state.shown.size ? `Shown: ${[...state.shown].map((g) => grouping.labels[g]).join(", ")}` : "All are shown");
      };
      const item = element("li");
      item.append(button);
      return item;
    }),
  );
  if (focused !== undefined) document.querySelector(`#legend [data-group="${focused}"]`)?.focus();
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function swatch(group) {
  const dot = element("span", "dot");
  dot.style.background = colour(group);
  return dot;
}

function groupLine(target, i, more = "") {
  const group = state.grouping.of[i];
  target.replaceChildren(swatch(group), state.grouping.labels[group] + more);
}

function say(text) {
  $("said").textContent = text;
}

// -- the chosen photograph

function choose(i, { move = true } = {}) {
  state.chosen = i;
  state.looked = -1;
  $("chosen").hidden = i < 0;
  if (i >= 0) {
    writeChosen();
    $("chosen").scrollIntoView({ block: "nearest" });
    if (move) bringIntoView(i);
    say(`${data.paths[i]}, ${state.grouping.labels[state.grouping.of[i]]}`);
  }
  repaint();
}

function writeChosen() {
  const i = state.chosen;
  const panel = $("chosen");
  smallPicture(panel.querySelector(".photo canvas"), i, Math.min(240, Math.max(160, data.thumbnails.px)));
  panel.querySelector(".name").textContent = data.paths[i];
  groupLine(panel.querySelector(".group"), i, sizes[2 * i] ? "" : " · the picture could not be read");
  $("copy").textContent = "Copy path";
  panel.querySelector("h2").hidden = !K;
  $("neighbours").replaceChildren(
    ...neighboursOf(i).map((j, place) => {
      const button = element("button");
      const similarity = similarities[i * K + place].toFixed(3);
      button.title = data.paths[j];
      button.setAttribute("aria-label", `${data.paths[j]}, similarity ${similarity}`);
      button.setAttribute("aria-current", place === state.looked);
      const holder = element("span", "picture");
      const picture = element("canvas");
      smallPicture(picture, j, 50);
      holder.append(picture);
      button.append(holder, similarity);
      button.onclick = () => choose(j);
      button.onmouseenter = button.onfocus = () => { state.hovered = j; repaint(); };
      button.onmouseleave = button.onblur = () => { state.hovered = -1; repaint(); };
      const item = element("li");
      item.append(button);
      return item;
    }),
  );
}

function lookAt(step) {
  if (state.chosen < 0 || !K) return;
  state.looked = state.looked < 0 && step < 0 ? K - 1 : (state.looked + step + K) % K;
  [...$("neighbours").querySelectorAll("button")].forEach((b, place) => b.setAttribute("aria-current", place === state.looked));
  const j = neighbours[state.chosen * K + state.looked];
  say(`Neighbour ${state.looked + 1}: ${data.paths[j]}`);
  bringIntoView(j);
  repaint();
}

function towards(dx, dy) {
  // The nearest photograph in a direction: those far to the side count as further away.
  let best = -1;
  let bestCost = Infinity;
  for (let i = 0; i < N; i++) {
    if (!state.lit[i] || i === state.chosen) continue;
    const along = (X[i] - X[state.chosen]) * dx + (Y[i] - Y[state.chosen]) * dy;
    const aside = Math.abs((X[i] - X[state.chosen]) * dy) + Math.abs((Y[i] - Y[state.chosen]) * dx);
    const cost = along + 2.5 * aside;
    if (along > 0 && aside <= along && cost < bestCost) [best, bestCost] = [i, cost];
  }
  if (best >= 0) choose(best);
}

function nearestTo(px, py, within) {
  let best = -1;
  let bestDistance = within * within;
  for (let i = 0; i < N; i++) {
    if (!state.lit[i]) continue;
    const distance = (SX[i] - px) ** 2 + (SY[i] - py) ** 2;
    if (distance < bestDistance) [best, bestDistance] = [i, distance];
  }
  return best;
}

function under(event) {
  const box = canvas.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  return [nearestTo(px, py, Math.max(10, wantedThumbnail() * 0.75)), px, py];
}

// -- pointer

const pointers = new Map();
let dragged = false;

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  if (pointers.size === 1) dragged = false;
  hideHover();
});

canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) {
    if (event.pointerType !== "touch") hover(event);
    return;
  }
  const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
  if (pointers.size === 2) {
    const other = [...pointers.values()].find((p) => p.pointerId !== event.pointerId);
    const box = canvas.getBoundingClientRect();
    const was = Math.hypot(before.clientX - other.clientX, before.clientY - other.clientY);
    const is = Math.hypot(event.clientX - other.clientX, event.clientY - other.clientY);
    zoom(is / Math.max(was, 1), (event.clientX + other.clientX) / 2 - box.left, (event.clientY + other.clientY) / 2 - box.top);
    pan(dx / 2, dy / 2);
    dragged = true;
  } else if (dragged || Math.hypot(dx, dy) > 3) {
    dragged = true;
    canvas.classList.add("moving");
    pan(dx, dy);
  } else return; // a click with an unsteady hand
  pointers.set(event.pointerId, event);
});

function release(event) {
  const known = pointers.delete(event.pointerId);
  canvas.classList.remove("moving");
  if (known && !dragged && event.type === "pointerup") {
    const [i] = under(event);
    choose(i, { move: false });
  }
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", hideHover);
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  const lines = event.deltaMode === 1 ? 18 : 1;
  zoom(Math.exp(-event.deltaY * lines * 0.0016), event.clientX - box.left, event.clientY - box.top);
  hideHover();
}, { passive: false });

function hover(event) {
  const [i, px, py] = under(event);
  canvas.classList.toggle("over", i >= 0);
  if (i !== state.hovered) {
    state.hovered = i;
    repaint();
  }
  const tip = $("hover");
  tip.hidden = i < 0;
  if (i < 0) return;
  smallPicture(tip.querySelector("canvas"), i, Math.min(224, Math.max(128, data.thumbnails.px)));
  tip.querySelector(".name").textContent = data.paths[i];
  groupLine(tip.querySelector(".group"), i, sizes[2 * i] ? "" : " · the picture could not be read");
  const { width, height } = size();
  tip.style.left = `${px + 18 + tip.offsetWidth > width ? Math.max(0, px - 18 - tip.offsetWidth) : px + 18}px`;
  tip.style.top = `${Math.max(0, Math.min(py + 14, height - tip.offsetHeight - 4))}px`;
}

function hideHover() {
  $("hover").hidden = true;
  canvas.classList.remove("over");
  if (state.hovered >= 0) {
    state.hovered = -1;
    repaint();
  }
}

// -- keys and buttons

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const typing = event.target === $("search") || event.target === $("grouping");
  if (event.key === "Escape") {
    if (state.chosen >= 0) choose(-1);
    else if (state.shown.size || state.query) {
      $("search").value = state.query = "";
      state.shown.clear();
      update();
    }
    canvas.focus();
    return;
  }
  if (typing) return;
  const arrow = ARROWS[event.key];
  if (arrow) {
    if (event.target !== canvas && event.target !== document.body) return; // lists scroll
    if (state.chosen >= 0 && !event.shiftKey) towards(...arrow);
    else pan(-90 * arrow[0], -90 * arrow[1]);
  } else if (event.key === "Enter" && event.target === canvas) {
    const { width, height } = size();
    choose(nearestTo(width / 2, height / 2, Infinity));
  } else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

const KEYS = {
  "+": () => zoom(1.5),
  "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  "0": wholeMap,
  "/": () => $("search").select(),
  "?": () => $("keys").showModal(),
  n: () => lookAt(1),
  p: () => lookAt(-1),
  t: () => useTheme(!dark),
};

$("closer").onclick = () => zoom(1.5);
$("further").onclick = () => zoom(1 / 1.5);
$("whole").onclick = wholeMap;
$("theme").onclick = () => useTheme(!dark);
$("help").onclick = () => $("keys").showModal();
$("close").onclick = () => { choose(-1); canvas.focus(); };
$("copy").onclick = async () => {
  const path = data.paths[state.chosen];
  try {
    await navigator.clipboard.writeText(path);
  } catch { // a page opened from a file may not be allowed to
    const field = element("textarea");
    field.value = path;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  $("copy").textContent = "Copied";
};
$("search").oninput = () => {
  state.query = $("search").value.trim().toLowerCase();
  update();
};
$("search").onkeydown = (event) => {
  if (event.key !== "Enter" || !state.found.length) return;
  const step = event.shiftKey ? -1 : 1;
  const at = state.found.indexOf(state.chosen);
  const next = at < 0 ? (step > 0 ? 0 : state.found.length - 1) : at + step;
  choose(state.found[(next + state.found.length) % state.found.length]);
};
$("grouping").onchange = () => {
  state.grouping = groupings[$("grouping").selectedIndex];
  state.shown.clear();
  update();
  if (state.chosen >= 0) writeChosen();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => useTheme(event.matches));
let untouched = true; // until the map is first moved, it fills whatever size the window has
new ResizeObserver(() => {
  if (untouched) {
    state.view.x = (bounds.left + bounds.right) / 2;
    state.view.y = (bounds.top + bounds.bottom) / 2;
    state.view.scale = wholeScale();
  }
  repaint();
}).observe(canvas);
for (const kind of ["pointerdown", "wheel", "keydown"]) canvas.addEventListener(kind, () => { untouched = false; });

// -- begin

$("summary").textContent = data.summary;
$("origin").textContent = data.origin;
$("grouping").replaceChildren(...groupings.map((g) => element("option", "", g.title)));
$("colouring").hidden = groupings.length < 2;
useTheme(dark);
