// The images that are shown, each at every scale of its negative prompt: a slider chooses the scale, a wipe compares it with none.

import { command, scaleWords, slug } from "./words.js";

const at = (id) => document.getElementById(id);
let shown = null; // {asked, model, scales, rows: [{seed, sources}]}

export const seedShown = () => shown?.rows[0]?.seed;

// The image that is looked at in a row of sources.
export const looked = (row) => row.sources[Number(at("scale").value)] ?? row.sources[0];

// say(text): tells what cannot be done.
export function show(what, say) {
  const usual = what.model.negative_scale.default;
  const moved = shown && shown.scales.join() === what.scales.join() && shown.asked.model === what.asked.model;
  shown = what;
  const negative = shown.asked.negative_prompt;
  at("slider").hidden = shown.scales.length < 2;
  at("scale").max = shown.scales.length - 1;
  if (!moved) at("scale").value = Math.max(0, shown.scales.indexOf(usual));
  at("slider").querySelector("label").textContent = `How strongly “${negative}” is taken away`;
  const cards = [...at("images").children].slice(0, shown.rows.length);
  while (cards.length < shown.rows.length) cards.push(card(say));
  at("images").replaceChildren(...cards); // the same ones, so that a wipe stays where it was, and the focus
  slide();
}

function card(say) {
  const made = at("image").content.cloneNode(true).firstElementChild;
  const place = made.querySelector(".place");
  const wipe = () => made.style.setProperty("--place", `${place.value}%`);
  place.addEventListener("input", wipe);
  wipe();
  made.querySelector(".copy").addEventListener("click", (event) => copy(event.target, made.row, say));
  return made;
}

function slide() {
  const { asked, model, scales, rows } = shown;
  const scale = scales[Number(at("scale").value)];
  const negative = asked.negative_prompt;
  const words = negative ? scaleWords(scale, model.negative_scale.default, negative) : "";
  at("scale-words").textContent = words;
  at("scale").setAttribute("aria-valuetext", words);
  [...at("images").children].forEach((made, number) => {
    const row = (made.row = rows[number]);
    const source = looked(row);
    const part = (name) => made.querySelector(name);
    Object.assign(part(".shown"), { src: source, alt: negative ? `${asked.prompt}, without ${negative}` : asked.prompt });
    part(".wipe").hidden = scales.length < 2 || scales[0] !== 0;
    if (!part(".wipe").hidden) Object.assign(part(".plain"), { src: row.sources[0], alt: asked.prompt });
    part(".left").textContent = "no negative";
    part(".right").textContent = `− ${negative}`;
    part(".place").setAttribute("aria-label", `Compare with the image in which “${negative}” is not taken away`);
    part(".facts").textContent = `seed ${row.seed}${negative ? `, scale ${scale}` : ""}`;
    Object.assign(part(".download"), { href: source, download: `${slug(asked.prompt)}-${row.seed}${negative ? `-${scale}` : ""}.png` });
  });
}

async function copy(button, row, say) {
  const { asked, model, scales } = shown;
  // Where a server's bundle lies is not known to whoever reads its page.
  const bundle = model.embedded ? [] : ["--bundle", "FOLDER"];
  const text = command(asked, row.seed, scales[Number(at("scale").value)], bundle);
  const missing = bundle.length ? `put the folder of bundle ${asked.model} in the place of FOLDER` : "";
  if (missing) say(missing);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy as command"), 1500);
  } catch {
    say([text, missing].filter(Boolean).join(" - ")); // without https a browser may not copy: then it can be marked by hand
  }
}

at("scale").addEventListener("input", slide);
