// What is asked and when. One call draws every image once for each negative scale, from the same seed.

import { forget, list, remember } from "./history.js";
import { mark, offer } from "./ideas.js";
import { looked, seedShown, show } from "./images.js";
import { surprise, withThing } from "./words.js";

const STEPS = 8; // scales beside 0
const FAST = 2; // seconds that all scales of one seed may take for images to be drawn unasked
const PAUSE = 400; // milliseconds without a key after which somebody has typed
const at = (id) => document.getElementById(id);
let models = [];
let drawing = null; // what is being drawn
let next = null; // what was asked for meanwhile: the last wins
let unkept = []; // what was drawn while somebody typed, and is not in the history
let typing = null; // a timer

const key = () => sessionStorage.getItem("key");

async function call(path, body) {
  const headers = { ...(body && { "content-type": "application/json" }), ...(key() && { authorization: `Bearer ${key()}` }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const found = await answer.json().catch(() => ({ error: { message: `answer ${answer.status}` } }));
  if (answer.status === 401) at("key-row").hidden = false;
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

// Not disabled: that would take the focus away.
const block = (blocked) => at("draw").setAttribute("aria-disabled", String(blocked));

const model = () => models.find((each) => each.id === at("model").value) ?? models[0];
const isFast = () => model().seconds_per_image !== null && model().seconds_per_image * (scales().length + 1) <= FAST;
const texts = () => ({ prompt: at("prompt").value, negative: at("negative").value.trim(), isKnown: !at("warning").childNodes.length });

async function start() {
  for (models = []; !models.length; ) {
    models = (await call("v1/models")).data;
    if (models.length) break;
    const state = await (await fetch("readyz")).text();
    if (!state.includes("loading")) throw new Error(`no model is served: ${state.trim()}`);
    say(state.trim());
    await new Promise((done) => setTimeout(done, 1000));
  }
  at("model").replaceChildren(...models.map((each) => new Option(each.id)));
  at("model").parentElement.hidden = models.length < 2;
  if (!model().vocabulary && model().examples.length) at("prompt").value = model().examples[0];
  choose();
  say("");
  block(false);
  if (isFast()) draw({ kept: false });
}

function choose() {
  at("size").replaceChildren(...model().sizes.map((size) => new Option(size)));
  at("negative").disabled = !model().negative_prompts;
  at("surprise").hidden = !surprise(model());
  offer(model().vocabulary, texts, (chosen) => change(chosen, { sameSeed: true }));
  summarise();
}

function summarise() {
  const count = at("count").value || "1";
  at("settings").querySelector("summary").textContent = `seed ${at("seed").value || "any"}, ${at("size").value}, ${count} image${count === "1" ? "" : "s"}`;
}

function scales() {
  const { max, default: usual } = model().negative_scale;
  const steps = Math.min(STEPS, model().max_images - 2);
  const even = Array.from({ length: Math.max(steps, 0) + 1 }, (_, i) => +((max * i) / Math.max(steps, 1)).toFixed(3));
  const all = [...new Set([...even, usual])].sort((a, b) => a - b);
  return all.length <= model().max_images ? all : [usual];
}

// sameSeed: that of the image that is shown, unless another is given. kept: in the history. live: somebody types, and waits for nothing.
function draw({ sameSeed = false, kept = true, live = false } = {}) {
  const { prompt, negative } = texts();
  if (!models.length || !prompt.trim()) return;
  const asked = { model: model().id, prompt, size: at("size").value, n: 1 };
  if (negative && model().negative_prompts) Object.assign(asked, { negative_prompt: negative, negative_scale: scales() });
  const count = Math.min(4, Math.max(1, Number(at("count").value) || 1));
  const job = { asked, model: model(), count, seed: at("seed").value.trim(), sameSeed, kept, live };
  if (!drawing) work(job);
  else if (JSON.stringify([asked, count, job.seed]) !== JSON.stringify([drawing.asked, drawing.count, drawing.seed])) next = job;
  else drawing.kept ||= kept; // it is being drawn already
}

async function work(job) {
  for (drawing = job; drawing; [drawing, next] = [next, null]) {
    block(!drawing.live);
    try {
      await drawAll(drawing);
    } catch (error) {
      say(error.message, true);
    }
  }
  block(false);
}

async function drawAll(job) {
  const { asked, count } = job;
  const shownSeed = job.sameSeed || job.live ? seedShown() : undefined;
  const first = job.seed !== "" ? Number(job.seed) : (shownSeed ?? Math.floor(Math.random() * (2 ** 32 - count)));
  const begun = performance.now();
  at("status").setAttribute("aria-live", job.live ? "off" : "polite");
  if (!job.live) say("drawing ...");
  const rows = [];
  const drawn = { asked, model: job.model, scales: asked.negative_scale ?? [0], rows };
  for (let i = 0; i < count && !(i && next); i++) {
    const seed = Number.isFinite(first) ? first + i : job.seed; // what is no seed the server refuses
    const { data, warnings } = await call("v1/images/generations", { ...asked, seed });
    rows.push({ seed: data[0].seed, sources: data.map((each) => `data:image/png;base64,${each.b64_json}`) });
    show(drawn, say);
    warn(warnings);
  }
  const images = rows.length * drawn.scales.length;
  say(`${images} image${images > 1 ? "s" : ""} in ${((performance.now() - begun) / 1000).toFixed(2)} s`);
  unkept = rows.map((row) => ({ asked, seed: row.seed, source: looked(row) }));
  if (job.kept) keep();
}

function drawTyped(kept) {
  stopTyping();
  draw({ live: true, kept });
}

function stopTyping() {
  clearTimeout(typing);
  typing = null;
}

function keep() {
  if (unkept.length) remember(unkept, again);
  unkept = [];
}

// The nearest that the model knows are buttons.
function warn(warnings) {
  const vocabulary = model().vocabulary;
  const parts = warnings.flatMap((line) => {
    const [what, nearest] = line.split("; nearest: ");
    const buttons = (nearest?.split(", ") ?? []).map((thing) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: thing });
      button.addEventListener("click", () => change({ prompt: withThing(texts().prompt, thing, vocabulary, false) }, { sameSeed: true }));
      return button;
    });
    const sentence = `${what[0].toUpperCase()}${what.slice(1)}.`;
    return [buttons.length ? `${sentence} Nearest:` : sentence, ...buttons];
  });
  at("warning").replaceChildren(...parts.flatMap((part) => [part, " "]));
}

