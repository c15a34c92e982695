"""An OpenAI-compatible endpoint on 127.0.0.1 whose replies a function decides."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ScriptedJudge:
    """reply: text of the answer to a request's text; status: of the next answers, then 200; raw: whole body instead."""

    reply: Callable[[str], str]
    url: str = ""
    status: list[int] = field(default_factory=list)
    raw: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        assert path == "/v1/chat/completions"
        self.requests.append(body)
        status = self.status.pop(0) if self.status else 200
        if status != 200:
            return status, "busy"
        content = self.reply(body["messages"][0]["content"])
        message = {"role": "assistant", "content": content}
        return 200, self.raw or json.dumps({"model": "judge-7b-q4", "choices": [{"index": 0, "message": message}]})


@contextmanager
def judging(reply: Callable[[str], str]) -> Iterator[ScriptedJudge]:
    judge = ScriptedJudge(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            judge.keys.append(self.headers["authorization"])
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, text = judge.answer(self.path, body)
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield judge
        finally:
            server.shutdown()
            thread.join()
