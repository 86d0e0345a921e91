"""`graft serve`: the socket, the models, the signals, and shutdown.

The port is bound before the model is loaded, so that a port in use is reported at once. The first Ctrl-C or SIGTERM
stops accepting and lets requests in flight end, for the shutdown timeout at most; a second one ends them at once.
SIGTERM is how a server is meant to be stopped: exit status 0. After Ctrl-C it is 130.
"""

import asyncio
import math
import os
import signal
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from graftlm.config import ServeConfig, TrainConfig
from graftlm.config.serving import check_api_key
from graftlm.errors import InputError, Interrupted

try:
    import h11
    import llguidance  # noqa: F401 (inference/grammar.py imports it at the first schema)
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from graftlm.serving.app import make_app
    from graftlm.serving.middleware import is_loopback
    from graftlm.serving.service import ServedModel, Service
except ModuleNotFoundError as error:
    if (error.name or "").startswith("graftlm"):
        raise
    raise InputError(f"graft serve needs the {error.name} package: pip install 'graftlm[serve]'") from None

from graftlm.exchange.huggingface import ADAPTER_CONFIG, OWN_CONFIG
from graftlm.exchange.load import ModelBundle, adapter_notes, learned_chat, load, load_base, resolve_path
from graftlm.exchange.runs import find_run, read_run
from graftlm.inference.engine import Engine
from graftlm.methods import method_from_json
from graftlm.methods.lora import LoRA
from graftlm.text.chat import Chat
from graftlm.text.template import Template, load_template

KEY_VARIABLE = "GRAFT_API_KEY"
MAX_CONNECTIONS = 1024
KEEP_ALIVE_SECONDS = 30
ERROR_SECONDS = 5
"""After the shutdown timeout, to send errors to the requests that did not end in it."""

Run = dict[str, Any]


