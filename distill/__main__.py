"""The command line of `distill`, as `python -m distill`, which `torchrun -m distill` starts on several processes."""

from distill.cli.main import main

if __name__ == "__main__":
    main()
