"""From flags to a listening server, and to its end: the socket, the models, the signals.

What is unusual here: the port is bound before the model is loaded, so that a port in use is told of at once. The first
Ctrl-C or SIGTERM stops accepting and lets what is in flight end, for `--grace` seconds at most; a second one ends it
all at once. SIGTERM is how a server is meant to end, so that is no failure: exit status 0; after Ctrl-C it is 130.
"""

import asyncio
import math
import os
import signal
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from graftlm.config import ServeConfig, TrainConfig, check_key
from graftlm.errors import InputError, Interrupted

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from graftlm.serving.app import ServedModel, Service, make_app
    from graftlm.serving.limits import is_loopback
except ModuleNotFoundError as error:
    if (error.name or "").startswith("graftlm"):
        raise
    raise InputError(f"graft serve needs the {error.name} package: pip install 'graftlm[serve]'") from None

from graftlm.exchange.adapters import CONFIG, OWN_CONFIG
from graftlm.exchange.load import Loaded, load, read_run, resolve_path
from graftlm.inference.engine import Engine
from graftlm.text.template import Template, load_template

KEY = "GRAFT_SERVE_KEY"
MOST_CONNECTIONS = 1024
KEEP_ALIVE_SECONDS = 30
LAST_SECONDS = 5
"""Behind the grace, for the refusals of what did not end in it."""

Run = dict[str, Any]
Tell = Callable[[str], None]


def serve(config: ServeConfig, tell: Tell) -> Iterator[dict[str, Any]]:
    """Serve until told to stop. Yields once, when requests are taken: the server's url and its models' names.

    Raises InputError for what cannot be served, Interrupted behind Ctrl-C.
    """
    key = config.key or os.environ.get(KEY, "")
    check_key(key, KEY)
    folders = parse_adapter_args(config.adapters)
    runs = {name: run_of(folder) for name, folder in folders.items()}
    base = base_of(config, folders, runs)
    is_run = (Path(base) / "run.json").is_file()
    with listening(config.host, config.port) as listener:
        loaded = load("resume" if is_run else base, base, device=config.device, dtype=config.dtype)
        templates = templates_of(config, loaded, runs)
        engine = Engine(loaded, folders, max_rows=config.max_rows)
        try:
            base, *names = templates
            models = {base: ServedModel(base, None, templates[base], engine.max_seq_len)}
            models |= {name: ServedModel(name, name, templates[name], engine.max_seq_len) for name in names}
            service = Service(engine, loaded.tokenizer, models, loaded.model.shape.vocab, config.max_tokens)
            app = make_app(service, host=config.host, names=config.allow_hosts, key=key, rate=config.rate)
            server = Server(app, config.grace, lambda: engine.close(drain=False))
            with server.signals():
                if not key and not is_loopback(config.host):
                    tell(f"--host {config.host} without a key: whoever reaches this machine can use the server")
                yield {"url": url_of(config.host, listener), "models": list(models)}
                server.run(sockets=[listener])
        finally:
            engine.close(drain=False)
    if server.told == signal.SIGINT:
        raise Interrupted("stopped")


# What is served -------------------------------------------------------------------------------------------------------


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
    """What a run folder records; None for an adapter's folder that is none, such as PEFT's. Raises InputError."""
    return None if any((folder / name).is_file() for name in (CONFIG, OWN_CONFIG)) else read_run(folder)


def base_of(config: ServeConfig, folders: Mapping[str, Path], runs: Mapping[str, Run | None]) -> str:
    """The base model's name. Raises InputError for runs on several, and where nothing says which."""
    known = {name: run["base"] for name, run in runs.items() if run is not None}
    first = next(iter(known), "")
    for name, base in known.items():
        if base["sha256"] != known[first]["sha256"]:
            raise InputError(
                f"{folders[name]}: was trained on {base['name']}, and {folders[first]} on {known[first]['name']}: "
                "one server has one base; start another"
            )
    if config.init_from:
        return resolve_path(config.init_from)
    if folders and not known:
        raise InputError(f"{next(iter(folders.values()))}: does not say what its base is called; give --init_from")
    return known[first]["name"] if known else TrainConfig.init_from


def templates_of(config: ServeConfig, loaded: Loaded, runs: Mapping[str, Run | None]) -> dict[str, Template]:
    """How each model is asked about a review, by its name; the base comes first. Who does not say is asked as the base.

    Raises InputError for an adapter that has the base's name.
    """
    own = {name: _template(run) for name, run in runs.items() if run is not None}
    of_base = loaded.template or next(iter(own.values()), None)
    if of_base is None or config.template or config.labels:
        spec = config.template or (of_base.text if of_base else TrainConfig.template)
        of_base = load_template(spec, config.labels or (",".join(of_base.labels) if of_base else TrainConfig.labels))
    name = loaded.name if loaded.run is None else config.init_from
    # Where on the disk a local base lies is nobody's business.
    base = Path(name).resolve().name if Path(name).is_absolute() or loaded.run is not None else name
    if base in runs:
        raise InputError(f"--adapters: {base!r} is the base's own name; give the adapter another: NAME=FOLDER")
    return {base: of_base} | {name: own.get(name, of_base) for name in runs}


def _template(run: Run) -> Template:
    return Template(run["template"]["name"], run["template"]["text"], tuple(run["template"]["labels"]))


# The socket -----------------------------------------------------------------------------------------------------------


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at an address of this machine. Raises InputError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: no address of this machine; use 127.0.0.1, or 0.0.0.0 for all") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(MOST_CONNECTIONS)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise InputError(
                f"--host {host} --port {port}: {why}; choose another, or --port 0 for a free one"
            ) from None
        yield listener


def url_of(host: str, listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    address = listener.getsockname()[0]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, host)
    return f"http://{f'[{here}]' if ':' in here else here}:{listener.getsockname()[1]}"


# The loop -------------------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's, but for a request that turns out to be broken when its answer is under way already, or given.

    uvicorn sends a 400 all the same, and both it and the app's answer then fail with a traceback.
    """

    def send_400_response(self, msg: str) -> None:
        """Tell the client, where no answer has begun, and hang up. What the app still says goes nowhere."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, with signals handled as this command's exit status wants them, and nothing written of requests.

    Told to stop, it waits `grace` seconds for what is in flight, then calls `give_up`, behind which every request can
    be answered (by a refusal) at once.
    """

    def __init__(self, app: Any, grace: float, give_up: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                http=Connection,
                log_config=None,
                log_level="error",
                access_log=False,  # it would hold what users ask
                proxy_headers=False,  # else a client could choose the address that its rate is counted for
                server_header=False,
                backlog=MOST_CONNECTIONS,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(grace) + LAST_SECONDS,
            )
        )
        self._grace, self._give_up = grace, give_up
        self.told: int | None = None
        """The signal that stopped it."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own way would end the process by the signal itself; `signals` is ours."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing new, and let what is in flight end."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._grace, lambda: loop.run_in_executor(None, self._give_up))
        await super().shutdown(sockets)
        timer.cancel()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it, the first Ctrl-C or SIGTERM stops the server gently and the second at once."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True
            self.told = self.told or number

        # What the caller has told us to ignore (nohup, a script's background job) stays ignored.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
