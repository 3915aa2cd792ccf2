// Script of the page at /: streams a completion of the prompt and plots the time per token.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "seed"];
const FIELDS = [...NUMBERS, "stop_strings"];
const BLOCK = 4000; // characters per element: long text is split into several, so that layout stays fast
// Upper limits of an axis, each with its number of intervals.
const BORDERS = [[1, 5], [1.5, 3], [2, 4], [2.5, 5], [3, 3], [4, 4], [5, 5], [6, 3], [8, 4], [10, 5]];
const count = (n) => n.toLocaleString("en");

let model = "";
let shown = null; // {prompt, completion} in the output box
let running = null; // AbortController of the current request
let points = []; // [context length in tokens, ms], one per token

// ---- storage: settings in this browser, the API key in this tab --------------------------------

function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null; // storage can be disabled
  }
}

function keep(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    // the value is requested again
  }
}

function restoreSettings() {
  let saved = {};
  try {
    saved = JSON.parse(recall("localStorage", "tnnlm.sampling")) || {};
  } catch {
    // invalid JSON: use the defaults
  }
  for (const id of FIELDS) if (typeof saved[id] === "string") $(id).value = saved[id];
}

function saveSettings() {
  const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  keep("localStorage", "tnnlm.sampling", JSON.stringify(values));
}

// ---- the server --------------------------------------------------------------------------------

async function call(path, options = {}) {
  const key = recall("sessionStorage", "tnnlm.key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  let message = `The server returned ${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // the error is not from the API, for example from a proxy
  }
  throw new Error(message);
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").value = "";
  $("key").focus();
}

async function loadModel() {
  const { data } = await (await call("v1/models")).json();
  const card = data[0];
  model = card.id;
  document.title = `${model} · tnnlm`;
  $("model").textContent = model;
  const about = [`${size(card.tnnlm.parameters)} parameters`, card.tnnlm.engine];
  $("about").textContent = about.filter(Boolean).join(" · ");
  $("state").textContent = bytes(card.tnnlm.state_bytes);
  $("max_tokens").max = card.tnnlm.max_tokens;
  $("most").textContent = `up to ${count(card.tnnlm.max_tokens)}`;
  $("prompt").placeholder = card.tnnlm.prompts[0] ?? "";
}

function size(n) {
  const [unit, name] = n < 1e6 ? [1e3, "K"] : n < 1e9 ? [1e6, "M"] : [1e9, "B"];
  return n < 1e3 ? String(n) : (n / unit).toPrecision(3) + name;
}

function bytes(n) {
  return n < 1 << 20 ? `${count(Math.round(n / 1024))} KiB` : `${(n / (1 << 20)).toFixed(1)} MiB`;
}

// Server-sent events: network chunks may end anywhere, also within a line or a character.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
  }
}

// ---- generation --------------------------------------------------------------------------------

function request(prompt) {
  for (const id of NUMBERS) {
    if ($(id).checkValidity()) continue;
    $("sampling").open = true;
    $(id).focus();
    throw new Error(`${document.querySelector(`label[for=${id}]`).textContent}: ${$(id).validationMessage}`);
  }
  const body = { model, prompt, stream: true, stream_options: { include_usage: true, include_timing: true } };
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  const stops = $("stop_strings").value.split("\n").filter(Boolean);
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  if (stops.length) body.stop = stops.map((s) => s.replace(/\\([nt\\])/g, (_, letter) => escapes[letter]));
  return body;
}

async function generate(resume) {
  if (running || (resume && !shown)) return;
  showError("");
  const prompt = resume ? shown.prompt + shown.completion : $("prompt").value;
  let body;
  try {
    body = request(prompt);
  } catch (error) {
    return showError(error.message);
  }
  saveSettings();
  if (!resume) begin(prompt);
  if (!wide.matches) $("text").scrollIntoView({ block: "nearest" });
  running = new AbortController();
  refreshButtons();
  showStatus("Processing the prompt …");
  const began = { tokens: points.length, time: 0, new: 0, position: 0 };
  latest = null;
  let end = "";
  try {
    end = await stream(body, began);
  } catch (error) {
    if (error.name === "AbortError") end = "Stopped";
    else showError(error.message);
  }
  running = null;
  flush();
  refreshButtons();
  const seconds = began.time ? (performance.now() - began.time) / 1000 : 0;
  const after = `${count(began.new)} ${began.new === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} s`;
  showStatus(end ? `${end}: ${after}.` : "");
}

