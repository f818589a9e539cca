"""A server on loopback that answers `/v1/completions` as vLLM does, or by echo, with the logits of a model.

It can refuse, die and come back, and answer wrongly.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Server:
    """A stub of a server of one model.

    Attributes:
        requests: the bodies that it was sent, and the headers of the last.
        spoil: changes an answer, or raises `Refuse`.
        form: "vllm" or "echo".
        most: the most tokens that it names.
    """

    def __init__(self, model: Any, tokenizer: Any, form: str = "vllm", port: int = 0) -> None:
        self.model, self.tokenizer, self.form, self.port = model, tokenizer, form, port
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.spoil: Callable[[Any], Any] = lambda answer: answer
        self.named = True
        self.http: Any = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.headers = dict(self.headers)
                try:
                    answer = server.spoil(server.answer(body, self.path))
                except Refuse as refused:
                    self.send(refused.status, refused.content, refused.headers)
                    return
                if answer is None:  # dies in the middle
                    self.connection.close()
                    return
                self.send(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode(), {})

            def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that is gone is none of the stub's errors."""

        self.http = Quiet(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http = None

    def answer(self, body: dict[str, Any], path: str) -> Any:
        if path != "/v1/completions":
            raise Refuse(404, b'{"error": {"message": "no such path"}}')
        if body["model"] != "the-model":
            raise Refuse(404, b'{"error": {"message": "The model does not exist"}}')
        if self.form == "strict" and "prompt_logprobs" in body:
            raise Refuse(400, b'{"error": {"message": "Unrecognized request argument supplied: prompt_logprobs"}}')
        choices = [self.choice(ids, body, number) for number, ids in enumerate(body["prompt"])]
        return {"id": "x", "choices": choices[::-1]}  # in any order

    def choice(self, ids: list[int], body: dict[str, Any], number: int) -> dict[str, Any]:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found, k = [self.largest(row, body["logprobs"], (*ids, 0)[at + 1]) for at, row in enumerate(logits)], number
        if self.form == "vllm":
            told = [None, *({str(i): {"logprob": v, "rank": r, "decoded_token": self.text(i)}
                             for r, (i, v) in enumerate(each.items(), 1)} for each in found[:-1])]  # fmt: skip
            last = {f"token_id:{i}": value for i, value in found[-1].items()}
            return {"index": k, "text": "", "prompt_logprobs": told, "logprobs": {"top_logprobs": [last]}}
        if not body.get("echo"):
            return {"index": k, "text": "", "logprobs": {"top_logprobs": [{}]}}
        told = [None, *({self.text(i): value for i, value in each.items()} for each in found)]
        return {"index": k, "text": "", "logprobs": {"top_logprobs": told}}

    def largest(self, row: torch.Tensor, k: int, own: int) -> dict[int, float]:
        """The k most probable tokens, and the one of the text, as servers do."""
        top = row.topk(k)
        found = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return {own: float(row[own]), **found}

    def text(self, number: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(number)


class Refuse(Exception):
    def __init__(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.status, self.content, self.headers = status, content, headers or {}


@contextmanager
def serving(*args: Any, **settings: Any) -> Iterator[Server]:
    server = Server(*args, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
