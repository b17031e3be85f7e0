"""The package's version, held only here.

`setup.py` and `CMakeLists.txt` read this file as text, so the assignment keeps its form.
"""

__version__ = "0.1.0"
