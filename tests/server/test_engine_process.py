"""``taskvec serve`` with its engine in another process: lifecycle, failures, and who knows what."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import free_port
from processes import (
    EXACT,
    MODULE,
    NOT_MEASURED,
    TASKS,
    TEXTS,
    Load,
    Served,
    answers,
    command_of,
    connects,
    embed,
    ended,
    served,
    started,
    total,
    wait_for,
)
from taskvec.checkpoint.checkpoint import Checkpoint

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

LAYOUTS = pytest.mark.parametrize("workers", ["1", "2"])
RAW = "application/octet-stream"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server with its engine in a process of its own, as is the default."""
    with served(*NOT_MEASURED, *EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def in_process() -> Iterator[Served]:
    """A server of one process."""
    with served("--in-process", *NOT_MEASURED, *EXACT) as server:
        yield server


def vectors(server: Served, task: str = "text-matching") -> np.ndarray:
    return np.frombuffer(embed(server.url, {"input": TEXTS, "task": task}, RAW).content, "<f4")


def answer(server: Served) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"input": "a text"}, timeout=30)


@pytest.mark.parametrize("task", TASKS)
def test_the_vectors_are_those_of_one_process(
    server: Served, in_process: Served, task: str
) -> None:
    """Where the engine is makes no difference to the vectors."""
    assert np.abs(vectors(server, task) - vectors(in_process, task)).max() <= 1e-5


def test_the_metrics_are_those_of_one_process(server: Served, in_process: Served) -> None:
    """The same series exist, and the engine's are counted once, soon after an answer."""
    names = []
    for each in (server, in_process):
        before = total(httpx.get(f"{each.url}/metrics").text, "taskvec_batch_texts_sum")
        embed(each.url, {"input": TEXTS})
        time.sleep(0.3)
        shown = httpx.get(f"{each.url}/metrics").text
        assert total(shown, "taskvec_batch_texts_sum") == before + len(TEXTS)
        assert total(shown, "taskvec_queue_texts") == 0
        assert total(shown, "process_resident_memory_bytes") > 0
        names.append({line.split(" ")[0] for line in shown.splitlines() if line[:1] != "#"})
    assert names[0] == names[1]


@LAYOUTS
def test_pauses_of_the_engines_process_are_shown(workers: str) -> None:
    """The longest turn of its loop and hold of its lock are in the metrics, apart from others'."""
    with served("--workers", workers, *EXACT) as server:

        def shown(name: str) -> float:
            return total(httpx.get(f"{server.url}/metrics").text, f"taskvec_{name}_seconds")

        embed(server.url, {"input": TEXTS})
        wait_for(lambda: shown("engine_process_interpreter_lock_longest_hold") > 0)
        os.kill(server.engine(), signal.SIGSTOP)
        time.sleep(1)
        os.kill(server.engine(), signal.SIGCONT)
        wait_for(lambda: shown("engine_process_event_loop_longest_turn") > 0.9)
        assert shown("event_loop_longest_turn") < 0.9


def test_the_gateway_has_no_torch(server: Served, in_process: Served) -> None:
    """The weights and torch are in the engine's process alone, and its memory is shown."""

    def maps(process: int) -> str:
        return Path(f"/proc/{process}/maps").read_text()

    assert "libtorch" not in maps(server.process.pid)
    assert "libtorch" in maps(server.engine())
    assert "libtorch" in maps(in_process.process.pid)
    assert in_process.descendants() == set()
    shown = httpx.get(f"{server.url}/metrics").text
    resident = total(shown, "taskvec_engine_process_resident_bytes")
    assert resident > total(shown, "process_resident_memory_bytes")


def test_the_engine_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """API keys and passwords are not in the environment of the engine's process."""
    monkeypatch.setenv("TASKVEC_API_KEYS", "web=tv-very-secret")
    monkeypatch.setenv("TASKVEC_ENGINE_API_KEY", "tv-very-secret")
    with served(*EXACT) as server:
        own, engines = (
            Path(f"/proc/{process}/environ").read_bytes()
            for process in (server.process.pid, server.engine())
        )
    assert b"tv-very-secret" in own
    assert b"tv-very-secret" not in engines


