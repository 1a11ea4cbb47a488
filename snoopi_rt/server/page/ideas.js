// Buttons with what a model knows. Each row is one stop of the tab key; arrows move within it.

import { colourIn, hasFlaw, thingIn, withColour, withFlaw, withThing } from "./words.js";

const at = (id) => document.getElementById(id);
const ROWS = ["objects", "colours", "artifacts"];

// vocabulary: a model's, or null. texts(): {prompt, negative, isKnown} as they are. choose({prompt, negative}): called with the new ones when
// a button is clicked; negative may be undefined.
export function offer(vocabulary, texts, choose) {
  at("ideas").hidden = !vocabulary;
  if (!vocabulary) return;
  const chosen = {
    objects: (word, { prompt, isKnown }) => ({ prompt: withThing(prompt, word, vocabulary, isKnown) }),
    colours: (word, { prompt }) => ({ prompt: withColour(prompt, word, vocabulary) }),
    artifacts: (word, { prompt, negative }) => {
      const had = hasFlaw(prompt, word);
      return { prompt: withFlaw(prompt, word, vocabulary), negative: had && negative === word ? "" : word };
    },
  };
  for (const row of ROWS) {
    const words = row === "objects" ? Object.keys(vocabulary.objects) : vocabulary[row];
    at(row).replaceChildren(...words.map((word) => chip(word, row, () => choose(chosen[row](word, texts())))));
    at(row).hidden = at(`${row}-title`).hidden = words.length === 0;
  }
  mark(vocabulary, texts().prompt);
}

function chip(word, row, click) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: word, tabIndex: -1 });
  button.dataset.word = word;
  if (row === "colours") {
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = word;
    button.prepend(swatch);
  }
  button.addEventListener("click", click);
  return button;
}

// Presses the buttons of what a prompt names.
export function mark(vocabulary, prompt) {
  if (!vocabulary) return;
  const named = { objects: [thingIn(prompt, vocabulary)], colours: [colourIn(prompt, vocabulary)] };
  named.artifacts = vocabulary.artifacts.filter((word) => hasFlaw(prompt, word));
  for (const row of ROWS) {
    const buttons = [...at(row).children];
    for (const button of buttons) button.setAttribute("aria-pressed", String(named[row].includes(button.dataset.word)));
    if (!buttons.includes(document.activeElement)) stop(buttons, buttons.find((button) => button.ariaPressed === "true") ?? buttons[0]);
  }
}

function stop(buttons, only) {
  for (const button of buttons) button.tabIndex = button === only ? 0 : -1;
}

for (const row of ROWS) {
  at(row).addEventListener("keydown", (event) => {
    const buttons = [...at(row).children];
    const here = buttons.indexOf(document.activeElement);
    const places = { ArrowLeft: here - 1, ArrowUp: here - 1, ArrowRight: here + 1, ArrowDown: here + 1, Home: 0, End: buttons.length - 1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    const next = buttons[(places[event.key] + buttons.length) % buttons.length];
    stop(buttons, next);
    next.focus();
  });
}
