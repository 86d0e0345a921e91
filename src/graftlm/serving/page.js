// The page of `graft serve`, after report_parts.js: label probabilities of a review, and generated texts, from the base
// and all adapters side by side. It uses only the public API.

const element = (id) => document.getElementById(id);
let models = []; // as GET /v1/models lists them
let key = "";
let running = null; // AbortController of the generation in progress

// Requests ------------------------------------------------------------------------------------------------------------

async function request(path, body, signal) {
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

function errorText(error) {
  return error instanceof TypeError ? "the server cannot be reached" : error.message;
}

// The JSON objects of server-sent events.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server closed the connection early");
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
    models = (await (await request("v1/models")).json()).data;
  } catch (error) {
    element("key-form").hidden = error.status !== 401;
    element("intro").textContent = errorText(error);
    announce(errorText(error));
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
  if (!text.trim()) return announce("enter a review first");
  const list = element("readings");
  list.setAttribute("aria-busy", "true");
  announce("classifying");
  try {
    const { results } = await (await request("v1/classify", { text })).json();
    const bodies = tiles(list);
    models.forEach((model, number) => showProbabilities(bodies[number], results[0].models[model.id]));
    const summary = models.map(({ id }) => [id, results[0].models[id]]);
    announce(summary.map(([id, { label, probabilities: p }]) => `${id}: ${label} ${percent(p[label])}`).join(", "));
  } catch (error) {
    list.replaceChildren(node("li", { class: "tile" }, node("p", { class: "wrong" }, errorText(error))));
    announce(errorText(error));
  }
  list.removeAttribute("aria-busy");
}

function showProbabilities(body, { label, probabilities, truncated }) {
  const bars = Object.entries(probabilities).map(([name, probability]) => {
    const filled = node("span");
    filled.style.width = `${100 * probability}%`;
    const bar = node("div", { class: "bar", "aria-hidden": "true" }, filled);
    const attributes = name === label ? { class: "likeliest" } : {};
    return node("li", attributes, node("span", {}, name), " ", node("span", {}, percent(probability)), bar);
  });
  body.append(node("ul", { class: "bars" }, ...bars));
  if (truncated) body.append(node("p", { class: "note" }, "Truncated: the text is too long for this model."));
}

// Text generation -----------------------------------------------------------------------------------------------------

async function generate(event) {
  event.preventDefault();
  const prompt = element("prompt").value;
  if (!prompt) return announce("enter a prompt first");
  running?.abort();
  const mine = (running = new AbortController());
  const bodies = tiles(element("continuations"));
  element("stop").disabled = false;
  announce("generating");
  const summaries = await Promise.all(models.map((model, n) => stream(model.id, prompt, bodies[n], mine.signal)));
  if (running !== mine) return; // started again
  running = null;
  if (document.activeElement === element("stop")) element("prompt").focus();
  element("stop").disabled = true;
  announce(summaries.join(", "));
}

// Streams one model's text; resolves to a summary.
async function stream(model, prompt, body, signal) {
  const shown = node("p", { class: "text", tabindex: 0, role: "group", "aria-label": `Text of ${model}` });
  const note = node("p", { class: "note" }, "…");
  const text = node("span");
  shown.append(node("span", { class: "given" }, prompt), text);
  body.append(shown, note);
  const began = performance.now();
  const limits = { max_tokens: +element("tokens").value, temperature: +element("temperature").value };
  const parameters = { model, prompt, ...limits, stream: true, stream_options: { include_usage: true } };
  let finish = "";
  try {
    for await (const part of events(await request("v1/completions", parameters, signal))) {
      if (part.error) throw new Error(part.error.message);
      for (const choice of part.choices) {
        text.append(choice.text);
        finish = choice.finish_reason ?? finish;
      }
      shown.scrollTop = shown.scrollHeight;
      if (part.usage) {
        const seconds = (performance.now() - began) / 1000;
        const end = finish === "length" ? "stopped at the limit" : "ended";
        note.textContent = `${part.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s, ${end}`;
      }
    }
  } catch (error) {
    const stopped = signal.aborted;
    note.textContent = stopped ? "stopped" : errorText(error);
    if (!stopped) note.className = "wrong";
  }
  return `${model}: ${note.textContent}`;
}

// Events --------------------------------------------------------------------------------------------------------------

for (const [form, handler] of [["review-form", classify], ["prompt-form", generate]]) {
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