@LAYOUTS
def test_nothing_is_imported_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    """Files of the directory in which the service starts are not run as code, by any process."""
    script = tmp_path / "bin" / "serve.py"  # a script's own folder is on Python's path
    script.parent.mkdir()
    script.write_text("if __name__ == '__main__':\n import taskvec.cli.main as m\n m.main()\n")
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("uvloop", "multiprocessing", "taskvec"):
        ran = f"open({str(tmp_path / 'ran')!r}, 'a').write(__file__ + ' ')\n"
        (folder / f"{name}.py").write_text(f"{ran}raise ImportError('not this one')\n")
    monkeypatch.chdir(folder)
    with served("--workers", workers, *EXACT, run=(str(script),)) as server:
        assert len(vectors(server))
        assert not (tmp_path / "ran").exists()


@LAYOUTS
def test_a_killed_engine_is_replaced(workers: str) -> None:
    """After SIGKILL: clear refusals, then the same vectors again; gateways and counts stay."""
    with served("--workers", workers, *EXACT) as server:
        expected, gateways = vectors(server), server.gateways()
        killed = server.engine()
        os.kill(killed, signal.SIGKILL)
        seen: list[httpx.Response] = []
        wait_for(lambda: seen.append(answer(server)) or seen[-1].status_code == 503)
        assert seen[-1].json()["code"] == "engine_unavailable"
        assert seen[-1].headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        wait_for(lambda: seen.append(answer(server)) or seen[-1].status_code == 200)
        assert {each.status_code for each in seen} <= {200, 503}
        assert server.engine() != killed
        assert np.array_equal(vectors(server), expected)
        assert server.gateways() == gateways
        wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)

        def restarts() -> float:
            shown = httpx.get(f"{server.url}/metrics").text
            return total(shown, "taskvec_engine_process_restarts_total")

        wait_for(lambda: restarts() == 1)


