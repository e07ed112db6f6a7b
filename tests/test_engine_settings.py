"""Settings of the engine: valid and invalid combinations, and passing settings to processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from taskvec.settings import EngineKind, Settings, TokenInput, environment_variable

KEY = "sk-1z"
"""Short, because error messages truncate long values, which would hide a leak."""
REMOTE = ("--engine", "remote")

VARIED: list[dict[str, Any]] = [
    {},
    {"model": "/models/a b", "revision": "v1", "served_model_name": "näme", "port": 0},
    {"model_aliases": ("a", "b:c"), "max_tokens": 512, "log_requests": False},
    {"engine": "vllm", "vllm_args": {"a": [1, None, "x,y"], "b": {"ü": 'quo"te'}, "c": True}},
    {"engine": "vllm", "memory_share": 0.1, "tensor_parallel": 2, "dtype": "float16"},
    {
        "engine": "remote",
        "engine_url": ("http://a:1", "unix:///run/x.sock", "dns://b:2"),
        "engine_api_key": KEY,
        "engine_ca": Path("/etc/ca file.pem"),
        "engine_call_timeout": 0.1 + 0.2,
    },
    {"workers": 3, "token_input": "accept", "request_timeout": 1e-3, "cache_dir": Path("/c")},
]

ACCEPTED = [
    ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
    ("http://[::1]:8000/", "http://[::1]:8000"),
    ("https://engine.example", "https://engine.example"),
    ("https://engine.example:8443/behind/a/proxy/", "https://engine.example:8443/behind/a/proxy"),
    ("unix:///run/engine.sock", "unix:///run/engine.sock"),
    ("dns://engine.svc.cluster.local:8000", "dns://engine.svc.cluster.local:8000"),
]

REFUSED_URLS = [
    "engine",
    "engine:8000",
    "ftp://engine:8000",
    "http://",
    "http://:8000",
    "http://engine:port",
    "http://engine:99999",
    "unix://",
    "unix://run/engine.sock",
    "dns://engine",
    "dns://engine:",
    "dns://engine:99999",
    "dns://engine:8000/path",
]

REFUSED_ARGUMENTS = [
    "{",
    "max_loras=8",
    "[]",
    "[1]",
    "8",
    "null",
    '"text"',
]


@pytest.mark.parametrize("given", VARIED, ids=lambda given: "+".join(given) or "defaults")
def test_another_process_reads_the_same_settings(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """Settings read from the variables of ``environment()`` equal the original."""
    original = Settings(**given)
    for name, value in original.environment().items():
        monkeypatch.setenv(name, value)
    again = Settings()
    assert again == original
    assert again.engine_api_key == original.engine_api_key


def test_every_setting_goes_to_the_other_process() -> None:
    """``environment()`` has every field, so that inherited variables have no effect.

    Keys that are not set are left out: an empty variable would be refused.
    """
    names = [environment_variable(name) for name in Settings.model_fields]
    keys = {"TASKVEC_KEYS_FILE", "TASKVEC_API_KEYS"}
    assert list(Settings().environment()) == [name for name in names if name not in keys]
    with_keys = Settings(keys_file="keys.json", api_keys="web=s3cret")
    assert list(with_keys.environment()) == names


def test_what_was_overridden_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that an argument overrides is overridden in the other process as well."""
    monkeypatch.setenv("TASKVEC_MODEL_ALIASES", "inherited")
    monkeypatch.setenv("TASKVEC_REVISION", "inherited")
    monkeypatch.setenv("TASKVEC_TOKEN_INPUT", "accept")
    original = Settings(model_aliases=(), revision=None, token_input=TokenInput.REJECT)
    for name, value in original.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == original
    assert Settings().token_input is TokenInput.REJECT


@pytest.mark.parametrize(("given", "kept"), ACCEPTED)
def test_an_engine_url_is_taken(given: str, kept: str) -> None:
    """Every documented form is accepted, and a trailing slash removed."""
    assert Settings(engine="remote", engine_url=given).engine_url == (kept,)


@pytest.mark.parametrize("given", REFUSED_URLS)
def test_another_url_is_refused(given: str) -> None:
    """An invalid URL is rejected with a list of the valid forms."""
    with pytest.raises(ValidationError) as refused:
        Settings(engine="remote", engine_url=("http://good:1", given))
    (fault,) = refused.value.errors()
    assert fault["loc"] == ("engine_url",)
    assert given.rstrip("/") in fault["msg"]
    for form in ("http://host:port", "https://host:port", "unix:///path", "dns://name:port"):
        assert form in fault["msg"]


