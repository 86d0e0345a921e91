// The page of `graft serve`, after report_parts.js and page_stream.js: a chat with one model; label probabilities and
// continuations of a text, from the base and all adapters side by side. It uses only the public API.

let models = []; // as GET /v1/models lists them; the base is the first
let turns = []; // of the conversation: {user, tile, item}
let running = null; // AbortController of the generation in progress

// Models and tabs -----------------------------------------------------------------------------------------------------

async function readModels() {
  try {
    models = (await (await request("v1/models")).json()).data;
  } catch (error) {
    const locked = !element("key-form").hidden;
    element("intro").textContent = locked ? "" : errorText(error);
    if (locked && key) throw new Error(errorText(error).split(":")[0]); // the rest is about headers
    return;
  }
  element("key-form").hidden = true;
  const [base, ...adapters] = models.map((model) => model.id);
  const names = adapters.length ? ` and its adapter${adapters.length > 1 ? "s" : ""} ${adapters.join(", ")}` : "";
  element("intro").textContent = `Serving ${base}${names}.`;
  if (element("work").hidden) showWork(models[0]);
}

function showWork(base) {
  element("model").append(...models.map((model, n) => node("option", { value: n }, `${model.id}${n ? "" : " (base)"}`)));
  element("max_tokens").max = base.max_tokens;
  element("max_tokens").value = Math.min(256, base.max_tokens);
  element("no-chat").textContent =
    `${base.id} has no chat template, so it cannot chat. Free text works: there it continues what you write. ` +
    "To chat, serve a model that was tuned for it.";
  element("no-chat").hidden = base.chat;
  element("conversation").hidden = !base.chat;
  element("settings").open = matchMedia("(min-width: 60rem)").matches;
  element("work").hidden = false;
  select(element(base.chat ? "chat-tab" : "texts-tab"));
}

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    element(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  element("settings").hidden = tab.id === "labels-tab";
}

function moveTab(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
  select(next);
  next.focus();
}

// Forms ---------------------------------------------------------------------------------------------------------------

// Does what a form is for; what keeps it from that is shown in the form, and read by screen readers.
async function attempt(form, work) {
  const problem = form.querySelector(".problem");
  problem.textContent = "";
  try {
    await work(form);
  } catch (error) {
    problem.textContent = errorText(error);
  }
}

function textOf(form, what) {
  const text = form.querySelector("textarea").value;
  if (!text.trim()) throw new Error(`Nothing was sent: the ${what} is empty.`);
  return text;
}

// The sampling settings as fields of a request.
function readSettings() {
  if (running) throw new Error("An answer is being generated: stop it first, or wait for its end.");
  const inputs = [...element("settings-form").querySelectorAll("input")];
  for (const input of inputs.filter((input) => !input.checkValidity())) {
    element("settings").open = true;
    input.focus();
    throw new Error(`Settings, ${input.labels[0].firstChild.data.trim()}: ${input.validationMessage}`);
  }
  return Object.fromEntries(inputs.filter((input) => input.value).map((input) => [input.id, +input.value]));
}

// Runs `work(signal)`, which resolves to a summary, with the form's button to stop it.
async function generate(form, work) {
  running = new AbortController();
  const stop = form.querySelector(".stop");
  stop.disabled = false;
  announce("generating");
  const summary = await work(running.signal);
  running = null;
  if (document.activeElement === stop) form.querySelector("textarea").focus();
  stop.disabled = true;
  announce(summary);
}

// Chat ----------------------------------------------------------------------------------------------------------------

async function send(form) {
  const user = textOf(form, "message");
  const settings = readSettings();
  form.reset();
  await ask(form, user, settings);
}

// Asks again for the last answer, perhaps another model or with other settings.
async function retry(form) {
  const settings = readSettings();
  const { user, item } = turns.pop();
  item.remove();
  form.querySelector("textarea").focus();
  await ask(form, user, settings);
}

