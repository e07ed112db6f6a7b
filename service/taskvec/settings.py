"""All settings of the service, in one frozen class; each has an environment variable.

Descriptions appear in ``taskvec serve --help``. docs/configuration.md and .env.example are
generated from this class by ``make docs``.
"""

from __future__ import annotations

import enum
import json
import os
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from taskvec.auth.keys import read_pairs
from taskvec.checkpoint.merged_task import TASK_NAME
from taskvec.checkpoint.open import DEFAULT_MODEL
from taskvec.dialects import DialectName
from taskvec.engines.remote.discovery import check_url
from taskvec.home import home_folder

_REDIS_URL = r"^(redis|rediss|valkey|valkeys)://"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")


KEY_SETTINGS = ("keys_file", "api_keys")
"""Settings that make the service require API keys."""


class EngineKind(enum.StrEnum):
    """Engine that computes the embeddings."""

    PACKED = "packed"
    VLLM = "vllm"
    REMOTE = "remote"


class Dtype(enum.StrEnum):
    """Number type of the arithmetic."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class AdapterMode(enum.StrEnum):
    """How the adapters' weights are stored."""

    AUTO = "auto"
    MERGED = "merged"
    LOW_RANK = "low-rank"


class TokenInput(enum.StrEnum):
    """Whether requests may contain token ids."""

    REJECT = "reject"
    ACCEPT = "accept"


class LimitsDown(enum.StrEnum):
    """What happens to requests while their limits cannot be checked."""

    OPEN = "open"
    CLOSED = "closed"


