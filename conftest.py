"""Settings of every test process, doctests included: shapes enforced, no network, one thread for each worker."""

import os

from jaxtyping import install_import_hook

# Not by --jaxtyping-packages: naming two packages, that option cannot pass settings to beartype, and without the
# numeric tower `temperature=2` would be refused where `float` is annotated.
install_import_hook(["interventions", "distill"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; torch reads it at import

import torch

torch.set_num_threads(1)
