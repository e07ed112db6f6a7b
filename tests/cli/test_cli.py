"""The command line in a process of its own: output, errors and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import taskvec
from conftest import free_port, wait_until
from taskvec import Embedder
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.settings import Settings, environment_variable

COMMANDS = ("serve", "check", "embed", "eval", "eval-mteb", "version")
BF16_DIFFERENCE = 1e-3
"""Documented maximum difference per component between batches."""

QUIET = ("--log-level", "error")
ADAPTER = Path("adapters/clustering")
ADAPTER_WEIGHTS = ADAPTER / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def library() -> Iterator[Embedder]:
    """Load the default model in this process."""
    with Embedder() as embedder:
        yield embedder


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_is_for_every_command(command: tuple[str, ...]) -> None:
    """--help and -h print the same on standard output and exit with 0."""
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == run(*command, "-h").stdout
    listed = COMMANDS if not command else ("Usage",)
    assert all(name in done.stdout.decode() for name in listed)


def test_serve_help_shows_every_setting() -> None:
    """The help has the option, the variable and the description of every setting."""
    # Lines are also wrapped at hyphens, so white space is ignored.
    shown = "".join(run("serve", "--help").stdout.decode().split())
    for name, field in Settings.model_fields.items():
        if name in {"engine_api_key", "api_keys"}:  # secrets: other users see command lines
            assert environment_variable(name) in shown
            continue
        assert f"--{name.replace('_', '-')}" in shown
        assert f"[envvar:{environment_variable(name)}]" in shown
        assert "".join(field.description.split()) in shown


def test_version_is_the_package_s() -> None:
    """`taskvec version` prints only the version."""
    assert run("version").stdout.decode() == f"{taskvec.__version__}\n"


@pytest.mark.parametrize("arguments", [("version",), ("serve", "--port", "x"), ("check", "no/m/x")])
def test_console_script_and_module_agree(arguments: tuple[str, ...]) -> None:
    """`taskvec` and `python -m taskvec` behave the same."""
    script = shutil.which("taskvec", path=str(Path(sys.executable).parent))
    assert script is not None, "the package is not installed"
    mine = run(*arguments)
    theirs = subprocess.run([script, *arguments], capture_output=True, check=False, timeout=60)
    assert (theirs.returncode, theirs.stdout) == (mine.returncode, mine.stdout)
    assert theirs.stderr == mine.stderr.replace(b"python -m taskvec", b"taskvec")


def test_check_prints_card_tasks_and_self_test(library: Embedder) -> None:
    """`taskvec check` prints the model card, the tasks and the result of the self-test."""
    done = run("check")
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [line.split(maxsplit=1) for line in done.stdout.decode().splitlines()]
    card = library.model
    assert ["model", card.name] in rows
    assert ["dimensions", str(card.dimension)] in rows
    assert ["vocabulary", str(card.vocabulary)] in rows
    assert ["matryoshka", ", ".join(map(str, card.matryoshka))] in rows
    tasks = [text.partition(":")[0] for label, text in rows if label == "task"]
    assert tasks == library.tasks
    assert rows[-1][0] == "self-test"
    assert rows[-1][1].startswith(f"passed: {len(card.adapters)} adapters")


def cut_weights(folder: Path) -> None:
    """Truncate the backbone's weights."""
    data = replaced(folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def dora(folder: Path) -> None:
    """Declare an adapter as DoRA."""
    config = json.loads(replaced(folder, ADAPTER / "adapter_config.json"))
    (folder / ADAPTER / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def other_width(folder: Path) -> None:
    """Halve the input width of every lora_A."""
    rewrite(folder, lambda key, value: value[:, ::2].copy() if "lora_A" in key else value)


def no_effect(folder: Path) -> None:
    """Zero every lora_B: the files are valid, but the adapter has no effect."""
    rewrite(folder, lambda key, value: np.zeros_like(value) if "lora_B" in key else value)


def other_architecture(folder: Path) -> None:
    """Declare an unsupported architecture."""
    config = json.loads(replaced(folder, "config.json"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def no_tokenizer(folder: Path) -> None:
    """Remove tokenizer.json."""
    (folder / "tokenizer.json").unlink()


DAMAGES = {
    cut_weights: "model.safetensors is damaged",
    dora: "adapter_config.json sets use_dora",
    other_width: "adapter_model.safetensors: ",
    other_architecture: "config.json has the unknown architecture 'bert'",
    no_tokenizer: "tokenizer.json is missing",
    no_effect: "adapter 'clustering' gives the same vectors",
}


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_exits_with_three(
    tmp_path: Path, default_checkpoint: Checkpoint, damage: Callable[[Path], None], command: str
) -> None:
    """A damaged checkpoint exits with 3 and one sentence that names the file."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(default_checkpoint.folder, folder, copy_function=os.symlink)
    damage(folder)
    if command == "check":
        done = run("check", str(folder))
    else:
        done = run("serve", "--model", str(folder), "--port", "0", *QUIET)
    assert done.returncode == 3
    (sentence,) = done.stderr.decode().splitlines()
    assert sentence.startswith("taskvec: ")
    assert sentence.endswith(".")
    assert DAMAGES[damage] in sentence


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (("serve", "--port", "70000"), {}, "TASKVEC_PORT"),
        (("serve", "--port", "http"), {}, "TASKVEC_PORT"),
        (("serve",), {"TASKVEC_PORT": "70000"}, "TASKVEC_PORT"),
        (("serve",), {"TASKVEC_DTYPE": "int8"}, "TASKVEC_DTYPE"),
        (("serve", "--device", "tpu"), {}, "TASKVEC_DEVICE"),
        (("serve",), {"TASKVEC_MAX_TEXTS": "0"}, "TASKVEC_MAX_TEXTS"),
        (("serve",), {"TASKVEC_LOG_REQUESTS": "perhaps"}, "TASKVEC_LOG_REQUESTS"),
        (("serve", "--no-such-option"), {}, "--no-such-option"),
        (("check", "--dtype", "int8"), {}, "--dtype"),
        (("check", "--device", "tpu"), {}, "--device"),
        (("embed", "--device", "tpu"), {}, "--device"),
        (("embed", "--task", "poetry"), {}, "'poetry'"),
        (("embed", "--dimensions", "257"), {}, "dimensions"),
        (("embed", "--output", "/no/such/folder/x.npy"), {}, "/no/such/folder/x.npy"),
        (("nonsense",), {}, "nonsense"),
    ],
    ids=str,
)
def test_wrong_usage_exits_with_two(
    arguments: tuple[str, ...], variables: dict[str, str], named: str
) -> None:
    """An invalid value exits with 2, and the error names its option or variable."""
    done = run(*arguments, stdin=b"a\n", **variables)
    errors = done.stderr.decode()
    assert done.returncode == 2, errors
    assert done.stdout == b""
    assert named in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["serve", "check"])
def test_an_absent_device_exits_with_three(command: str) -> None:
    """A missing GPU exits with 3 and one sentence."""
    done = run(command, "--device", "cuda:99", *(QUIET if command == "serve" else ()))
    errors = done.stderr.decode()
    assert done.returncode == 3, errors
    (sentence,) = errors.splitlines()
    assert "--device" in sentence


def test_a_busy_port_is_named() -> None:
    """A port in use exits with 3 and a line that names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port), *QUIET)
    assert done.returncode == 3
    (line,) = done.stderr.decode().splitlines()
    assert str(port) in line
    assert "because it is in use" in line


def test_embed_gives_json_lines(library: Embedder) -> None:
    """Each input line gives one JSON line with its index and the library's vector."""
    texts = ["first", "zweiter Täxt, 第三", "  spaces stay  "]
    done = run("embed", "--task", "clustering", "--dimensions", "64", stdin=lines(texts))
    assert (done.returncode, done.stderr) == (0, b"")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    vectors = np.array([answer["embedding"] for answer in answers])
    truth = library.embed(texts, task="clustering", dimensions=64)
    assert np.abs(vectors - truth).max() <= BF16_DIFFERENCE


def test_embed_takes_dos_line_ends_and_a_last_line_without(library: Embedder) -> None:
    """Lines may end with CR LF or LF, and the last line without either."""
    done = run("embed", stdin=b"first\r\nsecond")
    vectors = np.array([json.loads(line)["embedding"] for line in done.stdout.splitlines()])
    truth = library.embed(["first", "second"])
    assert np.abs(vectors - truth).max() <= BF16_DIFFERENCE


@pytest.mark.parametrize("count", [3, 1025])
def test_embed_writes_an_array(tmp_path: Path, library: Embedder, count: int) -> None:
    """--output writes one float32 array in input order, also for several chunks."""
    texts = [f"line {n}" for n in range(count)]
    done = run("embed", "--output", str(tmp_path / "x.npy"), stdin=lines(texts))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    vectors = np.load(tmp_path / "x.npy")
    assert (vectors.dtype, vectors.shape) == (np.float32, (count, library.model.dimension))
    assert np.abs(vectors - library.embed(texts)).max() <= BF16_DIFFERENCE


def test_embed_of_nothing_gives_nothing(tmp_path: Path) -> None:
    """Empty input gives no lines, or an array of zero rows, and exits with 0."""
    done = run("embed")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert run("embed", "--output", str(tmp_path / "x.npy")).returncode == 0
    vectors = np.load(tmp_path / "x.npy")
    assert (vectors.dtype, len(vectors)) == (np.float32, 0)


@pytest.mark.parametrize(
    ("text", "number", "word"),
    [
        (b"a\n\nb\n", 2, "empty"),
        (b"a\nb\n\xff\xfe\n", 3, "UTF-8"),
        (b"x\n" * 1030 + b"\n", 1031, "empty"),
        (b"a\n" + b"word " * 5000 + b"\n", 2, "2048 tokens"),
        (b"x\n" * 1030 + b"word " * 5000, 1031, "2048 tokens"),
    ],
    ids=["empty", "not UTF-8", "empty in chunk 2", "too long", "too long in chunk 2"],
)
def test_embed_names_the_line(text: bytes, number: int, word: str) -> None:
    """A line that cannot be embedded is rejected with its number, counted from 1."""
    done = run("embed", stdin=text)
    (sentence,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert f"Line {number}" in sentence
    assert word in sentence
    assert "input[" not in sentence, "the message must have a line number, not an index"


def test_embed_truncates_with_the_option(library: Embedder) -> None:
    """--truncate embeds the beginning of a line that is too long."""
    done = run("embed", "--truncate", stdin=b"word " * 5000)
    truth = library.embed("word " * 5000, truncate=True)
    assert np.abs(json.loads(done.stdout)["embedding"] - truth[0]).max() <= BF16_DIFFERENCE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda item: item.name)
def test_a_request_in_flight_is_answered_before_the_end(number: signal.Signals) -> None:
    """On SIGTERM and SIGINT the server answers requests in flight, then exits by that signal."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), *QUIET]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE) as process,
        ThreadPoolExecutor(1) as threads,
    ):
        try:
            wait_until(f"{url}/health/ready", process)
            body = {"input": [f"{'word ' * 60}{n}" for n in range(2048)], "dimensions": 8}
            answer = threads.submit(httpx.post, f"{url}/v1/embeddings", json=body, timeout=300)
            while "taskvec_requests_in_flight 1.0" not in httpx.get(f"{url}/metrics").text:
                assert not answer.done(), "the request must still be in flight"
                time.sleep(0.01)
        finally:
            process.send_signal(number)
        assert len(answer.result().json()["data"]) == 2048
        errors = process.communicate(timeout=60)[1].decode()
    # uvicorn raises the signal again once it has stopped; a shell shows 128 more.
    assert process.returncode in {0, -number, 128 + number}
    assert errors.strip() == ""


def replaced(folder: Path, name: str | Path) -> bytes:
    """Return a linked file's bytes and remove the link, so that the file can be written."""
    file = folder / name
    data = file.read_bytes()
    file.unlink()
    return data


def rewrite(folder: Path, change: Callable[[str, Any], Any]) -> None:
    """Replace the adapter's tensors by changed ones."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    replaced(folder, ADAPTER_WEIGHTS)
    save_file({k: change(k, v) for k, v in tensors.items()}, folder / ADAPTER_WEIGHTS)


def lines(texts: list[str]) -> bytes:
    """Return texts as bytes for standard input, one per line."""
    return "".join(f"{text}\n" for text in texts).encode()


def run(
    *arguments: str, stdin: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m taskvec` with arguments and further environment variables."""
    command = [sys.executable, "-m", "taskvec", *arguments]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=120,
        env=os.environ | variables,
    )
