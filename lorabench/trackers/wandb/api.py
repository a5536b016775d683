"""What a W&B server has of a run, asked over its GraphQL address with time limits of our own. No wandb, no writing but summaries."""

from __future__ import annotations

import base64
import json
import netrc
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

ANSWER = 30.0  # seconds a server may take for one answer

VIEWER = "query Viewer { viewer { entity } }"
STATUS = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
 model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) {
  id state summaryMetrics historyLineCount historyTail } } }"""
HISTORY = """query HistoryPage($entity: String!, $project: String!, $run: String!, $minStep: Int64!, $maxStep: Int64!, $pageSize: Int!) {
 project(name: $project, entityName: $entity) { run(name: $run) { history(minStep: $minStep, maxStep: $maxStep, samples: $pageSize) } } }"""
SUMMARY = """mutation UpsertBucket($id: String, $summaryMetrics: JSONString) {
 upsertBucket(input: {id: $id, summaryMetrics: $summaryMetrics}) { bucket { id } } }"""
PAGE = 1000  # steps a page of history


class Away(ConnectionError):
    """The server gave no answer: not reachable, too slow, refusing, or failing."""


@dataclass(frozen=True)
class Mirrored:
    """What the server has of a run. last_step: of its last history row, -1 for none. state: running, finished, failed, crashed
    (silent for minutes), ...; "" where the server does not say."""

    id: str
    rows: int
    last_step: int
    summary: Mapping[str, Any]
    state: str = ""

    def ended(self, *, failed: bool = False) -> bool:
        """Whether it counts as over there, and as what it was."""
        return self.state in ("", "failed" if failed else "finished")


class Server:
    """A W&B server and whose project is meant. Every method raises `Away` where no good answer comes."""

    def __init__(self, url: str, key: str, project: str, entity: str | None, *, timeout: float = ANSWER) -> None:
        self.url, self.key, self.project, self.timeout = url.rstrip("/"), key, project, timeout
        self._entity = entity
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost")
        self._opener = build_opener(*([ProxyHandler({})] if local else []))

    def entity(self) -> str:
        """As asked for, else the key's own; a first sign of life, too."""
        viewer = self._ask(VIEWER, {}).get("viewer")
        if not viewer:
            raise Away(f"{self.url} does not know this key")
        return self._entity or str(viewer["entity"])

    def run(self, name: str) -> Mirrored | None:
        """None for a run that the server has nothing of."""
        found = self._ask(STATUS, {"project": self.project, "entity": self._entity, "name": name})
        bucket = (found.get("model") or {}).get("bucket")
        if bucket is None:
            return None
        tail = json.loads(bucket.get("historyTail") or "[]") or []
        last = json.loads(tail[-1]).get("_step", -1) if tail else -1
        summary = json.loads(bucket.get("summaryMetrics") or "{}") or {}
        rows, state = int(bucket.get("historyLineCount") or 0), str(bucket.get("state") or "")
        return Mirrored(bucket["id"], rows, int(last), summary, state)

    def steps(self, name: str, last: int) -> list[int]:
        """Steps of the run's history rows up to `last`, as they stand."""
        out: list[int] = []
        entity = self.entity()
        for low in range(0, last + 1, PAGE):
            asked = {"entity": entity, "project": self.project, "run": name, "minStep": low, "maxStep": low + PAGE}
            run = (self._ask(HISTORY, {**asked, "pageSize": PAGE}).get("project") or {}).get("run") or {}
            rows = [json.loads(row) if isinstance(row, str) else row for row in run.get("history") or []]
            out += [int(row["_step"]) for row in rows if "_step" in row]
        return out

    def write_summary(self, run: Mirrored, values: Mapping[str, Any]) -> None:
        """Set these values of the summary, take out those that are None; the others stay."""
        merged = json.dumps({k: v for k, v in {**run.summary, **values}.items() if v is not None}, allow_nan=False)
        self._ask(SUMMARY, {"id": run.id, "summaryMetrics": merged})

    def _ask(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        token = base64.b64encode(f"api:{self.key}".encode()).decode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json", "User-Agent": "lorabench"}
        body = json.dumps({"query": query, "variables": variables}).encode()
        try:
            with self._opener.open(Request(f"{self.url}/graphql", body, headers), timeout=self.timeout) as reply:
                answer = json.load(reply)
        except HTTPError as e:
            refused = "the key is refused" if e.code in (401, 403) else "the server failed"
            raise Away(f"{self.url}: {refused} (HTTP {e.code})") from None
        except (URLError, HTTPException, OSError, ValueError) as e:
            raise Away(f"{self.url} does not answer: {_why(e, self.timeout)}") from None
        if not isinstance(answer, dict) or answer.get("errors") or not isinstance(answer.get("data"), dict):
            errors = answer.get("errors") if isinstance(answer, dict) else None
            said = "; ".join(str(e.get("message", e)) for e in errors or [])[:200]
            raise Away(f"{self.url}: {said or 'an answer that is none of W&B'}")
        data: dict[str, Any] = answer["data"]
        return data


def _why(e: Exception, timeout: float) -> str:
    reason = getattr(e, "reason", e)
    if isinstance(reason, (TimeoutError, socket.timeout)):
        return f"nothing came in {timeout:g} s"
    return str(getattr(reason, "strerror", None) or reason) or type(e).__name__


def base_url() -> str:
    """Where W&B's own client would connect to: WANDB_BASE_URL, else what its settings files say."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    from wandb.sdk import wandb_setup

    return str(wandb_setup.singleton().settings.base_url)  # `wandb.setup` would start W&B's service process here


def api_key() -> str | None:
    """From WANDB_API_KEY, or from the netrc file where `wandb login` puts it; W&B would ask on the terminal."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return None
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    found = hosts.get(urlsplit(base_url()).hostname or "")
    return found[2] if found else None