@LAYOUTS
def test_an_engine_that_hangs_is_replaced(workers: str) -> None:
    """A process that is stopped is not ready soon, then killed; its requests get 503."""
    with served("--workers", workers, "--stall-timeout", "6", *EXACT) as server:
        hung = server.engine()
        os.kill(hung, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(answer, server)
            wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
            assert command_of(hung), "the service is not ready before the process is killed"
            refused = answer(server)
            assert (refused.status_code, refused.json()["code"]) == (503, "engine_unavailable")
            assert refused.headers["retry-after"] == "1"
            got = waiting.result()
            assert (got.status_code, got.json()["code"]) == (503, "engine_unavailable")
        wait_for(lambda: not command_of(hung))
        wait_for(lambda: answer(server).status_code == 200, seconds=60)


@LAYOUTS
def test_a_stopped_main_process_does_not_end_its_engine(workers: str) -> None:
    """The time for which the process that watches was stopped is not the engine's silence."""
    with served("--workers", workers, "--stall-timeout", "4", *EXACT) as server:
        engine = server.engine()
        for _ in range(3):
            os.kill(server.process.pid, signal.SIGSTOP)
            time.sleep(6)
            os.kill(server.process.pid, signal.SIGCONT)
            time.sleep(0.3)
        wait_for(lambda: answer(server).status_code == 200)
        assert server.engine() == engine


def test_requests_in_a_killed_engine_are_answered() -> None:
    """Whatever was in the engine when it was killed gets a 503 that says to try again."""
    options = ("--max-queue-tokens", "10000000", *EXACT)
    with served(*options) as server, ThreadPoolExecutor(4) as threads:
        long = {"input": [f"{'word ' * 100}{n}" for n in range(2048)], "dimensions": 8}
        sent = [
            threads.submit(httpx.post, f"{server.url}/v1/embeddings", json=long, timeout=120)
            for _ in range(4)
        ]
        wait_for(lambda: total(httpx.get(f"{server.url}/metrics").text, "taskvec_queue_texts") > 0)
        os.kill(server.engine(), signal.SIGKILL)
        for each in sent:
            got = each.result()
            assert (got.status_code, got.json()["code"]) == (503, "engine_unavailable")
        for name in ("taskvec_queue_texts", "taskvec_requests_in_flight"):
            wait_for(lambda: total(httpx.get(f"{server.url}/metrics").text, name) == 0)  # noqa: B023


@LAYOUTS
def test_an_engine_that_cannot_come_back_ends_the_service(
    tmp_path: Path, default_checkpoint: Checkpoint, workers: str
) -> None:
    """When the model can no longer be read, some tries later all processes end with a sentence."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(default_checkpoint.folder, folder)
    options = ("--workers", workers, "--model", str(folder), *EXACT)
    with served(*options) as server:
        processes = server.descendants()
        wait_for_gateways(server)
        shutil.rmtree(folder)
        os.kill(server.engine(), signal.SIGKILL)
        wait_for(lambda: answer(server).status_code == 503)
        server.process.wait(120)
        code, errors = ended(server)
        assert code == 3, errors
        assert errors.splitlines()[-1].startswith("taskvec: The engine's process has ended 5 times")
        wait_for(lambda: not any(map(command_of, processes)))


def wait_for_gateways(server: Served) -> None:
    """Wait until all gateways have read the model."""
    for gateway in server.gateways():  # the other one answers
        os.kill(gateway, signal.SIGSTOP)
        wait_for(lambda: answers(server.url))
        os.kill(gateway, signal.SIGCONT)


def copied(checkpoint: Checkpoint, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint.folder, folder / "checkpoint"))


@LAYOUTS
def test_changed_weights_are_not_mixed_with_those_before(
    tmp_path: Path, default_checkpoint: Checkpoint, workers: str
) -> None:
    """When a new engine process reads other weights, all processes end, and the file is named."""
    folder = copied(default_checkpoint, tmp_path)
    file = folder / "adapters/clustering/adapter_model.safetensors"
    options = ("--workers", workers, "--model", str(folder), *EXACT)
    with served(*options) as server:
        wait_for_gateways(server)
        processes = server.descendants()
        body = {"input": "a text", "task": "clustering"}
        before = embed(server.url, body).json()["data"]
        tensors = load_file(file)
        save_file({k: v * 3 if "lora_B" in k else v for k, v in tensors.items()}, file)
        os.kill(server.engine(), signal.SIGKILL)
        seen = []
        while server.process.poll() is None:
            try:
                got = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=30)
            except httpx.TransportError:
                break
            seen.append(got.status_code)
            assert got.status_code == 503 or got.json()["data"] == before
            time.sleep(0.02)
        assert 503 in seen
        code, errors = ended(server)
        assert code == 3, errors
        assert "adapters/clustering/adapter_model.safetensors" in errors.splitlines()[-1]
        assert "restart the service" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        wait_for(lambda: not any(map(command_of, processes)))


@LAYOUTS
def test_processes_that_end_before_they_are_ready_are_logged_and_counted(
    tmp_path: Path, default_checkpoint: Checkpoint, workers: str
) -> None:
    """While an engine cannot come back, each end is in the log, and the metric counts the tries."""
    folder = copied(default_checkpoint, tmp_path)
    file, away = folder / "model.safetensors", folder / "away"
    options = ("--workers", workers, "--model", str(folder), *EXACT)
    with served(*options) as server:
        wait_for_gateways(server)
        file.rename(away)
        os.kill(server.engine(), signal.SIGKILL)

        def restarts() -> float:
            shown = httpx.get(f"{server.url}/metrics").text
            return total(shown, "taskvec_engine_process_restarts_total")

        wait_for(lambda: restarts() >= 2)
        away.rename(file)
        wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
        counted = restarts()
        server.process.terminate()
        _, errors = ended(server)
    lines = [line for line in errors.splitlines() if "engine_process_ended" in line]
    assert len(lines) == counted
    assert sum('"ready":false' in line for line in lines) == counted - 1


@pytest.mark.parametrize(("workers", "files"), [("1", 6), ("2", 7), ("1", 9), ("2", 10)], ids=str)
def test_a_start_without_files_ends_with_a_sentence(workers: str, files: int) -> None:
    """Where the engine's process cannot be launched, or little else, there is no traceback."""
    command = (sys.executable, *MODULE, "serve", "--workers", workers, "--log-level", "error")
    done = subprocess.run(
        (*command, "--port", str(free_port())),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert done.returncode == 3, done.stderr
    assert "Too many open files" in done.stderr
    assert "Traceback" not in done.stderr


def without_effect(file: Path) -> None:
    tensors = load_file(file)
    save_file({k: np.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}, file)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@LAYOUTS
@pytest.mark.parametrize("damage", [without_effect, cut_short])
def test_a_damaged_checkpoint_ends_the_start(
    tmp_path: Path, default_checkpoint: Checkpoint, damage: Callable[[Path], None], workers: str
) -> None:
    """What the engine's process finds wrong is one sentence and exit code 3, as in one process."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(default_checkpoint.folder, folder)
    damage(folder / "adapters/clustering/adapter_model.safetensors")
    options = ("--workers", workers, "--model", str(folder), "--log-level", "error")
    code, errors = ended(Served(*options))
    assert code == 3, errors
    (sentence,) = errors.splitlines()
    assert sentence.startswith("taskvec: ")
    assert "clustering" in sentence


def test_an_engine_killed_while_it_starts_ends_the_start() -> None:
    """There is no second try before the first was ready: one sentence, exit code 3."""
    with started("--log-level", "error") as server:
        wait_for(lambda: any("engine_process" in command_of(p) for p in server.descendants()))
        os.kill(server.engine(), signal.SIGKILL)
        code, errors = ended(server)
    assert code == 3, errors
    (sentence,) = errors.splitlines()
    assert "before it was ready" in sentence
    assert "SIGKILL" in sentence


@LAYOUTS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda item: item.name)
def test_a_signal_to_all_processes_loses_nothing(workers: str, number: signal.Signals) -> None:
    """A terminal signals every process: what was taken is answered all the same."""
    with served("--workers", workers, *EXACT) as server, ThreadPoolExecutor(8) as threads:
        processes = server.descendants()
        load = Load(server.url)
        runs = [threads.submit(load.run) for _ in range(8)]
        load.wait_for(24)
        load.hold()
        for process in processes:
            if "resource_tracker" not in command_of(process):
                os.kill(process, number)
        server.process.send_signal(number)
        errors = server.process.communicate(timeout=60)[1].decode()
        for run in runs:
            run.result()
        assert set(load.seen) <= {"200", "503"}, load.seen
        assert load.seen["200"] >= 24
        assert errors.strip() == ""
        wait_for(lambda: not any(map(command_of, processes)))


@LAYOUTS
def test_the_engine_ends_with_the_main_process(workers: str) -> None:
    """After SIGKILL of the main process no process stays, and the port is free."""
    with served("--workers", workers, *EXACT) as server:
        processes = server.descendants()
        server.process.kill()
        wait_for(lambda: not any(map(command_of, processes)), seconds=20)
        assert not connects(server.port)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0])
def test_an_early_sigterm_leaves_no_process(seconds: float) -> None:
    """SIGTERM while the engine is loading ends both processes soon."""
    with started(*EXACT) as server:
        wait_for(lambda: any("engine_process" in command_of(p) for p in server.descendants()))
        time.sleep(seconds)
        processes = server.descendants()
        server.process.terminate()
        code, errors = ended(server)
        assert code in {-signal.SIGTERM, 128 + signal.SIGTERM}, errors
        assert errors.strip() == ""
        wait_for(lambda: not any(map(command_of, processes)))


def test_no_files_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gateway and its engine work without a temporary folder that can be written."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tmp_path.chmod(0o500)
    with served(*EXACT) as server:
        assert len(vectors(server))
        assert list(tmp_path.iterdir()) == []


def test_one_process_cannot_have_several_gateways() -> None:
    """Options that contradict each other are an error that names both."""
    code, errors = ended(Served("--in-process", "--workers", "2"))
    assert code == 2
    assert "--in-process" in errors
    assert "--workers" in errors
