"""Images that buildah builds from the Dockerfile, and containers of them, without a daemon."""

from __future__ import annotations

import ast
import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from conftest import repository
from processes import children

PROGRAMS = ("buildah", "debootstrap", "mount", "nsenter", "setpriv", "unshare")
NAMESPACES = ("--mount", "--pid", "--net")

SUITE = "bookworm"
PACKAGES = "ca-certificates,python3-pip,python3-venv"
AS_IN_DOCKERS_PYTHON = """
ln -s python3 /usr/bin/python
rm -rf /usr/lib/python3*/EXTERNALLY-MANAGED /var/cache/apt/* /var/lib/apt/lists/*
"""

PIP_OPTIONS = (
    *("cert", "client-cert", "constraint", "default-timeout", "extra-index-url", "find-links"),
    *("index-url", "no-index", "proxy", "retries", "timeout", "trusted-host"),
)
"""Options of pip that say where packages are, not where they are installed."""

START = """
set -eu
root=$1 directory=$2 user=$3 access=$4 python=$5
shift 5
"$python" -c 'if True:
    import fcntl, socket, struct
    up = struct.pack("16sH14x", b"lo", 1)
    fcntl.ioctl(socket.socket(), 0x8914, up)  # SIOCSIFFLAGS, IFF_UP'
mount --bind "$root" "$root"
mount --bind "$root/cache" "$root/cache"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir -m 1777 "$root/dev/shm"
for device in null zero random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -o "remount,bind,$access" "$root"
exec setpriv --no-new-privs \
    unshare --root "$root" --wd "$directory" --setuid "${user%:*}" --setgid "${user#*:}" "$@"
"""
"""Makes of a root and its namespaces what `docker run --read-only --tmpfs /tmp` makes of them."""