class LogLevel(enum.StrEnum):
    """Minimum level of the log lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Settings(BaseSettings):
    """Settings of the service; those not given as arguments come from ``TASKVEC_*`` variables."""

    model_config = SettingsConfigDict(
        env_prefix="TASKVEC_",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # the input may contain an API key
    )

    model: Annotated[
        str,
        Field(
            description="Model to serve: a checkpoint folder, a hub id such as "
            "jinaai/jina-embeddings-v5-text-small, or the built-in taskvec-mini."
        ),
    ] = DEFAULT_MODEL
    revision: Annotated[
        str | None,
        Field(
            description="Hub branch, tag or commit of the model; if not set, the hub's default "
            "branch."
        ),
    ] = None
    task_name: Annotated[
        str | None,
        Field(
            pattern=f"^{TASK_NAME}$",
            description="Task of a model without adapters, if one adapter is merged into its "
            "weights: retrieval, text-matching, clustering, classification, or another name; "
            "embedding for one task without the prompts of a task. If not set, the end of the "
            "model's name, or else retrieval if the model has prompts for queries and documents.",
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        Field(description="Name of the model in the API; if not set, the model's own name."),
    ] = None
    model_aliases: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Further names for the served model, separated by commas, for clients "
            "with a fixed model name such as text-embedding-3-small."
        ),
    ] = ()
    host: Annotated[
        str,
        Field(
            description="Address or name to listen on. 0.0.0.0 is every IPv4 address, :: every "
            "address of IPv6 and of IPv4."
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535, description="Port to listen on; 0 picks a free port.")
    ] = 8080

    workers: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="Number of gateway processes. With more than one, they share one engine "
            "process. For short texts the gateway is the bottleneck, not the engine.",
        ),
    ] = 1

    engine: Annotated[
        EngineKind,
        Field(
            description="packed: the built-in torch engine; vllm: vLLM on this machine; remote: "
            "vLLM or taskvec servers elsewhere."
        ),
    ] = EngineKind.PACKED
    in_process: Annotated[
        bool,
        Field(
            description="Run the packed engine in the process of the gateway instead of one of "
            "its own. It takes less memory, and requests of all kinds then delay embeddings."
        ),
    ] = False
    engine_url: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Servers of the remote engine: http://host:port, https://host:port, "
            "unix:///path, or dns://name:port for every address that the name resolves to. "
            "Repeat the option or separate URLs by commas for several."
        ),
    ] = ()
    engine_api_key: Annotated[
        SecretStr | None,
        Field(description="API key for the remote engine's servers, sent as a bearer token."),
    ] = None
    engine_ca: Annotated[
        Path | None,
        Field(
            description="PEM file with the CA certificates for https engine servers; if not "
            "set, those of the system."
        ),
    ] = None
    engine_call_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Timeout in seconds of one call to a server of the remote engine; after "
            "it the call is sent to another server.",
        ),
    ] = 120.0
    cache_dir: Annotated[
        Path | None,
        Field(
            description="Folder for data that is computed once per model: golden vectors, and "
            "the copy of the model for vLLM. If not set, the folder taskvec in the user's cache "
            "folder."
        ),
    ] = None

    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|cuda(:\d+)?)$",
            description="Device of the engine: auto, cpu, cuda or cuda:N.",
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Field(
            description="Number type of the engine's arithmetic; auto: bfloat16 if the hardware "
            "supports it, else float16 on a GPU and float32 on a CPU."
        ),
    ] = Dtype.AUTO
    adapter_mode: Annotated[
        AdapterMode,
        Field(
            description="merged: full weights per adapter, fastest; low-rank: factors beside "
            "shared weights, least memory; auto: merged if that takes at most half of the free "
            "memory."
        ),
    ] = AdapterMode.AUTO
    threads: Annotated[
        int,
        Field(
            ge=0,
            description="CPU threads of a forward pass; 0 means one per available core.",
        ),
    ] = 0
    tokenizer_threads: Annotated[
        int,
        Field(
            ge=0,
            le=256,
            description="Number of requests that are tokenised in parallel; 0 means one per "
            "core, at most 4.",
        ),
    ] = 0
    max_batch_tokens: Annotated[
        int,
        Field(
            ge=0,
            description="Maximum tokens in one forward pass. Larger is faster on a GPU, smaller "
            "lets other requests start sooner. 0 selects a value for the device.",
        ),
    ] = 0

    max_batch_texts: Annotated[
        int,
        Field(
            ge=0,
            description="vllm only: maximum texts in one forward pass; 0 selects a value for "
            "the device.",
        ),
    ] = 0
    memory_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="vllm only: fraction of the GPU memory (on a CPU: of the RAM) to use; 0 "
            "means 0.9 (on a CPU: 0.3).",
        ),
    ] = 0.0
    tensor_parallel: Annotated[
        int,
        Field(
            ge=1,
            description="vllm only: number of devices that each copy of the model is split over.",
        ),
    ] = 1
    data_parallel: Annotated[
        int, Field(ge=1, description="vllm only: number of copies of the model.")
    ] = 1
    vllm_args: Annotated[
        dict[str, Any],
        NoDecode,
        Field(
            description="vllm only: further engine arguments by vLLM's names, as a JSON object "
            'such as {"max_loras": 8}; they override all other settings.'
        ),
    ] = {}

    max_tokens: Annotated[
        int, Field(ge=0, description="Maximum tokens in one text; 0 means the model's limit.")
    ] = 0
    max_texts: Annotated[int, Field(ge=1, description="Maximum texts in one request.")] = 2048
    max_body_bytes: Annotated[
        int,
        Field(
            ge=1, description="Maximum size of a request body in bytes; larger bodies are not read."
        ),
    ] = 32 * 1024 * 1024
    memory_budget: Annotated[
        int,
        Field(
            ge=0,
            description="Maximum memory in bytes of all requests of one process: bodies, texts, "
            "token ids, vectors and unread responses; further requests get status 429. 0 means a "
            "sixth of the container's memory limit or of the machine's memory, from 128 to 256 MB.",
        ),
    ] = 0
    max_queue_tokens: Annotated[
        int,
        Field(
            ge=0,
            description="Maximum tokens of unfinished requests; further requests get status "
            "429. 0 means the tokens that the engine embeds in --queue-seconds at its measured "
            "speed.",
        ),
    ] = 0
    max_queue_requests: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum unfinished requests in each priority class of one process; "
            "further requests get status 429.",
        ),
    ] = 1024
    queue_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="Maximum work in the queue, in seconds of the engine's time; used if "
            "--max-queue-tokens is 0.",
        ),
    ] = 30.0
    answer_cache_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Size in bytes of each process's cache of embeddings in memory; 0 means "
            "no cache.",
        ),
    ] = 0
    answer_cache_url: Annotated[
        str | None,
        Field(
            pattern=_REDIS_URL,
            description="Redis or Valkey for one cache of embeddings that all processes share, "
            "instead of one in memory. Configure its maxmemory and an eviction policy.",
        ),
    ] = None
    answer_cache_ttl: Annotated[
        int,
        Field(
            ge=1,
            description="Time to live in seconds of an embedding in the Redis of "
            "--answer-cache-url.",
        ),
    ] = 86_400
    answer_cache_shared: Annotated[
        bool,
        Field(
            description="Share cached embeddings between API keys. Response times then reveal "
            "whether another API key sent the same text."
        ),
    ] = False
    max_header_bytes: Annotated[
        int,
        Field(ge=1024, description="Maximum size of a request's head (URL and headers) in bytes."),
    ] = 65_536
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum client connections of one process; beyond it the connection "
            "that has been idle longest is closed.",
        ),
    ] = 4096
    keep_alive_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds after which an idle connection is closed; longer than the idle "
            "timeout of every proxy in front, which would else send a request on a connection that "
            "is being closed.",
        ),
    ] = 75.0
    header_timeout: Annotated[
        float, Field(gt=0, description="Seconds within which the headers of a request must arrive.")
    ] = 10.0
    body_timeout: Annotated[
        float, Field(gt=0, description="Seconds within which the body of a request must arrive.")
    ] = 30.0
    answer_timeout: Annotated[
        float, Field(gt=0, description="Seconds within which a client must read its response.")
    ] = 60.0
    request_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Maximum duration of a request in seconds; a client may request a "
            "shorter one.",
        ),
    ] = 300.0
    stall_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds without progress of an engine that has work, after which the "
            "service is not ready; and without a sign of life of the engine's process, after which "
            "it is replaced.",
        ),
    ] = 60.0
    dead_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds without progress of an engine that has work, after which the "
            "service is not live, so that an orchestrator restarts it; an engine in a process of "
            "its own is replaced.",
        ),
    ] = 300.0
    canary_interval: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds without an embedded text after which a test text is embedded, "
            "to check the engine.",
        ),
    ] = 30.0
    drain_grace: Annotated[
        float,
        Field(
            ge=0,
            description="Seconds after SIGTERM in which new requests are still accepted, so "
            "that load balancers notice that the service is not ready; 5 to 10 behind a load "
            "balancer.",
        ),
    ] = 0.0
    drain_timeout: Annotated[
        int,
        Field(ge=1, description="Seconds for requests in flight to finish on shutdown."),
    ] = 60
    token_input: Annotated[
        TokenInput,
        Field(
            description="Whether requests may contain token ids instead of text. Ids of another "
            "tokenizer give meaningless vectors, so accept them only from clients that use this "
            "model's tokenizer."
        ),
    ] = TokenInput.REJECT

    keys_file: Annotated[
        Path | None,
        Field(
            description="TOML file of API keys, as printed by `taskvec key`; reloaded when it "
            "changes. If there are API keys, every route except /health and, by default, /metrics "
            "requires one; the pages at / and /docs ask for it."
        ),
    ] = None
    api_keys: Annotated[
        SecretStr | None,
        Field(
            description="API keys as name=secret pairs, separated by commas; used in addition "
            "to the keys file."
        ),
    ] = None
    key_requests_per_minute: Annotated[
        int,
        Field(
            ge=0,
            description="Embedding requests per minute of each API key without a limit of its "
            "own; 0 means unlimited. The key limits need API keys.",
        ),
    ] = 0
    key_tokens_per_minute: Annotated[
        int,
        Field(
            ge=0,
            description="Tokens per minute of each API key without a limit of its own; 0 means "
            "unlimited.",
        ),
    ] = 0
    key_concurrency: Annotated[
        int,
        Field(
            ge=0,
            description="Concurrent embedding requests, in one process, of each API key without "
            "a limit of its own; 0 means unlimited.",
        ),
    ] = 0
    limits_url: Annotated[
        str | None,
        Field(
            pattern=_REDIS_URL,
            description="Redis or Valkey, such as redis://host:6379/0, in which all processes "
            "count requests and tokens per minute together; if not set, each process counts "
            "alone.",
        ),
    ] = None
    limits_down: Annotated[
        LimitsDown,
        Field(
            description="While the Redis of --limits-url is down: open counts requests in "
            "each process alone, closed answers with status 503."
        ),
    ] = LimitsDown.OPEN
    metrics_without_key: Annotated[
        bool, Field(description="Serve /metrics without an API key even if there are API keys.")
    ] = True
    ui: Annotated[
        bool,
        Field(
            description="Serve a page at / on which a person can try the service; it loads nothing "
            "from elsewhere, and asks for an API key if there are API keys."
        ),
    ] = True
    dialects: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            min_length=1,
            description="Embedding APIs to serve, separated by commas; the routes of the others "
            "are a 404. /v1/embeddings is openai.",
        ),
    ] = tuple(DialectName)
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Origins allowed by CORS, such as https://app.example.com, separated by "
            "commas; * for all."
        ),
    ] = ()
    forwarded_allow_ips: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Addresses and networks of proxies, separated by commas, whose headers "
            "X-Forwarded-For and X-Forwarded-Proto are believed, such as 10.0.0.0/8; * for all. If "
            "not set, those in FORWARDED_ALLOW_IPS, or else this machine."
        ),
    ] = ()
    tls_cert: Annotated[
        Path | None,
        Field(
            description="PEM file with the certificate chain; enables HTTPS, and disables HTTP. "
            "Read again when it changes."
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        Field(
            description="PEM file with the private key of the certificate; if not set, it is "
            "read from the certificate's file."
        ),
    ] = None

    log_level: Annotated[LogLevel, Field(description="Lowest level of log lines to write.")] = (
        LogLevel.INFO
    )
    log_requests: Annotated[
        bool, Field(description="Write one log line per request; it never contains texts.")
    ] = True
    traces: Annotated[
        bool,
        Field(
            description="Send OpenTelemetry traces over OTLP/HTTP, configured by the standard "
            "OTEL_* variables; needs taskvec[otel]."
        ),
    ] = False

    @field_validator(
        "model_aliases",
        "engine_url",
        "dialects",
        "cors_origins",
        "forwarded_allow_ips",
        mode="before",
    )
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list | tuple) and all(isinstance(part, str) for part in listed):
            names = (name.strip() for part in listed for name in part.split(","))
            return tuple(name for name in names if name)
        return value

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        return value.removeprefix("[").removesuffix("]")  # as IPv6 addresses have in a URL

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _check_proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            try:
                if proxy != "*":
                    ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(
                    f"{proxy!r} must be an IP address, a network such as 10.0.0.0/8, or *"
                ) from None
        return value

    @field_validator("engine_url")
    @classmethod
    def _check_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_url, value))

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not read_pairs(value.get_secret_value()):
            raise ValueError("must have at least one name=secret pair")
        return value

    @field_validator("dialects")
    @classmethod
    def _check_dialects(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in tuple(DialectName):
                raise ValueError(f"{name!r} must be one of {', '.join(DialectName)}")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} must be an origin: scheme, host and port, without a trailing slash"
                )
        return value

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _parse_json(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be valid JSON ({error})") from None
        if not isinstance(parsed, dict):
            raise ValueError('must be a JSON object such as {"max_loras": 8}')  # noqa: TRY004
        return parsed

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.engine is EngineKind.REMOTE and not self.engine_url:
            raise ValueError(
                "--engine remote needs the URL of at least one server: set --engine-url "
                "(TASKVEC_ENGINE_URL)."
            )
        if self.engine is not EngineKind.REMOTE and self.engine_url:
            raise ValueError(
                "--engine-url (TASKVEC_ENGINE_URL) needs --engine remote (TASKVEC_ENGINE), but the "
                f"engine is {self.engine.value}."
            )
        if self.in_process and self.workers > 1:
            raise ValueError(
                "--in-process (TASKVEC_IN_PROCESS) runs the engine in the process of the only "
                "gateway, but --workers (TASKVEC_WORKERS) asks for several: set only one of them."
            )
        if self.answer_cache_bytes and self.answer_cache_url:
            raise ValueError(
                "--answer-cache-bytes (TASKVEC_ANSWER_CACHE_BYTES) sets up a cache in memory, and "
                "--answer-cache-url (TASKVEC_ANSWER_CACHE_URL) one in Redis: set only one of them."
            )
        if self.tls_key and not self.tls_cert:
            raise ValueError("--tls-key (TASKVEC_TLS_KEY) needs --tls-cert (TASKVEC_TLS_CERT).")
        return self

    @property
    def cache(self) -> Path:
        """The folder ``cache_dir``, or its default.

        Raises:
            StartError: the user has no home directory; see ``taskvec.home``.
        """
        if self.cache_dir is not None:
            return self.cache_dir
        caches = os.environ.get("XDG_CACHE_HOME")
        return (Path(caches) if caches else home_folder() / ".cache") / "taskvec"

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give another process the same settings.

        Every setting is included, so that variables which that process inherits have no effect;
        except keys that are not set, because an empty variable for keys is an error.
        """
        variables = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None and name in KEY_SETTINGS:
                continue
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
    """Return the name of a setting's environment variable."""
    return f"TASKVEC_{field.upper()}"
