"""Several nodes under Ray Train, with a worker for each of 16 GPUs.

    python docs/launch/ray_train.py 16 fit --data reviews.csv --teacher teacher --output runs/reviews --resume auto

Ray starts one worker a GPU, joins them into one group of processes, and starts the same command in each,
in the folder where this file is started, which all nodes must see.
"""

import os
import sys

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer


def command(config: dict) -> None:
    """Run a command of `distill` in one worker."""
    from distill.cli.main import main

    os.chdir(config["folder"])  # Ray starts workers in a folder of its own
    sys.argv = ["distill", *config["arguments"]]
    main()


if __name__ == "__main__":
    workers, *arguments = sys.argv[1:]
    scaling = ScalingConfig(num_workers=int(workers), use_gpu=True)
    config = {"arguments": arguments, "folder": os.getcwd()}
    TorchTrainer(command, train_loop_config=config, scaling_config=scaling).fit()
