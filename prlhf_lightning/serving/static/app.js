// The demonstration page: streams an answer for each card, and hands in what people think of them.

const $ = (id) => document.getElementById(id);
const cards = [];
let model = "";
let running = null; // aborts the answers that are being written

function tell(text, bad = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("bad", bad);
}

/** Fetch from the API with the key, if there is one; ask for it where it is missing or wrong. */
async function api(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) },
    body: body && JSON.stringify(body),
    signal,
  });
  if (response.status === 401 && (await askForKey())) return api(path, body, signal);
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

let asking = null; // one dialog for all requests that miss the key
function askForKey() {
  asking ??= new Promise((resolve) => {
    $("key").addEventListener("close", () => {
      const given = $("key-value").value.trim();
      asking = null;
      if (given) sessionStorage.setItem("key", given);
      resolve(Boolean(given));
    }, { once: true });
    $("key-value").value = "";
    $("key").showModal();
  });
  return asking;
}

/** Yield the JSON of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer was cut off.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

class Card {
  constructor(tone, name, user) {
    this.root = $("card").content.firstElementChild.cloneNode(true);
    this.text = this.root.querySelector(".text");
    this.note = this.root.querySelector(".note");
    this.votes = this.root.querySelector(".votes");
    this.prompt = this.answer = "";
    this.root.classList.add(tone);
    this.addWho(tone, name, user);
    this.votes.querySelector(".better").addEventListener("click", () => prefer(this));
    for (const thumb of this.votes.querySelectorAll(".thumb")) thumb.addEventListener("click", () => judge(this, thumb));
    $("cards").append(this.root);
  }

  addWho(tone, name, user) {
    const who = this.root.querySelector(".who");
    if (user === null) {
      const title = Object.assign(document.createElement("strong"), { textContent: name });
      who.append(title, Object.assign(document.createElement("span"), { textContent: "What all readers have in common" }));
      this.root.setAttribute("aria-label", name);
      return;
    }
    const label = Object.assign(document.createElement("label"), { textContent: name, htmlFor: `user-${tone}` });
    this.input = Object.assign(document.createElement("input"), { id: `user-${tone}`, type: "text", dir: "auto", value: user });
    this.input.setAttribute("list", "users");
    this.input.addEventListener("change", listJudges);
    who.append(label, this.input);
    this.root.setAttribute("aria-label", name);
  }

  get user() {
    return this.input?.value.trim() || null;
  }

  async write(prompt, strength, signal) {
    this.prompt = prompt;
    this.answer = this.text.textContent = this.note.textContent = "";
    this.votes.hidden = true;
    this.text.classList.remove("failed");
    this.text.classList.add("writing");
    try {
      const asked = { model, messages: [{ role: "user", content: prompt }], stream: true, temperature: 0, strength };
      if (this.user) asked.user = this.user;
      const response = await api("v1/chat/completions", asked, signal);
      for await (const event of events(response)) {
        if (signal.aborted) return; // a piece that had come before the next question
        this.answer += event.choices[0]?.delta.content ?? "";
        this.text.textContent = this.answer;
      }
      const unknown = response.headers.get("x-personalization") === "unknown";
      this.note.textContent = unknown ? "The model does not know this reader: this is the generic answer." : "";
      this.votes.hidden = $("judge").hidden || !this.answer.trim();
      for (const button of this.votes.querySelectorAll("button")) mark(button, false);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.text.textContent = error.message;
      this.text.classList.add("failed");
    } finally {
      if (!signal.aborted) this.text.classList.remove("writing");
    }
  }
}

function mark(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

function listJudges() {
  const before = document.querySelector("#judges input:checked")?.value;
  const names = [...new Set(cards.map((card) => card.user).filter(Boolean))];
  $("judges").replaceChildren(...names.map((name, i) => {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "judge", value: name });
    radio.checked = name === before || (i === 0 && !names.includes(before));
    label.append(radio, Object.assign(document.createElement("bdi"), { textContent: name }));
    return label;
  }));
}

async function handIn(button, ...judgments) {
  const user = document.querySelector("#judges input:checked")?.value;
  if (!user) return tell("Name a reader first.", true);
  try {
    for (const judgment of judgments) await api("v1/feedback", { user, id: crypto.randomUUID?.(), ...judgment });
    mark(button, true);
    tell(`Kept as a vote of ${user}.`);
  } catch (error) {
    tell(error.message, true);
  }
}

function prefer(card) {
  const whole = cards.filter((other) => !other.votes.hidden); // and not failed, nor still being written
  const others = new Set(whole.map((other) => other.answer).filter((text) => text !== card.answer));
  if (!others.size) return tell("There is no other answer to compare with.", true);
  for (const other of cards) mark(other.votes.querySelector(".better"), false);
  const pairs = [...others].map((rejected) => ({ prompt: card.prompt, chosen: card.answer, rejected }));
  return handIn(card.votes.querySelector(".better"), ...pairs);
}

function judge(card, thumb) {
  for (const other of card.votes.querySelectorAll(".thumb")) mark(other, false);
  return handIn(thumb, { prompt: card.prompt, completion: card.answer, label: thumb.dataset.label });
}

async function learn() {
  const user = document.querySelector("#judges input:checked")?.value;
  if (!user) return tell("Name a reader first.", true);
  $("learn").disabled = true;
  tell(`Learning what ${user} likes …`);
  try {
    const { pairs } = await (await api("v1/adapt", { user })).json();
    await ask();
    tell(`Learned from ${pairs} ${pairs === 1 ? "vote" : "votes"}.`);
  } catch (error) {
    tell(error.message, true);
  } finally {
    $("learn").disabled = false;
  }
}

async function ask() {
  running?.abort();
  const mine = (running = new AbortController());
  tell("");
  const prompt = $("prompt").value.trim();
  if (!prompt) return;
  await Promise.all(cards.map((card) => card.write(prompt, $("strength").valueAsNumber, mine.signal)));
}

function showStrength() {
  const value = $("strength").valueAsNumber;
  const meaning = value === 0 ? ", generic" : value === 1 ? ", as trained" : value > 1 ? ", exaggerated" : "";
  $("strength-value").textContent = value.toFixed(1) + meaning;
}

async function start() {
  const [models, users, document_] = await Promise.all(
    ["v1/models", "v1/users?limit=1000", "openapi.json"].map((path) => api(path).then((response) => response.json())),
  );
  model = models.data[0].id;
  $("model").textContent = model;
  const ids = users.data.map((user) => user.id);
  $("users").replaceChildren(...ids.map((id) => Object.assign(document.createElement("option"), { value: id })));
  cards.push(new Card("a", "For one reader", ids[0] ?? ""));
  const learns = Boolean(document_.paths["/v1/adapt"]);
  cards.push(new Card("b", learns ? "For you" : "For another", learns ? "you" : (ids[Math.floor(ids.length / 2)] ?? "")));
  cards.push(new Card("none", "For nobody in particular", null));
  $("judge").hidden = !document_.paths["/v1/feedback"];
  listJudges();
  $("learn").hidden = !learns;
  if (learns) document.querySelector("#judges label:last-child input").checked = true;
}

$("learn").addEventListener("click", learn);
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("strength").addEventListener("input", showStrength);
$("strength").addEventListener("change", () => cards.some((card) => card.answer) && ask());

start().catch((error) => tell(error.message, true));
