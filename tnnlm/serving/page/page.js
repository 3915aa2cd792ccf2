// Script of the page at /: streams completions of a prompt, or a conversation, and plots the time per token.

import { call, chunks, keep, recall } from "./api.js";
import { Conversation } from "./chat.js";
import { Sample, columns, element } from "./output.js";
import * as plot from "./plot.js";

const { count } = plot;
const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "max_tokens", "n", "top_p", "top_k", "seed"];
const FIELDS = [...NUMBERS, "stop_strings"];

let model = "";
let hint = ""; // placeholder of the prompt
let shown = null; // {prompt, samples} in the output box of the completion view
let running = null; // AbortController of the current request
let progress = null; // of the current request, or the last one
let frame = 0;
const chat = new Conversation();
const chatting = () => $("view-chat").checked;

// ---- settings, model, API key ------------------------------------------------------------------

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
  $("template").textContent = card.tnnlm.chat_template ?? "–";
  hint = card.tnnlm.prompts?.[0] ?? "";
  showHint();
  $("state").textContent = count(Math.round(card.tnnlm.state_bytes / 1024));
  $("max_tokens").max = card.tnnlm.max_tokens;
  if ($("max_tokens").validity.rangeOverflow) $("max_tokens").value = card.tnnlm.max_tokens;
  $("most").textContent = `up to ${count(card.tnnlm.max_tokens)}`;
}

// A short prompt in the language of the model's data.
const showHint = () => ($("prompt").placeholder = chatting() ? "" : hint);

function size(n) {
  const [unit, name] = n < 1e6 ? [1e3, "K"] : n < 1e9 ? [1e6, "M"] : [1e9, "B"];
  return n < 1e3 ? String(n) : (n / unit).toFixed(1) + name;
}

// ---- requests ----------------------------------------------------------------------------------

// Fields that both endpoints share; throws if one is invalid.
function request() {
  for (const id of NUMBERS) {
    if ($(id).checkValidity()) continue;
    $("sampling").open = true;
    $(id).focus();
    throw new Error(`${document.querySelector(`label[for=${id}]`).textContent}: ${$(id).validationMessage}`);
  }
  const body = { model, stream: true, stream_options: { include_usage: true, include_timing: true } };
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  const stops = $("stop_strings").value.split("\n").filter(Boolean);
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  if (stops.length) body.stop = stops.map((s) => s.replace(/\\([nt\\])/g, (_, letter) => escapes[letter]));
  return body;
}

// Starts what the buttons and keys ask for, unless a request runs; shows why if it can't.
function start(work) {
  if (running) return;
  showError("");
  let body;
  try {
    body = request();
  } catch (error) {
    return showError(error.message);
  }
  saveSettings();
  work(body);
}

function generate(body) {
  const prompt = $("prompt").value;
  const alone = body.n === 1;
  const samples = Array.from({ length: body.n }, () => new Sample(alone ? prompt : ""));
  shown = { prompt, samples };
  $("text").replaceChildren(...(alone ? [] : [element("div", "prompt", prompt)]), columns(samples));
  clearNumbers();
  run("v1/completions", { ...body, prompt, return_token_ids: true }, samples);
}

// Continues every sample from the state that the server keeps after its last token. The token ids find it;
// the same text may have other tokens, and after a stop string the tokens go on behind the text.
function resume(body) {
  const { prompt, samples } = shown;
  const kept = samples.every((sample) => sample.known && !sample.cut);
  const prompts = samples.map((sample) => (kept ? sample.ids : prompt + sample.text));
  run("v1/completions", { ...body, n: 1, prompt: prompts, return_token_ids: true }, samples);
}

async function send(body) {
  const message = $("prompt").value;
  if (!message.trim()) return;
  const samples = chat.ask(message, body.n, $("text"), model);
  $("prompt").value = "";
  progress = null;
  const failed = await run("v1/chat/completions", { ...body, messages: chat.messages }, samples);
  if (!chat.answered(failed ? "" : report(true))) $("prompt").value ||= message;
  refreshButtons();
}

// Streams an answer into the samples; returns whether it failed.
async function run(path, body, samples) {
  if (!wide.matches) $("text").scrollIntoView({ block: "nearest" });
  $("text").scrollTop = $("text").scrollHeight;
  running = new AbortController();
  progress = { samples, time: 0, steps: 0, tokens: 0, points: plot.size(), position: 0, usage: null };
  for (const sample of samples) sample.begin(Boolean(body.stop));
  refreshButtons();
  showStatus("Processing the prompt …");
  let end = "";
  try {
    for await (const chunk of chunks(path, body, running.signal)) take(chunk);
    end = `Finished (${reasons(samples)})`;
  } catch (error) {
    if (error.name === "AbortError") end = "Stopped";
    else showError(error.message);
    if (error.status === 401) askForKey();
  }
  running = null;
  for (const sample of samples) sample.end(sample.finish);
  flush();
  refreshButtons();
  showStatus(end ? `${end}: ${report(false)}.` : "");
  return !end;
}

function take(chunk) {
  if (chunk.usage) progress.usage = chunk.usage;
  for (const choice of chunk.choices) {
    if (!progress.time) {
      progress.time = performance.now();
      showStatus("Generating …");
    }
    if (chunk.tnnlm) {
      const { position, step_ms: steps } = chunk.tnnlm;
      plot.add(position, steps);
      progress.steps += steps.length;
      progress.position = Math.max(progress.position, position);
    }
    progress.samples[choice.index].take(choice);
    if (!frame) frame = requestAnimationFrame(flush);
  }
}

