"""Settings of `graft serve`: which models, where it listens, and what it lets requests have."""

from dataclasses import dataclass, field

from graftlm.config.common import Device, Dtype, require
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a base model and adapters of it: a page to try them side by side, and an OpenAI-compatible API."""

    adapters: tuple[str, ...] = ()
    """LoRA runs (or PEFT's LoRA folders) of one base, each as FOLDER or NAME=FOLDER; NAME is what requests call it, by
    default the folder's own name."""
    init_from: str = ""
    """The base model: a built-in name, a hub id, a local folder or a .gguf file; or, without adapters, a run's folder,
    whatever its method. Default: the base that the runs were trained on; without adapters smollm2-135m."""
    host: str = "127.0.0.1"
    """The address to listen at. By default only this machine reaches it; 0.0.0.0 is open to all (give a --key)."""
    port: int = 8000
    """The port to listen at; 0 takes any free one."""
    key: str = field(default="", repr=False)
    """What requests must bring as their bearer key; best given as the environment variable GRAFT_SERVE_KEY, since other
    users of the machine can read a command's words. Default: that variable, else no key."""
    allow_hosts: tuple[str, ...] = ()
    """Further names that requests may call this server by, such as the name that a proxy in front of it has."""
    rate: int = 0
    """Requests a minute that one client address may make; 0: no limit."""
    max_rows: int = 32
    """Answers decoded together; more wait for a place."""
    max_tokens: int = 512
    """Most tokens of an answer that a request may ask for."""
    grace: float = 30.0
    """Seconds that requests in flight have to end in, once the server is told to stop."""
    template: str = ""
    """How the base is asked about a review: as in graft train. Default: its run's, else its first adapter's, else
    sentiment."""
    labels: str = ""
    """The base's label words by label number. Default: as the template's."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        require(bool(self.host.strip()), "host", repr(self.host), "an address, as in 127.0.0.1")
        require(0 <= self.port < 2**16, "port", self.port, "0 (any free one) to 65535")
        for flag in ("rate", "grace"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("max_rows", "max_tokens"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        check_key(self.key, "--key")


def check_key(key: str, where: str) -> None:
    """An InputError that does not show it for a key that no header can hold."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{where} (not shown): must be made of printable ASCII characters without spaces")
