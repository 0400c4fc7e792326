#!/bin/bash
# huggingface_hub's InferenceClient at an OpenAI-compatible address: a response_format of type
# json_schema leaves as json_object, so a server that knows OpenAI's form enforces no schema.
#
# Versions: huggingface_hub 2.4.0.
# Guess: with base_url the client speaks OpenAI's protocol, and sends response_format as it was given.
# Behaviour: it writes {"type": "json_object", "value": SCHEMA}, the form of Text Generation
#   Inference, whatever the server is. In OpenAI's protocol json_object means some JSON, and `value`
#   means nothing: vLLM 0.30 answers with JSON of any shape, without an error or a warning. A schema
#   arrives only by a field of the server's own, such as vLLM's structured_outputs in extra_body.
# Output seen:
#   sent: json_schema, with the keys json_schema, type
#   arrived: json_object, with the keys type, value
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
cat > "$folder/ask.py" << 'PYTHON'
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from huggingface_hub import InferenceClient

SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}
ASKED = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
received = []


class Server(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"role": "assistant", "content": "{}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "1", "created": 0, "model": "m", "system_fingerprint": ""}
        body = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = HTTPServer(("127.0.0.1", 0), Server)
Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
client.chat.completions.create(
    model="m", messages=[{"role": "user", "content": "Judge."}], response_format=ASKED
)
arrived = received[-1]["response_format"]
for word, form in (("sent", ASKED), ("arrived", arrived)):
    print(f"{word}: {form['type']}, with the keys {', '.join(sorted(form))}")
assert arrived == {"type": "json_object", "value": SCHEMA}, arrived
PYTHON
env -u HF_HUB_OFFLINE "$folder/venv/bin/python" "$folder/ask.py"