function change({ prompt, negative }, how) {
  at("prompt").value = prompt;
  if (negative !== undefined) at("negative").value = negative;
  mark(model().vocabulary, prompt);
  stopTyping();
  draw(how);
}

function again({ asked, seed }) {
  if (!models.length) return;
  if (models.some((each) => each.id === asked.model)) at("model").value = asked.model;
  choose();
  Object.assign(at("seed"), { value: seed });
  at("count").value = 1;
  if (model().sizes.includes(asked.size)) at("size").value = asked.size;
  summarise();
  change({ prompt: asked.prompt, negative: asked.negative_prompt ?? "" }, { kept: false });
  at("prompt").focus({ preventScroll: true });
  scrollTo({ top: 0 });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  stopTyping();
  draw();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
for (const id of ["prompt", "negative"]) {
  at(id).addEventListener("input", (event) => {
    stopTyping();
    if (!models.length || event.isComposing) return;
    unkept = [];
    mark(model().vocabulary, at("prompt").value);
    if (isFast()) typing = setTimeout(() => drawTyped(false), PAUSE);
  });
  at(id).addEventListener("change", () => {
    if (typing) drawTyped(true);
    else if (drawing) drawing.kept = true;
    else keep();
  });
}
at("surprise").addEventListener("click", () => change(surprise(model())));
at("settings").addEventListener("input", summarise);
at("model").addEventListener("change", () => {
  choose();
  if (isFast()) draw({ sameSeed: true, kept: false });
});
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  start().catch((error) => say(error.message, true));
});
at("forget").addEventListener("click", () => {
  forget(again);
  at("prompt").focus();
});
list(again);
say("loading ...");
start().catch((error) => say(error.message, true));
