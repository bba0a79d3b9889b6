"use strict";
// The decisions of somebody who checks the bins of this page, kept by the browser and saved as a
// file. `page` is what page.py has put into the page for this script.
const page = JSON.parse(document.getElementById("page").textContent);
const element = (id) => document.getElementById(id);
const list = element("list");
const cards = [...document.querySelectorAll(".card")];
const decisions = new Map(); // {decision, counted, decided_at} by position
let current = -1;
let order = []; // positions in the order of their decisions, for undo
let savedAt = "";
let storageFails = false;

const VERDICTS = {
  right: () => "Record is right",
  wrong: (counted) => `Record is wrong: counted ${counted}`,
  other_items: (counted) => `Record is wrong: ${counted} other ${counted === 1 ? "item" : "items"}`,
  unclear: () => "Cannot tell",
};

// What the browser keeps. Each bin has a key of its own, so that two windows do not overwrite each
// other's decisions.

function keyOf(position) {
  return `${page.audit}:${page.bins[position].id}`;
}

function keep(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
    storageFails = false;
  } catch {
    storageFails = true;
  }
}

function kept(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    storageFails = true;
    return null;
  }
}

function readKept(position) {
  let found = null;
  try {
    found = JSON.parse(kept(keyOf(position)));
  } catch {
    // Somebody else's text.
  }
  if (found && Object.hasOwn(VERDICTS, found.decision)) decisions.set(position, found);
  else decisions.delete(position);
}

// Deciding.

function decide(position, decision, counted) {
  const expected = page.bins[position].expected;
  if (decision === "right" || decision === "other_items") counted = expected;
  if (decision === "wrong" && counted === expected) decision = "right";
  const made = { decision, counted, decided_at: new Date().toISOString() };
  decisions.set(position, made);
  order = [...order.filter((other) => other !== position), position];
  keep(keyOf(position), JSON.stringify(made));
  show(position);
  summarize();
  const next = nextOpen(position);
  if (next === undefined) element("progress").focus();
  else goTo(next);
}

// Only where the record lists items.
function otherItems(position) {
  if (cards[position].querySelector("[data-action=otherItems]")) decide(position, "other_items");
}

function undo(position) {
  if (position === undefined) return;
  decisions.delete(position);
  order = order.filter((other) => other !== position);
  keep(keyOf(position), null);
  show(position);
  summarize();
  goTo(position);
}

function takeCount(position) {
  const field = cards[position].querySelector("input");
  const text = field.value.trim();
  const valid = /^[0-9]{1,9}$/.test(text);
  field.setAttribute("aria-invalid", String(!valid));
  if (valid) decide(position, "wrong", Number(text));
  else field.focus();
}

// Showing.

function show(position) {
  const card = cards[position];
  const made = decisions.get(position);
  card.classList.toggle("decided", made !== undefined);
  for (const name of Object.keys(VERDICTS)) card.classList.toggle(name, made?.decision === name);
  card.querySelector(".verdict").textContent = made ? VERDICTS[made.decision](made.counted) : "";
  card.querySelector(".box").textContent = made ? (made.counted ?? "?") : "";
  const field = card.querySelector("input");
  field.value = "";
  field.removeAttribute("aria-invalid");
}

function summarize() {
  const wrong = [...decisions.values()].filter(isWrong).length;
  const records = wrong === 1 ? "record" : "records";
  element("progress").textContent =
    `${grouped(decisions.size)} of ${grouped(cards.length)} checked, ${grouped(wrong)} ${records} wrong`;
  element("bar").value = decisions.size;
  const unsaved = unsavedDecisions();
  element("save-state").textContent = saveState(unsaved);
  element("save-state").classList.toggle("alarming", storageFails && unsaved > 0);
  showWorth();
}

function isWrong(made) {
  return made.decision === "wrong" || made.decision === "other_items";
}

function saveState(unsaved) {
  if (unsaved && storageFails) return "This browser keeps nothing: save before you close the page.";
  if (unsaved) return `${grouped(unsaved)} not in a saved file yet`;
  return decisions.size ? "All are in the saved file" : "";
}

function unsavedDecisions() {
  return [...decisions.values()].filter((made) => made.decided_at > savedAt).length;
}

function goTo(position) {
  const large = document.body.classList.contains("large");
  cards[current]?.classList.remove("current");
  current = position;
  cards[current].classList.add("current");
  cards[current].querySelector("article").focus({ preventScroll: true });
  if (!large) cards[current].scrollIntoView({ block: "nearest" });
}

function nextOpen(position) {
  for (let step = 1; step < cards.length; step++) {
    const other = (position + step) % cards.length;
    if (!decisions.has(other)) return other;
  }
  return undefined;
}

function move(step) {
  const openOnly = list.classList.contains("open-only");
  let other = current + step;
  while (openOnly && decisions.has(other)) other += step;
  if (other in cards) goTo(other);
}

function enlarge(on = !document.body.classList.contains("large")) {
  if (current < 0) move(1);
  document.body.classList.toggle("large", on);
  if (current >= 0) goTo(current);
}

