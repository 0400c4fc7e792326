"""`vllm serve` with the endpoints that TRL's VLLMClient uses, as a thread: `FakeServer(model)`."""

import json
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from safetensors.torch import load_file
from vllm import SamplingParams, Worker
from vllm.distributed.weight_transfer.nccl_common import WIRE

KNOWN = {field.name for field in fields(SamplingParams)}


def send_from_any_device(set_attribute=setattr) -> None:
    """Make TRL's client transfer weights from any device, as the fake can, not from CUDA alone."""
    from trl.generation.vllm_client import VLLMClient

    start = VLLMClient.init_communicator
    set_attribute(VLLMClient, "init_communicator", lambda self, **_: start(self, "cuda"))


class FakeServer:
    """logprobs_mode, has_weight_transfer: as the flags of `vllm serve` would have set them."""

    def __init__(
        self, model: str, *, logprobs_mode="processed_logprobs", has_weight_transfer=True
    ) -> None:
        self.worker, self.lock, self.max_model_len = Worker(model), Lock(), 10_000
        self.config = {
            "model_config": {"logprobs_mode": logprobs_mode},
            "weight_transfer_config": {"backend": "nccl"} if has_weight_transfer else None,
        }
        handler = type("Handler", (_Handler,), {"server_of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.base_url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reply(self, path: str, body: dict) -> dict:
        if path == "/v1/completions":
            return {"choices": self._complete(body)}
        if path == "/collective_rpc":
            assert body["method"] == "reload_from"
            weights = load_file(Path(body["kwargs"]["folder"]) / "model.safetensors")
            self.worker.load_weights(list(weights.items()))
        if path == "/update_weights":
            info = body["update_info"]
            for name, shape in zip(info["names"], info["shapes"], strict=True):
                weight = WIRE.get(timeout=10)
                assert list(weight.shape) == shape
                self.worker.load_weights([(name, weight)])
        return {
            "/v1/models": {"data": [{"id": "policy"}]},
            "/server_info": {"vllm_config": self.config},
            "/get_world_size": {"world_size": 1},
        }.get(path, {"success": True})

    def _complete(self, body: dict) -> list[dict]:
        params = SamplingParams(**{name: body[name] for name in KNOWN & set(body)})
        choices = []
        for prompt in body["prompt"]:
            if len(prompt) + params.max_tokens > self.max_model_len:
                raise ValueError(f"This model's maximum context length is {self.max_model_len}")
            with self.lock:
                output = self.worker.sample(prompt, params)
            for completion in output.outputs:
                values = [next(iter(found.values())).logprob for found in completion.logprobs]
                names = [f"token_id:{token}" for token in completion.token_ids]
                choices.append(
                    {
                        "prompt_token_ids": prompt,
                        "token_ids": list(completion.token_ids),
                        "logprobs": {
                            "tokens": names,
                            "token_logprobs": values,
                            "top_logprobs": [{n: v} for n, v in zip(names, values, strict=True)],
                        },
                    }
                )
        return choices


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FakeServer

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._answer(json.loads(self.rfile.read(length) or b"{}"))

    def _answer(self, body: dict) -> None:
        status, reply = 200, {}
        try:
            reply = self.server_of.reply(self.path.partition("?")[0], body)
        except ValueError as error:
            status, reply = 400, {"error": str(error)}
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Not on the screen."""