function reasons(samples) {
  const all = samples.map((sample) => sample.finish);
  const kinds = [...new Set(all)];
  if (kinds.length === 1) return kinds[0];
  return kinds.map((kind) => `${all.filter((one) => one === kind).length} ${kind}`).join(", ");
}

// Tokens and seconds of the last request, and how much of its prompt was read.
function report(short) {
  const { usage, time, steps, samples } = progress;
  const tokens = usage ? usage.completion_tokens : time ? steps + samples.length : 0;
  const seconds = time ? (performance.now() - time) / 1000 : 0;
  const parts = short ? [] : [`${count(tokens)} ${tokens === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} s`];
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached !== undefined) {
    const read = usage.prompt_tokens - cached;
    parts.push(`${count(read)} of ${count(usage.prompt_tokens)} prompt tokens read, ${count(cached)} kept`);
  }
  return parts.join("; ");
}

// ---- showing -----------------------------------------------------------------------------------

function flush() {
  cancelAnimationFrame(frame);
  frame = 0;
  const box = $("text");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  for (const sample of progress.samples) sample.flush();
  if (atEnd) box.scrollTop = box.scrollHeight;
  if (progress.time) showNumbers();
}

function clearNumbers() {
  plot.clear();
  for (const id of ["context", "step", "speed"]) $(id).textContent = "–";
}

function showNumbers() {
  const { position, usage, steps, time, points } = progress;
  if (position || usage) $("context").textContent = count(position || usage.total_tokens);
  if (plot.size() === points) return;
  $("step").textContent = plot.recentMedian(2000).toFixed(2);
  const seconds = (performance.now() - time) / 1000;
  if (!running || seconds > 0.2) $("speed").textContent = count(Math.round(steps / seconds));
  // Updating takes longer with more points, and one more changes less, so the interval grows.
  if (!running || performance.now() - plot.drawn > plot.size() / 20) plot.draw();
}

function showStatus(text) {
  $("status").textContent = text;
}

function showError(error) {
  $("error").textContent = error;
  if (error) showStatus("");
}

function refreshButtons() {
  const nothing = chatting() ? chat.empty : !shown;
  const states = { generate: running, stop: !running, continue: running || !shown, copy: nothing };
  states.reset = running || chat.empty;
  for (const [id, off] of Object.entries(states)) $(id).setAttribute("aria-disabled", String(Boolean(off)));
  for (const view of ["view-completion", "view-chat"]) $(view).disabled = Boolean(running);
  document.body.classList.toggle("generating", Boolean(running));
}

// Shows the view that is selected; each keeps what it has shown.
const stash = { completion: [], chat: [] };
function showView(before) {
  const view = chatting() ? "chat" : "completion";
  if (before) stash[before] = [...$("text").childNodes];
  $("text").replaceChildren(...stash[view]);
  document.body.classList.toggle("chat", chatting());
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== view;
  showHint();
  $("prompt-label").textContent = chatting() ? "Message" : "Prompt";
  $("text-title").textContent = chatting() ? "Conversation" : "Output";
  $("generate").textContent = chatting() ? "Send" : "Generate";
  history.replaceState(null, "", chatting() ? "#chat" : location.pathname + location.search);
  clearNumbers();
  showError("");
  showStatus("Ready.");
  refreshButtons();
  $("text").scrollTop = $("text").scrollHeight;
}

async function copy() {
  const whole = ({ prompt, samples }) => samples.map((sample) => prompt + sample.text).join("\n\n");
  if (chatting() ? chat.empty : !shown) return;
  try {
    await navigator.clipboard.writeText(chatting() ? chat.transcript() : whole(shown));
    showStatus("Copied.");
  } catch {
    getSelection().selectAllChildren($("text")); // the clipboard API needs HTTPS or localhost
    showStatus("Selected: press Ctrl+C to copy.");
  }
}

// ---- keys and buttons --------------------------------------------------------------------------

const main = () => start(chatting() ? send : generate);
const more = () => shown && !chatting() && start(resume);
const stop = () => running?.abort();

function reset() {
  if (running || chat.empty) return;
  chat.clear();
  $("text").replaceChildren();
  clearNumbers();
  showError("");
  showStatus("Ready.");
  refreshButtons();
  $("prompt").focus();
}

document.addEventListener("keydown", (event) => {
  const sends = chatting() && event.target === $("prompt") && !event.shiftKey && !event.isComposing;
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.shiftKey ? more : main)();
  else if (event.key === "Enter" && sends) main();
  else return;
  event.preventDefault();
});
$("generate").addEventListener("click", main);
$("continue").addEventListener("click", more);
$("stop").addEventListener("click", stop);
$("reset").addEventListener("click", reset);
$("copy").addEventListener("click", copy);
$("view-completion").addEventListener("change", () => showView("chat"));
$("view-chat").addEventListener("change", () => showView("completion"));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keep("sessionStorage", "tnnlm.key", $("key").value);
  $("key-form").hidden = true;
  connect();
  $("prompt").focus();
});
for (const id of FIELDS) $(id).addEventListener("change", saveSettings);
const wide = matchMedia("(min-width: 901px)");
const unfold = () => ($("sampling").open = wide.matches || $("sampling").open);
wide.addEventListener("change", unfold);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plot.draw);
new ResizeObserver(plot.draw).observe($("plot"));

function connect() {
  showError("");
  loadModel().catch((error) => {
    showError(error.message);
    if (error.status === 401) askForKey();
  });
}

unfold();
restoreSettings();
if (location.hash === "#chat") $("view-chat").checked = true;
showView();
connect();