def unavailable() -> str:
    """Return what keeps this machine from building images and running them; empty if nothing."""
    if os.geteuid() != 0:
        return "building and starting images needs root: run the tests as root"
    if absent := [program for program in PROGRAMS if not shutil.which(program)]:
        packages = "buildah debootstrap util-linux"
        return f"{', '.join(absent)} not found, to build images: apt-get install {packages}"
    if _captured("unshare", *NAMESPACES, "--fork", "true").returncode != 0:
        return "namespaces cannot be made, to start images: a container needs --privileged"
    return ""


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        root: its file system, mounted.
        config: what Docker reads of it: user, command, labels and so on.
    """

    root: Path
    config: dict[str, Any]

    def environment(self) -> dict[str, str]:
        """The variables of its processes."""
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    def files(self) -> dict[str, int]:
        """The path of each file that is not empty, and its size in bytes."""
        return {
            str(file.relative_to(self.root)): file.stat().st_size
            for folder, _, names in os.walk(self.root)
            for file in (Path(folder, name) for name in names)
            if file.is_file() and not file.is_symlink() and file.stat().st_size
        }


class Builder:
    """Builds the targets of the Dockerfile into a store of its own."""

    def __init__(self, folder: Path, python_image: str) -> None:
        """Make the base image.

        Args:
            folder: an empty folder for the store.
            python_image: the Dockerfile's base image. Where its registry is out of reach, Debian's
                own Python stands for it.
        """
        self._folder = folder
        self._driver = "overlay"
        if self._try("from", "scratch").returncode != 0:  # as in a container on an overlay
            self._driver = "vfs"
        self._python_image = f"docker.io/library/{python_image}"
        if self._try("pull", "--quiet", self._python_image).returncode != 0:
            self._python_image = "localhost/python"
            self._debootstrap()
        self._volumes = [f"--volume={path}:{path}:ro" for path in self._configure_pip()]
        self._volumes.append(f"--volume={self._folder}/pip.conf:/etc/pip.conf:ro")

    def base(self) -> Image:
        """The image that the others are built on."""
        return self._image(self._python_image)

    def target(self, name: str, **arguments: str) -> Image:
        """Build a target, with build arguments."""
        arguments |= {"PYTHON_IMAGE": self._python_image}
        self._run(
            *("build", "--format=docker", "--layers", f"--target={name}", *self._volumes),
            *(f"--build-arg={argument}={value}" for argument, value in arguments.items()),
            *(f"--tag=localhost/taskvec:{name}", str(repository())),
        )
        return self._image(f"localhost/taskvec:{name}")

    def context(self) -> set[str]:
        """The files that a build of this checkout is given."""
        recipe = self._folder / "Dockerfile"
        recipe.write_text("FROM scratch\nCOPY . /\n")
        tag = "localhost/context"
        self._run("build", "--quiet", f"--file={recipe}", f"--tag={tag}", str(repository()))
        return set(self._image(tag).files())

    def close(self) -> None:
        """Unmount the images, and remove the store."""
        self._run("rm", "--all")
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):
            if Path(mount).is_relative_to(self._folder):
                _output(_captured("umount", mount))
        _output(_captured("rm", "-rf", self._folder))  # 100,000 files, faster than Python

    def _debootstrap(self) -> None:
        root = self._folder / "debian"
        options = ("--variant=minbase", f"--include={PACKAGES}")
        _output(_captured("debootstrap", *options, SUITE, root))
        _output(_captured("chroot", root, "sh", "-ec", AS_IN_DOCKERS_PYTHON))
        container = self._run("from", "scratch")
        self._run("copy", "--quiet", container, str(root), "/")
        self._run("commit", "--quiet", container, self._python_image)
        _output(_captured("rm", "-rf", root))

    def _configure_pip(self) -> set[str]:
        """Write what this machine's pip is configured with; return the paths that it names."""
        listed = _output(_captured(sys.executable, "-m", "pip", "config", "list")).splitlines()
        configuration = configparser.RawConfigParser()
        configuration["global"] = {}
        # In pip, too, variables come before files.
        for line in sorted(listed, key=lambda line: line.startswith(":env:")):
            name, value = line.split("=", 1)
            if (option := name.rpartition(".")[2]) in PIP_OPTIONS:
                configuration["global"][option] = ast.literal_eval(value)
        with (self._folder / "pip.conf").open("w") as file:
            configuration.write(file)
        paths = set()
        for word in " ".join(configuration["global"].values()).split():
            path = Path(unquote(urlsplit(word).path))
            if word.startswith("file:") and path.name == "simple":
                path = path.parent  # the pages of an index link to files beside it
            if word.startswith(("/", "file:")) and path.exists():
                paths.add(str(path))
        return paths

    def _image(self, name: str) -> Image:
        described = json.loads(self._run("inspect", "--type=image", name))
        root = self._run("mount", self._run("from", "--pull-never", name))
        return Image(Path(root), described["Docker"]["config"])

    def _run(self, *arguments: str) -> str:
        return _output(self._try(*arguments))

    def _try(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        store = self._folder / self._driver
        return _captured(
            *("buildah", "--storage-driver", self._driver, "--root", store),
            *("--runroot", self._folder / "run", *arguments),
            BUILDAH_ISOLATION="chroot",
        )


class Container:
    """Processes on an image's root, as its user, with a loopback interface as their network.

    Attributes:
        process: what started its first process, and ends with its exit code.
    """

    def __init__(self, image: Image, command: list[str], access: str, variables: dict[str, str]):
        """Start its first process.

        Args:
            image: what it runs.
            command: the process, in place of the image's entry point and command.
            access: to the root: ro, or rw.
            variables: more variables of its processes.
        """
        self._image = image
        self._environment = image.environment() | variables
        words = [str(image.root), image.config["WorkingDir"], image.config["User"], access]
        self.process = self._popen(
            *("unshare", *NAMESPACES, "--fork", "--kill-child"),
            *("sh", "-c", START, "sh", *words, sys.executable, *command),
        )

    def output_of(self, *command: str) -> tuple[int, str]:
        """Run a command in it, as `docker exec` does; return the exit code and the output."""
        user, _, group = self._image.config["User"].partition(":")
        return ended(
            self._popen(
                *("nsenter", f"--target={self._first()}", *NAMESPACES, "--root", "--wd"),
                *(f"--setuid={user}", f"--setgid={group}", *command),
            )
        )

    def health(self) -> tuple[int, str]:
        """Run the image's health check; return its exit code and output."""
        kind, *command = self._image.config["Healthcheck"]["Test"]
        assert kind == "CMD", "in exec form"
        return self.output_of(*command)

    def wait_for(self, *command: str, seconds: float = 180) -> None:
        """Repeat a command in it until it succeeds."""
        limit = time.monotonic() + seconds
        while (found := self.output_of(*command))[0] != 0:
            assert self.process.poll() is None, ended(self.process)
            assert time.monotonic() < limit, found
            time.sleep(0.2)

    @contextmanager
    def neighbour(self, *command: str) -> Iterator[None]:
        """Run a command of this machine in its network."""
        network = ["nsenter", f"--target={self._first()}", "--net"]
        with subprocess.Popen([*network, *command]) as process:
            try:
                yield
            finally:
                process.terminate()

    def stop(self) -> tuple[int, str]:
        """Send the image's stop signal; return the exit code and all output."""
        os.kill(self._first(), signal.Signals[self._image.config["StopSignal"]])
        return ended(self.process)

    def kill(self) -> None:
        """End all its processes."""
        # The first: with it, the kernel ends the others.
        for process in children(self.process.pid):
            os.kill(process, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()

    def _first(self) -> int:
        """The id of its first process, once that is on the image's root and its user."""
        user = f"Uid:\t{self._image.config['User'].partition(':')[0]}\t"
        while self.process.poll() is None:
            for process in children(self.process.pid):
                with suppress(OSError):  # it may have ended
                    if user in Path(f"/proc/{process}/status").read_text():
                        return process
            time.sleep(0.02)
        raise AssertionError(ended(self.process))

    def _popen(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(shutil.which(program)), *arguments],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def started(image: Image, **variables: str) -> Iterator[Container]:
    """Start what the image starts, on a read-only root."""
    command = image.config["Entrypoint"] + image.config["Cmd"]
    container = Container(image, command, "ro", variables)
    try:
        yield container
    finally:
        container.kill()


def run(image: Image, *command: str, access: str = "ro") -> tuple[int, str]:
    """Run a command as the only process of a container; return its exit code and output."""
    return ended(Container(image, list(command), access, {}).process)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait for a process; return its exit code and output."""
    output = process.communicate(timeout=60)[0]
    return process.returncode, output.decode()


def _captured(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _output(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a command that must have succeeded."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()
