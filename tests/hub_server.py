"""The Hub's endpoints on loopback, strict about what they accept; the standard library and PyYAML only.

Enough for create_repo, create_commit, model_info, snapshot_download, from_pretrained and `Trainer(push_to_hub=True)`.
Faults can be ordered: a status, or a connection that is cut in the middle of an upload.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_thisIsAFakeTokenOfTheTestsOnly0000"
USER = "tester"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "other", "unknown"}
LFS = (".safetensors", ".png", ".bin", ".pt", ".pth")


@dataclass
class Repo:
    private: bool
    commits: list = field(default_factory=list)  # (oid, {path: blob})
    branches: dict = field(default_factory=dict)

    def head(self, revision="main"):
        if revision in self.branches:
            revision = self.branches[revision]
        return next(((oid, files) for oid, files in self.commits if oid == revision), None)

    def commit(self, files, branch):
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, files))
        self.branches[branch] = oid
        return oid


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """A Hub that forgets everything when it is closed."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.store, self.faults, self.requests = {}, {}, [], []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, method, path, action, times=1):
        """Order a status, "cut", "silent" (accepts, and never answers), or bytes (a page in place of the answer)."""
        self.faults += times * [(method, path, action)]

    def files(self, repo, revision="main"):
        return self.repos[repo].head(revision)[1]

    def uploads(self):
        return Counter(path for method, path in self.requests if method == "PUT")

    def handle_error(self, request, address):
        """A client that went away is no news."""


