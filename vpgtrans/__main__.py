"""`python -m vpgtrans`, and `torchrun --nproc-per-node N -m vpgtrans`: the command line."""

from vpgtrans.cli import main

if __name__ == "__main__":
    main()
