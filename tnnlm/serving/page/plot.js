// Plot of the time per token against the context length, in which long completions stay fast to draw.

const $ = (id) => document.getElementById(id);
// Upper limits of an axis, each with its number of intervals.
const BORDERS = [[1, 5], [1.5, 3], [2, 4], [2.5, 5], [3, 3], [4, 4], [5, 5], [6, 3], [8, 4], [10, 5]];
export const count = (n) => n.toLocaleString("en");

export let drawn = 0; // time of the last drawing
let points = []; // [context length in tokens, ms], one per token
let scale = 10; // upper limit of the y axis in ms

export function clear() {
  points = [];
  draw();
}

// Adds the steps of one sequence, which end at a context length. The steps of a batch make a token of every
// sample at once, so that only those beyond the last point are new.
export function add(position, steps) {
  const last = points.length ? points.at(-1)[0] : 0;
  steps.forEach((ms, i) => {
    const at = position - steps.length + 1 + i;
    if (at > last) points.push([at, ms]);
  });
}

export const size = () => points.length;

export function recentMedian(most) {
  return median(points.slice(-most).map((point) => point[1]));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Round upper limit at or above a value, and evenly spaced ticks up to it.
function axis(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  const [first, parts] = BORDERS.find(([n]) => n * power >= value * 0.999);
  const ticks = Array.from({ length: parts + 1 }, (_, i) => (i * first * power) / parts);
  return { top: first * power, ticks };
}

function binned(bins, top) {
  const groups = Array.from({ length: bins }, () => []);
  for (const [x, ms] of points) groups[Math.min(bins - 1, Math.floor((x / top) * bins))].push([x, ms]);
  const middle = (group, i) => median(group.map((point) => point[i]));
  return groups.filter((group) => group.length).map((group) => [middle(group, 0), middle(group, 1)]);
}

export function draw() {
  drawn = performance.now();
  const canvas = $("plot");
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const x = axis(Math.max(100, ...points.slice(-1).map((point) => point[0])));
  const line = binned(40, x.top);
  // Rare slow steps would flatten the plot: those above the scale are plotted at its edge and counted.
  // The scale changes only when the median line leaves its middle range.
  const highest = line.length ? Math.max(...line.map((point) => point[1])) : 5;
  if (highest > 0.85 * scale || highest < 0.4 * scale) scale = axis(1.6 * highest).top;
  const y = axis(scale);
  const [left, top, right, bottom] = [52, 12, 12, 44];
  const across = (n) => left + (n / x.top) * (width - left - right);
  const up = (ms) => height - bottom - (Math.min(ms, y.top) / y.top) * (height - top - bottom);

  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  pen.lineWidth = 1;
  pen.strokeStyle = colour("rule");
  pen.fillStyle = colour("quiet");
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const tick of y.ticks) {
    pen.strokeRect(left, Math.round(up(tick)) + 0.5, width - left - right, 0);
    pen.fillText(String(Number(tick.toPrecision(3))), left - 8, up(tick));
  }
  pen.textBaseline = "top";
  for (const tick of x.ticks) {
    pen.textAlign = tick === x.top ? "right" : "center";
    pen.fillText(count(tick), tick === x.top ? width - right : across(tick), height - bottom + 7);
  }
  pen.textAlign = "center";
  pen.fillText("context length (tokens)", left + (width - left - right) / 2, height - 16);
  pen.save();
  pen.translate(6, top + (height - top - bottom) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText("ms per token", 0, 0);
  pen.restore();
  if (points.length) drawPoints(pen, line, across, up, colour);
}

function drawPoints(pen, line, across, up, colour) {
  pen.fillStyle = colour("point");
  const every = Math.ceil(points.length / 20000);
  for (let i = 0; i < points.length; i += every) {
    const [n, ms] = points[i];
    pen.fillRect(across(n) - 1.5, up(ms) - 1.5, 3, 3);
  }
  pen.strokeStyle = colour("accent");
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  pen.beginPath();
  for (const [n, ms] of line) pen.lineTo(across(n), up(ms));
  pen.stroke();
  const above = points.filter((point) => point[1] > scale).length;
  const span = (part) => `${median(part.map((point) => point[1])).toFixed(2)} ms`;
  const half = Math.min(100, Math.ceil(points.length / 2));
  $("plot-summary").textContent =
    `One point per token; the line is their median. First ${count(half)}: ${span(points.slice(0, half))}, ` +
    `last ${count(half)}: ${span(points.slice(-half))}.` +
    (above ? ` ${count(above)} slower than the scale, plotted at its edge.` : "");
}
