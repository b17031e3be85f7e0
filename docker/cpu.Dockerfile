# CPU image: docker build -f docker/cpu.Dockerfile -t inferix:cpu .
# docker run --rm -v "$PWD/outputs:/work" inferix:cpu generate -o demo.mp4
FROM python:3.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

COPY . /src
# The checked versions; torch in its small CPU build.
RUN python -m pip install -c /src/constraints/cpu.txt --extra-index-url https://download.pytorch.org/whl/cpu /src \
    && rm -rf /src \
    && useradd --create-home --uid 1000 inferix \
    && install -d -o inferix /work

USER 1000
WORKDIR /work
ENTRYPOINT ["inferix"]
CMD ["--help"]
