// What was drawn before, kept in this browser: {asked, seed, source}, the newest first.

const STORED = "snoopi-rt.history";
const KEPT = 48;
const at = (id) => document.getElementById(id);

function entries() {
  try {
    return JSON.parse(localStorage.getItem(STORED) ?? "[]").filter((entry) => entry.asked?.prompt && entry.source);
  } catch {
    return []; // another program's, or storage is forbidden
  }
}

export function remember(added, again) {
  for (let all = [...added, ...entries()].slice(0, KEPT); all.length; all = all.slice(0, -1)) {
    try {
      localStorage.setItem(STORED, JSON.stringify(all));
      break;
    } catch {
      // full: the oldest goes
    }
  }
  list(again);
}

export function forget(again) {
  try {
    localStorage.removeItem(STORED);
  } catch {
    // storage is forbidden: nothing was kept
  }
  list(again);
}

// again(entry): called when one is clicked.
export function list(again) {
  const all = entries();
  at("history").replaceChildren(...all.map((entry) => item(entry, again)));
  at("before").hidden = all.length === 0;
}

function item(entry, again) {
  const [button, image, words, li] = ["button", "img", "span", "li"].map((name) => document.createElement(name));
  const { prompt, negative_prompt: negative } = entry.asked;
  Object.assign(image, { src: entry.source, alt: "", loading: "lazy" });
  words.textContent = negative ? `${prompt} - ${negative}` : prompt;
  Object.assign(button, { type: "button", title: `${prompt}${negative ? `, without ${negative}` : ""}, seed ${entry.seed}` });
  button.setAttribute("aria-label", `Draw again: ${button.title}`);
  button.append(image, words);
  button.addEventListener("click", () => again(entry));
  li.append(button);
  return li;
}
