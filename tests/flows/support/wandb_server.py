"""As much of a W&B server as wandb's SDK asks of one, in memory, on 127.0.0.1.

Imitated, as wandb 0.31 asks for it (GraphQL at /graphql, told by the operation's name): logging in (Viewer); starting,
updating and ending a run (UpsertBucket); its metrics, system metrics and summary (POST .../file_stream); its files
(CreateRunFiles, PUT to the address that is answered); artifacts as far as their being accepted (their content by
reference and their manifest; nothing can be downloaded again); reading runs (Runs, Run), their whole history (a live
HistoryPage; there are no parquet exports) and a file of theirs (RunFiles, GET); creating a sweep and one agent that
runs its grid (UpsertSweep, SweepWithRuns, CreateAgent, Heartbeat).
Not imitated: permissions (any key does), filters, orders and pages, aliases, teams, launch, reports, alerts, sweeps
other than a grid. What is not imitated is answered by an error that names it, and kept in `unknown`.
"""

import gzip
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ruamel.yaml import YAML

Json = dict[str, Any]
_UNQUOTED = re.compile(r"\b(?:query|mutation)\s+(\w+)")


@dataclass
class StoredRun:
    """What the server holds of one run. history, events: rows; files: {name: content}."""

    entity: str
    project: str
    name: str
    config: str = "{}"
    summary: str = "{}"
    told: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def as_node(self) -> Json:
        state = "running" if self.exit_code is None else "failed" if self.exit_code else "finished"
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.told.get("displayName") or self.name,
            "description": "",
            "notes": None,
            "tags": [],
            "commit": None,
            "readOnly": False,
            "sweepName": self.told.get("sweep"),
            "state": state,
            "group": self.told.get("groupName"),
            "jobType": self.told.get("jobType"),
            "config": self.config,
            "summaryMetrics": self.summary,
            "systemMetrics": json.dumps(self.events[-1] if self.events else {}),
            "historyLineCount": len(self.history),
            "historyKeys": {
                "lastStep": max((row["_step"] for row in self.history), default=-1),
                "keys": {},
                "sets": [],
            },
            "createdAt": "2026-11-26T10:00:00",
            "heartbeatAt": "2026-11-26T10:00:01",
            "user": {"name": "Ada", "username": "ada"},
            "projectId": "1",
            "project": {"id": "1", "name": self.project, "entity": {"id": "1", "name": self.entity}},
        }


