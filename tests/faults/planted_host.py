"""A host that was broken into: `python planted_host.py PORT MARKER KIND…` answers each job with the next attack.

Each answer makes the file MARKER where it is unpickled freely. It speaks as `tests/interventions/remote/host.py` does.
"""

import io
import os
import pickle
import sys
import zipfile
from http.server import ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "interventions" / "remote"))
import host
import tiny


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker):
    """What is planted, by name."""
    from transformers.modeling_outputs import BaseModelOutput

    touch = f"touch {marker}"
    return {
        "system": Planted(os.system, touch),
        "exec": Planted(exec, f"open({marker!r}, 'w')"),
        "import": Planted(getattr, Planted(__import__, "subprocess"), "call"),
        "nested": {"answer": {"outputs": [BaseModelOutput(Planted(os.system, touch))]}},
    }


def result(kind, marker):
    """The bytes of a result, in each of the forms that torch.load takes."""
    form, _, name = kind.partition(":")
    return saved({"answer": payloads(marker)[name]}, _use_new_zipfile_serialization=form != "legacy")


def saved(value, **how):
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def answered(kind, marker, port):
    """The last message of a job."""
    import zstandard
    from nnsight.schema.response import ResponseModel, Status

    form, _, name = kind.partition(":")
    compressed = zstandard.ZstdCompressor().compress
    if form in ("zip", "legacy"):
        return ResponseModel(id="1", status=Status.COMPLETED, data=compressed(result(kind, marker))).pickle()
    if form == "url":
        return ResponseModel(id="1", status=Status.COMPLETED, data=f"http://127.0.0.1:{port}/result").model_dump_json()
    if form == "status":
        return '{"id": 1}'
    if form == "other":
        return ResponseModel(id="1", status=Status.COMPLETED, data=compressed(saved({"answer": 3}))).pickle()
    message = {"id": "1", "status": "COMPLETED", "description": payloads(marker)[name]}
    if form == "raw":
        return pickle.dumps(message)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(message, protocol=4))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


if __name__ == "__main__":
    port, marker, *kinds = sys.argv[1:]
    waiting = iter(kinds)

    class Host(host.Host):
        def do_GET(self):
            import zstandard

            if self.path != "/result":
                return super().do_GET()
            data = zstandard.ZstdCompressor().compress(result("zip:system", marker))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Host)
    port = server.server_address[1]
    host.MODEL = tiny.traced()
    host.answered = lambda blob, compress: answered(next(waiting), marker, port)
    whole = host.frame
    host.frame = lambda data, text=False: whole(data.encode(), True) if isinstance(data, str) else whole(data, text)
    print(port, flush=True)
    server.serve_forever()
