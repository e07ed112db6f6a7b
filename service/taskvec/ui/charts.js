// Drawings on a canvas, in the colours of the style sheet and at the screen's resolution.

const MARGIN = 0.08;
const MOST_NUMBERS = 4;

/** Return the context of a canvas in CSS pixels, cleared; and its size. */
function prepared(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  return { context, width, height };
}

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** A square of n x n similarities: the background colour for the least one, full colour for the largest. */
export function drawHeatMap(canvas, { matrix, n, least, largest, full, selected }) {
  const { context, width } = prepared(canvas);
  const empty = channels(colour("--raised")), dark = channels(full);
  const cell = width / n;
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      // Below the third decimal all similarities are equal, and have the colour of the largest.
      const share = largest - least < 5e-4 ? 1 : Math.min(1, Math.max(0, (matrix[i * n + j] - least) / (largest - least)));
      context.fillStyle = `rgb(${empty.map((from, c) => Math.round(from + share * (dark[c] - from))).join(" ")})`;
      const x = Math.floor(j * cell), y = Math.floor(i * cell);
      context.fillRect(x, y, Math.ceil((j + 1) * cell) - x, Math.ceil((i + 1) * cell) - y);
    }
  }
  if (selected) {
    context.strokeStyle = colour("--ink");
    context.lineWidth = 2;
    context.strokeRect(selected[1] * cell, selected[0] * cell, cell, cell);
  }
}

/** The cell of a heat map below a point, as [row, column]. */
export function cellAt(canvas, n, event) {
  const box = canvas.getBoundingClientRect();
  const of = (at, from, length) => Math.min(n - 1, Math.max(0, Math.floor(((at - from) / length) * n)));
  return [of(event.clientY, box.top, box.height), of(event.clientX, box.left, box.width)];
}

/** Where points lie on a square canvas: one scale for both axes, so that distances are true. */
function placed(points, width) {
  const reach = Math.max(1e-9, ...points.flat().map(Math.abs));
  const scale = (width / 2) * (1 - 2 * MARGIN);
  return points.map(([x, y]) => [width / 2 + (x / reach) * scale, width / 2 - (y / reach) * scale]);
}

/** Groups of places, by index, of which the first one's dot covers the numbers of the others. */
export function covered(places, radius) {
  const groups = [];
  places.forEach(([x, y], i) => {
    const group = groups.find(([first]) => Math.hypot(places[first][0] - x, places[first][1] - y) < radius);
    if (group) group.push(i);
    else groups.push([i]);
  });
  return groups.filter((group) => group.length > 1);
}

/** The numbers of a group of texts, such as "1, 2, 3", or "1, 2, 3 and 9 more". */
export function numbersOf(group) {
  const numbers = group.slice(0, MOST_NUMBERS).map((i) => i + 1).join(", ");
  return group.length > MOST_NUMBERS ? `${numbers} and ${group.length - MOST_NUMBERS} more` : numbers;
}

/** A map of points; numbered, where there is room for numbers. */
export function drawMap(canvas, { points, full, selected }) {
  const { context, width } = prepared(canvas);
  const marked = new Set(selected ?? []);
  context.font = `500 ${width < 200 ? 8 : 10}px ${colour("--sans")}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  const numbered = points.length <= 40;
  const radius = numbered ? (width < 200 ? 6 : 8) : 3.5;
  const places = placed(points, width);
  const order = places.map((_, i) => i).sort((a, b) => marked.has(a) - marked.has(b)); // marked ones on top
  for (const i of order) {
    const [x, y] = places[i];
    context.beginPath();
    context.arc(x, y, marked.has(i) ? radius + 2 : radius, 0, 2 * Math.PI);
    context.fillStyle = marked.has(i) ? colour("--ink") : full;
    context.fill();
    context.strokeStyle = colour("--paper");
    context.lineWidth = 1;
    context.stroke();
    if (numbered) {
      context.fillStyle = colour("--paper");
      context.fillText(String(i + 1), x, y + 0.5);
    }
  }
  if (!numbered) return;
  context.lineWidth = 3;
  context.strokeStyle = colour("--paper");
  context.fillStyle = colour("--ink");
  for (const group of covered(places, radius / 2)) {
    const [x, y] = places[group[0]], text = numbersOf(group);
    const half = context.measureText(text).width / 2;
    const at = Math.min(width - half - 2, Math.max(half + 2, x));
    const above = y - radius - 9;
    context.strokeText(text, at, above);
    context.fillText(text, at, above);
  }
}

/** The point of a map that is nearest to the pointer. */
export function pointAt(canvas, points, event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const distances = placed(points, box.width).map(([a, b]) => (a - x) ** 2 + (b - y) ** 2);
  return distances.indexOf(Math.min(...distances));
}

/** A line of values from 0 up; null where there is no value. The last one has a dot. */
export function drawLine(canvas, values, places) {
  const { context, width, height } = prepared(canvas);
  const top = Math.max(1e-9, ...values.map((value) => value ?? 0));
  const at = (value, i) => [
    4 + ((places - values.length + i) / Math.max(1, places - 1)) * (width - 8),
    height - 4 - (value / top) * (height - 8),
  ];
  context.strokeStyle = colour("--rule");
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, height - 3.5);
  context.lineTo(width, height - 3.5);
  context.stroke();
  context.strokeStyle = context.fillStyle = colour("--accent");
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.beginPath();
  let drawing = false;
  values.forEach((value, i) => {
    if (value === null) drawing = false;
    else {
      context[drawing ? "lineTo" : "moveTo"](...at(value, i));
      drawing = true;
    }
  });
  context.stroke();
  if (values.length && values.at(-1) !== null) {
    context.beginPath();
    context.arc(...at(values.at(-1), values.length - 1), 3, 0, 2 * Math.PI);
    context.fill();
  }
}