def serve(config: ServeConfig, warn: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Serve until a signal. Yields once, when requests are accepted: the server's URL and the names of its models.

    Raises InputError for what cannot be served, Interrupted after Ctrl-C.
    """
    key = config.api_key or os.environ.get(KEY_VARIABLE, "")
    check_api_key(key, KEY_VARIABLE)
    config = _with_run_as_base(config)
    folders = parse_adapter_args(config.adapters)
    runs = {name: run_of(folder) for name, folder in folders.items()}
    base = base_of(config, runs)
    with listening(config.host, config.port) as listener:
        load_one = load_base if folders else load
        loaded = load_one(base, device=config.device, dtype=config.dtype, base_format=config.base_format)
        templates = templates_of(config, loaded, runs)
        engine = Engine(loaded, folders, max_rows=config.max_batch_size)
        try:
            base, *names = templates
            adapters = {base: None, **{name: name for name in names}}
            speak = [name for name, folder in folders.items() if learned_chat(folder, loaded.tokenizer)]
            ends = dict.fromkeys(speak, Chat(loaded.tokenizer).stop_tokens) if speak else {}
            models = {
                n: ServedModel(n, a, templates[n], engine.max_seq_len, ends.get(n, frozenset()))
                for n, a in adapters.items()
            }
            service = Service(engine, loaded.tokenizer, models, config.max_tokens)
            app = make_app(
                service, host=config.host, allowed_hosts=config.allowed_hosts, api_key=key, rate_limit=config.rate_limit
            )
            server = Server(app, config.shutdown_timeout, lambda: engine.close(drain=False))
            with server.signals():
                for folder in (folders[name] for name, run in runs.items() if run is None):
                    for note in adapter_notes(folder, loaded.model.config, loaded.tokenizer):
                        warn(note)
                if not key and not is_loopback(config.host):
                    warn(f"--host {config.host} without a key: everyone who reaches this machine can use the server")
                yield {"url": url_of(config.host, listener), "models": list(models)}
                server.run(sockets=[listener])
        finally:
            engine.close(drain=False)
    if server.signal == signal.SIGINT:
        raise Interrupted("stopped")


# What is served -------------------------------------------------------------------------------------------------------


def _with_run_as_base(config: ServeConfig) -> ServeConfig:
    """The flags, with a single run that is not served next to its base as the base."""
    if len(config.adapters) > 1 or config.init_from:
        return config
    run = next(filter(None, map(find_run, config.adapters)), None)
    if run is None or type(method_from_json(run.record["method"])) is LoRA:
        return config
    return replace(config, adapters=(), init_from=config.adapters[0])


def parse_adapter_args(adapters: tuple[str, ...]) -> dict[str, Path]:
    """FOLDER or NAME=FOLDER -> folder by name. Raises InputError where a name is missing or given twice."""
    found: dict[str, Path] = {}
    for given in adapters:
        named = "=" in given and not Path(given).is_dir()
        name, _, folder = given.partition("=") if named else (Path(given).resolve().name, "", given)
        if not name.strip():
            raise InputError(f"--adapters {given}: has no name; write NAME=FOLDER")
        if name in found:
            raise InputError(f"--adapters {given}: {name!r} is {found[name]} already; write NAME=FOLDER")
        found[name] = Path(folder)
    return found


def run_of(folder: Path) -> Run | None:
    """The run.json of a run folder; None for another adapter folder, such as PEFT's. Raises InputError."""
    return None if any((folder / name).is_file() for name in (ADAPTER_CONFIG, OWN_CONFIG)) else read_run(folder)


def base_of(config: ServeConfig, runs: Mapping[str, Run | None]) -> str:
    """The base model's name; the engine refuses adapters of another. Raises InputError if no run or flag names one."""
    known = [run["base"]["name"] for run in runs.values() if run is not None]
    if config.init_from:
        return resolve_path(config.init_from)
    if runs and not known:
        raise InputError(f"{config.adapters[0]}: does not name its base; give --init_from")
    return str(known[0]) if known else TrainConfig.init_from


def templates_of(config: ServeConfig, loaded: ModelBundle, runs: Mapping[str, Run | None]) -> dict[str, Template]:
    """The prompt template of each model, by name; the base is the first. Models without one use the base's.

    Raises InputError for an adapter that has the base's name.
    """
    own = {name: _template(run) for name, run in runs.items() if run is not None}
    of_base = loaded.template or next(iter(own.values()), None)
    if of_base is None or config.template or config.labels:
        spec = config.template or (of_base.text if of_base else TrainConfig.template)
        labels = config.labels or (",".join(of_base.labels) if of_base else TrainConfig.labels)
        of_base = replace(load_template(spec, labels), chat=of_base is not None and of_base.chat)
    name = loaded.name if loaded.run is None else config.init_from
    # The API does not reveal where on the disk a local base is.
    base = Path(name).resolve().name if Path(name).is_absolute() or loaded.run is not None else name
    if base in runs:
        raise InputError(f"--adapters: {base!r} is the base's own name; give the adapter another: NAME=FOLDER")
    return {base: of_base} | {name: own.get(name, of_base) for name in runs}


def _template(run: Run) -> Template:
    return Template.of_run(run)


# The socket -----------------------------------------------------------------------------------------------------------


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises InputError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dualstack = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS, dualstack_ipv6=dualstack)
    except (OSError, UnicodeError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"--host {host} --port {port}: {why}; choose another, or --port 0 for a free one") from None
    with listener:
        yield listener


def url_of(host: str, listener: socket.socket) -> str:
    """The URL for a browser on this machine."""
    address = listener.getsockname()[0]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, host)
    return f"http://{f'[{here}]' if ':' in here else here}:{listener.getsockname()[1]}"


# The loop -------------------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's protocol, except for a request that turns out to be malformed after its response has begun.

    There uvicorn sends a 400 nevertheless, and both this and the app's response fail with a traceback.
    """

    def send_400_response(self, msg: str) -> None:
        """Send a 400 if no response has begun, and close the connection. Further output of the app is dropped."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn without access log, and with signals that set this command's exit status.

    On shutdown it waits `timeout` seconds for requests in flight, then calls `abort`, which fails those that remain.
    """

    def __init__(self, app: Any, timeout: float, abort: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                http=Connection,
                log_config=None,
                log_level="error",
                access_log=False,  # prompts are private
                proxy_headers=False,  # a client could choose the address that the rate limit counts
                server_header=False,
                backlog=MAX_CONNECTIONS,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(timeout) + ERROR_SECONDS,
            )
        )
        self._timeout, self._abort = timeout, abort
        self.signal: int | None = None
        """The signal that stopped it."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Replaced by `signals`: uvicorn's own handler ends the process by the signal itself."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no new connections, and let requests in flight end."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout, lambda: loop.run_in_executor(None, self._abort))
        await super().shutdown(sockets)
        timer.cancel()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """In this context the first Ctrl-C or SIGTERM stops the server gracefully, the second at once."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True
            self.signal = self.signal or number

        # A signal that the parent process ignores (nohup, a background job of a script) stays ignored.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
