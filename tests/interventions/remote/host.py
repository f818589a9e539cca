"""A host of remote traces, as NDIF is one, in a process of its own without our packages: `python host.py PORT`.

It speaks what nnsight's client speaks: POST /request, GET /response/ID, and the status of a job over a websocket at
/subscribe. One job at a time. Not a part of the tests' package: it is run by its path, with our packages barred.
"""

import base64
import hashlib
import importlib.abc
import io
import json
import struct
import sys
import threading
import traceback
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BARRED = ("interventions", "distill", "jaxtyping", "beartype", "tests")
lock, sockets, answers = threading.Lock(), {}, {}


class Bar(importlib.abc.MetaPathFinder):
    """What is not installed here."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BARRED:
            raise ModuleNotFoundError(f"No module named {name!r} (on this host)")
        return None


class Host(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/health":
            self._reply(200, json.dumps({"left": left_behind()}))
        elif self.path == "/subscribe":
            self._upgrade()
        else:
            answer = answers.get(self.path.rpartition("/")[2])
            self._reply(*((200, answer) if answer else (404, "")))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.headers["Content-Type"].encode()
        parts = BytesParser().parsebytes(b"Content-Type: " + kind + b"\r\n\r\n" + body).get_payload()
        fields = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}
        request = json.loads(fields["data"])
        self._reply(200, json.dumps({"id": "1", "status": "RECEIVED"}))
        socket = sockets.get(request["session_id"])
        with lock:
            answer = answered(fields["blob"], request["compress"])
        if socket is not None:
            socket.sendall(frame(answer))

    def _reply(self, code, text):
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _upgrade(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        name = str(len(sockets))
        sockets[name] = self.connection
        self.connection.sendall(frame(json.dumps({"session_id": name}).encode(), text=True))
        while (received := self.connection.recv(4096)) and received[0] & 0x0F != 8:
            pass
        self.connection.sendall(b"\x88\x00")  # without it the client waits for three seconds
        self.close_connection = True


def frame(data, text=False):
    length = len(data)
    size = (
        bytes([length]) if length < 126
        else b"\x7e" + struct.pack(">H", length) if length < 65536
        else b"\x7f" + struct.pack(">Q", length)
    )  # fmt: skip
    return bytes([0x81 if text else 0x82]) + size + data


def answered(blob, compress):
    """What a job gave, or why it failed, as the last message of its socket."""
    import torch
    import zstandard
    from nnsight.schema.request import RequestModel
    from nnsight.schema.response import ResponseModel, Status
    from nnsight.tracing.tracer import _saves, dec, inc

    try:
        tracer = RequestModel.deserialize(blob, MODEL._remoteable_persistent_objects(), compress=compress)
        inc()
        try:
            tracer.execute(tracer.info.code)
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        data = zstandard.ZstdCompressor().compress(buffer.getvalue()) if compress else buffer.getvalue()
        return ResponseModel(id="1", status=Status.COMPLETED, data=data).pickle()
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        return ResponseModel(id="1", status=Status.ERROR, description=text).pickle()


def left_behind():
    """What jobs left on this host: modules of ours, edits, hooks, opened forwards."""
    modules = [name for name in sys.modules if name.split(".")[0] in BARRED]
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in MODEL._module.modules())
    opened = [name for name, each in MODEL._module.named_modules() if vars(each)["__nnsight__"].sourced]
    return {"modules": modules, "edits": len(MODEL._edits), "hooks": hooks, "opened": opened}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.meta_path.insert(0, Bar())
    import tiny

    MODEL = tiny.traced()
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Host)
    print(server.server_address[1], flush=True)
    server.serve_forever()
