"""The settings: one environment variable each; errors name the variable."""

from __future__ import annotations

from pathlib import PosixPath
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from taskvec.checkpoint.open import DEFAULT_MODEL
from taskvec.settings import (
    AdapterMode,
    Dtype,
    EngineKind,
    LimitsDown,
    LogLevel,
    Settings,
    TokenInput,
    environment_variable,
)

FIELDS = list(Settings.model_fields)

FROM_ENVIRONMENT = [
    ("model", "/models/mine", "/models/mine"),
    ("revision", "v2", "v2"),
    ("task_name", "clustering", "clustering"),
    ("served_model_name", "ours", "ours"),
    ("model_aliases", "a, b,,c ,", ("a", "b", "c")),
    ("host", "0.0.0.0", "0.0.0.0"),  # noqa: S104 - a value to read, nothing listens
    ("port", "0", 0),
    ("workers", "4", 4),
    ("engine", "vllm", EngineKind.VLLM),
    ("in_process", "true", True),
    ("engine_url", "http://a:1/, dns://b:2", ("http://a:1", "dns://b:2")),
    ("engine_api_key", "key", SecretStr("key")),
    ("engine_ca", "/ca.pem", PosixPath("/ca.pem")),
    ("engine_call_timeout", "1.5", 1.5),
    ("cache_dir", "/cache", PosixPath("/cache")),
    ("device", "cuda:1", "cuda:1"),
    ("dtype", "float32", Dtype.FLOAT32),
    ("adapter_mode", "low-rank", AdapterMode.LOW_RANK),
    ("threads", "3", 3),
    ("tokenizer_threads", "2", 2),
    ("max_batch_tokens", "4096", 4096),
    ("max_batch_texts", "64", 64),
    ("memory_share", "0.5", 0.5),
    ("tensor_parallel", "2", 2),
    ("data_parallel", "2", 2),
    ("vllm_args", '{"max_loras": 8}', {"max_loras": 8}),
    ("max_tokens", "512", 512),
    ("max_texts", "1", 1),
    ("max_body_bytes", "1000", 1000),
    ("memory_budget", "1000000", 1_000_000),
    ("max_queue_tokens", "5000", 5000),
    ("max_queue_requests", "77", 77),
    ("queue_seconds", "2.5", 2.5),
    ("answer_cache_bytes", "1000000", 1_000_000),
    ("answer_cache_url", "redis://redis:6379/1", "redis://redis:6379/1"),
    ("answer_cache_ttl", "60", 60),
    ("answer_cache_shared", "true", True),
    ("max_header_bytes", "2000", 2000),
    ("max_connections", "50", 50),
    ("keep_alive_timeout", "620", 620.0),
    ("header_timeout", "1.5", 1.5),
    ("body_timeout", "2.5", 2.5),
    ("answer_timeout", "3.5", 3.5),
    ("request_timeout", "0.5", 0.5),
    ("stall_timeout", "7.5", 7.5),
    ("dead_timeout", "8", 8.0),
    ("canary_interval", "9", 9.0),
    ("drain_grace", "0.5", 0.5),
    ("drain_timeout", "5", 5),
    ("token_input", "accept", TokenInput.ACCEPT),
    ("keys_file", "/keys.toml", PosixPath("/keys.toml")),
    ("api_keys", "web=secret,jobs=other", SecretStr("web=secret,jobs=other")),
    ("key_requests_per_minute", "60", 60),
    ("key_tokens_per_minute", "100000", 100_000),
    ("key_concurrency", "8", 8),
    ("limits_url", "redis://redis:6379/0", "redis://redis:6379/0"),
    ("limits_down", "closed", LimitsDown.CLOSED),
    ("metrics_without_key", "false", False),
    ("ui", "false", False),
    ("dialects", "openai, cohere", ("openai", "cohere")),
    ("cors_origins", "https://a.example, *", ("https://a.example", "*")),
    ("forwarded_allow_ips", "10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
    ("tls_cert", "/cert.pem", PosixPath("/cert.pem")),
    ("tls_key", "/key.pem", PosixPath("/key.pem")),
    ("log_level", "debug", LogLevel.DEBUG),
    ("log_requests", "false", False),
    ("traces", "true", True),
]

REFUSED = [
    ("forwarded_allow_ips", "proxy.example"),
    ("forwarded_allow_ips", "10.0.0.0/33"),
    ("keep_alive_timeout", "0"),
    ("port", "-1"),
    ("port", "65536"),
    ("port", "http"),
    ("workers", "0"),
    ("engine", "onnx"),
    ("engine_url", "ftp://a"),
    ("engine_url", "dns://no-port"),
    ("engine_call_timeout", "0"),
    ("device", "tpu"),
    ("device", "cuda:x"),
    ("dtype", "int8"),
    ("adapter_mode", "none"),
    ("threads", "-1"),
    ("tokenizer_threads", "257"),
    ("max_batch_tokens", "-1"),
    ("max_batch_texts", "-1"),
    ("memory_share", "1.1"),
    ("tensor_parallel", "0"),
    ("data_parallel", "0"),
    ("vllm_args", "{"),
    ("vllm_args", "[]"),
    ("max_tokens", "-1"),
    ("max_texts", "0"),
    ("max_body_bytes", "0"),
    ("max_queue_tokens", "-1"),
    ("max_queue_requests", "0"),
    ("queue_seconds", "0"),
    ("answer_cache_bytes", "-1"),
    ("answer_cache_url", "http://redis"),
    ("answer_cache_ttl", "0"),
    ("max_header_bytes", "1000"),
    ("max_connections", "0"),
    ("header_timeout", "0"),
    ("body_timeout", "-1"),
    ("answer_timeout", "nan"),
    ("request_timeout", "0"),
    ("request_timeout", "nan"),
    ("stall_timeout", "0"),
    ("dead_timeout", "0"),
    ("canary_interval", "0"),
    ("drain_grace", "-1"),
    ("drain_timeout", "0"),
    ("token_input", "maybe"),
    ("api_keys", ","),
    ("api_keys", "no-pair"),
    ("api_keys", "none=secret"),
    ("key_requests_per_minute", "-1"),
    ("key_tokens_per_minute", "-1"),
    ("key_concurrency", "-1"),
    ("limits_url", "http://redis"),
    ("limits_down", "ajar"),
    ("metrics_without_key", "perhaps"),
    ("dialects", "openai,smoke-signals"),
    ("cors_origins", "https://a.example/"),
    ("cors_origins", "a.example"),
    ("log_level", "loud"),
    ("log_requests", "perhaps"),
    ("traces", "perhaps"),
]


@pytest.mark.parametrize(("field", "text", "value"), FROM_ENVIRONMENT, ids=str)
def test_every_setting_has_its_variable(
    monkeypatch: pytest.MonkeyPatch, field: str, text: str, value: object
) -> None:
    """``TASKVEC_<FIELD>`` sets that field and no other."""
    monkeypatch.setenv(environment_variable(field), text)
    companions = {"engine_url": ("engine", "remote"), "tls_key": ("tls_cert", "/cert.pem")}
    companion = companions.get(field)
    if companion is not None:
        monkeypatch.setenv(environment_variable(companion[0]), companion[1])
    changed = Settings().model_dump()
    assert changed[field] == value
    assert type(changed[field]) is type(value)
    others = set() if companion is None else {companion[0]}
    assert {n for n, v in changed.items() if v != defaults()[n]} <= {field} | others


def test_no_setting_is_forgotten_here() -> None:
    """The table above covers every field, so that new ones are tested."""
    assert [field for field, *_ in FROM_ENVIRONMENT] == FIELDS


def test_without_variables_the_built_in_model_is_served_locally() -> None:
    """By default the built-in model is served on the loopback address only."""
    settings = Settings()
    assert (settings.model, settings.host, settings.port) == (DEFAULT_MODEL, "127.0.0.1", 8080)
    assert (settings.max_texts, settings.token_input) == (2048, TokenInput.REJECT)


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_is_described(field: str) -> None:
    """Every field has a description, which --help and docs/configuration.md are made of."""
    description = Settings.model_fields[field].description or ""
    assert len(description) > 15
    assert description.endswith(".")


@pytest.mark.parametrize(("field", "text"), REFUSED, ids=str)
def test_a_bad_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, field: str, text: str
) -> None:
    """An invalid value is rejected, and the error names its variable."""
    variable = environment_variable(field)
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValidationError) as refused:
        Settings()
    (fault,) = refused.value.errors()
    assert environment_variable(str(fault["loc"][0])) == variable
    assert fault["input"] in (text, (text,))
    assert fault["msg"].startswith(("Input should", "String should", "Value error, "))


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two invalid values are both reported."""
    monkeypatch.setenv("TASKVEC_PORT", "70000")
    monkeypatch.setenv("TASKVEC_DTYPE", "fp32")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert {fault["loc"][0] for fault in refused.value.errors()} == {"port", "dtype"}


@pytest.mark.parametrize("field", FIELDS)
def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """An empty variable is ignored: compose files and charts pass blank values on."""
    monkeypatch.setenv(environment_variable(field), "")
    assert Settings().model_dump()[field] == defaults()[field]


def test_an_argument_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument has precedence over its variable."""
    monkeypatch.setenv("TASKVEC_PORT", "1234")
    assert Settings(port=4321).port == 4321


@pytest.mark.parametrize(
    "given", ["a,b", " a , b ", ("a", "b"), ["a", "b"]], ids=["commas", "spaces", "tuple", "list"]
)
def test_aliases_are_split_at_commas(given: Any) -> None:
    """Aliases may be one string, as in a variable, or a sequence, as in code."""
    assert Settings(model_aliases=given).model_aliases == ("a", "b")


def test_settings_do_not_change() -> None:
    """Settings are frozen."""
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1
    assert settings.port == 8080


def test_an_unknown_setting_is_refused() -> None:
    """A misspelt argument is rejected."""
    with pytest.raises(ValidationError, match="prot"):
        Settings(prot=1)


def defaults() -> dict[str, Any]:
    """Return the default of every field."""
    return {name: field.default for name, field in Settings.model_fields.items()}
