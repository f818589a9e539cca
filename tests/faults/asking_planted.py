"""Asks a host that was broken into: `python -m tests.faults.asking_planted` prints what each answer did here."""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from interventions import InterventionError, run
from tests.interventions.remote import asking, tiny

HOST = Path(__file__).parent / "planted_host.py"
KINDS = [
    *(f"zip:{name}" for name in ("system", "exec", "import", "nested")),
    *("legacy:system", "frame:system", "frame:exec", "raw:system", "url:system", "status:", "other:"),
]


def outcome(function, marker: Path) -> tuple[str, bool]:
    """What was said, and whether what was planted ran."""
    try:
        function()
        said = "nothing"
    except InterventionError as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    ran = marker.exists()
    marker.unlink(missing_ok=True)
    return said, ran


def main() -> None:
    warnings.simplefilter("ignore")
    from nnsight.schema.config import CONFIG

    from interventions.tracing import backend

    CONFIG.APP.REMOTE_LOGGING = False
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "ran"
        command = [sys.executable, str(HOST), "0", str(marker), *KINDS, "zip:system", "zip:system", "frame:system"]
        host = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert host.stdout is not None
            url = f"http://127.0.0.1:{host.stdout.readline().strip()}"
            model, inputs = tiny.traced(), asking.drawn(0)
            found = {kind: outcome(lambda: run(model, inputs, remote=url), marker) for kind in KINDS}

            def own(**where) -> None:
                with model.trace(**inputs, **where):
                    model.output.logits.save()

            found["own trace, backend="] = outcome(lambda: own(backend=backend(model, url)), marker)
            found["own trace, result"] = outcome(lambda: own(remote=url), marker)
            found["own trace, message"] = outcome(lambda: own(remote=url), marker)
        finally:
            host.kill()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
