# GPU image: docker build -f docker/cuda.Dockerfile -t inferix:cuda .
# docker run --rm --gpus all -v "$PWD/outputs:/work" inferix:cuda doctor
# Wheels of torch bring the CUDA libraries, so the base needs only the driver's mount; gcc compiles Triton's launchers.
FROM python:3.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN python -m pip install -c /src/constraints/gpu.txt "/src[gpu]" \
    && rm -rf /src \
    && useradd --create-home --uid 1000 inferix \
    && install -d -o inferix /work

USER 1000
WORKDIR /work
ENTRYPOINT ["inferix"]
CMD ["--help"]
