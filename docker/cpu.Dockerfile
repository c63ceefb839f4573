# The CPU stack of requirements/cpu.lock, from the root of the repository:
#
#   docker build -f docker/cpu.Dockerfile -t mcore-rl:cpu .
#   docker run --rm --shm-size=2g mcore-rl:cpu examples/quickstart/run.sh
#
# Where pip finds a CUDA build of torch first: --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheels>.
# Its install lines have been run in a venv; the image has not been built.
FROM python:3.11-slim-bookworm

# A compiler for torch, pkill for examples/launch/run.sh, libnuma for vLLM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 procps \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mcore_rl
ARG PIP_EXTRA_INDEX_URL=
COPY requirements/cpu.lock requirements/cpu.lock
RUN pip install --no-cache-dir --no-deps -r requirements/cpu.lock

COPY pyproject.toml README.md LICENSE ./
COPY mcore_rl mcore_rl
COPY examples examples
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

RUN useradd --create-home trainer && mkdir outputs && chown trainer outputs
USER trainer
ENV HF_HUB_OFFLINE=1
CMD ["mcore-rl", "doctor"]
