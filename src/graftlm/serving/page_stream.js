// Requests to the public API, and the tile that shows an answer while it is generated. After report_parts.js.

const element = (id) => document.getElementById(id);
let key = "";

async function request(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  if (answer.status === 401) element("key-form").hidden = false;
  const found = await answer.json().catch(() => null);
  throw new Error(found?.error?.message ?? `the server answered ${answer.status}`);
}

function errorText(error) {
  const unreachable = error instanceof TypeError; // of fetch
  return unreachable ? "the server cannot be reached: is graft serve running?" : error.message;
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

// An answer of a model: its text, a note, and buttons.
class Tile {
  // tag: of the list item or box; given: the text that the answer continues.
  constructor(tag, model, given = "") {
    this.model = model;
    this.text = "";
    this.added = node("span");
    this.shown = node("p", { class: "text" }, node("span", { class: "given" }, given), this.added);
    this.note = node("span", { class: "note" }, "…");
    this.copyButton = node("button", { type: "button", hidden: "" }, "Copy");
    this.copyButton.addEventListener("click", () => this.copy());
    this.foot = node("div", { class: "row foot" }, this.note, this.copyButton);
    const colour = `run-${models.indexOf(model) % 8}`;
    this.node = node(tag, { class: `tile ${colour}` }, node("h3", {}, model.id), this.shown, this.foot);
  }

  // Streams the answer to a request. nothing: the note where its text is empty. Resolves to the note.
  async stream(path, body, signal, nothing) {
    const began = performance.now();
    const parameters = { model: this.model.id, ...body, stream: true, stream_options: { include_usage: true } };
    let [finish, tokens] = ["", 0];
    try {
      for await (const part of events(await request(path, parameters, signal))) {
        if (part.error) throw new Error(part.error.message);
        for (const choice of part.choices) {
          const text = choice.text ?? choice.delta.content ?? "";
          this.text += text;
          this.change(() => this.added.append(text));
          finish = choice.finish_reason ?? finish;
        }
        tokens = part.usage?.completion_tokens ?? tokens;
      }
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      const limit = tokens < body.max_tokens ? "the end of the model's context" : "the limit of Max tokens";
      const end = finish === "length" ? `, stopped at ${limit}` : "";
      return this.end(this.text.trim() ? `${tokens} tokens in ${seconds} s${end}` : nothing);
    } catch (error) {
      return signal.aborted ? this.end("stopped") : this.end(errorText(error), "problem");
    }
  }

  end(text, kind = "note") {
    this.change(() => {
      this.note.textContent = text;
      this.note.className = kind;
      for (const button of this.foot.querySelectorAll("button")) button.hidden = button === this.copyButton && !this.text;
    });
    return text;
  }

  // A conversation that is scrolled to its end stays there.
  change(edit) {
    const pane = this.node.closest(".turns");
    const atEnd = pane && pane.scrollHeight - pane.scrollTop - pane.clientHeight < 50;
    edit();
    if (atEnd) pane.scrollTop = pane.scrollHeight;
  }

  // Only pages of this machine or of https may write to the clipboard; on others the text is selected.
  async copy() {
    try {
      await navigator.clipboard.writeText(this.text);
      this.copyButton.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.added);
      this.copyButton.textContent = "Selected: press Ctrl+C";
    }
    announce(this.copyButton.textContent);
  }
}
