"""Package metadata. The build system and the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("proteus").joinpath("__init__.py").read_text())[1]
XFORMERS = "xformers>=0.0.34; platform_system == 'Linux' and platform_machine == 'x86_64'"
LORA = ["peft>=0.17"]  # adapt.tune=lora, student.tune=lora
EXPORT = ["onnx>=1.19", "onnxscript>=0.7", "onnxruntime>=1.23"]  # tools/export.py onnx

setup(
    name="proteus-distill",
    version=VERSION,
    description="Distil vision foundation models into small ones with unlabelled images alone.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["proteus", "proteus.*"]),
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.31",
        XFORMERS,
        "accelerate>=1.15",
        "datasets>=4.0",
        "pyarrow>=15.0",
        "torchmetrics>=1.4",
        "psutil>=5.9",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "tensorboard>=2.16",
        "safetensors>=0.4.5",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "faiss-cpu>=1.9",
    ],
    extras_require={
        "export": EXPORT,
        "lora": LORA,
        "dev": [*EXPORT, *LORA, "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.8", "mypy>=1.13", "types-PyYAML"],
    },
)
