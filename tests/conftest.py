"""Checkpoints, engines and servers that several tests share."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import math
import os
import re
import resource
import socket
import ssl
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from fastapi.dependencies import models as fastapi_models
from hypothesis import settings as hypothesis_settings

import taskvec
from fakes import FakeEngine
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.malloc import trim_malloc
from taskvec.memory_limits import MemoryLimits
from taskvec.service import build_service
from taskvec.settings import Settings

ALL_EXAMPLES = 100
"""Examples of a property test that states no number."""

QUICK_EXAMPLES = 0.2
"""Share of the examples of property tests that `make test` runs; `make test-all` runs them all."""

LEFT_OUT = pytest.StashKey[Counter[str]]()
"""Number of tests that `--quick` has left out, by reason."""

LIBRARIES = {"transformers", "peft", "sklearn"}

IMPORTS_LIBRARIES = re.compile(
    r"^(from|import) (oracle|peft|transformers|tinytraining|taskvec_train|taskvec\.evaluation"
    r"|taskvec\.cli\.evaluate)\b|^ +from sentence_transformers import",
    re.MULTILINE,
)
"""Imports of a test file that load transformers, peft or scikit-learn: 250 MB."""

# vLLM pins a web framework and a torch of its own: its tests run where it is installed, by
# `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["real_vllm"]
# The clients are installed in an environment of their own, for `make test-clients`.
collect_ignore += [] if importlib.util.find_spec("litellm") else ["real_clients"]

FASTAPI_CACHES = [f for f in vars(fastapi_models).values() if hasattr(f, "cache_clear")]
"""Empty with FastAPI versions that have no such caches."""

DEFAULT_VOCABULARY = open_checkpoint(DEFAULT_MODEL).backbone.vocabulary
"""Token ids that the default model knows: all below this."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make test` and of CI."""
    group = parser.getgroup("taskvec")
    group.addoption("--quick", action="store_true", help="leave out tests that are marked `full`")
    group.addoption("--no-skips", action="store_true", help="fail tests that skip themselves")
    group.addoption("--wheel", type=Path, help="wheel that must be the taskvec under test")
    group.addoption(
        "--libraries",
        choices=("without", "with"),
        help="collect only the files that import transformers or scikit-learn, or only the others",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the markers, and choose the number of examples of property tests."""
    share = QUICK_EXAMPLES if config.getoption("--quick") else 1.0
    # No deadline: the machines that test are shared. In CI the same examples every time, so that a
    # run says something about the change; new examples are found where people work.
    hypothesis_settings.register_profile(
        "taskvec",
        deadline=None,
        derandomize="CI" in os.environ,
        max_examples=int(share * ALL_EXAMPLES),
    )
    hypothesis_settings.load_profile("taskvec")
    config.addinivalue_line(
        "markers", "sheds_by_lag: an event loop that stays late refuses requests"
    )
    config.addinivalue_line("markers", "full(reason): `make test` leaves it to `make test-all`")
    wheel = config.getoption("--wheel")
    if wheel is not None:
        _require_installed(wheel)
    elif not Path(taskvec.__file__).is_relative_to(repository() / "service"):
        raise pytest.UsageError(
            f"the tests would import taskvec from {taskvec.__file__}, where a wheel was installed: "
            "name it in WHEEL=, or touch pyproject.toml to install the checkout again"
        )


def _require_installed(wheel: Path) -> None:
    """Fail unless the imported package is the wheel's, file by file."""
    packages = Path(sysconfig.get_path("purelib"))
    imported = Path(taskvec.__file__).parent
    if imported != packages / "taskvec":
        raise pytest.UsageError(f"--wheel {wheel}: the tests would import taskvec from {imported}")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            file = packages / name
            changed = name.endswith("/RECORD")  # by the installation
            if not changed and (not file.is_file() or file.read_bytes() != archive.read(name)):
                raise pytest.UsageError(f"--wheel {wheel}: the installed {file} is another one")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--libraries`, choose files: all that a process collects is imported and stays."""
    return True if in_other_part(collection_path, config) else None


def in_other_part(path: Path, config: pytest.Config) -> bool:
    """Return whether `--libraries` leaves a file, or the folder of training, out."""
    wanted = config.getoption("--libraries")
    training = repository() / "tests/training"
    if wanted is None or (path.is_dir() and path != training):
        return False
    imports = path.is_relative_to(training) or IMPORTS_LIBRARIES.search(path.read_text())
    return bool(imports) != (wanted == "with")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what a pytest-xdist worker has left out to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = dict(session.config.stash.get(LEFT_OUT, {}))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are marked, with `--quick`, and files named in the wrong part."""
    files = {item.path for item in items}
    others = {path for path in files if in_other_part(path, config)}  # named by the command
    items[:] = [item for item in items if item.path not in others]
    if not config.getoption("--quick"):
        return
    left = config.stash.setdefault(LEFT_OUT, Counter())
    kept = []
    for item in items:
        mark = item.get_closest_marker("full")
        if mark is None:
            kept.append(item)
        else:
            left[mark.args[0]] += 1
    items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receive a worker's numbers; all workers have the same."""
    left = getattr(node, "workeroutput", {}).get("left out", {})
    node.config.stash[LEFT_OUT] = Counter(left)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what `--quick` has left out, and why."""
    left = config.stash.get(LEFT_OUT, Counter())
    if left:
        terminalreporter.section("left to `make test-all`")
        share = f"{1 - QUICK_EXAMPLES:.0%}"
        terminalreporter.line(f"{share:>5} of the examples of each property test: full fuzzing")
        for reason, number in left.most_common():
            terminalreporter.line(f"{number:5} {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With `--no-skips`, a skipped test has failed: CI installs all that tests need."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--no-skips"):
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Check a collected file.

    With `--no-skips`, a file that skips itself has failed; so has one, with `--libraries without`,
    that imports such a library.
    """
    before = LIBRARIES & sys.modules.keys()
    report = yield
    imported = (LIBRARIES & sys.modules.keys()) - before
    if imported and isinstance(collector, pytest.Module):
        config, file = collector.config, collector.path
        if config.getoption("--libraries") == "without" and not in_other_part(file, config):
            report.outcome = "failed"
            report.longrepr = (
                f"{file} has imported {', '.join(sorted(imported))}: add what it imports to "
                "IMPORTS_LIBRARIES in tests/conftest.py"
            )
    if report.skipped and collector.config.getoption("--no-skips"):
        report.outcome = "failed"
    return report


@pytest.fixture(autouse=True)
def default_logs() -> Iterator[None]:
    """Undo what a test configured of structlog, which is global: others capture its events."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def forgotten_applications() -> Iterator[None]:
    """Empty FastAPI's caches of functions, which keep the applications of earlier tests alive."""
    yield
    for function in FASTAPI_CACHES:
        function.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def freed_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give back what a module's tests have used: tokenizers in its caches, engines in cycles."""
    yield
    for function in vars(request.module).values():
        if hasattr(function, "cache_clear") and function.__module__ == request.module.__name__:
            function.cache_clear()
    gc.collect()
    trim_malloc()
    if request.config.getoption("--libraries") == "without":
        imported = LIBRARIES & sys.modules.keys()
        assert not imported, f"{imported} imported: see IMPORTS_LIBRARIES in tests/conftest.py"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's Redis may be slow without being down."""
    monkeypatch.setattr("taskvec.redis.TIMEOUT_SECONDS", 10.0)


@pytest.fixture(autouse=True)
def no_shedding_by_lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not refuse requests while the event loop stays late: here it runs the clients as well."""
    if request.node.get_closest_marker("sheds_by_lag") is None:
        monkeypatch.setattr("taskvec.api.load_shedding.MAX_STANDING_DELAY", math.inf)


def examples(number: int) -> int:
    """Return how many examples a property test runs that has ``number`` in `make test-all`."""
    return max(1, number * hypothesis_settings.default.max_examples // ALL_EXAMPLES)


@contextmanager
def no_open_files() -> Iterator[Callable[[], None]]:
    """Take every file that this process may open; yields a function that gives them back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []

    def release() -> None:
        while held:
            os.close(held.pop())

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        yield release
    finally:
        release()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session")
def default_checkpoint() -> Checkpoint:
    """The checkpoint in the package."""
    return open_checkpoint(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A real ``taskvec serve`` on the default model."""
    with running_server() as url:
        yield url


@contextmanager
def running_server(*options: str, ready: bool = True) -> Iterator[str]:
    """Start ``taskvec serve`` on a free port, wait until it is ready, stop it by SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(f"{url}/health/ready" if ready else f"{url}/health/live", process)
            yield url
        finally:
            process.terminate()
            process.communicate(timeout=60)


def wait_until(
    url: str,
    process: subprocess.Popen[bytes],
    seconds: float = 60,
    verify: ssl.SSLContext | bool = True,
) -> None:
    """Wait for a 200, or fail with what the process said."""
    limit = time.monotonic() + seconds
    # One client: reading the certificates for another takes 17 ms of processor time.
    with httpx.Client(verify=verify, timeout=5, headers={"connection": "close"}) as client:
        while time.monotonic() < limit:
            if process.poll() is not None:
                errors = process.communicate()[1].decode()
                raise AssertionError(f"exit {process.returncode}: {errors}")
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
    raise AssertionError(f"{url} did not answer in {seconds} s")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fake_application(
    checkpoint: Checkpoint,
    engine: FakeEngine,
    failures: list[BaseException],
    limits: MemoryLimits | None = None,
    **settings: Any,
) -> FastAPI:
    """The whole application in front of a fake engine; a failed start is added to ``failures``."""
    given = Settings(**({"log_requests": False, "max_queue_tokens": 1 << 22} | settings))
    service = build_service(given, checkpoint=checkpoint, engine=engine, limits=limits)
    return create_app(service, failures.append)


@asynccontextmanager
async def fake_service(
    checkpoint: Checkpoint,
    engine: FakeEngine | None = None,
    limits: MemoryLimits | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    """The whole application in this process, in front of a fake engine."""
    engine = engine or FakeEngine(checkpoint.card)
    app = fake_application(checkpoint, engine, [], limits, **settings)
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)  # the application starts its engine in a task of its own
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, engine


def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
