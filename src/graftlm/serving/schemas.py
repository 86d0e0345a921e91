"""The bodies of requests: JSON -> validated fields, or an error of one line that names the field and its values.

- Nothing is ignored silently. A field of OpenAI's API that this server does not support is accepted only with a value
  that changes nothing (`IGNORED`); any other value, and an unknown field, is an error. null means a field's default.
- Types are strict: "16" is not a number, and 1 is not true. The parser limits depth and rejects lone surrogates.
- A field's `description` is the text of its error.
"""

import dataclasses
import json
import secrets
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from graftlm.config.flags import describe_bounds
from graftlm.config.inference import SamplingFlags
from graftlm.errors import GraftError, did_you_mean
from graftlm.inference.sampling import SamplingParams
from graftlm.text.chat import Message

MAX_CHOICES = 64
"""Choices of one request: prompts times n; and texts to classify."""
MAX_STOPS, MAX_MESSAGES, MAX_TOOLS, MAX_BIASES = 4, 1000, 128, 1024
MAX_EMBEDDINGS = 2048
"""Texts of one request, as in OpenAI's API."""
MAX_LOGPROBS = 20
"""Alternatives that are reported of each token."""


class APIError(GraftError):
    """A rejected or failed request: the HTTP status and, in OpenAI's format, the message, field and code."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def to_json(self) -> dict[str, Any]:
        """{"error": {…}}, as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# Fields of OpenAI's API that are not supported, and their values that change nothing, besides null, false, 0 and empty.
ANY = object()
IGNORED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("echo", "suffix", "top_logprobs"), ()),
    **dict.fromkeys(("tools", "functions", "audio", "prediction", "reasoning_effort", "store"), ()),
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"), (ANY,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "web_search_options": (),
    "parallel_tool_calls": (ANY,),
    "best_of": (1,),
    "modalities": (["text"],),
}
IGNORED_IN_MESSAGES: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("name", "refusal", "annotations", "audio", "function_call"), ()
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept: dict[str, Any] = {}
        for name, value in fields.items():
            if name in cls.model_fields:
                kept |= {} if value is None else {name: value}
            elif name not in cls.ignored:
                kept[name] = value
            elif value and not any(allowed is ANY or value == allowed for allowed in cls.ignored[name]):
                raise PydanticCustomError("unsupported", "{name} is not supported: leave it out", {"name": name})
        return kept


Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(_Strict):
    """Additional content of a stream."""

    ignored = {"include_obfuscation": (False,)}
    include_usage: bool = False


DEFAULTS: dict[str, dict[str, Any]] = {
    "temperature": {"default": 1.0},
    "seed": {"default_factory": lambda: secrets.randbits(62)},
}
"""OpenAI's defaults where they are not ours; without a seed every request draws one."""
API_BOUNDS: dict[str, dict[str, float]] = {"temperature": {"le": 2}, "seed": {"lt": 2**63}}


def _sampling_field(f: "dataclasses.Field[Any]") -> Any:
    """A sampling setting as a field of a request: type, default, bounds and description."""
    if f.name == "logit_bias":
        description = 'an object of biases from -100 to 100 by token id, as in {"198": -100}'
        return dict[TokenKey, Bias], Field({}, max_length=MAX_BIASES, description=description)
    kind = get_type_hints(SamplingFlags)[f.name]
    bounds: dict[str, Any] = {**f.metadata, **API_BOUNDS.get(f.name, {})}
    description = f"{'a whole number,' if kind is int else 'a number'} {describe_bounds(bounds)}"
    return kind, Field(**DEFAULTS.get(f.name, {"default": f.default}), **bounds, description=description)


_SamplingSettings: Any = create_model(
    "_SamplingSettings", __base__=_Strict, **{f.name: _sampling_field(f) for f in dataclasses.fields(SamplingFlags)}
)


class JSONSchema(_Strict):
    """A named JSON schema. The schema is always kept, so `strict` changes nothing."""

    ignored = {"strict": (ANY,), "name": (ANY,), "description": (ANY,)}
    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("schema", "json_schema belongs to the type json_schema")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.content
        return {"type": "object"} if self.type == "json_object" else None


