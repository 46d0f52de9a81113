"""Packaging of evaclip; the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="evaclip",
    version="0.1.0",
    description="Distributed training of CLIP encoders that start from masked-image-modelling (EVA) weights",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["evaclip", "evaclip.*"]),
    package_data={"evaclip.data": ["bpe_simple_vocab_16e6.txt.gz"], "evaclip": ["py.typed"]},
    install_requires=[
        "torch>=2.9",
        "deepspeed>=0.19",
        "timm>=1.0.20",
        "webdataset>=1.0.2",
        "fsspec>=2024.5",
        "wandb>=0.31",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "simplejpeg>=1.8",
        "pillow>=11.0",
        "numpy>=1.26",
        "tqdm>=4.66",
        "safetensors>=0.5",
        "xxhash>=3.4",
        "ftfy>=6.2",
        "regex>=2024.5.15",
        "jaxtyping>=0.2.34",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "remote": ["fsspec[http,s3,gs]>=2024.5"],
        "eval": ["scikit-learn>=1.4"],
        "demo": ["scikit-learn>=1.4", "matplotlib>=3.8"],
        "dev": [
            "fsspec[http]>=2024.5",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "open_clip_torch>=3.2",
            "transformers>=4.50",
            "scikit-learn>=1.4",
            "matplotlib>=3.8",
            "psutil>=5.9",
            "ruff==0.17.5",
            "pyright==1.1.414",
            "beartype>=0.20",
        ],
    },
    entry_points={"console_scripts": ["evaclip=evaclip.cli:main"]},
)
