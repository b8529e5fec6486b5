"""What a request of ``/v1/chat/completions`` may say, and errors as OpenAI writes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["ChatRequest", "RequestError", "Strict", "parse_as", "parse_request"]


class RequestError(Exception):
    """An answer that is an error: HTTP ``status``, one sentence, and OpenAI's ``type``, ``param`` and ``code``."""

    def __init__(self, message, status=400, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self):
        """The JSON body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """What every part of a request keeps to."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Url(Strict):
    """Where a picture or clip is, and how closely a picture is looked at."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    max_dynamic_patch: int | None = Field(None, ge=1, le=1024)


class Part(Strict):
    """One part of a message's content."""

    type: Literal["text", "image_url", "video_url"]
    text: str | None = None
    image_url: Url | str | None = None
    video_url: Url | str | None = None
    max_dynamic_patch: int | None = Field(None, ge=1, le=1024)

    @model_validator(mode="after")
    def _has_its_own(self):
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs '{self.type}'")
        return self


class Message(Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @property
    def thought(self):
        """What was thought before an answer, under either name."""
        return self.reasoning or self.reasoning_content or ""

    @model_validator(mode="after")
    def _has_content(self):
        if self.content is None and self.role != "assistant":
            raise ValueError("content must be a text or a list of parts")
        return self


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """OpenAI's ``response_format.json_schema``."""

    model_config = ConfigDict(extra="ignore")
    name: str | None = None
    schema_: Any = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's ``structured_outputs``."""

    json_: Any = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


class TemplateOptions(Strict):
    """vLLM's ``chat_template_kwargs``."""

    enable_thinking: bool | None = None


class ChatRequest(Strict):
    """A request; absent or null is the default, and fields that nobody knows are passed over."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    tools: list | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def thinks(self, default):
        """Whether the model is to think first; ``default`` where the request does not say."""
        wish = self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking
        return default if wish is None else wish

    @property
    def stops(self):
        """Texts that end the answer."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @property
    def form(self):
        """The form of the answer, as :func:`~paddlemix.models.blocks.decoding.forms.compile_form` takes it, or None.

        Raises:
            RequestError: there is more than one.
        """
        found = []
        if self.response_format is not None and self.response_format.type == "json_object":
            found.append(({"json_schema": {"type": "object"}}, "response_format"))
        if self.response_format is not None and self.response_format.type == "json_schema":
            schema = self.response_format.json_schema
            if schema is None or schema.schema_ is None:
                raise RequestError("response_format.json_schema needs 'schema'", param="response_format")
            found.append(({"json_schema": schema.schema_}, "response_format"))
        for source, names in (
            (self.structured_outputs, ("json_", "regex", "choice")),
            (self, ("guided_json", "guided_regex", "guided_choice")),
        ):
            kinds = ("json_schema", "regex", "choices")
            values = [(kind, getattr(source, name, None), name) for kind, name in zip(kinds, names)]
            found += [({kind: value}, name) for kind, value, name in values if value is not None]
        if len(found) > 1:
            raise RequestError("a request can ask for one form of its answer: leave the others out", param=found[1][1])
        return found[0][0] if found else None

    def check(self, vocabulary):
        """What no field's type says; ``vocabulary`` is the model's number of tokens.

        Raises:
            RequestError: something is wrong.
        """
        if self.tools:
            raise RequestError("tools are not supported: leave them out", param="tools")
        if self.messages[-1].role != "user":
            raise RequestError("the last message must be the user's", param="messages")
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise RequestError("stop can be at most 4 texts", param="stop")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and int(token[:20]) < vocabulary) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias maps ids below {vocabulary} to numbers from -100 to 100", param="logit_bias")


def parse_request(value):
    """A :class:`ChatRequest` from parsed JSON; raises as :func:`parse_as`."""
    return parse_as(ChatRequest, value)


def parse_as(kind, value):
    """A request of the pydantic model ``kind`` from parsed JSON.

    Raises:
        RequestError: a field is missing, or of a wrong type or value.
    """
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        steps = [str(step) for step in first["loc"] if not (isinstance(step, str) and step[:1].isupper())]
        where = ".".join(steps)[:100] or "messages"
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where}: {message}"[:300], param=where.split(".")[0]) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