class Sampling(_SamplingSettings):
    """The fields that completions and chats share; the sampling settings are those of SamplingFlags."""

    ignored = IGNORED
    model: str = Field(description="the name of a model, as GET /v1/models lists them")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"1 to {MAX_CHOICES}")
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] = Field(
        [], description=f"at most {MAX_STOPS} texts, none of them empty"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(), description='{"include_usage": true or false}')
    max_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    response_format: ResponseFormat = Field(
        ResponseFormat(type="text"),
        description='{"type": "text"}, {"type": "json_object"}, or '
        '{"type": "json_schema", "json_schema": {"name": a text, "schema": a JSON schema}}',
    )

    @property
    def echoes(self) -> bool:
        """Whether each answer begins with its prompt."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are reported of each token; None: no log-probabilities at all."""
        raise NotImplementedError

    def sampling_params(self, max_new_tokens: int, stop_token_ids: Collection[int]) -> SamplingParams:
        """How to sample."""
        return SamplingParams(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingFlags)},
            max_new_tokens=max_new_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=frozenset(stop_token_ids),
        )


Texts = Text | list[Text] | list[TokenId] | list[Annotated[list[TokenId], Field(min_length=1)]]
TEXTS = "a text, a list of texts, a list of token ids or a list of such lists, none empty"


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Texts = Field(min_length=1, description=TEXTS)
    max_tokens: int | None = Field(None, ge=0, description="a whole number, 1 or more, or 0 with echo")
    echo: bool = Field(False, description="true or false")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description=f"a whole number from 0 to {MAX_LOGPROBS}")

    @property
    def num_logprobs(self) -> int | None:
        """See Sampling."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """See Sampling."""
        return self.echo

    @model_validator(mode="after")
    def _zero_tokens(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("combination", "max_tokens: 0 needs echo", {"name": "max_tokens"})
        return self


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    """The name of a function, and its arguments as JSON text."""

    name: Text
    arguments: str

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError if they are not a JSON object."""
        found = json.loads(self.arguments or "{}")
        if not isinstance(found, dict):
            raise ValueError
        return found

    @model_validator(mode="after")
    def _arguments_are_json(self) -> "CalledFunction":
        try:
            _ = self.parsed
        except (ValueError, RecursionError):
            raise PydanticCustomError("arguments", "the arguments are no JSON object") from None
        return self