function showOpenOnly(on) {
  element("open-only").checked = on;
  list.classList.toggle("open-only", on);
}

// The file.

function save() {
  const own = page.bins.map((bin, position) => ({ ...bin, audit: page.audit, ...decisions.get(position) }));
  const made = own.filter((row) => row.decision);
  const ids = new Set(made.map((row) => row.id));
  const rows = [...page.earlier.filter((row) => !ids.has(row.id)), ...made];
  // Ids, numbers, times and fixed words: no cell needs quotes or can be a formula.
  const lines = rows.map((row) => page.columns.map((name) => row[name] ?? "").join(","));
  const text = [page.columns.join(","), ...lines, ""].join("\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "decisions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  savedAt = new Date().toISOString();
  keep(page.audit, savedAt);
  summarize();
}

// What it was worth: the same as worth.py, which names the sources.

const CONFIDENCE = 0.95;
const logFactorials = [0];

function logChoose(items, chosen) {
  for (let n = logFactorials.length; n <= items; n++) logFactorials.push(logFactorials[n - 1] + Math.log(n));
  return logFactorials[items] - logFactorials[chosen] - logFactorials[items - chosen];
}

function chanceOfSoFew(part, wrong) {
  const ways = logChoose(part.bins, part.checked);
  let chance = 0;
  for (let drawn = Math.max(0, part.checked - (part.bins - wrong)); drawn <= Math.min(part.wrong, wrong); drawn++) {
    chance += Math.exp(logChoose(wrong, drawn) + logChoose(part.bins - wrong, part.checked - drawn) - ways);
  }
  return chance;
}

function mostWrong(part, tail) {
  let [low, high] = [part.wrong, part.bins - (part.checked - part.wrong)];
  while (low < high) {
    const middle = Math.floor((low + high + 1) / 2);
    if (chanceOfSoFew(part, middle) > tail) low = middle;
    else high = middle - 1;
  }
  return low;
}

function interval(part, confidence) {
  const tail = (1 - confidence) / 2;
  const right = { ...part, wrong: part.checked - part.wrong };
  return [part.bins - mostWrong(right, tail), mostWrong(part, tail)];
}

function expectedWrong(part) {
  return part.checked ? (part.bins * part.wrong) / part.checked : 0;
}

// Estimates are lists of value, low and high.
function worth(flagged, others, alarms) {
  const found = { checked: flagged.checked, wrong: flagged.wrong };
  if (flagged.checked) {
    const bounds = [expectedWrong(flagged), ...interval(flagged, CONFIDENCE)];
    found.right_alarms = bounds.map((number) => number / flagged.bins);
  }
  const parts = [flagged, others];
  if (parts.some((part) => part.bins && !part.checked)) return found;
  const uncertain = parts.filter((part) => part.checked < part.bins).length;
  const confidence = CONFIDENCE ** (1 / Math.max(1, uncertain));
  const [[low, high], [otherLow, otherHigh]] = parts.map((part) => interval(part, confidence));
  const value = expectedWrong(flagged);
  const total = value + expectedWrong(others);
  found.wrong_records = [total, low + otherLow, high + otherHigh];
  if (!total) return found;
  found.found = [value / total, low / Math.max(1, low + otherHigh), high / Math.max(1, high + otherLow)];
  found.best_share = bestShare(alarms, flagged.bins / Math.max(1, flagged.checked), total);
  return found;
}

function bestShare(alarms, weight, wrongRecords) {
  let [best, highest] = [null, 0];
  for (const share of [...new Set(alarms.map(([share]) => share))].sort((a, b) => a - b)) {
    const raised = alarms.filter(([flaggedAt]) => flaggedAt <= share);
    const right = raised.filter(([, wrong]) => wrong).length;
    const balance = (2 * weight * right) / (weight * raised.length + wrongRecords);
    if (balance > highest) [best, highest] = [share, balance];
  }
  return best;
}

function worthOfDecisions() {
  const clear = [...decisions].filter(([, made]) => made.decision !== "unclear");
  const of = (part) => clear.filter(([position]) => page.bins[position].part === part);
  const countWrong = (made) => made.filter(([, one]) => isWrong(one)).length;
  const [flagged, others] = ["flagged", "other"].map((part) => ({
    bins: page.parts[part], checked: of(part).length, wrong: countWrong(of(part)),
  }));
  if (!page.sampled) return { checked: flagged.checked, wrong: flagged.wrong };
  const alarms = of("flagged").map(([position, made]) => [page.bins[position].flagged_at, isWrong(made)]);
  return worth(flagged, others, alarms);
}

function showWorth() {
  const found = worthOfDecisions();
  element("worth").hidden = !decisions.size;
  element("worth-alarms").textContent = `${grouped(found.wrong)} of ${grouped(found.checked)}`;
  element("worth-alarms-interval").textContent = page.sampled
    ? spread(found.right_alarms, percent, `of all ${grouped(page.parts.flagged)} on the list`)
    : found.checked < page.parts.flagged ? "those that were checked, the most suspicious" : "all that are on the list";
  if (!page.sampled) return;
  element("worth-records").textContent = found.wrong_records ? `about ${rounded(found.wrong_records[0])}` : "–";
  element("worth-records-interval").textContent = spread(found.wrong_records, rounded, "records");
  element("worth-found").textContent = found.found ? `about ${percent(found.found[0])}` : "–";
  element("worth-found-interval").textContent = spread(found.found, percent, "of them");
  element("worth-share").textContent = found.best_share ?? "–";
}

function spread(estimate, form, what) {
  if (!estimate) return "too little is checked to say";
  const [low, high] = estimate.slice(1).map(form);
  return low === high ? `exactly ${low} ${what}` : `${low} to ${high} ${what}`;
}

function percent(share) {
  if (share > 0 && share < 0.01) return "<1%";
  if (share > 0.99 && share < 1) return ">99%";
  return `${Math.round(100 * share)}%`;
}

function rounded(number) {
  return grouped(Math.round(number));
}

function grouped(number) {
  return number.toLocaleString("en-US");
}

// The pictures at the end of the page. The browser decodes each when it comes into sight.
function placePictures() {
  const urls = element("pictures").textContent.split("\n");
  for (const [position, card] of cards.slice(page.first_pictures).entries()) {
    if (urls[position]) card.querySelector("img").src = urls[position];
  }
  element("pictures").remove();
}

// Keys and clicks.

const KEYS = {
  r: () => decide(current, "right"),
  i: () => otherItems(current),
  x: () => decide(current, "unclear", null),
  l: () => enlarge(),
  j: () => move(1),
  k: () => move(-1),
};
const KEYS_WITHOUT_A_BIN = {
  u: () => undo(decisions.has(current) ? current : order.at(-1)),
  o: () => showOpenOnly(!element("open-only").checked),
  s: save,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const inField = event.target.matches("input[inputmode]");
  if (event.key === "Enter" && inField) takeCount(current);
  else if (event.key === "Escape" && inField) leaveField(event.target);
  else if (event.key === "Escape") enlarge(false);
  else if (!element("use-keys").checked || !cards.length) return;
  else if (event.key === "ArrowRight" && !inField) move(1);
  else if (event.key === "ArrowLeft" && !inField) move(-1);
  else if (/^[0-9]$/.test(event.key) && !inField) typeCount(event.key);
  else if (Object.hasOwn(KEYS_WITHOUT_A_BIN, event.key.toLowerCase())) KEYS_WITHOUT_A_BIN[event.key.toLowerCase()]();
  else if (Object.hasOwn(KEYS, event.key.toLowerCase())) {
    // The first key only says which bin is meant.
    if (current < 0) move(1);
    else KEYS[event.key.toLowerCase()]();
  } else return;
  event.preventDefault();
}

function typeCount(digit) {
  if (current < 0) move(1);
  const field = cards[current].querySelector("input");
  if (decisions.has(current)) return;
  field.value = digit;
  field.focus();
}

function leaveField(field) {
  field.value = "";
  cards[current].querySelector("article").focus();
}

const ACTIONS = {
  right: (position) => decide(position, "right"),
  count: takeCount,
  otherItems,
  unclear: (position) => decide(position, "unclear", null),
  undo,
  enlarge: () => enlarge(),
};

function positionOf(target) {
  return cards.indexOf(target.closest(".card"));
}

function begin() {
  savedAt = kept(page.audit) ?? "";
  for (const position of cards.keys()) {
    readKept(position);
    if (decisions.has(position)) show(position);
  }
  order = [...decisions.keys()].sort((a, b) => (decisions.get(a).decided_at < decisions.get(b).decided_at ? -1 : 1));
  summarize();
  document.addEventListener("DOMContentLoaded", placePictures);
  document.addEventListener("keydown", onKey);
  list?.addEventListener("focusin", (event) => {
    const position = positionOf(event.target);
    if (position === current || position < 0) return;
    cards[current]?.classList.remove("current");
    current = position;
    cards[current].classList.add("current");
  });
  list?.addEventListener("click", (event) => {
    const action = event.target.closest("[data-action]")?.dataset.action;
    if (!action) return;
    const position = positionOf(event.target);
    if (position !== current) goTo(position);
    ACTIONS[action](position);
  });
  element("open-only").addEventListener("change", (event) => showOpenOnly(event.target.checked));
  element("save").addEventListener("click", save);
  window.addEventListener("beforeunload", (event) => {
    if (storageFails && unsavedDecisions()) event.preventDefault();
  });
  // Another window decides about the same bins.
  window.addEventListener("storage", (event) => {
    if (!event.key?.startsWith(page.audit)) return;
    savedAt = kept(page.audit) ?? "";
    const position = page.bins.findIndex((_, other) => keyOf(other) === event.key);
    if (position >= 0) {
      readKept(position);
      show(position);
    }
    summarize();
  });
}

if (cards.length) begin();
