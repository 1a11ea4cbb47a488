// Texts: a prompt whose thing, colour or flaw is another, what the slider says, file names, commands. No page is touched.

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
const either = (words) => [...words].sort((a, b) => b.length - a.length).map(escaped).join("|");
const BARE = /^((bread|corn|cheese|broccoli|coffee|tea|beer|wine|milk|soda|fire|honey|chocolate|candy|popcorn|spaghetti|sushi|ramen|bacon|salad|poop|santa claus|saturn|lightning|dice)|.*[^su]s)$/;

// "an owl", "a cactus", "grapes".
export const withArticle = (words) => (BARE.test(words) ? words : refit(`a ${words}`));

// With "a" and "an" as the words behind them want it.
const refit = (text) => text.replace(/\b(a)n? (?=(\w+))/gi, (_, a, next) => `${a}${/^([aeio]|um|hour)/i.test(next) ? "n" : ""} `);

const names = (vocabulary) => Object.entries(vocabulary.objects).flatMap(([name, synonyms]) => [name, ...synonyms]);

const object = (vocabulary) => new RegExp(`(?:\\b(an?) )?(?<![\\w-])(${either(names(vocabulary))})(e?s)?(?![\\w-])(?! background)`, "i");

// The known thing that a prompt names: its usual name, or undefined.
export function thingIn(prompt, vocabulary) {
  const spelling = object(vocabulary).exec(prompt)?.[2].toLowerCase();
  return spelling && Object.entries(vocabulary.objects).find(([name, synonyms]) => name === spelling || synonyms.includes(spelling))?.[0];
}

// With this thing in the place of the one that it names; isKnown: whether that is what it is about. Else flaw and background alone stay.
export function withThing(prompt, thing, vocabulary, isKnown = true) {
  const place = object(vocabulary);
  if (isKnown && place.test(prompt)) return refit(prompt.replace(place, (_, article) => (article ? withArticle(thing) : thing)));
  const [word, colour] = [vocabulary.artifacts.find((each) => hasFlaw(prompt, each)), colourIn(prompt, vocabulary)];
  const text = word ? withFlaw(withArticle(thing), word, vocabulary) : withArticle(thing);
  return colour ? withColour(text, colour, vocabulary) : text;
}

const background = (vocabulary) => new RegExp(`,? *\\b(?:on|with|against) an? (${either(vocabulary.colours)}) background\\b`, "i");

export const colourIn = (prompt, vocabulary) => background(vocabulary).exec(prompt)?.[1].toLowerCase();

// On a background of this colour; on none that is named if it is of that colour already.
export function withColour(prompt, colour, vocabulary) {
  const place = background(vocabulary);
  const words = colourIn(prompt, vocabulary) === colour ? "" : refit(` on a ${colour} background`);
  return (place.test(prompt) ? prompt.replace(place, words) : prompt.replace(/[\s.,!]*$/, "") + words).trim();
}

const flaw = (word) => new RegExp(`(?:, )?(?<![\\w-])${escaped(word)}(?![\\w-]) ?`, "i");

export const hasFlaw = (prompt, word) => flaw(word).test(prompt);

// With this flaw; without it if it has it already.
export function withFlaw(prompt, word, vocabulary) {
  const had = hasFlaw(prompt, word);
  let text = prompt;
  for (const other of vocabulary.artifacts) text = text.replace(flaw(other), "");
  if (!had) text = /^an? /i.test(text) ? text.replace(/^(an?) /i, `$1 ${word} `) : `${word} ${text}`;
  return refit(text.trim());
}

const pick = (list) => list[Math.floor(Math.random() * list.length)];

// Something that the model can draw, as {prompt, negative}; undefined if it is not known what that is.
export function surprise({ vocabulary, examples }) {
  if (!vocabulary) return examples.length ? { prompt: pick(examples) } : undefined;
  let prompt = withArticle(pick(Object.keys(vocabulary.objects)));
  const word = pick(vocabulary.artifacts);
  if (word) prompt = withFlaw(prompt, word, vocabulary);
  return { prompt: vocabulary.colours.length ? withColour(prompt, pick(vocabulary.colours), vocabulary) : prompt, negative: word };
}

export function scaleWords(scale, usual, negative) {
  const what = `“${negative}”`;
  if (scale === 0) return `${scale}: ${what} is not taken away.`;
  if (scale < usual) return `${scale}: ${scale < usual / 2 ? "a little" : "much"} of ${what} is taken away.`;
  return scale === usual ? `${scale}: ${what} is taken away, the usual strength.` : `${scale}: more than usual; too much spoils the image.`;
}

const SLUG = 60;

// As snoopi_rt/image_names.py.
export function slug(prompt) {
  const ascii = prompt.normalize("NFKD").replace(/[^\x00-\x7f]/g, "").toLowerCase().replaceAll("'", "");
  let words = ascii.replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  if (words.length > SLUG) {
    const end = words.lastIndexOf("-", SLUG);
    words = words.slice(0, end > 0 ? end : SLUG);
  }
  return words || "image";
}

// One word that bash, zsh and ksh read back as the same text, and that holds nothing a terminal obeys: as snoopi_rt/shell.py.
function quoted(text) {
  if (/^[\w@%+:,./-][\w@%+=:,./-]*$/.test(text)) return text;
  if (!/[\p{C}\p{Zl}\p{Zp}]/u.test(text)) return `'${text.replaceAll("'", `'"'"'`)}'`;
  const octal = (char) => [...new TextEncoder().encode(char)].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("");
  return `$'${text.replace(/[\\']/g, "\\$&").replace(/[!\p{C}\p{Zl}\p{Zp}]/gu, octal)}'`;
}

// The command that draws it; `bundle`: words of the option, if one is needed.
export function command(asked, seed, scale, bundle) {
  const option = (name, value) => (value.startsWith("-") ? [`${name}=${value}`] : [name, value]);
  const negative = asked.negative_prompt ? [...option("--neg", asked.negative_prompt), "--neg-scale", String(scale)] : [];
  const prompt = asked.prompt === "-" ? " -" : asked.prompt; // - alone is standard input
  const options = [...negative, "--seed", String(seed), "--size", asked.size, ...bundle];
  const words = prompt.startsWith("-") ? [...options, "--", prompt] : [prompt, ...options];
  return ["snoopi-rt", "generate", ...words].map(quoted).join(" ");
}
