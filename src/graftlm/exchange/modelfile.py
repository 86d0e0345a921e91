"""Ollama's Modelfile for an exported model: its template, its stop texts, greedy decoding.

Ollama writes prompts by a Go template. A model that learned conversations gets one made from its chat template: what
that writes around messages is found by rendering a few, and must give the chat template's text for a conversation of
five turns. A model that learned texts with labels gets its prompt template, with the user's text in it; one that
learned other texts gets the user's text alone.
"""

from dataclasses import dataclass

from graftlm.errors import InputError
from graftlm.exchange.load import ModelBundle
from graftlm.text.chat import Chat, Message

ROLES = ("system", "user", "assistant")
TEXTS = ("\ue010text\ue011", "\ue012text\ue013", "\ue014text\ue015")
"""What no chat template writes by itself."""


@dataclass(frozen=True)
class Turns:
    """What a chat template writes before and after messages, if it writes all messages of a role in the same way."""

    no_system: str
    """At the beginning of a conversation without a system message."""
    affixes: dict[str, tuple[str, str]]
    """Role -> before and after a message; after a user's comes what begins an answer. system may be missing: then
    Ollama leaves out such messages."""

    @classmethod
    def of(cls, chat: Chat, bos: str) -> "Turns":
        """Those of a chat template, without the begin-of-text, which is written by Ollama.

        Raises InputError for a template that writes conversations in another way.
        """
        system, user, answer = TEXTS
        first = _between(chat.render([("user", user)]).removeprefix(bos), user)
        try:
            in_system = chat.render([("system", system), ("user", user)]).removeprefix(bos)
        except InputError:  # Gemma 2 rejects system messages
            in_system = ""
        with_system = _between(in_system, system, user) if in_system else ["", first[0]]
        second = _between(
            chat.render([("user", user), ("assistant", answer), ("user", system)]).removeprefix(bos),
            user,
            answer,
            system,
        )
        start = _common_suffix([first[0], with_system[1], second[2]])
        before = second[1].removeprefix(first[1])  # Mistral's template writes a space before answers, not at the end
        affixes = {"user": (start, first[1]), "assistant": (before, second[2].removesuffix(start))}
        if in_system:
            affixes["system"] = (with_system[0], with_system[1].removesuffix(start))
        turns = cls(first[0].removesuffix(start), affixes)
        talk_of_five: list[Message] = [
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("user", "e"),
        ]
        for messages in (talk_of_five, *([[("system", "s"), *talk_of_five]] if in_system else [])):
            if turns.render(messages) != chat.render(messages).removeprefix(bos):
                raise InputError(
                    "--format ollama: the model's chat template writes a turn in ways that depend on other turns, as "
                    "no template of Ollama's does: use --format gguf; llama.cpp runs the chat template itself"
                )
        return turns

    def render(self, messages: list[Message]) -> str:
        """The text of a conversation up to the next answer."""
        texts = "".join(self.affixes[role][0] + content + self.affixes[role][1] for role, content, *_ in messages)
        return texts if messages[0][0] == "system" else self.no_system + texts

    def go_template(self) -> str:
        """The same as a Go template over Ollama's `.Messages`."""
        kinds = []
        for role in (role for role in ROLES if role in self.affixes):
            before, after = map(_literal, self.affixes[role])
            kinds.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{')
        messages = f"{{{{ range .Messages }}}}{{{{ {' else '.join(kinds)} end }}}}{{{{ end }}}}"
        if not self.no_system:
            return messages
        if "system" not in self.affixes:
            return _literal(self.no_system) + messages
        return f"{{{{ if not .System }}}}{_literal(self.no_system)}{{{{ end }}}}{messages}"


def modelfile(loaded: ModelBundle, model: str = "model.gguf") -> str:
    """The Modelfile of a run whose merged model is in the file `model` next to it."""
    tokenizer, prompts = loaded.tokenizer, loaded.template
    bos = tokenizer.decode_with_special(tokenizer.encode_prompt(""))
    chat = Chat(tokenizer, "use --format gguf") if loaded.learned_chat else None
    if chat is not None and not (prompts is not None and prompts.chat):
        template = Turns.of(chat, bos).go_template()
    else:
        written = prompts.prompt(TEXTS[0]) if prompts is not None and loaded.learned_labels else TEXTS[0]
        written = written if chat is None else chat.render([("user", written)]).removeprefix(bos)
        template = _literal(written).replace(TEXTS[0], "{{ .Prompt }}")
    if '"""' in template:
        raise InputError('--format ollama: the template holds """, which ends texts in a Modelfile: use --format gguf')
    ends = [tokenizer.token(index) for index in loaded.eos_token_ids]
    lines = [f"FROM ./{model}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {_quoted(end)}" for end in ends]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _between(text: str, *parts: str) -> list[str]:
    """The text before, between and after these parts, each of which it must have once."""
    found = []
    for part in parts:
        if text.count(part) != 1:
            raise InputError(
                "--format ollama: the chat template does not write messages as they are: use --format gguf"
            )
        before, _, text = text.partition(part)
        found.append(before)
    return [*found, text]


def _common_suffix(texts: list[str]) -> str:
    length = next((n for n in range(min(map(len, texts)), 0, -1) if len({text[-n:] for text in texts}) == 1), 0)
    return texts[0][len(texts[0]) - length :]


def _literal(text: str) -> str:
    """Text of a Go template that is written as it is. Ollama drops what is not printable from a Modelfile."""
    text = text.replace("{{", '{{ "{{" }}')
    kept = (
        c if c.isprintable() or c in "\n\t" or c in "".join(TEXTS) else f'{{{{ "\\u{ord(c):04x}" }}}}' for c in text
    )
    return "".join(kept)


def _quoted(text: str) -> str:
    """A value of a Modelfile. Its quotation marks have no escapes."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'
