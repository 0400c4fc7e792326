"""A real HTTP server on this machine that speaks the chat-completions protocol, or fails to."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        body = json.loads(self.rfile.read(length))
        asked = {"path": self.path, "headers": dict(self.headers), "body": body}
        server: Any = self.server
        with server.lock:
            server.asked.append(asked)
            reply = server.replies.pop(0) if server.replies else server.default
        reply(self)

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


def text(content: str, finish_reason: str = "stop", usage: Any = None) -> Reply:
    message = {"role": "assistant", "content": content}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}
    if usage is not None:
        body["usage"] = usage
    return json_body(body)


def json_body(body: Any) -> Reply:
    return lambda handler: handler.send(json.dumps(body).encode())


def status(code: int, body: bytes = b"{}", **headers: str) -> Reply:
    return lambda handler: handler.send(body, code, **headers)


def slow(seconds: float) -> Reply:
    def reply(handler: Handler) -> None:
        time.sleep(seconds)
        with suppress(OSError):  # the client has hung up
            text("too late")(handler)

    return reply


def half_a_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def half_a_body_of_unknown_length(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("connection", "close")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


@contextmanager
def serve(*replies: Reply, default: Reply | None = None):
    """The replies in order, then the default. `url`, and `asked`: what came in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.asked = threading.Lock(), []
    server.replies, server.default = list(replies), default or text("fine")
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
