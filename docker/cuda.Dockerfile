# The CUDA stack of the extra `cuda` of pyproject.toml, from the root of the repository:
#
#   docker build -f docker/cuda.Dockerfile -t mcore-rl:cuda .
#   docker run --rm --gpus all --shm-size=64g mcore-rl:cuda
#
# There is no lock for CUDA yet: pip takes the newest versions that the extra allows. This image has
# not been built, and the CUDA branches have not been run: docs/gpu.md.
ARG BASE=nvidia/cuda:12.9.1-cudnn-devel-ubuntu24.04
FROM ${BASE}

# A compiler for Transformer Engine, pkill for examples/launch/run.sh, libnuma for vLLM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git libnuma1 procps python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/mcore_rl
COPY pyproject.toml README.md LICENSE ./
COPY mcore_rl mcore_rl
# torch comes with vLLM and first: Transformer Engine is compiled against it.
RUN pip install --no-cache-dir "setuptools>=77" wheel "vllm>=0.25" \
    && pip install --no-cache-dir --no-build-isolation -e ".[cuda,ray]"
COPY examples examples
COPY tools tools

RUN useradd --create-home trainer && mkdir outputs && chown trainer outputs
USER trainer
ENV HF_HUB_OFFLINE=1
CMD ["python", "tools/gpu_check.py"]
