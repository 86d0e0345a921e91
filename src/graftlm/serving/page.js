// The page of `graft serve`, behind report_parts.js: a review's label probabilities, and texts continued, by the base
// and all its adapters side by side. All of it comes from the API that anyone may use; nothing here is privileged.

const element = (id) => document.getElementById(id);
let models = []; // as GET /v1/models lists them
let key = "";
let running = null; // what stops the continuations that are being written

// Asking --------------------------------------------------------------------------------------------------------------

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => null);
  const error = new Error(found?.error?.message ?? `the server answered ${answer.status}`);
  error.status = answer.status;
  throw error;
}

function words(error) {
  return error instanceof TypeError ? "the server cannot be reached" : error.message;
}

// Server-sent events, as the objects they hold.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server ended the answer early");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Models --------------------------------------------------------------------------------------------------------------

async function readModels() {
  try {
    models = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    element("key-form").hidden = error.status !== 401;
    element("intro").textContent = words(error);
    say(words(error));
    return;
  }
  element("key-form").hidden = true;
  const [base, ...adapters] = models.map((model) => model.id);
  const names = adapters.length ? ` and its adapters ${adapters.join(", ")}` : "";
  element("intro").textContent = `${base}${names}, side by side.`;
}

function tiles(list) {
  list.replaceChildren();
  return models.map((model, number) => {
    const body = node("div");
    list.append(node("li", { class: `tile run-${number % 8}` }, node("h3", {}, model.id), body));
    return body;
  });
}

// Label probabilities -------------------------------------------------------------------------------------------------

async function classify(event) {
  event.preventDefault();
  const text = element("review").value;
  if (!text.trim()) return say("type a review first");
  const list = element("readings");
  list.setAttribute("aria-busy", "true");
  say("reading");
  try {
    const { results } = await (await ask("v1/classify", { text })).json();
    const bodies = tiles(list);
    models.forEach((model, number) => showReading(bodies[number], results[0].models[model.id]));
    const said = models.map(({ id }) => [id, results[0].models[id]]);
    say(said.map(([id, { label, probabilities: p }]) => `${id}: ${label} ${percent(p[label])}`).join(", "));
  } catch (error) {
    list.replaceChildren(node("li", { class: "tile" }, node("p", { class: "wrong" }, words(error))));
    say(words(error));
  }
  list.removeAttribute("aria-busy");
}

function showReading(body, { label, probabilities, cut }) {
  const bars = Object.entries(probabilities).map(([name, probability]) => {
    const filled = node("span");
    filled.style.width = `${100 * probability}%`;
    const bar = node("div", { class: "bar", "aria-hidden": "true" }, filled);
    const attributes = name === label ? { class: "likeliest" } : {};
    return node("li", attributes, node("span", {}, name), " ", node("span", {}, percent(probability)), bar);
  });
  body.append(node("ul", { class: "bars" }, ...bars));
  if (cut) body.append(node("p", { class: "note" }, "It is too long for this model: only its beginning was read."));
}

// Free text -----------------------------------------------------------------------------------------------------------

async function write(event) {
  event.preventDefault();
  const prompt = element("prompt").value;
  if (!prompt) return say("type a text first");
  running?.abort();
  const mine = (running = new AbortController());
  const bodies = tiles(element("continuations"));
  element("stop").disabled = false;
  say("writing");
  const said = await Promise.all(models.map((model, n) => continued(model.id, prompt, bodies[n], mine.signal)));
  if (running !== mine) return; // it was begun anew
  running = null;
  if (document.activeElement === element("stop")) element("prompt").focus();
  element("stop").disabled = true;
  say(said.join(", "));
}

// One model's continuation, token by token; resolves to how it went.
async function continued(model, prompt, body, signal) {
  const shown = node("p", { class: "text", tabindex: 0, role: "group", "aria-label": `The text of ${model}` });
  const note = node("p", { class: "note" }, "…");
  const text = node("span");
  shown.append(node("span", { class: "given" }, prompt), text);
  body.append(shown, note);
  const began = performance.now();
  const settings = { max_tokens: +element("tokens").value, temperature: +element("temperature").value };
  const asked = { model, prompt, ...settings, stream: true, stream_options: { include_usage: true } };
  let finish = "";
  try {
    for await (const part of events(await ask("v1/completions", asked, signal))) {
      if (part.error) throw new Error(part.error.message);
      for (const choice of part.choices) {
        text.append(choice.text);
        finish = choice.finish_reason ?? finish;
      }
      shown.scrollTop = shown.scrollHeight;
      if (part.usage) {
        const seconds = (performance.now() - began) / 1000;
        const end = finish === "length" ? "cut there" : "ended";
        note.textContent = `${part.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s, ${end}`;
      }
    }
  } catch (error) {
    const stopped = signal.aborted;
    note.textContent = stopped ? "stopped" : words(error);
    if (!stopped) note.className = "wrong";
  }
  return `${model}: ${note.textContent}`;
}

// What is typed and pressed -------------------------------------------------------------------------------------------

for (const [form, handler] of [["review-form", classify], ["prompt-form", write]]) {
  element(form).addEventListener("submit", handler);
  element(form).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    element(form).requestSubmit();
  });
}
element("stop").disabled = true;
element("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = element("key").value;
  element("key").value = "";
  readModels().then(() => models.length && element("review").focus());
});
readModels();