class Refused(Exception):
    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.headers = status, headers | ({"X-Error-Code": code} if code else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    # ---- plumbing ----

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        self.__dict__.pop("body", None)  # one handler answers all requests of a connection
        try:
            if self.misbehave(path):
                return None
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.server.lock:
                        return getattr(self, name)(**match.groupdict())
            raise Refused(404, f"no such endpoint: {self.command} {path}")
        except Refused as refusal:
            self.reply(refusal.status, {"error": str(refusal)}, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def misbehave(self, path):
        with self.server.lock:
            matching = [one for one in self.server.faults if one[0] == self.command and re.search(one[1], path)]
            if not matching:
                return False
            self.server.faults.remove(matching[0])
        action = matching[0][2]
        if action == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.shutdown(2)
            raise ConnectionAbortedError
        if action == "silent":
            threading.Event().wait(60)
            self.close_connection = True
        elif isinstance(action, bytes):
            self.reply(200, action)
        else:
            raise Refused(action, "as ordered by the test")
        return True

    @cached_property
    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def json(self):
        return json.loads(self.body)

    def reply(self, status, content=b"", **headers):
        _ = self.body  # all of it is read before the answer
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- rights ----

    def token(self):
        given = self.headers.get("Authorization", "")
        if given and given != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid credentials in Authorization header")
        return given.removeprefix("Bearer ") or None

    def writer(self, repo):
        if self.token() is None:
            raise Refused(401, "Invalid username or password.")
        if repo.split("/")[0] != USER:
            raise Refused(403, f"You don't have the rights to write to {repo}")

    def readable(self, repo):
        found = self.server.repos.get(repo)
        if found is None or (found.private and self.token() is None):
            raise Refused(404 if self.token() else 401, "Repository not found", "RepoNotFound")
        return found

    def state(self, repo, revision):
        found = self.readable(repo).head(unquote(revision))
        if found is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return found

    # ---- endpoints ----

    def whoami(self):
        self.token()
        self.reply(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self):
        given = self.json()
        repo = f"{given.get('organization') or USER}/{given['name']}"
        self.writer(repo)
        if repo in self.server.repos:
            return self.reply(409, {"error": "You already created it", "url": f"{self.server.url}/{repo}"})
        private = given.get("private") or given.get("visibility") == "private"
        made = self.server.repos[repo] = Repo(bool(private))
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        self.reply(200, {"url": f"{self.server.url}/{repo}"})

    def create_branch(self, repo, branch):
        self.writer(repo)
        found = self.readable(repo)
        if branch in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        self.reply(200, {})

    def validate_yaml(self):
        given = self.json()
        problems = card_problems(given["content"]) if given["repoType"] == "model" else []
        status = 400 if problems else 200
        self.reply(status, {"errors": [{"message": p} for p in problems], "warnings": []})

    def preupload(self, repo, revision):
        self.writer(repo)
        _, files = self.state(repo, revision)
        answers = []
        for file in self.json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in files:
                # Of an LFS file, git's blob is its pointer; the client compares sha256 for those.
                answer["oid"] = hashlib.sha256(files[path]).hexdigest() if mode == "lfs" else blob_id(files[path])
            answers.append(answer)
        self.reply(200, {"files": answers})

    def lfs_batch(self, repo):
        self.writer(repo)
        objects = []
        for item in self.json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.store:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{repo}/{item['oid']}"}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, repo, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "content is not what its hash says")
        self.server.store[oid] = self.body
        self.reply(200)

    def commit(self, repo, revision):
        self.writer(repo)
        found, branch = self.readable(repo), unquote(revision)
        files = dict(self.state(repo, branch)[1])
        for line in map(json.loads, self.body.splitlines()[1:]):
            key, value, path = line["key"], line["value"], line["value"]["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile":
                files[path] = self.server.store[value["oid"]]
            else:
                assert key == "deletedFile"
                files.pop(path)
        oid = found.commit(files, branch)
        self.reply(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def model_info(self, repo, revision="main"):
        oid, files = self.state(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self.server.repos[repo].private
        plain = {"id": repo, "modelId": repo, "sha": oid, "private": private, "gated": False, "disabled": False}
        self.reply(200, {**plain, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo, revision):
        _, files = self.state(repo, revision)
        entries = []
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if path.endswith(LFS):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.reply(200, entries)

    def resolve(self, repo, revision, path):
        oid, files = self.state(repo, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        content, headers = files[path], {"X-Repo-Commit": oid}
        if path.endswith(LFS):
            etag = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(content)}
        else:
            etag = blob_id(content)
        self.reply(200, content, ETag=f'"{etag}"', **headers)


ROUTES = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/repos/create", "create_repo"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("POST",), rf"/api/models/{REPO}/branch/(?P<branch>.+)", "create_branch"),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), rf"/lfs/{REPO}/(?P<oid>\w+)", "lfs_put"),
    (("GET",), rf"/api/models/{REPO}/revision/(?P<revision>.+)", "model_info"),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    (("GET",), rf"/api/models/{REPO}", "model_info"),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


def card_problems(text):
    """What the Hub objects to in a model card's metadata."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be names and values"]
    tags, bases, results = data.get("tags", []), data.get("base_model", []), []
    for model in data.get("model-index", []):
        results += model["results"] if model.get("name") else [{}]
    datasets = [result.get("dataset", {}) for result in results]
    metrics = [metric for result in results for metric in result.get("metrics", [{}])]
    values = [metric.get("value") for metric in metrics]
    names = [("base_model", name) for name in ([bases] if isinstance(bases, str) else bases)]
    names += [("datasets", name) for name in data.get("datasets", [])]
    holds = {
        f'"license" must be one of {sorted(LICENSES)}': data.get("license", "mit") in LICENSES,
        '"tags" must be a list of texts': isinstance(tags, list) and all(isinstance(tag, str) and tag for tag in tags),
        **{f'"{field}" {name!r} is no id': re.fullmatch(r"[\w.-]+/[\w.-]+", name) for field, name in names},
        '"task.type" is required': all(result.get("task", {}).get("type") for result in results),
        '"dataset.name" is required': all(dataset.get("name") for dataset in datasets),
        '"type" must be an identifier': all(
            re.fullmatch(r"[\w./-]+", str(one.get("type", ""))) for one in (*datasets, *metrics)
        ),
        '"metric.value" must be finite': all(isinstance(one, float | int) and abs(one) < 1e308 for one in values),
    }
    return [problem for problem, kept in holds.items() if not kept]
