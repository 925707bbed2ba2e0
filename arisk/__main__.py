"""`python -m arisk` is the `arisk` command."""

from arisk.cli import main

if __name__ == "__main__":
    main()