async function ask(form, user, settings) {
  const system = element("system").value.trim() ? [{ role: "system", content: element("system").value }] : [];
  const answered = turns.filter(({ tile }) => tile.text); // not those that failed
  const earlier = answered.flatMap(({ user, tile }) => [
    { role: "user", content: user },
    { role: "assistant", content: tile.text },
  ]);
  const messages = [...system, ...earlier, { role: "user", content: user }];
  const tile = new Tile("div", models[element("model").value]);
  const again = node("button", { type: "button", class: "retry", hidden: "" }, "Retry");
  again.addEventListener("click", () => attempt(form, retry));
  tile.foot.append(again);
  const item = node("li", {}, node("h3", { class: "unseen" }, "You"), node("p", { class: "user" }, user), tile.node);
  turns.push({ user, tile, item });
  element("turns").append(item);
  element("turns").scrollTop = element("turns").scrollHeight;
  element("examples").hidden = true;
  const nothing = "The answer is empty: the model ended it at once. Retry, say it in other words, or choose another model.";
  await generate(form, async (signal) => {
    const note = await tile.stream("v1/chat/completions", { messages, ...settings }, signal, nothing);
    return `${tile.model.id}: ${tile.text} (${note})`;
  });
}

function clear() {
  running?.abort();
  turns = [];
  element("turns").replaceChildren();
  element("examples").hidden = false;
  element("message").focus();
  announce("the conversation is cleared");
}

// Label probabilities -------------------------------------------------------------------------------------------------

async function classify(form) {
  const text = textOf(form, "text");
  const list = element("readings");
  list.setAttribute("aria-busy", "true");
  announce("classifying");
  try {
    const { results } = await (await request("v1/classify", { text })).json();
    const found = models.map(({ id }) => [id, results[0].models[id]]);
    list.replaceChildren(...found.map(([id, result], n) => probabilitiesTile(id, n, result)));
    announce(found.map(([id, { label, probabilities: p }]) => `${id}: ${label} ${percent(p[label])}`).join(", "));
  } catch (error) {
    list.replaceChildren();
    throw error;
  } finally {
    list.removeAttribute("aria-busy");
  }
}

function probabilitiesTile(id, number, { label, probabilities, truncated }) {
  const bars = Object.entries(probabilities).map(([name, probability]) => {
    const filled = node("span");
    filled.style.width = `${100 * probability}%`;
    const bar = node("div", { class: "bar", "aria-hidden": "true" }, filled);
    const attributes = name === label ? { class: "likeliest" } : {};
    return node("li", attributes, node("span", {}, name), " ", node("span", {}, percent(probability)), bar);
  });
  const tile = node("li", { class: `tile run-${number % 8}` }, node("h3", {}, id), node("ul", { class: "bars" }, ...bars));
  if (truncated) tile.append(node("p", { class: "note" }, "Truncated: the text is too long for this model."));
  return tile;
}

// Free text -----------------------------------------------------------------------------------------------------------

async function complete(form) {
  const seed = Math.floor(Math.random() * 2 ** 32); // the same for all models, since they are compared
  const body = { prompt: textOf(form, "text"), seed, ...readSettings() };
  const tiles = models.map((model) => new Tile("li", model, body.prompt));
  element("continuations").replaceChildren(...tiles.map((tile) => tile.node));
  const nothing = "No text: the model ended at once. Leave the text unfinished, without its last words, or use the chat.";
  await generate(form, async (signal) => {
    const notes = await Promise.all(tiles.map((tile) => tile.stream("v1/completions", body, signal, nothing)));
    return notes.map((note, n) => `${models[n].id}: ${note}`).join(", ");
  });
}

// Events --------------------------------------------------------------------------------------------------------------

function useKey(form) {
  key = element("key").value.trim();
  if (!key) throw new Error("Enter the key first.");
  form.reset();
  return readModels().then(() => tabs.find((tab) => tab.tabIndex === 0).focus());
}

const handlers = { "key-form": useKey, "chat-form": send, "review-form": classify, "prompt-form": complete };
for (const [id, work] of Object.entries(handlers)) {
  const form = element(id);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(form, work);
  });
  form.querySelector("textarea")?.addEventListener("keydown", (event) => {
    const sends = id === "chat-form" ? !event.shiftKey : event.ctrlKey || event.metaKey;
    if (event.key !== "Enter" || event.isComposing || !sends) return; // composing: Enter chooses a Chinese word
    event.preventDefault();
    form.requestSubmit();
  });
  form.querySelector(".stop")?.addEventListener("click", () => running?.abort());
}
for (const button of document.querySelectorAll("#examples button")) {
  button.addEventListener("click", () => {
    element("message").value = button.textContent;
    element("message").focus();
    element("chat-form").requestSubmit();
  });
}
for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", moveTab);
}
element("clear").addEventListener("click", clear);
element("settings-form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
readModels();
