"""The part of the Hugging Face hub's API that pushing and loading a model use, on this machine, its files in memory."""
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "a" * 34


class Hub:
    """repositories: {OWNER/NAME: {path: content}}; commits: paths of each, in turn."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}                  # large files, by their SHA-256
        self.commits: list[list[str]] = []
        self.private: list[str] = []
        self.url = ""

    def commit(self, name: str, lines: list[dict]) -> None:
        files, paths = self.repositories[name], []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            if line["key"] != "header":
                paths.append(value["path"])
        self.commits.append(sorted(paths))


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, content: bytes | dict = b"", code: int = 200, head: bool = False, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def allowed(self) -> bool:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "who are you?"}, 401)
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def file(self, head: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts == [""]:
                return self.answer(head=head)
            if parts[:2] == ["api", "models"]:
                name = "/".join(parts[2:4])
                return self.answer({"id": name, "private": name in hub.private, "siblings": []}, head=head)
            name, path = "/".join(parts[:2]), "/".join(parts[4:])
            if name not in hub.repositories:
                return self.answer(code=404, head=head, X_Error_Code="RepoNotFound")
            if path not in hub.repositories[name]:
                return self.answer(code=404, head=head, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
            content = hub.repositories[name][path]
            return self.answer(content, head=head, X_Repo_Commit="1" * 40,
                               ETag=f'"{hashlib.sha256(content).hexdigest()}"')

        def do_HEAD(self) -> None:
            self.file(head=True)

        def do_GET(self) -> None:
            self.file(head=False)

        def do_PUT(self) -> None:
            content = self.body()
            hub.stored[hashlib.sha256(content).hexdigest()] = content
            self.answer()

        def do_POST(self) -> None:
            content = self.body()
            if not self.allowed():
                return
            if self.path == "/api/validate-yaml":           # of a README.md
                assert json.loads(content)["content"].startswith("---\n")
                return self.answer({"errors": [], "warnings": []})
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:3] == ["api", "repos", "create"]:
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repositories:
                    return self.answer({"error": "it is there", "url": f"{hub.url}/{name}"}, 409)
                hub.repositories[name] = {}
                hub.private += [name] * (asked.get("visibility") == "private")
                return self.answer({"url": f"{hub.url}/{name}"})
            if parts[4:5] == ["preupload"]:
                return self.answer({"files": [
                    {"path": each["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".onnx")) else "regular"}
                    for each in json.loads(content)["files"]]})
            if parts[-2:] == ["objects", "batch"]:
                return self.answer({"transfer": "basic", "objects": [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/upload/{each['oid']}"}}}
                    for each in json.loads(content)["objects"]]})
            hub.commit("/".join(parts[2:4]), [json.loads(line) for line in content.splitlines()])
            return self.answer({"commitUrl": f"{hub.url}/{'/'.join(parts[2:4])}/commit/{'1' * 40}",
                                "commitOid": "1" * 40})
    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
