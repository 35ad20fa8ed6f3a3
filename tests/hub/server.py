"""A Hub on localhost: the HTTP protocol that `huggingface_hub` speaks, storing to a folder, with switchable faults.

Only what the client really asks for: accounts, repositories, commits with and without LFS, branches and tags, trees,
and files with ranges and etags.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from huggingface_hub.utils.sha import git_hash


USER, TOKEN = "me", "hf_secret"


@dataclass
class Repo:
    """Commits are {path: sha256 of a blob}; refs are {branch or tag: commit}."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        oid = hashlib.sha1(json.dumps([sorted(files.items()), message, len(self.commits)]).encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.branches[branch] = files, message, oid
        return oid

    def find(self, revision: str) -> str | None:
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """Requests whose path holds `where` fail with `status`, or are cut off in the middle (status 0), `times` times."""

    where: str
    status: int
    times: int = 10**6


class HubServer:
    """The server's state; `url` once it runs."""

    def __init__(self, folder: Path):
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.cards: list[str] = []  # whose metadata was to be validated
        self.url = ""

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        (self.blobs / oid).write_bytes(content)
        return oid

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.where in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


class NotThere(Exception):
    """A repository or a revision that does not exist; answered with 404."""


def make_app(hub: HubServer) -> FastAPI:
    app = FastAPI()
    app.add_exception_handler(NotThere, lambda request, missing: error(404, *missing.args))

    @app.middleware("http")
    async def gate(request: Request, call_next):
        path = request.scope["path"] = _as_of_models(request.url.path)
        hub.requests.append(f"{request.method} {path}")
        if (fault := hub.fault(path)) is not None:
            if fault.status:
                return error(fault.status, "", "fault")
            return StreamingResponse(_cut_off(), headers={"Content-Length": "1000"})
        writes = request.method in ("POST", "PUT", "DELETE") and path.split("/")[-2:-1] != ["paths-info"]
        if (writes and not path.startswith(("/lfs/", "/api/validate-yaml"))) or "whoami" in path:
            token = request.headers.get("authorization", "").removeprefix("Bearer ")
            if token != TOKEN:
                return error(401, "", "Invalid credentials in Authorization header")
        return await call_next(request)

    @app.get("/api/whoami-v2")
    def whoami():
        return {"name": USER, "type": "user", "orgs": []}

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request):
        content = (await request.json())["content"]
        hub.cards.append(content)
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create")
    async def create(request: Request):
        body = await request.json()
        namespace = body.get("organization") or USER
        repo_id = f"{namespace}/{body['name']}"
        if namespace != USER:
            return error(403, "", f"You don't have the rights to create a model under the namespace {namespace!r}")
        known = repo_id in hub.repos
        if not known:
            repo = hub.repos[repo_id] = Repo(body.get("private") or body.get("visibility") == "private")
            repo.commit("main", {".gitattributes": hub.store(b"*.safetensors filter=lfs\n")}, "initial commit")
        return JSONResponse({"url": f"{hub.url}/{repo_id}", "id": repo_id}, 409 if known else 200)

    def find(repo_id: str, revision: str = "main") -> tuple[Repo, str]:
        if (repo := hub.repos.get(repo_id)) is None:
            raise NotThere("RepoNotFound", "Repository not found")
        if (oid := repo.find(revision)) is None:
            raise NotThere("RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, oid

    def describe(repo_id: str, revision: str):
        repo, oid = find(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        known_as = repo_id.removeprefix("datasets:")
        return {"id": known_as, "modelId": known_as, "sha": oid, "private": repo.private, "siblings": siblings,
                "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    @app.get("/api/models/{user}/{name}")
    def info(user: str, name: str):
        return describe(f"{user}/{name}", "main")

    @app.get("/api/models/{user}/{name}/revision/{revision}")
    def info_of(user: str, name: str, revision: str):
        return describe(f"{user}/{name}", revision)

    @app.get("/api/models/{user}/{name}/refs")
    def refs(user: str, name: str):
        found = find(f"{user}/{name}")
        listed = {
            kind: [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": oid} for key, oid in values.items()]
            for kind, values in (("branches", found[0].branches), ("tags", found[0].tags))
        }
        return listed | {"converts": []}

    def entries(repo: Repo, oid: str) -> dict[str, dict]:
        found = {}
        for path, blob in repo.commits[oid].items():
            content = (hub.blobs / blob).read_bytes()
            size = len(content)
            found[path] = {"type": "file", "path": path, "size": size, "oid": git_hash(content)}
            if path.endswith(".safetensors"):
                found[path]["lfs"] = {"oid": blob, "size": size, "pointerSize": 130}
            for parent in list(Path(path).parents)[:-1]:
                found[str(parent)] = {"type": "directory", "path": str(parent), "size": 0, "oid": "0" * 40}
        return found

    @app.get("/api/models/{user}/{name}/tree/{revision}")
    @app.get("/api/models/{user}/{name}/tree/{revision}/{path:path}")
    def tree(user: str, name: str, revision: str, path: str = "", recursive: bool = False):
        found = find(f"{user}/{name}", revision)
        inside = [
            entry
            for key, entry in sorted(entries(*found).items())
            if (not path or key.startswith(f"{path}/")) and (recursive or str(Path(key).parent) == (path or "."))
        ]
        return inside if inside or not path else error(404, "EntryNotFound", f"{path} does not exist")

    @app.post("/api/models/{user}/{name}/paths-info/{revision}")
    async def paths_info(user: str, name: str, revision: str, request: Request):
        found = find(f"{user}/{name}", revision)
        body = await request.body()
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else [
            part.partition("=")[2].replace("%2F", "/") for part in body.decode().split("&") if part.startswith("paths")
        ]  # fmt: skip
        return [entry for key, entry in entries(*found).items() if key in wanted]

    @app.post("/api/models/{user}/{name}/preupload/{revision}")
    async def preupload(user: str, name: str, revision: str, request: Request):
        find(f"{user}/{name}", revision)
        files = (await request.json())["files"]
        mode = {True: "lfs", False: "regular"}
        return {
            "files": [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
        }

    @app.post("/{user}/{name}.git/info/lfs/objects/batch")
    async def lfs_batch(user: str, name: str, request: Request):
        objects = []
        for item in (await request.json())["objects"]:
            upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}
            missing = not (hub.blobs / item["oid"]).exists()
            objects.append({"oid": item["oid"], "size": item["size"], **({"actions": upload} if missing else {})})
        return {"transfer": "basic", "objects": objects}

    @app.put("/lfs/{oid}")
    async def lfs_upload(oid: str, request: Request):
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return error(400, "", "the content is not what was announced")
        hub.store(content)
        return {}

    @app.post("/api/models/{user}/{name}/commit/{revision}")
    async def commit(user: str, name: str, revision: str, request: Request):
        repo, parent = find(f"{user}/{name}", revision)
        files, message = dict(repo.commits[parent]), ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if not (hub.blobs / value["oid"]).exists():
                    return error(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        oid = repo.commit(revision, files, message)
        return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{user}/{name}/commit/{oid}"}

    @app.post("/api/models/{user}/{name}/branch/{branch}")
    async def create_branch(user: str, name: str, branch: str):
        repo, oid = find(f"{user}/{name}")
        if branch in repo.branches:
            return error(409, "", "Reference already exists")
        repo.branches[branch] = oid
        return {}

    @app.post("/api/models/{user}/{name}/tag/{revision}")
    async def create_tag(user: str, name: str, revision: str, request: Request):
        repo, oid = find(f"{user}/{name}", revision)
        tag = (await request.json())["tag"]
        if tag in repo.tags:
            return error(409, "", "Tag reference exists already")
        repo.tags[tag] = oid
        return {}

    @app.delete("/api/models/{user}/{name}/tag/{tag}")
    async def delete_tag(user: str, name: str, tag: str):
        found = find(f"{user}/{name}")
        found[0].tags.pop(tag, None)
        return {}

    @app.api_route("/{user}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(user: str, name: str, revision: str, path: str, request: Request):
        repo, oid = find(f"{user}/{name}", revision)
        if repo.private and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return error(401, "RepoNotFound", "Repository not found")
        if (blob := repo.commits[oid].get(path)) is None:
            return error(404, "EntryNotFound", f"Entry not found: {path}")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob}"'}
        if path.endswith(".safetensors"):
            headers["X-Linked-Etag"] = f'"{blob}"'
        return FileResponse(hub.blobs / blob, headers=headers)

    return app


def _as_of_models(path: str) -> str:
    """Repositories of datasets are kept beside the models', by names that begin with "datasets:"."""
    path = path.replace("/api/datasets/", "/api/models/datasets:", 1)
    return "/datasets:" + path.removeprefix("/datasets/") if path.startswith("/datasets/") else path


async def _cut_off():
    yield b"{"
    raise ConnectionError("cut off")


@contextmanager
def serve(folder: Path) -> Iterator[HubServer]:
    """A Hub on a free port, in a thread."""
    hub = HubServer(folder)
    server = uvicorn.Server(uvicorn.Config(make_app(hub), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