async function stream(body, began) {
  const options = { method: "POST", body: JSON.stringify(body), signal: running.signal };
  let end = null;
  for await (const data of events(await call("v1/completions", options))) {
    if (data === "[DONE]") return end;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) began.new = chunk.usage.completion_tokens;
    const [choice] = chunk.choices;
    if (!choice) continue;
    if (!began.time) {
      began.time = performance.now();
      showStatus("Generating …");
    }
    const { position, step_ms: steps } = chunk.tnnlm;
    steps.forEach((ms, i) => points.push([position - steps.length + 1 + i, ms]));
    began.new = points.length - began.tokens + 1; // the first token results from prefill, without a step
    began.position = position;
    append(choice.text, began);
    if (choice.finish_reason) end = choice.finish_reason === "stop" ? "Finished (stop)" : "Finished (length)";
  }
  throw new Error("The connection was lost.");
}

// ---- the output box ----------------------------------------------------------------------------

let waiting = "";
let latest = null; // progress of the current request
let frame = 0;
let drawn = 0; // time of the last update of the plot
let scale = 10; // upper limit of its y axis in ms

function begin(prompt) {
  shown = { prompt, completion: "" };
  points = [];
  $("text").replaceChildren();
  addBlock(prompt);
  for (const id of ["context", "step", "speed"]) $(id).textContent = "–";
  $("text").scrollTop = $("text").scrollHeight;
  draw();
}

function addBlock(prompt) {
  const block = document.createElement("div");
  for (const [name, text] of [["prompt", prompt], ["completion", ""]]) {
    const span = document.createElement("span");
    span.className = name;
    span.append(document.createTextNode(text));
    block.append(span);
  }
  $("text").append(block);
}

function append(text, began) {
  shown.completion += text;
  waiting += text;
  latest = began;
  if (!frame) frame = requestAnimationFrame(flush);
}

// Adds the text received since the last frame, as text nodes only, never as HTML.
function flush() {
  cancelAnimationFrame(frame);
  frame = 0;
  const box = $("text");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  while (waiting) {
    const node = box.lastElementChild.lastElementChild.firstChild;
    const border = waiting.indexOf("\n", Math.max(0, BLOCK - node.length));
    if (border < 0) {
      node.appendData(waiting);
      break;
    }
    node.appendData(waiting.slice(0, border));
    waiting = waiting.slice(border + 1); // a new block starts a new line
    addBlock("");
  }
  waiting = "";
  if (atEnd) box.scrollTop = box.scrollHeight;
  if (latest) showNumbers(latest);
}

function showNumbers(began) {
  $("context").textContent = count(began.position);
  const steps = points.length - began.tokens;
  if (!steps) return;
  $("step").textContent = median(recent(2000)).toFixed(2);
  const seconds = (performance.now() - began.time) / 1000;
  if (!running || seconds > 0.2) $("speed").textContent = count(Math.round(steps / seconds));
  // Updating takes longer with more points, and one more changes less, so the interval grows.
  if (!running || performance.now() - drawn > points.length / 20) draw();
}

function showStatus(text) {
  $("status").textContent = text;
}

function showError(error) {
  $("error").textContent = error;
  if (error) showStatus("");
}

function refreshButtons() {
  const states = { generate: running, stop: !running, continue: running || !shown, copy: !shown };
  for (const [id, off] of Object.entries(states)) $(id).setAttribute("aria-disabled", String(Boolean(off)));
  document.body.classList.toggle("generating", Boolean(running));
}

async function copy() {
  if (!shown) return;
  try {
    await navigator.clipboard.writeText(shown.prompt + shown.completion);
    showStatus("Copied.");
  } catch {
    getSelection().selectAllChildren($("text")); // the clipboard API needs HTTPS or localhost
    showStatus("Selected: press Ctrl+C to copy.");
  }
}

// ---- the plot ----------------------------------------------------------------------------------

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function recent(most) {
  return points.slice(-most).map((point) => point[1]);
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

function draw() {
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

// ---- keys and buttons --------------------------------------------------------------------------

function stop() {
  running?.abort();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate(event.shiftKey);
  else return;
  event.preventDefault();
});
$("generate").addEventListener("click", () => generate(false));
$("continue").addEventListener("click", () => generate(true));
$("stop").addEventListener("click", stop);
$("copy").addEventListener("click", copy);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keep("sessionStorage", "tnnlm.key", $("key").value);
  $("key-form").hidden = true;
  start();
  $("prompt").focus();
});
for (const id of FIELDS) $(id).addEventListener("change", saveSettings);
const wide = matchMedia("(min-width: 901px)");
const unfold = () => ($("sampling").open = wide.matches || $("sampling").open);
wide.addEventListener("change", unfold);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(draw).observe($("plot"));

function start() {
  showError("");
  loadModel().catch((error) => showError(error.message));
}

unfold();
restoreSettings();
start();
