"""Every setting of the service: one frozen class, one environment variable each.

docs/configuration.md and .env.example are generated from it (``make docs``).
"""

from __future__ import annotations

import enum
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from taskvec.auth.keys import read_pairs
from taskvec.checkpoint.open import DEFAULT_MODEL
from taskvec.engines.remote.discovery import check_url

STORE_URL = r"^(redis|rediss|valkey|valkeys)://"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")


class EngineKind(enum.StrEnum):
    """What embeds."""

    PACKED = "packed"
    VLLM = "vllm"
    REMOTE = "remote"


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


class LimitsDown(enum.StrEnum):
    """What happens to requests whose limits cannot be checked."""

    OPEN = "open"
    CLOSED = "closed"


class LogLevel(enum.StrEnum):
    """Least important log line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Settings(BaseSettings):
    """The settings, read from ``TASKVEC_*`` variables where not given."""

    model_config = SettingsConfigDict(
        env_prefix="TASKVEC_",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # a key may be among it
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

    workers: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="Gateway processes; more than one share one engine process. For short "
            "texts the gateway is the limit, not the engine.",
        ),
    ] = 1

    engine: Annotated[
        EngineKind,
        Field(
            description="packed: our own, in this process; vllm: vLLM in this process; remote: "
            "vLLM or taskvec servers elsewhere."
        ),
    ] = EngineKind.PACKED
    engine_url: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Servers of the remote engine: http://host:port, https://host:port, "
            "unix:///path, or dns://name:port for every address behind a name; several by "
            "repeating the option or with commas."
        ),
    ] = ()
    engine_api_key: Annotated[
        SecretStr | None,
        Field(description="Key that is sent to the remote engine's servers as a bearer token."),
    ] = None
    engine_ca: Annotated[
        Path | None,
        Field(
            description="File with the certificates that vouch for https engine servers; none for "
            "the system's."
        ),
    ] = None
    engine_call_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds after which a remote engine's server that has not answered counts "
            "as hung and another one is asked.",
        ),
    ] = 120.0
    cache_dir: Annotated[
        Path | None,
        Field(
            description="Folder for what is computed once a model: golden vectors, and the copy "
            "that vLLM reads; none for taskvec in the user's cache folder."
        ),
    ] = None

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

    max_batch_texts: Annotated[
        int,
        Field(
            ge=0,
            description="vllm: most texts in one forward; 0 for what suits the device.",
        ),
    ] = 0
    memory_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="vllm: share of the GPU's memory (on a CPU, of the RAM) that it may take; "
            "0 for 0.9 (0.3).",
        ),
    ] = 0.0
    tensor_parallel: Annotated[
        int, Field(ge=1, description="vllm: devices that one copy of the model is split over.")
    ] = 1
    data_parallel: Annotated[int, Field(ge=1, description="vllm: copies of the model.")] = 1
    vllm_args: Annotated[
        dict[str, Any],
        NoDecode,
        Field(
            description="vllm: further engine arguments by vLLM's own names, as a JSON object such "
            'as {"max_loras": 8}; they win over all others.'
        ),
    ] = {}

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
            ge=0,
            description="Most tokens admitted and not yet answered; beyond it requests get 429. 0 "
            "for what the engine does in queue_seconds, by its measured speed.",
        ),
    ] = 0
    max_queue_requests: Annotated[
        int,
        Field(
            ge=1,
            description="Most requests of a class admitted and not yet answered, in one process; "
            "beyond it they get 429.",
        ),
    ] = 1024
    queue_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds of the engine's work that may be queued, where max_queue_tokens "
            "is 0.",
        ),
    ] = 30.0
    answer_cache_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Bytes of memory, in each process, in which vectors are kept for the texts "
            "that come again; 0 for none.",
        ),
    ] = 0
    answer_cache_url: Annotated[
        str | None,
        Field(
            pattern=STORE_URL,
            description="Redis or Valkey in which all processes keep vectors together instead; "
            "give it a maxmemory and an eviction policy.",
        ),
    ] = None
    answer_cache_ttl: Annotated[
        int, Field(ge=1, description="Seconds for which that Redis keeps a vector.")
    ] = 86_400
    answer_cache_shared: Annotated[
        bool,
        Field(
            description="Answer an API key's texts by vectors that another's gave; times then tell "
            "whether somebody else sent the same text."
        ),
    ] = False
    max_header_bytes: Annotated[
        int, Field(ge=1024, description="Largest head of a request: address and headers.")
    ] = 65_536
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Most client connections of a process; beyond it the one that has waited "
            "longest for a request is closed.",
        ),
    ] = 4096
    header_timeout: Annotated[
        float, Field(gt=0, description="Seconds in which a request's headers must arrive.")
    ] = 10.0
    body_timeout: Annotated[
        float, Field(gt=0, description="Seconds in which a request's body must arrive.")
    ] = 30.0
    answer_timeout: Annotated[
        float, Field(gt=0, description="Seconds in which a client must read its answer.")
    ] = 60.0
    request_timeout: Annotated[
        float,
        Field(gt=0, description="Seconds a request may take; a client may ask for less."),
    ] = 300.0
    stall_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds after which an engine that has work and finishes nothing makes "
            "the service not ready.",
        ),
    ] = 60.0
    dead_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds after which such an engine makes the service not live, so that an "
            "orchestrator starts it again.",
        ),
    ] = 300.0
    canary_interval: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds without a finished text after which one is embedded as a test.",
        ),
    ] = 30.0
    drain_grace: Annotated[
        float,
        Field(
            ge=0,
            description="Seconds after SIGTERM in which requests are still taken, so that load "
            "balancers see that the service is not ready; 5 to 10 behind one.",
        ),
    ] = 0.0
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

    keys_file: Annotated[
        Path | None,
        Field(
            description="TOML file of API keys, as `taskvec key` prints them; read again when it "
            "changes. With keys, every route but /health asks for one."
        ),
    ] = None
    api_keys: Annotated[
        SecretStr | None,
        Field(description="API keys as name=secret pairs, separated by commas; beside the file's."),
    ] = None
    key_requests_per_minute: Annotated[
        int,
        Field(
            ge=0,
            description="Embedding requests a minute of a key that states no limit; 0 for no "
            "limit. Without keys there are none of these limits.",
        ),
    ] = 0
    key_tokens_per_minute: Annotated[
        int,
        Field(ge=0, description="Tokens a minute of a key that states no limit; 0 for no limit."),
    ] = 0
    key_concurrency: Annotated[
        int,
        Field(
            ge=0,
            description="Embedding requests at a time, in one process, of a key that states no "
            "limit; 0 for no limit.",
        ),
    ] = 0
    limits_url: Annotated[
        str | None,
        Field(
            pattern=STORE_URL,
            description="Redis or Valkey in which all processes count requests and tokens a minute "
            "together, such as redis://host:6379/0; none to count in each process.",
        ),
    ] = None
    limits_down: Annotated[
        LimitsDown,
        Field(
            description="While that Redis is down: open lets requests pass unchecked, closed "
            "answers 503."
        ),
    ] = LimitsDown.OPEN
    metrics_without_key: Annotated[
        bool, Field(description="Leave /metrics open where there are keys.")
    ] = True
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Origins of pages whose scripts may ask, such as https://app.example.com, "
            "separated by commas; * for all."
        ),
    ] = ()
    tls_cert: Annotated[
        Path | None,
        Field(description="PEM file with the certificate chain; with it, only HTTPS is spoken."),
    ] = None
    tls_key: Annotated[
        Path | None,
        Field(description="PEM file with the certificate's key; none if it is in the same file."),
    ] = None

    log_level: Annotated[LogLevel, Field(description="Least important log line.")] = LogLevel.INFO
    log_requests: Annotated[
        bool, Field(description="Write one log line a request; never its texts.")
    ] = True
    traces: Annotated[
        bool,
        Field(
            description="Send OpenTelemetry traces over OTLP/HTTP, as the standard OTEL_* "
            "variables say; needs taskvec[otel]."
        ),
    ] = False

    @field_validator("model_aliases", "engine_url", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list | tuple) and all(isinstance(part, str) for part in listed):
            names = (name.strip() for part in listed for name in part.split(","))
            return tuple(name for name in names if name)
        return value

    @field_validator("engine_url")
    @classmethod
    def _check_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_url, value))

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not read_pairs(value.get_secret_value()):
            raise ValueError("it has no name=secret pair")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: scheme, host and port alone, without a slash behind"
                )
        return value

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise ValueError(f"it is not valid JSON ({error})") from None
        if not isinstance(parsed, dict):
            raise ValueError('it is no JSON object such as {"max_loras": 8}')  # noqa: TRY004
        return parsed

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.engine is EngineKind.REMOTE and not self.engine_url:
            raise ValueError(
                "--engine remote needs at least one --engine-url (TASKVEC_ENGINE_URL): where are "
                "its servers?"
            )
        if self.engine is not EngineKind.REMOTE and self.engine_url:
            raise ValueError(
                "--engine-url (TASKVEC_ENGINE_URL) is for --engine remote (TASKVEC_ENGINE), and "
                f"the engine is {self.engine.value}."
            )
        if self.answer_cache_bytes and self.answer_cache_url:
            raise ValueError(
                "--answer-cache-bytes (TASKVEC_ANSWER_CACHE_BYTES) is for a cache in this process, "
                "--answer-cache-url (TASKVEC_ANSWER_CACHE_URL) for one in Redis: give one of them."
            )
        if self.tls_key and not self.tls_cert:
            raise ValueError("--tls-key (TASKVEC_TLS_KEY) needs --tls-cert (TASKVEC_TLS_CERT).")
        return self

    @property
    def cache(self) -> Path:
        """``cache_dir``, or its default."""
        if self.cache_dir is not None:
            return self.cache_dir
        home = os.environ.get("XDG_CACHE_HOME")
        return (Path(home) if home else Path.home() / ".cache") / "taskvec"

    def environment(self) -> dict[str, str]:
        """The variables from which another process reads the same settings."""
        variables = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            elif isinstance(value, tuple):
                value = ",".join(value)
            elif isinstance(value, dict):
                value = json.dumps(value)
            elif isinstance(value, enum.Enum):
                value = value.value
            variables[environment_variable(name)] = "" if value is None else str(value)
        return variables


def environment_variable(field: str) -> str:
    """The variable that a setting is read from."""
    return f"TASKVEC_{field.upper()}"
