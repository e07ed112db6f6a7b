"""The server's certificate, which is read again when its files change."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import structlog
import uvicorn
from uvicorn.config import create_ssl_context

from taskvec.errors import StartError
from taskvec.file_watch import FileWatch
from taskvec.permissions import read_failure

log = structlog.get_logger(__name__)


def check_certificate(certificate: Path, key: Path | None) -> None:
    """Refuse a certificate and a key that cannot be used together.

    Raises:
        StartError: names the files and the reason.
    """
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except (OSError, ValueError) as error:
        raise StartError(
            f"The certificate {certificate} with the key {key or certificate} cannot be used: "
            f"{_reason(certificate, key or certificate, error)}."
        ) from None


def _reason(certificate: Path, key: Path, error: Exception) -> str:
    if not isinstance(error, PermissionError):
        return str(error)
    denied = key if os.access(certificate, os.R_OK) else certificate  # OpenSSL does not say which
    return f"{denied}: {read_failure(denied, error)}"


class WatchedCertificate:
    """Gives new connections the certificate that is on disk; if it is invalid, the previous one."""

    def __init__(self, config: uvicorn.Config, replace: Callable[[ssl.SSLContext], None]) -> None:
        """Note the state of the files, which the server reads after that.

        Args:
            config: names the files, and has the other options of TLS.
            replace: called with a context for new handshakes.
        """
        self._config = config
        self._replace = replace
        self._certificate = Path(config.ssl_certfile or "")
        self._key = Path(config.ssl_keyfile) if config.ssl_keyfile else None
        files = [self._certificate] if self._key is None else [self._certificate, self._key]
        self._files = FileWatch(files, self._read_again)
        self.watch = self._files.watch
        self.ask = self._files.ask

    def _read_again(self) -> None:
        config = self._config
        try:
            check_certificate(self._certificate, self._key)
            context = create_ssl_context(
                self._certificate,
                self._key,
                config.ssl_keyfile_password,
                config.ssl_version,
                config.ssl_cert_reqs,
                config.ssl_ca_certs,
                config.ssl_ciphers,
            )
        except (StartError, OSError, ValueError) as error:
            # Between the replacement of one file and of the other they do not fit.
            log.error("certificate_not_reloaded", reason=str(error))  # noqa: TRY400
            return
        self._replace(context)
        log.info("certificate_reloaded", file=str(self._certificate))
