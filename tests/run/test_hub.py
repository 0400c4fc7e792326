"""--push_to_hub against a server on this machine that answers as the Hub does."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from posttrain.errors import PosttrainError
from posttrain.run.hub import check_push, push_model
config = SimpleNamespace(hub_model_id=sys.argv[2] or None, hub_private_repo=True,
                         output_dir="runs/dpo")
try:
    check_push(config)
    push_model(Path(sys.argv[1]), config)
except PosttrainError as error:
    sys.exit(f"error: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """Knows one user, and keeps what is sent to it."""

    def log_message(self, *_):
        """Say nothing."""

    def answer(self, body, status=200):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        token = {"accessToken": {"role": self.server.role}}
        orgs = [{"name": "team"}]
        return self.answer({"name": "ann", "type": "user", "orgs": orgs, "auth": token})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.path)
        url = f"http://127.0.0.1:{self.server.server_port}"
        if self.path.endswith("/repos/create"):
            self.server.repo = json.loads(body)
            name = f"ann/{self.server.repo['name']}"
            return self.answer({"url": f"{url}/{name}", "name": name, "id": name})
        if "/preupload/" in self.path:
            if self.server.refuses:
                return self.answer({"error": "Storage is full"}, 403)
            files = json.loads(body)["files"]
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": file["path"], **kept} for file in files]})
        if "/commit/" in self.path:
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    content = base64.b64decode(record["value"]["content"])
                    self.server.files[record["value"]["path"]] = content
            answer = {"commitUrl": f"{url}/ann/dpo/commit/1", "commitOid": "1" * 40}
            return self.answer({**answer, "pullRequestUrl": None, "hookOutput": ""})
        return self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.repo, server.asked, server.refuses = {}, None, [], False
    server.role = "write"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "README.md").write_text("---\ntags:\n- posttrain\n---\n\n# dpo\n")
    return folder


def pushed(hub, model, *, token="hf_right", name="", **settings):
    home = model.parent / "home"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        **({"HF_TOKEN": token} if token else {}),
        **settings,
    }
    command = [sys.executable, "-c", SCRIPT, str(model), name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_arrives_whole_under_its_name(hub, model):
    done = pushed(hub, model)
    assert done.returncode == 0, done.stderr
    assert (hub.repo["name"], hub.repo["organization"]) == ("dpo", "ann")
    assert hub.repo["visibility"] == "private"
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert f"http://127.0.0.1:{hub.server_port}/ann/dpo" in done.stdout


def test_what_the_hub_refuses_stays_on_disk_and_the_error_says_how_to_send_it(hub, model):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.refuses = True
    done = pushed(hub, model)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"the model is saved in {model}" in line
    assert f"hf upload ann/dpo {model}" in line
    assert not hub.files
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_token_that_reads_alone_is_refused_before_anything_is_made(hub, model):
    hub.role = "read"
    done = pushed(hub, model)
    assert done.returncode == 1
    assert "expected a token that may write" in done.stderr.splitlines()[-1]
    assert hub.repo is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token": ""}, "expected a token of the Hugging Face Hub, found none"),
        ({"token": "hf_wrong"}, "does not take the token"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"name": "a/b/c"}, "--hub_model_id"),
        ({"name": "bob/dpo"}, "--hub_model_id: expected ann or team before /, found bob"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(changed, words, hub, model):
    done = pushed(hub, model, **changed)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert hub.repo is None