@pytest.mark.parametrize("kind", [EngineKind.PACKED, EngineKind.VLLM])
def test_urls_are_for_the_remote_engine_alone(kind: EngineKind) -> None:
    """URLs for another engine are rejected, not ignored."""
    with pytest.raises(ValidationError) as refused:
        Settings(engine=kind, engine_url="http://a:1")
    message = str(refused.value.errors()[0]["msg"])
    assert "--engine-url" in message
    assert kind.value in message


@pytest.mark.parametrize("text", REFUSED_ARGUMENTS)
def test_vllm_arguments_are_an_object(text: str) -> None:
    """A value of vllm_args other than a JSON object is rejected with one error."""
    with pytest.raises(ValidationError) as refused:
        Settings(engine="vllm", vllm_args=text)
    (fault,) = refused.value.errors()
    assert fault["loc"] == ("vllm_args",)
    assert "JSON" in fault["msg"]


def test_vllm_arguments_keep_their_types() -> None:
    """Numbers, booleans, nulls and nested objects keep their JSON types."""
    text = (
        '{"max_loras": 8, "enforce_eager": true, "swap": null, "compilation_config": {"mode": 0}}'
    )
    assert Settings(engine="vllm", vllm_args=text).vllm_args == json.loads(text)


@pytest.mark.parametrize("show", [repr, str, Settings.model_dump, Settings.model_dump_json])
def test_the_key_is_not_shown(show: Any) -> None:
    """Printing or dumping settings does not reveal the engine's API key."""
    settings = Settings(engine="remote", engine_url="http://a:1", engine_api_key=KEY)
    assert KEY not in str(show(settings))


def test_the_key_is_not_in_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about another setting does not contain the API key: errors end up in logs."""
    monkeypatch.setenv("TASKVEC_ENGINE_API_KEY", KEY)
    with pytest.raises(ValidationError) as refused:
        Settings(engine="remote")
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (REMOTE, {}, ("--engine-url", "TASKVEC_ENGINE_URL")),
        ((), {"TASKVEC_ENGINE": "remote"}, ("--engine-url", "TASKVEC_ENGINE_URL")),
        (("--engine-url", "http://a:1"), {}, ("--engine-url", "TASKVEC_ENGINE")),
        ((), {"TASKVEC_ENGINE_URL": "http://a:1"}, ("--engine-url", "TASKVEC_ENGINE_URL")),
        (
            (*REMOTE, "--engine-url", "http://a:1", "--engine-url", "nowhere"),
            {},
            ("--engine-url", "TASKVEC_ENGINE_URL", "'nowhere'"),
        ),
        (
            (*REMOTE, "--engine-url", "http://a:1"),
            {"TASKVEC_ENGINE_CALL_TIMEOUT": "0"},
            ("--engine-call-timeout", "TASKVEC_ENGINE_CALL_TIMEOUT"),
        ),
        (
            ("--engine", "vllm", "--vllm-args", "max_loras=8"),
            {},
            ("--vllm-args", "TASKVEC_VLLM_ARGS", "JSON"),
        ),
        ((), {"TASKVEC_VLLM_ARGS": "[]"}, ("--vllm-args", "TASKVEC_VLLM_ARGS", "JSON")),
        (("--workers", "0"), {}, ("--workers", "TASKVEC_WORKERS")),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_sentence(
    arguments: tuple[str, ...], variables: dict[str, str], named: tuple[str, ...]
) -> None:
    """An invalid setting exits with 2 and one line that names the option and the variable."""
    done = serve(*arguments, TASKVEC_ENGINE_API_KEY=KEY, **variables)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("taskvec: ")
    assert all(name in line for name in named), line
    assert KEY not in line


def test_help_offers_no_option_for_the_key() -> None:
    """The API key has a variable and no option: other users can see a command line."""
    done = serve("--help")
    assert done.returncode == 0
    assert "--engine-api-key" not in done.stdout
    assert "TASKVEC_ENGINE_API_KEY" in done.stdout
    assert "--engine-url" in done.stdout


def test_an_option_for_the_key_is_refused() -> None:
    """--engine-api-key is an unknown option, and the error does not repeat its value."""
    done = serve(*REMOTE, "--engine-url", "http://a:1", f"--engine-api-key={KEY}")
    assert done.returncode == 2
    assert "--engine-api-key" in done.stderr
    assert KEY not in done.stderr


def serve(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a `taskvec serve` that is expected to fail."""
    return subprocess.run(
        [sys.executable, "-m", "taskvec", "serve", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | variables,
    )
