"""The `inferix` command: one small file per verb, gathered in `main.py`.

Modules here import torch and the engine inside functions, so that `--help` answers at once.
"""
