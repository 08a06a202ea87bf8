"""The parameters of OpenAI's endpoints that this server takes, and those that it refuses."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from runtime.serving.openai_messages import Message, Tool, ToolName
from runtime.serving.request_body import Body, Part

MOST_STOPS, MOST_BIASES, MOST_LOGPROBS, MOST_CHOICES, MOST_TEXTS = 16, 1024, 20, 16, 256

PROMPTS = "a text or a list of token ids, or a list of these"
_STOPS = f"a text or a list of at most {MOST_STOPS} texts, none of them empty"
_BIASES = f"at most {MOST_BIASES} token ids, each as a string, with a number"
_LIMIT = "1 or more, or -1 for no limit"
_CHOICE = 'none, auto, required or {"type": "function", "function": {"name": "..."}}'


class StreamOptions(Part):
    """Options of streaming.

    Attributes:
        include_usage: whether the stream ends with the numbers of tokens.
    """

    include_usage: bool = False


class JsonSchema(Part):
    """A named JSON schema."""

    body: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Part):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class GenerationBody(Body):
    """The parameters that completions and chats have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    timings_per_token: bool = False
    n: int = Field(1, ge=1, le=MOST_CHOICES, description=f"1 to {MOST_CHOICES}")
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=-1, description=_LIMIT)
    stop: str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)] = Field(
        "", description=_STOPS
    )
    response_format: ResponseFormat = ResponseFormat()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_window: int | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], float] = Field(
        {}, max_length=MOST_BIASES, description=_BIASES
    )

    typical_p: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int = Field(-1, ge=-1, description="0 or more, or -1 for the whole text")
    dry_sequence_breakers: list[Annotated[str, Field(min_length=1)]] = Field(
        ["\n", ":", '"', "*"], max_length=MOST_STOPS, description=f"at most {MOST_STOPS} texts, none of them empty"
    )
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None

    ALIASES: ClassVar[Mapping[str, str]] = {
        "frequency_context_size": "penalty_window",
        "n_cmpl": "n",
        "n_predict": "max_tokens",
        "presence_context_size": "penalty_window",
        "repeat_last_n": "penalty_window",
        "repeat_penalty": "repetition_penalty",
        "repetition_context_size": "penalty_window",
        "typ_p": "typical_p",
    }
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "adapters": (),
        "add_generation_prompt": (True,),
        "audio": (),
        "chat_template_kwargs": ({},),
        "dynatemp_range": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "grammar": ("",),
        "ignore_eos": (False,),
        "json_schema": ({},),
        "lora": ([],),
        "min_keep": (0, 1),
        "modalities": (["text"],),
        "n_indent": (0,),
        "n_probs": (0,),
        "role_mapping": (),
        "samplers": (),
        "suffix": ("",),
        "t_max_predict_ms": (-1, 0),
        "top_n_sigma": (-1, 0),
        "web_search_options": (),
        "xtc_probability": (0,),
    }

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = super().prepared(values)
        if given.get("tool_choice") == "none":
            given.pop("tools", None)
        return given


class CompletionBody(GenerationBody):
    """The parameters of /v1/completions."""

    prompt: str | list[int] | list[str | list[int]] = Field(description=PROMPTS)
    echo: bool = False
    best_of: int = Field(0, ge=0, le=MOST_CHOICES, description=f"0 to {MOST_CHOICES}")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description=f"0 to {MOST_LOGPROBS}")
    tool_choice: Literal["none", "auto"] = "auto"

    ALIASES: ClassVar[Mapping[str, str]] = {**GenerationBody.ALIASES, "max_completion_tokens": "max_tokens"}
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.UNSUPPORTED,
        "messages": (),
        "tools": ([],),
    }


class ChatBody(GenerationBody):
    """The parameters of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=-1, description=_LIMIT)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS, description=f"0 to {MOST_LOGPROBS}")
    tools: list[Tool] = Field([])
    tool_choice: Literal["none", "auto", "required"] | ToolName = Field("auto", description=_CHOICE)
    parallel_tool_calls: bool = True

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.UNSUPPORTED,
        "best_of": (0, 1),
        "echo": (False,),
        "prompt": (),
    }
