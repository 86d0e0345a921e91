"""Flags of `graft serve`."""

from dataclasses import dataclass, field

from graftlm.config.flags import Flags, bounded, require
from graftlm.config.training import BaseFormat, Device, Dtype
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Flags):
    """Serve a base model and adapters of it: a page to chat with and compare them, and an OpenAI-compatible API."""

    adapters: tuple[str, ...] = ()
    """LoRA runs (or PEFT LoRA folders) of one base, each as FOLDER or NAME=FOLDER; NAME is the model's name in
    requests, by default the folder's name. A run of another method is served alone."""
    init_from: str = ""
    """The base model: a built-in name, a hub id, a local folder or a .gguf file; or, without adapters, the folder of a
    run of any method. Default: the base that the runs were trained on; without adapters smollm2-135m."""
    host: str = "127.0.0.1"
    """The address to listen on. By default only this machine can connect; 0.0.0.0 is open to all (set --api_key)."""
    port: int = 8000
    """The port to listen on; 0: any free one."""
    api_key: str = field(default="", repr=False)
    """The bearer key that requests must send; better set as the environment variable GRAFT_API_KEY, since other users
    of the machine can read a command's arguments. Default: that variable, else none."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names that requests may use for this server, for example that of a proxy."""
    rate_limit: int = bounded(0, ge=0)
    """Requests per minute allowed to each client address; 0: no limit."""
    max_batch_size: int = bounded(32, ge=1)
    """Maximum number of sequences decoded in one batch; others wait."""
    max_tokens: int = bounded(512, ge=1)
    """Maximum number of new tokens that a request may ask for."""
    shutdown_timeout: float = bounded(30.0, ge=0)
    """Seconds that running requests have to finish after the server is told to stop."""
    template: str = ""
    """The prompt template of the base for classifying a review: as in graft train. Default: its run's, else its first
    adapter's, else sentiment."""
    labels: str = ""
    """The base's label words, comma-separated. Default: as the template's."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Data type of weights and arithmetic."""
    base_format: BaseFormat = "auto"
    """How the base's weights are kept in memory: as in graft train. auto: a run's as it was trained, a base's as it is
    stored on a CPU in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.host.strip()), "host", repr(self.host), "an address, as in 127.0.0.1")
        require(0 <= self.port < 2**16, "port", self.port, "0 (any free one) to 65535")
        check_api_key(self.api_key, "--api_key")


def check_api_key(key: str, where: str) -> None:
    """Raise an InputError, which does not show the key, if an HTTP header cannot hold it."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{where} (not shown): must be made of printable ASCII characters without spaces")
