"""As much of a W&B server as the client needs to start, resume and finish a run; keeps the history it is sent."""

import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OWNER = {"id": "P", "name": "evaclip", "entity": {"id": "E", "name": "me"}}


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lines = {}  # run id -> lines of its history
        self.finished = set()
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
            self.lines.setdefault(run_id, [])
            return {"upsertBucket": {"bucket": {**self._bucket(run_id), "project": OWNER}, "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"http://{host}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
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
