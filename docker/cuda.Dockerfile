# The CUDA stack of the extra `cuda` of pyproject.toml, from the root of the repository:
#
#   docker build -f docker/cuda.Dockerfile -t mcore-rl:cuda .
#   docker run --rm --gpus all --shm-size=64g mcore-rl:cuda
#
# It installs requirements/cuda.lock as `make install-cuda` does. This image has not been built, and
# the CUDA branches have not been run: docs/gpu.md.
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE}

# A compiler for Transformer Engine, pkill for examples/launch/run.sh, libnuma for vLLM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git libnuma1 procps python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/mcore_rl
COPY requirements/cuda.lock requirements/cuda-compiled.lock requirements/
RUN pip install --no-cache-dir --no-deps -r requirements/cuda.lock
# Compiled against the torch that is there now.
RUN pip install --no-cache-dir --no-deps --no-build-isolation -r requirements/cuda-compiled.lock

COPY pyproject.toml README.md LICENSE ./
COPY mcore_rl mcore_rl
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
COPY examples examples
COPY tools tools

RUN useradd --create-home trainer && mkdir outputs && chown trainer outputs
USER trainer
ENV HF_HUB_OFFLINE=1
CMD ["python", "tools/gpu_check.py"]
