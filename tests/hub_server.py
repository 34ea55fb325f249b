# SPDX-License-Identifier: Apache-2.0
"""A Hub on localhost over bare git repositories, with the part of the protocol that publishing and loading need.

The token `hf_me` is that of the user `me`, who can write to `me/...` and read private repositories there. Large files
are stored by git LFS.
"""

import base64
import contextlib
import hashlib
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants


LARGE = (".safetensors", ".bin", ".onnx", ".onnx_data")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
WHO = {"GIT_AUTHOR_NAME": "hub", "GIT_AUTHOR_EMAIL": "hub@localhost"}
WHO |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in WHO.items()}


class Problem(Exception):
    """An error response: status, code and message."""

    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.code = status, code


class Repository:
    """A bare git repository; its large files are in a folder beside it."""

    def __init__(self, folder, private):
        self.folder, self.private = Path(folder), private
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.folder), inside=False)
        content = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE).encode()
        self.commit("main", {".gitattributes": content}, [], "initial commit", parent=None)

    def git(self, *arguments, data=None, inside=True, **environment):
        where = ["-C", str(self.folder)] if inside else []
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "GIT_CONFIG_NOSYSTEM": "1", **WHO, **environment}
        command = ["git", *where, *arguments]
        return subprocess.run(command, input=data, env=environment, capture_output=True, check=True).stdout

    def resolve(self, revision):
        for name in (f"refs/heads/{revision}", revision):
            with contextlib.suppress(subprocess.CalledProcessError):
                return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()
        raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def tree(self, revision):
        """Return path, blob id and size of every file, and for large files the content of the pointer."""
        entries = {}
        for line in self.git("ls-tree", "-r", "-l", "-z", self.resolve(revision)).decode().split("\0")[:-1]:
            (_, _, oid, size), path = line.split("\t")[0].split(), line.split("\t")[1]
            entry = {"type": "file", "path": path, "oid": oid, "size": int(size)}
            if path.endswith(LARGE):
                lines = dict(row.split(" ", 1) for row in self.git("cat-file", "blob", oid).decode().splitlines())
                large = {"oid": lines["oid"].removeprefix("sha256:"), "size": int(lines["size"])}
                entry |= {"size": large["size"], "lfs": {**large, "pointerSize": int(size)}}
            entries[path] = entry
        return entries

    def commit(self, branch, added, removed, message, parent):
        environment = {"GIT_INDEX_FILE": str(self.folder / "index.tmp")}
        self.git("read-tree", *([parent] if parent else ["--empty"]), **environment)
        for path in removed:
            # Mode 0 removes a file; `--force-remove` would need a work tree.
            self.git("update-index", "--index-info", data=f"0 {'0' * 40}\t{path}\n".encode(), **environment)
        for path, content in added.items():
            oid = self.git("hash-object", "-w", "--stdin", data=content).decode().strip()
            self.git("update-index", "--add", "--cacheinfo", f"100644,{oid},{path}", **environment)
        tree = self.git("write-tree", **environment).decode().strip()
        parents = ["-p", parent] if parent else []
        commit = self.git("commit-tree", tree, *parents, "-m", message).decode().strip()
        self.git("update-ref", branch if branch.startswith("refs/") else f"refs/heads/{branch}", commit)
        return commit


