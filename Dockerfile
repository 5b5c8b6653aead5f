# hf_sft with its tested requirements, for one machine or for a cluster that runs containers.
#
#   docker build -t hf-sft .
#   docker build -t hf-sft:cpu --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=URL .    URL: PyTorch's index of CPU wheels
#
#   docker run --rm hf-sft                                                                     help
#   docker run --rm --gpus all --ipc=host -v hf-sft-cache:/cache -v "$PWD/output:/app/output" \
#       hf-sft train --train_args_file train_args/qwen3-8b-sft-qlora.json
#   docker run --rm --gpus all --ipc=host -v hf-sft-cache:/cache -v "$PWD/output:/app/output" --entrypoint torchrun \
#       hf-sft --nproc_per_node 8 train.py --train_args_file train_args/llama3.1-8b-sft-fsdp.json
#
# Data of your own: -v "$PWD/data:/data:ro" and --train_file /data/chats.jsonl. Where output belongs to another user than 10001, add
# --user "$(id -u):$(id -g)". Models that ask for a licence: -e HF_TOKEN. NCCL needs --ipc=host, or --shm-size.
#
# torch brings CUDA's libraries, so the base needs no more than the runtime. ZeRO's offloading to NVMe compiles an operator with nvcc:
# take the -devel- image of the same version for it, and add libaio-dev.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE}

ARG TORCH_INDEX=""
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH

# A compiler and Python's headers: Triton (attention_backend flex) and DeepSpeed on CPUs build small libraries when they start.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

WORKDIR /app
# torch by itself: the largest layer stays when the project changes.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY setup.py pyproject.toml README.md LICENSE MANIFEST.in train.py ./
COPY hf_sft hf_sft
RUN pip install -c constraints.txt -e ".[quant,deepspeed,logging]"
COPY train_args train_args
COPY examples examples

# Everything that a run writes goes to the two volumes, whoever it runs as.
RUN useradd --uid 10001 --create-home trainer \
    && install -d -m 1777 /cache /cache/home /app/output
ENV HOME=/cache/home \
    HF_HOME=/cache/huggingface \
    HF_SFT_CACHE=/cache/hf_sft
VOLUME ["/cache", "/app/output"]
USER 10001

ENTRYPOINT ["hf-sft"]
CMD ["--help"]
