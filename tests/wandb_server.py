"""As much of a W&B server as the client needs for runs, histories, alerts, artifacts, sweeps; keeps what it is sent."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

KEY = "canary" * 8  # of a length that wandb accepts
OWNER = {"id": "P", "name": "evaclip", "entity": {"id": "E", "name": "me"}}


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lines = {}  # run id -> lines of its history
        self.upserts = {}  # run id -> what its first session said of it
        self.alerts = []
        self.artifacts = {}  # id -> what its creation said, and its "manifest" when committed
        self.uploads = {}  # path -> content
        self.takes_artifacts = True
        self.finished = set()
        self.sweep = ""  # definition of the one there may be, as YAML
        self.trials = {}  # run id -> options, for its agent
        self.bodies = []  # everything it was sent, to look for secrets

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def history(self, run_id):
        return [json.loads(line) for line in self.lines.get(run_id, [])]

    def handle_error(self, request, client_address):
        """A killed client drops its connections."""

    def answer(self, query, variables, host):
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        run_id = variables.get("name")
        if name == "Viewer":
            return {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            return {"model": {**OWNER, "bucket": self._bucket(run_id) if run_id in self.lines else None}}
        if name == "UpsertBucket":
            inserted = run_id not in self.lines
            self.upserts.setdefault(run_id, variables)
            self.lines.setdefault(run_id, [])
            return {"upsertBucket": {"bucket": {**self._bucket(run_id), "project": OWNER}, "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"http://{host}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        return self._answer_on_sweeps(name, variables) or self._answer_on_artifacts(name, variables, host)

    def _answer_on_sweeps(self, name, variables):
        if name == "UpsertSweep":
            self.sweep = variables["config"]
            project = {**OWNER, "name": variables["projectName"], "entity": {"id": "E", "name": "me"}}
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        if name == "SweepWithRuns":
            about = {"id": "S", "name": "sweep1", "state": "RUNNING", "config": self.sweep, "runs": {"edges": []}}
            return {"project": {"sweep": about}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "A"}}}
        if name == "Heartbeat":
            commands = []
            if not json.loads(variables["runState"]):
                run_id = next((run_id for run_id in self.trials if run_id not in self.lines), None)
                args = {key: {"value": value} for key, value in self.trials.get(run_id, {}).items()}
                program = yaml.safe_load(self.sweep)["program"]
                commands = [{"type": "run", "run_id": run_id, "args": args, "program": program}] if run_id else []
            return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}
        return None

    def _answer_on_artifacts(self, name, variables, host):  # noqa: PLR0911  one per question
        if name == "ArtifactType":
            return {"project": {"artifact": None}}  # none of this name yet
        if name == "CreateArtifact" and not self.takes_artifacts:
            return {"createArtifact": None}
        if name == "CreateArtifact":
            number = f"A{len(self.artifacts)}"
            self.artifacts[number] = {**variables["input"], "committed": False}
            return {"createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": {}}}}
        if name == "CreateArtifactManifest":
            file = {"id": "F", "uploadUrl": f"http://{host}/manifest/{variables['artifactID']}", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}
        if name == "CreateArtifactFiles":
            nodes = [
                {
                    "storagePath": f"wandb_artifact/{file['md5']}",
                    "uploadUrl": f"http://{host}/artifact/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "artifact": {"id": file["artifactID"]},
                }
                for file in variables["input"]["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if name == "CommitArtifact":
            self.artifacts[variables["artifactID"]]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        if name == "ArtifactByID":
            created = self.artifacts[variables["id"]]
            collection = {"__typename": "ArtifactSequence", "name": created["artifactCollectionName"], "project": None}
            about = {"id": variables["id"], "artifactSequence": collection, "versionIndex": 0, "description": None}
            about |= {"artifactType": {"name": created["artifactTypeName"]}, "metadata": None, "tags": []}
            about |= {"ttlDurationSeconds": -2, "ttlIsInherited": True, "historyStep": None, "state": "COMMITTED"}
            about |= {"size": 0, "digest": "d", "commitHash": None, "fileCount": 0, "createdAt": "2026-01-01T00:00:00Z"}
            return {"artifact": {"__typename": "Artifact", **about, "updatedAt": None, "aliases": []}}
        return {}

    def _bucket(self, run_id):
        lines = self.lines[run_id]
        return {
            "id": f"B-{run_id}",
            "name": run_id,
            "displayName": "shown",
            "config": "{}",
            "summaryMetrics": "{}",
            "historyLineCount": len(lines),
            "historyTail": json.dumps(lines[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',  # that a run exists
        }

    def stream(self, run_id, sent):
        chunk = sent.get("files", {}).get("wandb-history.jsonl")
        if chunk:
            self.lines[run_id][chunk["offset"] :] = chunk["content"]
        if sent.get("complete"):
            self.finished.add(run_id)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {}, self.headers["Host"])}
        else:
            answer = {}
            self.server.uploads[self.path] = body
            if self.path.endswith("/file_stream"):
                self.server.stream(self.path.split("/")[-2], json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815  as the base class calls it

    def log_message(self, *_):
        """Be silent."""

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        return body


@contextmanager
def serving():
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def environment(**extra):
    """This process's, without what it knows of W&B."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**mine, "WANDB_ERROR_REPORTING": "false", **extra}


def offline_files(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def read_back(file):
    """Records of a run file, as wandb's own reader prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    out = subprocess.run(
        command, capture_output=True, check=True, text=True, env=environment(WANDB_MODE="offline"), cwd=file.parent
    )
    return [json.loads(line) for line in out.stdout.splitlines()]


def sync(files, server, run_dir):
    """Upload offline run files, as a person does."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(file.parent) for file in files)]
    env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    subprocess.run(command, check=True, capture_output=True, env=env, cwd=run_dir.parent)  # it leaves logs


def as_in_the_file(row):
    """A row of W&B's history as metrics.jsonl has it: without W&B's own fields, NaN as null."""
    assert row["_step"] == row["step"]
    return {name: None if value == "NaN" else value for name, value in row.items() if not name.startswith("_")}
