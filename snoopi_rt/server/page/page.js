// One call draws every image once for each negative scale, from the same seed; the slider then only chooses what is shown.

const STEPS = 8; // scales beside 0
const KEPT = 48; // entries of the history
const at = (id) => document.getElementById(id);
let models = [];
let shown = null; // {asked, scales, rows: [{seed, sources}]}
let busy = true; // loading or drawing

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

function rest(resting) {
  busy = !resting;
  at("draw").setAttribute("aria-disabled", String(busy)); // not disabled: that would take the focus away
}

const model = () => models.find((each) => each.id === at("model").value) ?? models[0];

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
  choose();
  say("");
  rest(true);
}

function choose() {
  at("size").replaceChildren(...model().sizes.map((size) => new Option(size)));
  at("negative").disabled = !model().negative_prompts;
}

function scales() {
  const { max, default: usual } = model().negative_scale;
  const steps = Math.min(STEPS, model().max_images - 2);
  const even = steps < 1 ? [] : Array.from({ length: steps + 1 }, (_, i) => +((max * i) / steps).toFixed(3));
  return [...new Set([...even, usual])].sort((a, b) => a - b);
}

async function draw() {
  if (busy) return;
  const negative = model().negative_prompts ? at("negative").value.trim() : "";
  const asked = { model: model().id, prompt: at("prompt").value, size: at("size").value, n: 1 };
  if (negative) Object.assign(asked, { negative_prompt: negative, negative_scale: scales() });
  const count = Math.min(4, Math.max(1, Number(at("count").value) || 1));
  const first = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 32) : Number(at("seed").value);
  const begun = performance.now();
  rest(false);
  say("drawing ...");
  try {
    const rows = [];
    for (let i = 0; i < count; i++) {
      const seed = (first + i) % 2 ** 32;
      const { data } = await call("v1/images/generations", { ...asked, seed });
      rows.push({ seed, sources: data.map((each) => `data:image/png;base64,${each.b64_json}`) });
      show({ asked, scales: asked.negative_scale ?? [0], rows: [...rows] }, i === 0);
    }
    const drawn = count * shown.scales.length;
    say(`${drawn} image${drawn > 1 ? "s" : ""} in ${((performance.now() - begun) / 1000).toFixed(2)} s`);
    const place = Number(at("scale").value);
    for (const row of rows) remember({ asked, seed: row.seed, source: row.sources[place] ?? row.sources[0] });
  } catch (error) {
    say(error.message, true);
  } finally {
    rest(true);
  }
}

function show(what, fresh) {
  shown = what;
  const { scales } = shown;
  at("slider").hidden = scales.length < 2;
  at("scale").max = scales.length - 1;
  if (fresh) at("scale").value = Math.max(0, scales.indexOf(model().negative_scale.default));
  at("images").replaceChildren(...shown.rows.map(card));
  slide();
}

function card(row) {
  const made = at("image").content.cloneNode(true).firstElementChild;
  made.row = row;
  made.querySelector(".copy").addEventListener("click", (event) => copy(event.target, row));
  return made;
}

function slide() {
  const place = Number(at("scale").value);
  const scale = shown.scales[place];
  at("scale-value").textContent = scale;
  at("scale").setAttribute("aria-valuetext", String(scale));
  for (const made of at("images").children) {
    const source = made.row.sources[place] ?? made.row.sources[0];
    made.querySelector("img").src = source;
    made.querySelector("img").alt = shown.asked.prompt;
    made.querySelector(".said").textContent = `seed ${made.row.seed}${shown.asked.negative_prompt ? `, scale ${scale}` : ""}`;
    Object.assign(made.querySelector(".download"), { href: source, download: `snoopi-${made.row.seed}-${scale}.png` });
  }
}

// One word that bash, zsh and ksh read back as the same text, and that holds nothing a terminal obeys: as snoopi_rt/shell.py.
function quoted(text) {
  if (/^[\w@%+:,./-][\w@%+=:,./-]*$/.test(text)) return text;
  if (!/[\p{C}\p{Zl}\p{Zp}]/u.test(text)) return `'${text.replaceAll("'", `'"'"'`)}'`;
  const octal = (char) => [...new TextEncoder().encode(char)].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("");
  return `$'${text.replace(/[\\']/g, "\\$&").replace(/[!\p{C}\p{Zl}\p{Zp}]/gu, octal)}'`;
}

async function copy(button, row) {
  const { asked, scales } = shown;
  const option = (name, value) => (value.startsWith("-") ? [`${name}=${value}`] : [name, value]);
  const negative = asked.negative_prompt
    ? [...option("--neg", asked.negative_prompt), "--neg-scale", String(scales[Number(at("scale").value)])]
    : [];
  // Where a server's bundle lies is not known to whoever reads its page.
  const bundle = models.find((each) => each.id === asked.model)?.embedded ? [] : ["--bundle", "FOLDER"];
  const prompt = asked.prompt === "-" ? " -" : asked.prompt; // - alone is standard input
  const options = [...negative, "--seed", String(row.seed), "--size", asked.size, ...bundle];
  const words = ["snoopi-rt", "generate", ...(prompt.startsWith("-") ? [...options, "--", prompt] : [prompt, ...options])];
  const command = words.map(quoted).join(" ");
  const missing = bundle.length ? `put the folder of bundle ${asked.model} in the place of FOLDER` : "";
  if (missing) say(missing);
  try {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy as command"), 1500);
  } catch {
    say([command, missing].filter(Boolean).join(" - ")); // without https a browser may not copy: then it can be marked by hand
  }
}

const STORED = "snoopi-rt.history";

function history() {
  try {
    return JSON.parse(localStorage.getItem(STORED) ?? "[]").filter((entry) => entry.asked?.prompt && entry.source);
  } catch {
    return []; // another program's, or storage is forbidden
  }
}

function remember(entry) {
  let all = [entry, ...history()].slice(0, KEPT);
  for (; all.length; all = all.slice(0, -1)) {
    try {
      localStorage.setItem(STORED, JSON.stringify(all));
      break;
    } catch {
      // full: the oldest goes
    }
  }
  list();
}

function list() {
  const entries = history();
  at("history").replaceChildren(
    ...entries.map((entry) => {
      const button = document.createElement("button");
      const image = document.createElement("img");
      Object.assign(image, { src: entry.source, alt: "" });
      Object.assign(button, { type: "button", title: `${entry.asked.prompt}, seed ${entry.seed}` });
      button.setAttribute("aria-label", `Draw again: ${button.title}`);
      button.append(image);
      button.addEventListener("click", () => again(entry));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  at("forget").hidden = entries.length === 0;
}

function again({ asked, seed }) {
  if (busy) return;
  if (models.some((each) => each.id === asked.model)) at("model").value = asked.model;
  choose();
  Object.assign(at("prompt"), { value: asked.prompt });
  at("negative").value = asked.negative_prompt ?? "";
  at("seed").value = seed;
  at("count").value = 1;
  if (model().sizes.includes(asked.size)) at("size").value = asked.size;
  at("prompt").focus();
  scrollTo({ top: 0 });
  draw();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("scale").addEventListener("input", slide);
at("model").addEventListener("change", choose);
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  start().catch((error) => say(error.message, true));
});
at("forget").addEventListener("click", () => {
  localStorage.removeItem(STORED);
  list();
  at("prompt").focus();
});
list();
say("loading ...");
start().catch((error) => say(error.message, true));
