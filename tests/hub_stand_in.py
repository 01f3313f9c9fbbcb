"""A stand-in of the Hugging Face hub: what huggingface_hub 2.4 asks for to create, fill and read a repository.

Kept in memory: repositories with one branch and one commit after another. Large files go by Git LFS' basic transfer,
not by Xet, which the real hub prefers where hf_xet is installed. `asked` lists the requests.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

TOKENS = {"hf_writer": True, "hf_reader": False}  #: token -> whether it may write


class Hub(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def handle_one(self):
        """Find what was asked for."""
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        self.path = unquote(self.path.partition("?")[0])
        request = f"{self.command} {self.path}"
        route = next(((name, match) for name, form in ROUTES if (match := re.fullmatch(form, request))), None)
        self.server.hub.asked.append(route[0] if route else request)
        if route is None:
            return self.answer(404, {"error": "not in the stand-in"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        writes = route[0] in ("create", "preupload", "lfs", "commit")
        if writes and not TOKENS.get(token):
            return self.answer(403 if token else 401, {"error": "You don't have the rights"})
        return getattr(self, f"on_{route[0]}")(*route[1].groups())

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def answer(self, status, content, **headers):
        """JSON, or bytes, without a body for HEAD."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if status == 404 and "resolve" in self.path:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        """No lines in the tests' output."""

    @property
    def repositories(self):
        """Name -> private, commit, files."""
        return self.server.hub.repositories

    def on_create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        url = f"{self.server.hub.address}/{name}"
        if name in self.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.repositories[name] = SimpleNamespace(
            private=asked.get("visibility") == "private", commit="0" * 40, files={}
        )
        return self.answer(200, {"url": url, "name": name})

    def on_info(self, name, *_):
        it = self.repositories.get(name)
        if it is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = [{"rfilename": path} for path in it.files]
        return self.answer(200, {"id": name, "private": it.private, "sha": it.commit, "siblings": files, "tags": []})

    def on_validate(self):
        from huggingface_hub import ModelCard

        ModelCard(json.loads(self.body)["content"])  # raises for a broken head
        return self.answer(200, {"errors": [], "warnings": []})

    def on_preupload(self, name, _):
        asked = json.loads(self.body)["files"]
        large = (".safetensors", ".bin")  # as in the .gitattributes of a new repository
        modes = {it["path"]: "lfs" if it["path"].endswith(large) else "regular" for it in asked}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return self.answer(200, {"files": files})

    def on_lfs(self, name):
        objects = [
            {**it, "actions": {"upload": {"href": f"{self.server.hub.address}/lfs/{it['oid']}"}}}
            for it in json.loads(self.body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def on_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.hub.large[oid] = self.body
        return self.answer(200, {})

    def on_commit(self, name, _):
        it = self.repositories[name]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                it.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                it.files[value["path"]] = self.server.hub.large[value["oid"]]
        it.commit = hashlib.sha1(self.body).hexdigest()
        url = f"{self.server.hub.address}/{name}/commit/{it.commit}"
        return self.answer(200, {"success": True, "commitOid": it.commit, "commitUrl": url})

    def on_resolve(self, name, _, path):
        it = self.repositories.get(name)
        allowed = it and (not it.private or self.headers.get("Authorization"))
        if not allowed:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path not in it.files:
            return self.answer(404, {"error": "Entry not found"})
        data = it.files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.answer(200, data, ETag=etag, X_Repo_Commit=it.commit, X_Linked_Size=str(len(data)))


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("create", "POST /api/repos/create"),
    ("validate", "POST /api/validate-yaml"),
    ("preupload", rf"POST /api/models/{NAME}/preupload/(\w+)"),
    ("commit", rf"POST /api/models/{NAME}/commit/(\w+)"),
    ("info", rf"GET /api/models/{NAME}(/revision/\w+)?"),
    ("lfs", rf"POST /{NAME}.git/info/lfs/objects/batch"),
    ("put", r"PUT /lfs/(\w+)"),
    ("resolve", rf"(?:GET|HEAD) /{NAME}/resolve/(\w+)/(.+)"),
)


@contextmanager
def hub():
    """A running hub: `address`, `repositories`, `asked`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    server.hub = SimpleNamespace(address=address, repositories={}, large={}, asked=[])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