class ToolCallBody(_Strict):
    """A call in an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageBody(_Strict):
    """One message of a chat."""

    ignored = IGNORED_IN_MESSAGES
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    tool_calls: list[ToolCallBody] = []
    tool_call_id: str = ""

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> "MessageBody":
        empty = "content" not in self.model_fields_set and not self.tool_calls
        calls = bool(self.tool_calls) and self.role != "assistant"
        if empty or calls or bool(self.tool_call_id) != (self.role == "tool"):
            raise PydanticCustomError("message", "a message lacks a field, or has one of another role")
        return self

    def to_message(self) -> Message:
        """The message as chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role  # OpenAI's name for it in newer models
        fields: dict[str, Any] = {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        if self.tool_calls:
            fields["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.parsed}}
                for c in self.tool_calls
            ]
        return (role, text, fields) if fields else (role, text)


class FunctionBody(_Strict):
    """A function that the model may call."""

    ignored = {"strict": (ANY,)}
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {}


class ToolBody(_Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionBody


class FunctionName(_Strict):
    """The name of a function."""

    name: str


class ToolChoice(_Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="a list of messages, each with a role (system, developer, user, assistant or tool) and a content: "
        'a text, or parts {"type": "text", "text": …}; of tool also a tool_call_id; of assistant also tool_calls',
    )
    tools: list[ToolBody] = Field(
        [],
        max_length=MAX_TOOLS,
        description='a list of {"type": "function", "function": {"name": a text, "description": a text, '
        '"parameters": a JSON schema of an object}}',
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = Field(
        "auto", description='"none", "auto", "required" or {"type": "function", "function": {"name": a text}}'
    )
    parallel_tool_calls: bool = Field(True, description="true or false")
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description=f"a whole number from 0 to {MAX_LOGPROBS}")

    @property
    def num_logprobs(self) -> int | None:
        """See Sampling."""
        return self.top_logprobs if self.logprobs else None

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The functions that may be called, as their names, descriptions and parameters."""
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        functions = [tool.function.model_dump(exclude_unset=True) for tool in self.tools if self.tool_choice != "none"]
        return [each for each in functions if chosen is None or each["name"] == chosen]

    @property
    def forces_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in ("none", "auto")

    @model_validator(mode="after")
    def _tools(self) -> "ChatBody":
        if self.forces_call and not self.callable:
            raise PydanticCustomError("combination", "tool_choice: names no function of tools", {"name": "tool_choice"})
        others = {"logprobs": self.logprobs, "response_format": self.response_format.type != "text"}
        for name in [name for name, is_used in others.items() if is_used and self.callable]:
            raise PydanticCustomError("combination", "{name}: not supported together with tools", {"name": name})
        return self

    @model_validator(mode="after")
    def _top_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("combination", "top_logprobs: needs logprobs: true", {"name": "top_logprobs"})
        return self


class ClassifyBody(_Strict):
    """POST /v1/classify."""

    text: str | None = Field(None, description="a text")
    texts: list[str] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description=f"a list of 1 to {MAX_CHOICES} texts"
    )
    models: list[str] | None = Field(None, min_length=1, description="a list of models' names")

    @model_validator(mode="after")
    def _one_of_two(self) -> "ClassifyBody":
        if (self.text is None) == (self.texts is None):
            raise PydanticCustomError("one_of_two", "give either text or texts")
        return self


class EmbeddingBody(_Strict):
    """POST /v1/embeddings."""

    ignored = {"user": (ANY,), "dimensions": ()}
    model: str = Field(description="the name of a model, as GET /v1/models lists them")
    input: Texts = Field(min_length=1, description=TEXTS)
    encoding_format: Literal["float", "base64"] = Field("float", description="float or base64")

    @model_validator(mode="after")
    def _few(self) -> "EmbeddingBody":
        if isinstance(self.input, list) and not isinstance(self.input[0], int) and len(self.input) > MAX_EMBEDDINGS:
            raise PydanticCustomError("combination", f"input: at most {MAX_EMBEDDINGS} texts", {"name": "input"})
        return self


class TokenizeBody(_Strict):
    """POST /tokenize, as vLLM has it."""

    model: str | None = Field(None, description="the name of a model, as GET /v1/models lists them")
    prompt: str | None = Field(None, description="a text")
    messages: list[MessageBody] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="a list of messages, as in /v1/chat/completions"
    )
    add_special_tokens: bool = Field(True, description="true or false")
    add_generation_prompt: Literal[True] = Field(True, description="true")
    return_token_strs: bool = Field(False, description="true or false")

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of_two", "give either prompt or messages")
        return self


class DetokenizeBody(_Strict):
    """POST /detokenize, as vLLM has it."""

    model: str | None = Field(None, description="the name of a model, as GET /v1/models lists them")
    tokens: list[TokenId] = Field(description="a list of token ids")


def parse_body(body: type[BaseModel], content: bytes) -> Any:
    """The validated fields of a request's body. Raises APIError with one line for the first error."""
    try:
        return body.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    message, kind = first["msg"], first["type"]
    if kind == "json_invalid":
        raise APIError(400, f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    if kind == "model_type" and not first["loc"]:
        raise APIError(400, "the body is not a JSON object")
    if kind == "unsupported":
        raise APIError(400, message, param=first["ctx"]["name"], code="unsupported_parameter")
    if kind == "combination":
        raise APIError(400, message, param=first["ctx"]["name"])
    if kind == "one_of_two":
        raise APIError(400, message)
    field, inner = str(first["loc"][0]), first["loc"][1:]
    if kind == "extra_forbidden":
        path = ".".join(map(str, first["loc"]))[:200]
        known = did_you_mean(str(first["loc"][-1]), body.model_fields, "")
        raise APIError(400, f"unknown field {path!r}: {known}leave it out", param=path, code="unknown_parameter")
    allowed = body.model_fields[field].description
    if kind == "missing" and not inner:
        raise APIError(400, f"{field} is missing: {allowed}", param=field, code="missing_required_parameter")
    where = f" (number {inner[0] + 1} is wrong)" if inner and isinstance(inner[0], int) else ""
    raise APIError(400, f"{field}: must be {allowed}{where}", param=field)
