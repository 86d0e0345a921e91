"""`graft chat`: a conversation in the terminal, with a model or with several runs and their base.

A line is a message, or a command that begins with a slash. The answer is shown as it is generated; Ctrl-C ends it. What
is not typed in a terminal is read to its end, and each line is answered. Every model has an engine of its own
(`inference/engine.py`), which does not read the earlier turns again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from graftlm.config import ChatConfig
from graftlm.errors import GraftError, InputError, unknown_name_error
from graftlm.exchange.load import ModelBundle, load, load_base
from graftlm.exchange.runs import DEFAULT_RUN, RESUME, RunCheckpoint, find_run, format_of_run
from graftlm.inference.engine import Engine
from graftlm.inference.requests import Request, TokenOutput
from graftlm.inference.sampling import SamplingParams
from graftlm.text.chat import Chat

if TYPE_CHECKING:
    from rich.console import Console

Turn = tuple[str, str]
"""Role and text of a message."""
BASE = "base"
HELP = """\
/system TEXT    set the system message; without TEXT remove it
/adapter NAME   answer with this run from now on, or with base; without NAME the names are listed
/compare TEXT   let all models answer TEXT; without TEXT the last message again
/reset          forget the conversation, except the system message
/help           show this list
/quit           end the chat, as Ctrl-D does; Ctrl-C ends an answer"""


def chat(config: ChatConfig, notes: "Console") -> dict[str, Any]:
    """Talk until the input ends; returns the object of `graft chat --json`: model, system and messages.

    Raises InputError for a model without a chat template, and as `load`.
    """
    say = lambda line: notes.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    models = Models(config)
    conversation = Conversation(models, config, say)
    try:
        conversation.switch(models.first)
        for line in _lines(say):
            if not conversation.take(line):
                break
    finally:
        models.close()
    messages = [{"role": role, "content": text} for role, text in conversation.messages]
    return {"model": conversation.current, "system": conversation.system, "messages": messages}


def _lines(say: Callable[[str], object]) -> Iterator[str]:
    """The lines of the input; Ctrl-C in an empty line of a terminal does not end it."""
    if not sys.stdin.isatty():
        yield from map(str.rstrip, sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401, arrow keys and earlier lines in input()
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends the chat")
        except EOFError:
            say("")
            return


class Models:
    """The models of a conversation, each loaded when it first answers. The runs of a base share its tensors."""

    def __init__(self, config: ChatConfig) -> None:
        self._config = config
        self._bases: dict[str, ModelBundle] = {}
        self._engines: dict[str, tuple[ModelBundle, Engine]] = {}
        names = config.runs or (() if config.init_from else (DEFAULT_RUN,))
        found = [find_run(RESUME, name, config.checkpoint) for name in names]
        found = found or [find_run(config.init_from, checkpoint=config.checkpoint)]
        runs = [run for run in found if run is not None]
        short = [run.folder.resolve().name for run in runs]
        keys = short if len({BASE, *short}) > len(short) else [str(run.folder) for run in runs]
        self.sources: dict[str, RunCheckpoint | None] = {BASE: None, **dict(zip(keys, runs, strict=True))}
        """By the names that /adapter takes; None for the base."""
        self.first = next(iter(keys), BASE)
        self._base = _base_of(runs[0]) if runs else (config.init_from, "auto")

    def get(self, name: str) -> tuple[ModelBundle, Engine]:
        """A model by name. Raises InputError for an unknown name, and a model without a chat template."""
        if name not in self.sources:
            raise unknown_name_error("model", name, self.sources)
        if name not in self._engines:
            loaded = self._load(self.sources[name])
            if loaded.tokenizer.chat_template is None:
                raise InputError(f"{loaded.name}: has no chat template, so there is no chat: use graft generate")
            context = loaded.model.max_seq_len
            engine = Engine(loaded, {}, max_rows=1, max_tokens=context, prefix_tokens=context)
            self._engines[name] = loaded, engine
        return self._engines[name]

    def close(self) -> None:
        """End the engines' threads."""
        for _, engine in self._engines.values():
            engine.close(drain=False)

    def _load(self, run: RunCheckpoint | None) -> ModelBundle:
        config = self._config
        if run is not None and run.is_full_finetune:
            return load(RESUME, run.folder, run.checkpoint, config.device, config.dtype)
        name, base_format = self._base if run is None else _base_of(run)
        if name not in self._bases:
            base_format = base_format if config.base_format == "auto" else config.base_format
            self._bases[name] = load_base(name, config.device, config.dtype, base_format)
        return self._bases[name] if run is None else load(RESUME, run.folder, run.checkpoint, base=self._bases[name])


