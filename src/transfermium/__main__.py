"""`python -m transfermium`: the command line, as torchrun wants it."""

from .cli import main

if __name__ == "__main__":
    main()
