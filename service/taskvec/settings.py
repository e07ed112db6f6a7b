"""Every setting of the service: one frozen class, one environment variable each.

docs/configuration.md and .env.example are generated from it (``make docs``).
"""

from __future__ import annotations

import enum
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from taskvec.checkpoint.hub import DEFAULT_MODEL


class Dtype(enum.StrEnum):
    """Number type of the engine's arithmetic."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class AdapterMode(enum.StrEnum):
    """How adapters are held."""

    AUTO = "auto"
    MERGED = "merged"
    LOW_RANK = "low-rank"


class TokenInput(enum.StrEnum):
    """What happens to token ids in a request."""

    REJECT = "reject"
    ACCEPT = "accept"


class LogLevel(enum.StrEnum):
    """Least important log line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Settings(BaseSettings):
    """The settings, read from ``TASKVEC_*`` variables where not given."""

    model_config = SettingsConfigDict(
        env_prefix="TASKVEC_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    model: Annotated[
        str,
        Field(
            description="What to serve: a checkpoint folder, a hub id such as "
            "jinaai/jina-embeddings-v5-text-small, or the built-in taskvec-mini."
        ),
    ] = DEFAULT_MODEL
    revision: Annotated[
        str | None, Field(description="Hub branch, tag or commit to serve; none for the newest.")
    ] = None
    served_model_name: Annotated[
        str | None,
        Field(description="Name clients ask for; none for the model's own name."),
    ] = None
    model_aliases: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Further names that mean the served model, separated by commas: lets a "
            "client that insists on text-embedding-3-small in."
        ),
    ] = ()
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port; 0 for any free one.")] = 8080

    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Field(description="Arithmetic; auto is bfloat16 where the processor multiplies in it."),
    ] = Dtype.AUTO
    adapter_mode: Annotated[
        AdapterMode,
        Field(
            description="merged: full weights for each adapter, fastest; low-rank: factors beside "
            "shared weights, smallest; auto: merged where that takes at most half the free memory."
        ),
    ] = AdapterMode.AUTO
    threads: Annotated[
        int,
        Field(
            ge=0,
            description="Processor threads of a forward; 0 for one per core that it may use.",
        ),
    ] = 0
    tokenizer_threads: Annotated[
        int,
        Field(
            ge=0,
            le=256,
            description="Requests tokenised at the same time; 0 for one per core, at most 4.",
        ),
    ] = 0
    max_batch_tokens: Annotated[
        int,
        Field(
            ge=0,
            description="Most tokens in one forward: more is faster on a GPU, fewer lets others in "
            "sooner; 0 for what suits the device.",
        ),
    ] = 0

    max_tokens: Annotated[
        int, Field(ge=0, description="Longest text in tokens; 0 for the model's own limit.")
    ] = 0
    max_texts: Annotated[int, Field(ge=1, description="Most texts in one request.")] = 2048
    max_body_bytes: Annotated[
        int, Field(ge=1, description="Largest request body; what is larger is not read.")
    ] = 32 * 1024 * 1024
    max_queue_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Most tokens admitted and not yet answered; beyond it requests get 429.",
        ),
    ] = 4_194_304
    request_timeout: Annotated[
        float,
        Field(gt=0, description="Seconds a request may take; a client may ask for less."),
    ] = 300.0
    drain_timeout: Annotated[
        int,
        Field(ge=1, description="Seconds that requests in flight get to finish on shutdown."),
    ] = 60
    token_input: Annotated[
        TokenInput,
        Field(
            description="Whether requests may send token ids; ids of another model's vocabulary "
            "give meaningless vectors, so accept only clients that use this model's tokenizer."
        ),
    ] = TokenInput.REJECT

    log_level: Annotated[LogLevel, Field(description="Least important log line.")] = LogLevel.INFO
    log_requests: Annotated[
        bool, Field(description="Write one log line a request; never its texts.")
    ] = True

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value


def environment_variable(field: str) -> str:
    """The variable that a setting is read from."""
    return f"TASKVEC_{field.upper()}"
