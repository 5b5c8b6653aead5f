from pathlib import Path

from setuptools import find_packages, setup

QUANT = ["bitsandbytes>=0.49"]
DEEPSPEED = ["deepspeed>=0.18"]
METRICS = ["sacrebleu[ja]>=2.4", "rouge-score>=0.1.2", "nltk>=3.9", "rapidfuzz>=3.9"]
LOGGING = ["tensorboard>=2.18"]
PLOT = ["matplotlib>=3.9"]
DEV = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.14",
    "mypy>=1.11",
    "trl>=1.14",
]
DEV += LOGGING + PLOT + METRICS + DEEPSPEED  # written to, drawn by, measured with and run by tests

setup(
    name="hf-sft",
    version="0.1.0",
    description="Supervised fine-tuning of causal language models with the Hugging Face Trainer: packed, exact, short.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["hf_sft", "hf_sft.*"]),
    package_data={"hf_sft": ["py.typed", "page_templates/*.jinja"], "hf_sft.data": ["chat_templates/*.jinja"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.20.2,<6",  # 5.20 is the last for Python 3.10
        "accelerate>=1.12",
        "peft>=0.19",
        "datasets>=4.4",
        "safetensors>=0.6",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "jinja2>=3.1",
        "psutil>=6.0",
        "rich>=13",
    ],
    extras_require={
        "quant": QUANT,
        "deepspeed": DEEPSPEED,
        "metrics": METRICS,
        "logging": LOGGING,
        "plot": PLOT,
        "dev": DEV,
        "all": sorted({*QUANT, *DEEPSPEED, *METRICS, *LOGGING, *PLOT}),
    },
    entry_points={"console_scripts": ["hf-sft = hf_sft.cli:script"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