def _base_of(run: RunCheckpoint) -> tuple[str, str]:
    """The name of a run's base, and the format in which it was kept."""
    return run.record["base"]["name"], format_of_run(run.record)


class Conversation:
    """The messages so far, and the model that answers."""

    def __init__(self, models: Models, config: ChatConfig, say: Callable[[str], object]) -> None:
        self.current = BASE
        self.system, self.messages = config.system, list[Turn]()
        self._models, self._say = models, say
        self._params = SamplingParams.from_flags(config)

    def take(self, line: str) -> bool:
        """A line of input; False if it ends the chat. What goes wrong is a line, and the chat continues."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return False
            if word.startswith("/"):
                self._command(word[1:], rest.strip())
            elif word:
                self._ask([*self.messages, ("user", line.strip())], [self.current])
        except GraftError as error:
            self._say(str(error))
        return True

    def switch(self, name: str) -> None:
        """Let another model answer from now on."""
        loaded, _ = self._models.get(name)
        self.current = name
        shown = loaded.name if name == BASE else name
        self._say(f"{shown} answers; /help lists the commands")
        if loaded.chat() is None:
            self._say(f"{shown} was not tuned on conversations: its answers may make no sense, or not end")

    def _command(self, command: str, rest: str) -> None:
        commands = ("system", "adapter", "compare", "reset", "help", "quit")
        if command == "help":
            self._say(HELP)
        elif command == "system":
            self.system = rest
            self._say("the system message is set" if rest else "there is no system message now")
        elif command == "reset":
            self.messages = []
            self._say("the conversation begins anew")
        elif command == "adapter" and rest:
            self.switch(rest)
        elif command == "adapter":
            self._say(", ".join(f"{name} (answers)" if name == self.current else name for name in self._models.sources))
        elif command == "compare":
            last = max((n for n, (role, _) in enumerate(self.messages) if role == "user"), default=None)
            if not rest and last is None:
                raise InputError("/compare: there is no message yet: add one, as in /compare Who are you?")
            before = [*self.messages, ("user", rest)] if rest else self.messages[: (last or 0) + 1]
            self._ask(before, list(self._models.sources))
        else:
            raise unknown_name_error("command", f"/{command}", [f"/{name}" for name in commands])

    def _ask(self, messages: list[Turn], names: Sequence[str]) -> None:
        """Print each model's answer to the last message; what the current one says becomes part of the conversation."""
        answers = {}
        for name in names:
            if len(names) > 1:
                print(f"[{name}]", flush=True)
            messages, answers[name] = self._answer(name, messages)
        if text := answers.get(self.current):
            self.messages = [*messages, ("assistant", text)]

    def _answer(self, name: str, messages: list[Turn]) -> tuple[list[Turn], str]:
        """Print an answer as it is generated; the messages that it answers, and its text."""
        loaded, engine = self._models.get(name)
        template = Chat(loaded.tokenizer)
        messages, prompt = self._truncate(template, messages, engine.max_seq_len)
        stop = self._params.stop_token_ids | template.stop_tokens
        params = replace(self._params, stop_token_ids=stop, seed=self._params.seed + len(messages) // 2)
        outputs, shown, ended = SimpleQueue[TokenOutput](), "", None
        handle = engine.submit(Request(prompt, params), outputs.put)
        try:
            while ended is None:
                output = outputs.get()
                shown, ended = shown + output.text, output.finish_reason
                print(output.text, end="", flush=True)
        except KeyboardInterrupt:
            handle.cancel()
            ended = "cancelled"
        print(flush=True)
        handle.done.result()  # raises what went wrong
        if ended == "length":
            self._say(f"(ended after {len(handle.tokens)} tokens: --max_new_tokens allows more, if the context does)")
        elif ended == "cancelled":
            self._say("(stopped)")
        elif not shown.strip():
            self._say("(nothing came back: the model ended its answer at once: ask in other words)")
        return messages, shown.strip()

    def _truncate(self, template: Chat, messages: list[Turn], context: int) -> tuple[list[Turn], list[int]]:
        """The messages without the oldest turns that do not fit into the context, and their tokens."""
        system = [("system", self.system)] if self.system else []
        answer, before = min(self._params.limit, context // 4), len(messages)
        while len(prompt := template.encode([*system, *messages])) + answer > context and len(messages) > 2:
            messages = messages[2:]
        if len(messages) < before:
            self._say(
                f"(the oldest {before - len(messages)} messages do not fit into {context} tokens and are left out)"
            )
        return messages, prompt
