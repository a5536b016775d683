"""Questions to a W&B server, asked through W&B's public API. Every answer or its absence comes in bounded time."""

from __future__ import annotations

import netrc
import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

ANSWER_TIMEOUT = 30  # seconds a server may take for one answer
Answer = TypeVar("Answer")


class ServerUnavailable(ConnectionError):
    """The server gave no good answer: it is not reachable, too slow, refuses the key, or fails."""


@dataclass(frozen=True)
class RemoteRun:
    """A run as the server has it.

    rows: of its history. last_step: of its last row, -1 for none. state: running, finished, failed, crashed (no sign of
    life for minutes), ... handle: W&B's own object.
    """

    rows: int
    last_step: int
    summary: Mapping[str, Any]
    state: str
    handle: Any

    def is_over(self, *, failed: bool) -> bool:
        """Return whether the run has ended at the server, and as what it was."""
        return self.state == ("failed" if failed else "finished")


class Server:
    """One project of a W&B server. Every method raises `ServerUnavailable` where no good answer comes."""

    def __init__(
        self, url: str, key: str, project: str, entity: str | None, *, timeout: float = ANSWER_TIMEOUT
    ) -> None:
        self.url, self.key, self.project, self.timeout = url.rstrip("/"), key, project, timeout
        self._entity = entity
        self._clients = threading.local()  # W&B's API object keeps the runs that it has read: threads share none

    def ping(self, timeout: float | None = None) -> None:
        """Return if the server answers at all within `timeout` seconds.

        W&B's client retries in silence until its own timeout. Only a plain request can tell within a second that a
        server is down, and why. It carries no key.
        """
        limit = self.timeout if timeout is None else timeout
        is_local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost")
        opener = build_opener(*([ProxyHandler({})] if is_local else []))

        def status() -> int:
            try:
                with opener.open(f"{self.url}/healthz", timeout=limit) as reply:
                    return int(reply.status)
            except HTTPError as e:
                with e:
                    return e.code

        try:
            code = _within(limit, status)
        except (URLError, HTTPException, OSError, ValueError) as e:
            reason = getattr(e, "reason", e)
            text = str(getattr(reason, "strerror", None) or reason) or type(e).__name__
            why = f"nothing came in {limit:g} s" if isinstance(reason, TimeoutError) else text
            raise ServerUnavailable(f"{self.url} does not answer: {why}") from None
        if code >= 500:
            raise ServerUnavailable(f"{self.url}: the server failed (HTTP {code})")

    def entity(self) -> str:
        """Return the entity that was asked for, else the key's own."""
        default = self._ask(lambda client: client.default_entity)  # asked in any case: a key that is refused shows
        return self._entity or str(default)

    def run(self, wandb_id: str) -> RemoteRun | None:
        """Return what the server has of a run, or None if it has nothing."""
        from wandb.apis.public.runs import RunNotFoundError

        def ask(client: Any) -> RemoteRun | None:
            client.flush()  # else it answers with what it has read before
            path = "/".join(filter(None, (self._entity or client.default_entity, self.project, wandb_id)))
            try:
                run = client.run(path)
            except Exception as e:
                if isinstance(_cause(e), RunNotFoundError):
                    return None
                raise
            with suppress(OSError):
                os.rmdir(run.dir)  # W&B makes a folder for each run in the temporary directory, and nothing goes there
            last = (run.history_keys or {}).get("lastStep", -1)
            return RemoteRun(int(run.history_line_count or 0), int(last), run.summary_metrics, run.state, run)

        return self._ask(ask)

    def steps(self, run: RemoteRun) -> list[int]:
        """Return the steps of the rows of a run's history, in order."""

        def scan() -> list[int]:
            return [int(row["_step"]) for row in run.handle.scan_history(use_cache=False) if "_step" in row]

        return self._ask(lambda client: _within(self.timeout, scan))  # W&B gives a scan no time limit

    def write_summary(self, run: RemoteRun, values: Mapping[str, Any]) -> None:
        """Set these values in a run's summary and remove those that are None. All others stay."""

        def write(client: Any) -> None:
            for key in (k for k, value in values.items() if value is None and k in run.summary):
                del run.handle.summary[key]
            run.handle.summary.update({k: value for k, value in values.items() if value is not None})

        self._ask(write)

    def _ask(self, question: Callable[[Any], Answer]) -> Answer:
        self.ping()
        import wandb

        try:
            client = getattr(self._clients, "api", None)
            if client is None:
                limit: Any = self.timeout  # W&B takes fractions of a second, too
                client = wandb.Api({"base_url": self.url}, timeout=limit, api_key=self.key)
                self._clients.api = client
            return question(client)
        except Exception as e:  # whatever W&B's client makes of an answer that it can not use
            reason = _reason(e, self.timeout).replace(self.key, "<key>")
            raise ServerUnavailable(f"{self.url}: {reason}") from None


def _reason(error: Exception, timeout: float) -> str:
    """Return why W&B's client got no good answer."""
    cause = _cause(error)  # knows the HTTP status, 0 for none
    status = getattr(getattr(cause, "response", None), "http_status", 0)
    if status in (401, 403):
        return f"the key is refused (HTTP {status})"
    if status:
        return f"the server failed (HTTP {status})"
    if isinstance(cause, TimeoutError) or "did not respond in time" in str(cause):
        return f"no answer in {timeout:g} s"
    if "invalid credentials" in str(cause):
        return "the server does not know this key"
    return f"an answer that is none of W&B ({type(cause).__name__}: {' '.join(str(cause).split())[:200]})"


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Return what `call` returns. Raises `TimeoutError` after so many seconds; looking up a host's name knows no
    limit."""
    outcome: queue.SimpleQueue[tuple[list[Answer], Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put(([call()], None))
        except Exception as e:
            outcome.put(([], e))

    threading.Thread(target=work, daemon=True).start()
    try:
        answers, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return answers[0]


def _cause(error: BaseException) -> BaseException:
    """Return the error that W&B's client has wrapped in its own ones."""
    while (inner := getattr(error, "exc", None) or error.__cause__) is not None:
        error = inner
    return error


def base_url() -> str:
    """Return the address that W&B's own client would use: WANDB_BASE_URL, else the one in its settings files."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    from wandb.sdk import wandb_setup

    return str(wandb_setup.singleton().settings.base_url)  # `wandb.setup` would start W&B's service process here


def api_key() -> str | None:
    """Return the key in WANDB_API_KEY, else the one that `wandb login` put into the netrc file, else None.

    W&B's client would ask for one on the terminal.
    """
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return None
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    login = hosts.get(urlsplit(base_url()).hostname or "")
    return login[2] if login else None
