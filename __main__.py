"""`python -m inferix` is the `inferix` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