class Hub:
    """A server on a free port; a context manager whose `endpoint` is the value of `HF_ENDPOINT`.

    Access to the names in `gated` is refused. With `interrupted_after`, uploads of large files fail after so many have
    arrived.
    """

    def __init__(self, folder):
        self.folder, self.repositories, self.requests, self.gated = Path(folder), {}, [], set()
        self.interrupted_after, self.lock = None, threading.Lock()
        (self.folder / "lfs").mkdir(parents=True)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def stored(self, oid):
        return self.folder / "lfs" / oid

    def num_commits(self, name, revision="main"):
        repository = self.repositories[name]
        return int(repository.git("rev-list", "--count", repository.resolve(revision)))

    def sent(self, method, part):
        """Count the requests with a method and a part of the path."""
        return sum(method == sent and part in path for sent, path in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Answer requests by the parts of their path; `self.hub` is set by the server."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, url.path))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            self.route(parts)
        except Problem as problem:
            headers = {"X-Error-Code": problem.code, "X-Error-Message": str(problem)}
            self.send(json.dumps({"error": str(problem)}).encode(), problem.status, headers)

    def send(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content, status=200):
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    @property
    def user(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer hf_")

    def repository(self, name, writes=False):
        if name in self.hub.gated:
            raise Problem(403, "GatedRepo", f"Access to {name} is restricted. Visit /{name} to ask for access.")
        repository = self.hub.repositories.get(name)
        owns = self.user == name.partition("/")[0]
        if repository is None or (repository.private and not owns):
            status = 404 if self.user else 401
            raise Problem(status, "RepoNotFound", "Repository not found")
        if writes and not owns:
            raise Problem(403, "Forbidden", f"{self.user or 'Nobody'} may not write to {name}")
        return repository

    def route(self, parts):
        match parts:
            case ["api", "whoami-v2"]:
                self.send_json({"type": "user", "name": self.user, "orgs": []})
            case ["api", "validate-yaml"]:
                self.validate(json.loads(self.body)["content"])
            case ["api", "repos", "create"]:
                self.create(json.loads(self.body))
            case ["api", "datasets", owner, name, *_]:
                self.repository(f"{owner}/{name}")
            case ["api", "models", owner, name, *rest]:
                self.model(f"{owner}/{name}", rest)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.lfs_batch(self.repository(f"{owner}/{name[:-4]}", writes=True), json.loads(self.body))
            case ["lfs", oid]:
                self.lfs_put(oid)
            case [owner, name, "resolve", revision, *path]:
                self.file(self.repository(f"{owner}/{name}"), revision, "/".join(path))
            case _:
                raise Problem(404, "EntryNotFound", f"Nothing at {self.path}")

    def model(self, name, rest):
        match rest:
            case [] | ["revision", _]:
                self.send_json(self.info(name, rest[1] if rest else "main"))
            case ["refs"]:
                lines = self.repository(name).git("for-each-ref", "--format=%(refname) %(objectname)").decode()
                refs = [dict(zip(("ref", "targetCommit"), line.split(), strict=True)) for line in lines.splitlines()]
                branches = [{"name": ref["ref"].removeprefix("refs/heads/"), **ref} for ref in refs]
                self.send_json({"branches": branches, "tags": [], "converts": []})
            case ["tree", revision, *path]:
                tree = self.repository(name).tree(revision)
                below = "".join(f"{part}/" for part in path)
                found = [entry for place, entry in tree.items() if place.startswith(below)]
                if path and not found:
                    raise Problem(404, "EntryNotFound", f"{below} does not exist")
                self.send_json(found)
            case ["preupload", revision]:
                self.preupload(self.repository(name, writes=True), revision)
            case ["branch", branch]:
                repository = self.repository(name, writes=True)
                with contextlib.suppress(Problem):
                    repository.resolve(branch)
                    return self.send_json({"error": "Reference already exists"}, 409)
                repository.git("update-ref", f"refs/heads/{branch}", repository.resolve("main"))
                self.send_json({})
            case ["commit", revision]:
                self.commit(self.repository(name, writes=True), name, revision)
            case _:
                raise Problem(404, "EntryNotFound", f"Nothing at {self.path}")

    def info(self, name, revision):
        repository = self.repository(name)
        files = [{"rfilename": path} for path in repository.tree(revision)]
        sha = repository.resolve(revision)
        return {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": [], "siblings": files}

    def validate(self, content):
        try:
            _, block, _ = content.split("---\n", 2)
            data = yaml.safe_load(block)
            assert isinstance(data, dict) and data.get("license")
        except (ValueError, AssertionError, yaml.YAMLError) as error:
            return self.send_json({"errors": [{"message": repr(error)}], "warnings": []}, 400)
        self.send_json({"errors": [], "warnings": []})

    def create(self, payload):
        name = f"{payload['organization'] or self.user}/{payload['name']}"
        if not self.user or self.user != name.partition("/")[0]:
            raise Problem(403 if self.user else 401, "Forbidden", f"You may not create {name}")
        if name in self.hub.repositories:
            return self.send_json({"error": "You already created this model repo", "url": name}, 409)
        folder = self.hub.folder / f"{name}.git"
        folder.parent.mkdir(exist_ok=True)
        is_private = payload.get("visibility") == "private" or payload.get("private") is True
        self.hub.repositories[name] = Repository(folder, is_private)
        self.send_json({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def preupload(self, repository, revision):
        tree, answers = repository.tree(revision), []
        for file in json.loads(self.body)["files"]:
            is_large, known = file["path"].endswith(LARGE), tree.get(file["path"])
            oid = known and (known["lfs"]["oid"] if is_large else known["oid"])
            mode = "lfs" if is_large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answers})

    def lfs_batch(self, repository, payload):
        objects = []
        for wanted in payload["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.stored(wanted["oid"]).is_file():
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Problem(400, "BadRequest", "The content is not what was announced")
        with self.hub.lock:
            allowed = self.hub.interrupted_after
            if allowed is not None and len(list((self.hub.folder / "lfs").iterdir())) >= allowed:
                raise Problem(403, "Interrupted", "the line went dead")
            self.hub.stored(oid).write_bytes(self.body)
        self.send(b"")

    def commit(self, repository, name, revision):
        added, removed, header = {}, [], {}
        for line in self.body.decode().splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                header = value
            elif key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if not self.hub.stored(value["oid"]).is_file():
                    raise Problem(400, "BadRequest", f"{value['path']} was not uploaded")
                added[value["path"]] = POINTER.format(**value).encode()
            elif key == "deletedFile":
                removed.append(value["path"])
        number = len(repository.git("for-each-ref", "refs/pr").splitlines()) + 1
        branch = f"refs/pr/{number}" if self.query.get("create_pr") else revision
        oid = repository.commit(branch, added, removed, header["summary"], repository.resolve(revision))
        address = f"{self.hub.endpoint}/{name}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{address}/commit/{oid}"}
        self.send_json(answer | {"pullRequestUrl": f"{address}/discussions/{number}"})

    def file(self, repository, revision, path):
        entry = repository.tree(revision).get(path)
        if entry is None:
            raise Problem(404, "EntryNotFound", f"{path} does not exist")
        headers = {
            "X-Repo-Commit": repository.resolve(revision),
            "ETag": f'"{entry["oid"]}"',
            "Accept-Ranges": "bytes",
        }
        if "lfs" in entry:
            content = self.hub.stored(entry["lfs"]["oid"]).read_bytes()
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": len(content)}
        else:
            content = repository.git("cat-file", "blob", entry["oid"])
        self.send(content, 200, headers)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on localhost for this process; the user is `me`."""
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # transformers keeps one client, with the endpoint that it was built with.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield hub
