"""`python -m deploy`, which torchrun can start: `torchrun --nproc-per-node 8 -m -- deploy detect train --run RUN`."""

from deploy.cli import main

if __name__ == "__main__":
    main()
