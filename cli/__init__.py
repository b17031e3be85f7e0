"""The `inferix` command: one file per subcommand, registered in `main.py`.

Modules here import torch and the engine inside functions, so that `--help` is instant.
"""
