"""The command `python -m interventions MODEL`: print what can be addressed in a model, without loading its weights."""

import argparse
import sys
from pathlib import Path
from typing import Any

from interventions.errors import InterventionError
from interventions.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Print what can be addressed in a model, and return the exit status: 0, or 2 if the model cannot be built.

    Args:
        arguments: of the command line; None takes those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m interventions", description="What can be addressed in a model.")
    parser.add_argument(
        "model", help="a folder or config.json, a name on the hub, or a model type of transformers such as bert"
    )
    parser.add_argument("--paths", action="store_true", help="also list the modules")
    number = f"interventions {__version__}"
    parser.add_argument("--version", action="version", version=number, help="show the version and exit")
    options = parser.parse_args(arguments)
    from interventions.describe import describe  # after the arguments are read: torch takes a second

    try:
        print(describe(_model(options.model), paths=options.paths))
    except InterventionError as error:
        print(" ".join(f"interventions: {error}".split()), file=sys.stderr)
        return 2
    return 0


def _model(name: str) -> Any:
    """Build the model of a configuration on the meta device: its modules without memory for their weights."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    transformers.logging.set_verbosity_error()
    try:
        local = Path(name).exists()
        known = name in CONFIG_MAPPING_NAMES and not local
        config = AutoConfig.for_model(name) if known else AutoConfig.from_pretrained(name, trust_remote_code=False)
        classes = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
        with torch.device("meta"):
            return classes[0]._from_config(config) if classes and classes[0] else AutoModel.from_config(config)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InterventionError(
            f"{name!r} cannot be built: {reason}; give a folder with a config.json, or a model type, e.g. "
            "python -m interventions bert"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
