"""A stand-in for a W&B server on the loopback device: GraphQL, file streams, uploads, artifacts, and faults on demand.

It keeps what arrives, by run, and how it arrived: a line that was sent twice, or past the end, shows.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

KEY = "0123456789abcdef" * 2 + "01234567"  # 40 characters; a fake one


@dataclass
class Bucket:
    """One W&B run as the server knows it."""

    entity: str
    project: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)  # displayName, groupName, jobType, tags, ...
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    sent: int = 0  # history lines that came in, repeated ones too
    faults: list[str] = field(default_factory=list)  # lines past the end, or written over

    @property
    def state(self) -> str:
        return "crashed" if self.exit_code is None else "failed" if self.exit_code else "finished"

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    @property
    def id(self) -> str:
        return f"id-{self.name}"

    def values(self, key: str) -> dict[int, Any]:
        return {row["_step"]: row[key] for row in self.history if key in row}


@contextmanager
def silence() -> Iterator[str]:
    """The address of a host that takes connections and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(1000)
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


class WandbServer:
    """Use as a context, or `start` and `stop`. `delay`: seconds before each answer; `refuse`: an HTTP status for all."""

    def __init__(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.httpd: ThreadingHTTPServer | None = None
        self.lock = threading.Lock()
        self.asked = 0  # connections that are open
        self.reset()

    def reset(self) -> None:
        self.runs: dict[str, Bucket] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.operations: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.delay, self.refuse = 0.0, 0
        self.refuse_streams = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if self.httpd is None:
            handler = type("Handler", (_Handler,), {"owner": self})
            self.httpd = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
            self.httpd.daemon_threads = True
            self.httpd.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that was cut off
            threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from here on."""
        if self.httpd is not None:
            self.httpd.shutdown()
            self.httpd.server_close()
            self.httpd = None

    def __enter__(self) -> WandbServer:
        self.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.stop()

    # -- GraphQL ---------------------------------------------------------------------------------------------------------

    def answer(self, name: str, v: dict[str, Any]) -> Any:
        made = getattr(self, f"_{name}", None)
        if made is None:
            return None
        return made(v)

    def _Viewer(self, v: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": "team"}}]}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": teams}}

    def _ServerFeaturesQuery(self, v: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, v: dict[str, Any]) -> Any:
        entity, project = v.get("entity") or "me", v["project"]
        run = self.runs.get(f"{entity}/{project}/{v['name']}")
        return {"model": {"id": "m", "name": project, "entity": _entity(entity), "bucket": run and _resume(run)}}

    def _UpsertBucket(self, v: dict[str, Any]) -> Any:
        known = next((r for r in self.runs.values() if v.get("id") == r.id), None)
        if known is None:
            entity, project = v.get("entity") or "me", v["project"]
            path = f"{entity}/{project}/{v['name']}"
            known, inserted = self.runs.setdefault(path, Bucket(entity, project, v["name"])), path not in self.runs
        else:
            inserted = False
        for key in ("displayName", "groupName", "jobType", "tags", "notes", "sweep"):
            if v.get(key) is not None:
                known.fields[key] = v[key]
        if v.get("config"):
            known.config |= json.loads(v["config"])
        if v.get("summaryMetrics"):
            known.summary = json.loads(v["summaryMetrics"])
        return {"upsertBucket": {"bucket": _bucket(known), "inserted": inserted}}

    def _RewindRun(self, v: dict[str, Any]) -> Any:
        run = self.runs[f"{v.get('entity') or 'me'}/{v['project']}/{v['runName']}"]
        run.history = [row for row in run.history if row["_step"] <= v["metricValue"]]
        return {"rewindRun": {"rewoundRun": _bucket(run)}}

    def _HistoryPage(self, v: dict[str, Any]) -> Any:
        run = self.runs[f"{v['entity']}/{v['project']}/{v['run']}"]
        rows = [json.dumps(r) for r in run.history if v["minStep"] <= r["_step"] < v["maxStep"]]
        return {"project": {"run": {"history": rows[: v["pageSize"]]}}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> Any:
        files = [
            {"name": n, "uploadUrl": f"{self.url}/upload/{v['entity']}/{v['project']}/{v['run']}/{n}"}
            for n in v["files"]
        ]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, v: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _CreateArtifact(self, v: dict[str, Any]) -> Any:
        given = v.get("input", v)
        name = f"a{len(self.artifacts)}"
        self.artifacts[name] = {**given, "files": {}, "state": "PENDING"}
        found = {"id": name, "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"__typename": "CreateArtifactPayload", "artifact": found}}

    def _CreateArtifactManifest(self, v: dict[str, Any]) -> Any:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(v["artifactID"])}}

    def _UpdateArtifactManifest(self, v: dict[str, Any]) -> Any:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(v["artifactManifestID"])}}

    def _manifest(self, name: str) -> dict[str, Any]:
        file = {"id": f"f-{name}", "uploadUrl": f"{self.url}/artifact/{name}/manifest.json", "uploadHeaders": []}
        return {"id": name, "file": file}

    def _CreateArtifactFiles(self, v: dict[str, Any]) -> Any:
        nodes = []
        for spec in v["input"]["artifactFiles"]:
            name, path = spec["artifactID"], spec["name"]
            nodes.append({"node": {"storagePath": f"wandb_artifacts/{name}/{path}", "uploadUrl": f"{self.url}/artifact/{name}/{path}",
                                   "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": name}}})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, v: dict[str, Any]) -> Any:
        self.artifacts[v["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def _UpsertView2(self, v: dict[str, Any]) -> Any:
        self.views.append(v)
        return {"upsertView": {"view": {"id": "v", "name": v["name"]}, "inserted": True}}

    # -- files -----------------------------------------------------------------------------------------------------------

    def stream(self, path: str, body: dict[str, Any]) -> None:
        """POST .../file_stream: lines of files by offset, and the end of the run."""
        run = self.runs[path]
        for name, chunk in (body.get("files") or {}).items():
            lines, offset = chunk["content"], chunk["offset"]
            if name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
            elif name == "wandb-history.jsonl":
                self._append(run, offset, [json.loads(line) for line in lines])
        if body.get("complete"):
            run.exit_code = body.get("exitcode")

    def _append(self, run: Bucket, offset: int, rows: list[dict[str, Any]]) -> None:
        run.sent += len(rows)
        if offset > len(run.history):
            run.faults.append(f"offset {offset} of {len(run.history)} lines")
        for k, row in enumerate(rows, start=offset):
            if k < len(run.history):
                run.faults.append(f"line {k} again")
                run.history[k] = row
            else:
                run.history.append(row)

    def put(self, path: str, body: bytes) -> None:
        kind, rest = path.split("/", 1)
        if kind == "artifact":
            name, file = rest.split("/", 1)
            self.artifacts[name]["files"][file] = body
        else:
            entity, project, run, file = rest.split("/", 3)
            self.runs[f"{entity}/{project}/{run}"].files[file] = body


def _entity(name: str) -> dict[str, str]:
    return {"id": "e", "name": name}


def _bucket(run: Bucket) -> dict[str, Any]:
    project = {"id": "p", "name": run.project, "entity": _entity(run.entity)}
    return {"id": run.id, "name": run.name, "displayName": run.fields.get("displayName"), "description": "", "sweepName": None,
            "config": json.dumps(run.config), "project": project, "historyLineCount": len(run.history)}  # fmt: skip


def _resume(run: Bucket) -> dict[str, Any]:
    tail = json.dumps([json.dumps(run.history[-1])] if run.history else [])
    return {"id": run.id, "name": run.name, "state": run.state, "summaryMetrics": json.dumps(run.summary), "displayName": run.fields.get("displayName"),
            "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]",
            "config": json.dumps(run.config), "tags": run.fields.get("tags") or [], "notes": None,
            "wandbConfig": json.dumps({"t": 1})}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer

    def log_message(self, *args: Any) -> None: ...

    def handle(self) -> None:
        with self.owner.lock:
            self.owner.asked += 1
        try:
            super().handle()
        finally:
            with self.owner.lock:
                self.owner.asked -= 1

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return zlib.decompress(raw, 31) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _reply(self, value: Any, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        with suppress(OSError):  # who asked may be gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    def _begin(self) -> bytes | None:
        body, owner = self._body(), self.owner
        time.sleep(owner.delay)
        if owner.refuse or (owner.refuse_streams and self.path.endswith("/file_stream")):
            self._reply({"errors": [{"message": "refused"}]}, owner.refuse or 500)
            return None
        owner.keys.add(self.headers.get("Authorization") or "")
        return body

    def do_POST(self) -> None:
        body = self._begin()
        if body is None:
            return
        data = json.loads(body or b"{}")
        with self.owner.lock:
            if self.path.endswith("/file_stream"):
                entity, project, run = unquote(self.path).split("/")[-4:-1]
                self.owner.operations["file_stream"] += 1
                self.owner.stream(f"{entity}/{project}/{run}", data)
                return self._reply({"limits": {}})
            found = re.search(r"\b(?:query|mutation)\s+(\w+)", data.get("query", ""))
            name = found.group(1) if found else "unnamed"
            self.owner.operations[name] += 1
            answer = self.owner.answer(name, data.get("variables") or {})
        if answer is None:
            return self._reply({"errors": [{"message": f"the stand-in does not know {name}"}]}, 400)
        return self._reply({"data": answer})

    def do_PUT(self) -> None:
        body = self._begin()
        if body is not None:
            with self.owner.lock:
                self.owner.put(unquote(self.path).lstrip("/"), body)
            self._reply({})

    def do_GET(self) -> None:
        if self._begin() is not None:
            self._reply({})