class WandbServer:
    """The server; `url` is its WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.artifacts: list[Json] = []
        self.sweeps: dict[str, Json] = {}
        self._counter = itertools.count(1)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self) -> dict[str, str]:
        """What makes wandb talk to it; the key is made up."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_ERROR_REPORTING": "false"}

    def answer(self, query: str, variables: Json) -> Json:
        """One GraphQL question."""
        found = _UNQUOTED.search(query)
        name = found.group(1) if found else query.strip()[:40]
        self.operations.append(name)
        method = getattr(self, f"_{name}", None)
        if method is None:
            self.unknown.append(f"{name}: {query} {variables}")
            return {"errors": [{"message": f"{name} is not imitated"}], "data": None}
        return {"data": method(variables)}

    def _Viewer(self, _: Json) -> Json:
        names = {"entity": "ada", "username": "ada", "email": "ada@example.org", "name": "Ada", "admin": False}
        return {"viewer": {"id": "1", **names, "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def _GetDefaultEntity(self, _: Json) -> Json:
        return {"viewer": {"id": "1", "entity": "ada"}}

    def _ServerFeaturesQuery(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:
        return {"entity": {"organization": None}}

    def _ArtifactType(self, _: Json) -> Json:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, told: Json) -> Json:
        self.artifacts.append(told["input"])
        made = {
            "id": f"artifact-{len(self.artifacts)}",
            "state": "PENDING",
            "artifactSequence": {"latestArtifact": None},
        }
        return {"createArtifact": {"artifact": made}}

    def _CreateArtifactManifest(self, told: Json) -> Json:
        file = {"id": "1", "uploadUrl": f"{self.url}/manifest/{told['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{told['artifactID']}", "file": file}}}

    def _RunHistoryKeys(self, told: Json) -> Json:
        return {"project": {"run": {"historyKeys": self.runs[told["name"]].as_node()["historyKeys"]}}}

    def _CreateArtifactFiles(self, told: Json) -> Json:
        nodes = []
        for file in told["input"]["artifactFiles"]:
            where = {
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/artifact/{file['artifactID']}/{file['name']}",
            }
            nodes.append(
                {
                    "node": {
                        **where,
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": file["artifactID"]},
                    }
                }
            )
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, told: Json) -> Json:
        return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": "0" * 32}}}

    def _RunParquetHistory(self, told: Json) -> Json:
        rows = [{"_step": row["_step"]} for row in self.runs[told["runName"]].history]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows}}}}

    def _HistoryPage(self, told: Json) -> Json:
        rows = [row for row in self.runs[told["run"]].history if told["minStep"] <= row["_step"] < told["maxStep"]]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows[: told["pageSize"]]]}}}

    def _RunFiles(self, told: Json) -> Json:
        run = self.runs[told["name"]]
        edges = []
        for name, content in run.files.items():
            if name in told["fileNames"] or not told["fileNames"]:
                url = f"{self.url}/files/{run.entity}/{run.project}/{run.name}/{name}"
                where = {"id": name, "name": name, "url": url, "directUrl": url, "sizeBytes": str(len(content))}
                edges.append({"node": {**where, "mimetype": "", "updatedAt": None, "md5": ""}, "cursor": name})
        files = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": "1", "run": {"fileCount": len(run.files), "files": files}}}

    def _UpsertSweep(self, told: Json) -> Json:
        name = f"sweep{len(self.sweeps) + 1}"
        self.sweeps[name] = {"config": told["config"], "trials": grid(YAML(typ="safe").load(told["config"]))}
        project = {"id": "1", "name": told["projectName"], "entity": {"id": "1", "name": told["entityName"]}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, told: Json) -> Json:
        config = self.sweeps[told["sweep"]]["config"]
        sweep = {"id": told["sweep"], "name": told["sweep"], "method": "grid", "state": "RUNNING", "config": config}
        return {"project": {"sweep": {**sweep, "controller": None, "scheduler": None, "runs": {"edges": []}}}}

    def _CreateAgent(self, told: Json) -> Json:
        return {"createAgent": {"agent": {"id": told["sweep"]}}}

    def _Heartbeat(self, told: Json) -> Json:
        """The next trial for an agent that has none, or the end; an agent's id here is its sweep's name."""
        sweep = self.sweeps[told["id"]]
        commands: list[Json] = []
        if not any(json.loads(told.get("runState") or "{}").values()):
            if sweep["trials"]:
                number = next(self._counter)
                program = YAML(typ="safe").load(sweep["config"])["program"]
                commands = [
                    {"type": "run", "run_id": f"agents{number}", "args": sweep["trials"].pop(0), "program": program}
                ]
            else:
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": told["id"]}, "commands": json.dumps(commands)}}

    def _UpsertBucket(self, told: Json) -> Json:
        entity, project = told.get("entity") or "ada", told.get("project") or "uncategorized"
        inserted = told["name"] not in self.runs
        run = self.runs.setdefault(told["name"], StoredRun(entity, project, told["name"]))
        run.told |= {key: value for key, value in told.items() if value is not None}
        run.config = told.get("config") or run.config
        return {"upsertBucket": {"bucket": run.as_node(), "inserted": inserted}}

    def _CreateRunFiles(self, told: Json) -> Json:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{told['run']}/{name}"} for name in told["files"]]
        return {"createRunFiles": {"runID": f"id-{told['run']}", "uploadHeaders": [], "files": files}}

    def _Runs(self, told: Json) -> Json:
        runs = [run for run in self.runs.values() if (run.entity, run.project) == (told["entity"], told["project"])]
        if not runs:
            return {"project": None}
        edges = [{"node": run.as_node(), "cursor": run.name} for run in runs]
        page = {"endCursor": None, "hasNextPage": False}
        return {
            "project": {
                "internalId": "1",
                "runCount": len(runs),
                "readOnly": False,
                "runs": {"edges": edges, "pageInfo": page},
            }
        }

    def _Run(self, told: Json) -> Json:
        run = self.runs.get(told["name"])
        return {"project": {"run": None if run is None else run.as_node()}}

    def stream(self, run: StoredRun, told: Json) -> Json:
        """One message of a run's file stream: {"files": {name: {"offset", "content": lines}}, "complete", ...}."""
        for name, chunk in told.get("files", {}).items():
            lines = [json.loads(line) for line in chunk.get("content", []) if name.endswith((".jsonl", ".json"))]
            if name == "wandb-history.jsonl":
                del run.history[chunk["offset"] :]
                run.history += lines
            elif name == "wandb-events.jsonl":
                run.events += lines
            elif name == "wandb-summary.json":
                run.summary = json.dumps(lines[-1])
        if told.get("complete"):
            run.exit_code = told.get("exitcode", 0)
        return {"exitcode": None, "limits": {}}


def grid(config: Json) -> list[Json]:
    """The trials of a sweep by grid, as its agent is told them: {parameter: {"value": value}}."""
    choices = {
        name: told["values"] if "values" in told else [told["value"]] for name, told in config["parameters"].items()
    }
    return [
        dict(zip(choices, ({"value": value} for value in values), strict=True))
        for values in itertools.product(*choices.values())
    ]


class _Handler(BaseHTTPRequestHandler):
    server_of: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            told = json.loads(body)
            self._reply(json.dumps(self.server_of.answer(told["query"], told.get("variables") or {})).encode())
            return
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        run = self.server_of.runs.get(found.group(1)) if found else None
        if run is None:
            self.server_of.unknown.append(f"POST {self.path}")
            self._reply(b"{}", 404)
            return
        self._reply(json.dumps(self.server_of.stream(run, json.loads(body))).encode())

    def do_PUT(self) -> None:
        body = self._body()
        found = re.fullmatch(r"/upload/([^/]+)/(.+)", self.path)
        run = self.server_of.runs.get(found.group(1)) if found else None
        if found and run is not None:
            run.files[found.group(2)] = body
        self._reply(b"")

    def do_GET(self) -> None:
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/(.+)", self.path)
        run = self.server_of.runs.get(found.group(1)) if found else None
        content = run.files.get(found.group(2)) if found and run is not None else None
        if content is None:
            self.server_of.unknown.append(f"GET {self.path}")
        self._reply(content or b"", 404 if content is None else 200)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
