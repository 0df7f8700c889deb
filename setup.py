"""Install megatron_prism: `pip install -e '.[cpu,dev]'` without a GPU, `PIP_CONSTRAINT= pip install -e .` inside an NGC PyTorch container.

All there is to say stands in pyproject.toml.
"""

from setuptools import setup

setup()
