"""A hub on this machine, as far as uploads need one: accounts, repositories, and commits of small files."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import huggingface_hub.constants as constants
import pytest


class Hub:
    """What was uploaded: `repos[name]` is its visibility and files."""

    def __init__(self):
        self.repos, self.token, self.refuses = {}, "hf_secret", None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.respond({})

            def do_POST(self):
                self.respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def respond(self, body):
                path = urlsplit(self.path).path
                status, told = hub.answer(path, body, self.headers.get("Authorization", ""))
                content = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if status >= 400:
                    self.send_header("X-Error-Message", str(told.get("error")))
                self.end_headers()
                self.wfile.write(content)

        return Handler

    def answer(self, path, body, authorization):
        """Status and content of the answer to one request."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if self.refuses is not None and path.startswith(self.refuses):
            return 403, {"error": "You may not write here"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos[name] = {"private": private, "files": {}, "commits": 0}
            return 200, {"url": f"{self.address}/{name}", "name": name}
        name, _, verb = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if verb == "preupload":
            files = json.loads(body)["files"]
            told = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return 200, {"files": told}
        if verb == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos[name]["files"][line["value"]["path"]] = content
            self.repos[name]["commits"] += 1
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1", "success": True}
        return 404, {"error": f"{path} is not here"}


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub, which the library takes for the hub in the block, and this process is logged in to."""
    hub = Hub()
    thread = Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", hub.token)
        try:
            yield hub
        finally:
            hub.server.shutdown()
            hub.server.server_close()
            thread.join()
